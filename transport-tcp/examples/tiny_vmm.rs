//! A virtual machine monitor that moves its guest over TCP, as small as one can be.
//!
//! The guest counts: it writes its counter to one page after the other, for ever. So the counter, a register,
//! says what has to be in each page. The program moves the guest over TCP into a second machine while it
//! writes, and checks every page at both ends. Both machines are in one process here; between two hosts
//! nothing but the address is different. For larger VMMs there is `docs/bring-your-own-machine.md`.

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_regs, kvm_segment, kvm_sregs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use migration::dirty::DirtySet;
use migration::machine::{DestinationHost, DestinationMachine, SourceMachine};
use migration::memory::{PAGE_SIZE, Ram, RamOwner, RegionLayout};
use migration::transport::Token;
use migration::{Code, Failure, destination, source};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use whimbrel_transport_tcp::{Listener, TcpDestination, TcpSource, connect_control};

type Error = Box<dyn std::error::Error + Send + Sync>;

const MEMORY: u64 = 32 << 20;
const CODE: u64 = 0x1000;
const DATA: u64 = 1 << 20;
const PAGES: u64 = 2048;
/// 32-bit code: eax counts, edi is one of the pages from DATA on. After each turn it tells the VMM, by `out`.
const GUEST: [u8; 26] = [
    0xbf, 0, 0, 0x10, 0, 0x40, 0x89, 0x07, // turn: mov edi, DATA; next: inc eax; mov [edi], eax
    0x81, 0xc7, 0, 0x10, 0, 0, // add edi, PAGE_SIZE
    0x81, 0xff, 0, 0, 0x90, 0, 0x72, 0xef, // cmp edi, DATA + PAGES * PAGE_SIZE; jb next
    0xe6, 0x10, 0xeb, 0xe6, // out 0x10, al; jmp turn
];

/// A guest with one vCPU, and the thread that runs it.
pub struct Tiny {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Held while the guest runs, which it does until its next `out`.
    vcpu: Mutex<VcpuFd>,
    vm: VmFd,
    ram: RamOwner,
    runs: AtomicBool,
    ended: AtomicBool,
}

fn failed(error: kvm_ioctls::Error) -> Failure {
    Failure::new(Code::HOST, format_args!("KVM: {error}"))
}

impl Shared {
    fn vcpu(&self) -> MutexGuard<'_, VcpuFd> {
        self.vcpu.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPU's thread.
    fn run(&self) {
        while !self.ended.load(Ordering::Acquire) {
            let mut vcpu = self.vcpu();
            if !self.runs.load(Ordering::Acquire) {
                drop(vcpu);
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            match vcpu.run() {
                Ok(VcpuExit::IoOut(..)) => {}
                Err(error) if error.errno() == libc::EINTR => {}
                _ => self.ended.store(true, Ordering::Release),
            }
        }
    }

    /// Defines guest memory, in slot 0 from address 0 on, with dirty pages logged or not.
    fn map(&self, flags: u32) -> Result<(), Failure> {
        let (memory_size, userspace_addr) = (MEMORY, self.ram.regions()[0].address() as u64);
        let region = kvm_userspace_memory_region { flags, memory_size, userspace_addr, ..Default::default() };
        // SAFETY: the mapping has this length, and lives as long as `ram`, which is dropped after the VM.
        unsafe { self.vm.set_user_memory_region(region) }.map_err(failed)
    }
}

impl Tiny {
    /// A machine that is paused, and whose memory is zero.
    fn build() -> Result<Self, Failure> {
        let vm = Kvm::new().and_then(|kvm| kvm.create_vm()).map_err(failed)?;
        vm.set_tss_address(0xfffb_d000).map_err(failed)?;
        let vcpu = Mutex::new(vm.create_vcpu(0).map_err(failed)?);
        let ram = RamOwner::new(Ram::allocate(&[RegionLayout { guest_address: 0, len: MEMORY }])?);
        let shared = Arc::new(Shared { vcpu, vm, ram, runs: false.into(), ended: false.into() });
        shared.map(0)?;
        let vcpu = Arc::clone(&shared);
        Ok(Tiny { shared, thread: Some(thread::spawn(move || vcpu.run())) })
    }

    /// A machine whose guest begins to count.
    pub fn boot() -> Result<Self, Error> {
        let tiny = Tiny::build()?;
        tiny.shared.ram.write(0, CODE, &GUEST)?;
        let data = kvm_segment { limit: !0, type_: 3, present: 1, s: 1, db: 1, g: 1, ..Default::default() };
        let vcpu = tiny.shared.vcpu();
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs, sregs.ds, sregs.es, sregs.ss) = (kvm_segment { type_: 11, ..data }, data, data, data);
        sregs.cr0 |= 1; // protected mode
        vcpu.set_sregs(&sregs)?;
        vcpu.set_regs(&kvm_regs { rip: CODE, rflags: 2, ..Default::default() })?;
        drop(vcpu);
        tiny.resume()?;
        Ok(tiny)
    }

    /// Checks that each page of a paused guest is what follows from the counter, which it returns.
    fn check(&self) -> Result<u64, Error> {
        let count = self.shared.vcpu().get_regs()?.rax;
        for page in 0..PAGES {
            let mut value = [0; 4];
            self.shared.ram.regions()[0].read(DATA + page * PAGE_SIZE, &mut value)?;
            // It is paused between two turns only.
            if u64::from(u32::from_le_bytes(value)) + PAGES != count + page + 1 {
                return Err(format!("page {page} holds {value:?}, and the guest has counted to {count}"))?;
            }
        }
        Ok(count)
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl SourceMachine for Tiny {
    fn ram(&self) -> Arc<Ram> {
        Arc::clone(&self.shared.ram)
    }

    fn describe(&self) -> Result<Vec<u8>, Failure> {
        Ok(GUEST.into())
    }

    fn start_tracking(&self) -> Result<(), Failure> {
        self.shared.map(KVM_MEM_LOG_DIRTY_PAGES)
    }

    fn stop_tracking(&self) -> Result<(), Failure> {
        self.shared.map(0)
    }

    /// KVM clears its log while it gives it, so there is no `clear_dirty`.
    fn collect_dirty(&self, set: &mut DirtySet) -> Result<(), Failure> {
        let log = self.shared.vm.get_dirty_log(0, MEMORY as usize).map_err(failed)?;
        set.words_mut(0).iter_mut().zip(log).for_each(|(word, log)| *word |= log);
        Ok(())
    }

    fn pause(&self) -> Result<(), Failure> {
        self.shared.runs.store(false, Ordering::Release);
        // The lock comes free at the next `out`, which is then completed without running on.
        let mut vcpu = self.shared.vcpu();
        vcpu.set_kvm_immediate_exit(1);
        let stopped = vcpu.run().map(drop);
        vcpu.set_kvm_immediate_exit(0);
        match stopped {
            Err(e) if e.errno() == libc::EINTR && !self.shared.ended.load(Ordering::Acquire) => Ok(()),
            other => Err(Failure::new(Code::GUEST_ENDED, format_args!("the guest has ended: {other:?}"))),
        }
    }

    fn resume(&self) -> Result<(), Failure> {
        self.shared.runs.store(true, Ordering::Release);
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        let vcpu = self.shared.vcpu();
        let state = (vcpu.get_regs().map_err(failed)?, vcpu.get_sregs().map_err(failed)?);
        postcard::to_stdvec(&state).map_err(|e| Failure::new(Code::STATE, e))
    }
}

/// What takes guests in: machines that are all alike.
pub struct TinyHost;

impl DestinationHost for TinyHost {
    type Machine = Tiny;

    fn build(&mut self, description: &[u8], layout: &[RegionLayout]) -> Result<Tiny, Failure> {
        let tiny = Tiny::build()?;
        if description != GUEST || layout != tiny.shared.ram.layout() {
            return Err(Failure::new(Code::DEVICE, "another machine was asked for than there is here"));
        }
        Ok(tiny)
    }
}

impl DestinationMachine for Tiny {
    fn ram(&self) -> Arc<Ram> {
        Arc::clone(&self.shared.ram)
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        let read = postcard::take_from_bytes::<(kvm_regs, kvm_sregs)>(state);
        let Ok(((regs, sregs), [])) = read else {
            return Err(Failure::new(Code::STATE, "this is not the state of such a machine"));
        };
        let vcpu = self.shared.vcpu();
        vcpu.set_sregs(&sregs).and_then(|()| vcpu.set_regs(&regs)).map_err(failed)
    }

    fn run(&mut self) -> Result<(), Failure> {
        self.resume()
    }
}

/// Takes the guest in, lets it run for a while, and returns how far it has counted then.
fn receive(listener: &Listener) -> Result<u64, Error> {
    let mut link = listener.next_control(Duration::from_secs(60))?.ok_or("nobody has called")?;
    let transport = TcpDestination::new(listener);
    let tiny = destination::Migration::new(&mut TinyHost, &mut link).transport(transport).run()?.conclude();
    thread::sleep(Duration::from_millis(200));
    tiny.pause()?;
    tiny.check()
}

fn main() -> Result<(), Error> {
    let listener = Listener::bind(([127, 0, 0, 1], 0).into())?;
    let to = listener.local_addr();
    thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&listener));
        let tiny = Tiny::boot()?;
        thread::sleep(Duration::from_millis(100));
        let token = Token::random()?;
        let mut link = connect_control(&to.to_string(), token, Duration::from_secs(10))?;
        let report = source::Migration::new(&tiny, &mut link).transport(TcpSource::new(to, 2)).run();
        let (mib, rounds, ms) = (report.memory >> 20, report.rounds.len(), report.blackout_us / 1000);
        report.failure.map_or(Ok(()), Err)?;
        let left = tiny.check()?;
        let now = receiver.join().map_err(|_| "the receiver has panicked")??;
        println!(
            "moved {mib} MiB in {rounds} rounds and {ms} ms of pause; the guest went on from {left} to {now}"
        );
        if left < now { Ok(()) } else { Err("the guest does not go on".into()) }
    })
}
