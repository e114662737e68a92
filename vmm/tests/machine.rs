//! Whole machines with real guests: booting, pausing, ending.

mod common;

use common::guests::{self, AP_LOOPS, BACKWARDS, BAD_READS, LOOPS, TICKS};
use common::{boot, machine, machine_with, peek, wait_above};
use migration::machine::SourceMachine;
use std::time::{Duration, Instant};
use whimbrel_vmm::{Crash, Error, Host, Machine, MachineConfig, Outcome, SerialOutput, memory};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn a_guest_prints_and_powers_off() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("serial");
    let machine = machine_with(16, 1, SerialOutput::File(path.clone()));
    machine.boot(&boot(guests::hello())).unwrap();
    machine.resume().unwrap();
    assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PoweredOff));
    assert_eq!(std::fs::read_to_string(path).unwrap(), "hello\n");
    assert!(matches!(machine.resume(), Err(Error::Ended(Outcome::PoweredOff))));
}

#[test]
fn a_paused_guest_stands_still_and_its_port_reads_stay_whole() {
    let machine = machine(16, 1);
    machine.boot(&boot(guests::ticker())).unwrap();
    machine.resume().unwrap();
    wait_above(&machine, TICKS, 2);
    for _ in 0..300 {
        machine.pause().unwrap();
        let loops = peek(&machine, LOOPS);
        machine.save().unwrap();
        assert_eq!(peek(&machine, LOOPS), loops);
        machine.resume().unwrap();
        std::thread::yield_now();
    }
    let ticks = peek(&machine, TICKS);
    wait_above(&machine, TICKS, ticks + 2);
    assert_eq!((peek(&machine, BAD_READS), peek(&machine, BACKWARDS)), (0, 0));
    machine.stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
    assert!(matches!(machine.resume(), Err(Error::Stopped)));
}

#[test]
fn every_vcpu_runs() {
    let machine = machine(16, 4);
    machine.boot(&boot(guests::smp())).unwrap();
    machine.resume().unwrap();
    wait_above(&machine, LOOPS, 0);
    for vcpu in 1..4 {
        wait_above(&machine, AP_LOOPS + vcpu * 4, 0);
    }
    machine.pause().unwrap();
    assert!(matches!(machine.pause(), Ok(())), "pausing twice changes nothing");
}

#[test]
fn guests_end_in_known_ways_and_can_be_looked_at_afterwards() {
    let crash = Outcome::Crashed(Crash::TripleFault { vcpu: 0 });
    for (guest, outcome) in [(guests::triple_fault(), crash), (guests::reset(), Outcome::Reset)] {
        let machine = machine(16, 2);
        machine.boot(&boot(guest)).unwrap();
        machine.resume().unwrap();
        assert_eq!(machine.wait_timeout(PATIENCE), Some(outcome.clone()));
        machine.pause().unwrap();
        assert!(!machine.save().unwrap().is_empty());
        assert_eq!(machine.outcome(), Some(outcome));
    }
}

#[test]
fn what_kvm_cannot_emulate_ends_the_guest_with_its_place() {
    let machine = machine(16, 1);
    machine.boot(&boot(guests::lost())).unwrap();
    machine.resume().unwrap();
    match machine.wait_timeout(PATIENCE) {
        Some(Outcome::Crashed(Crash::Emulation { vcpu: 0, rip: 0xd000_0000, .. })) => {}
        other => panic!("{other:?}"),
    }
    // It can still be moved: another host may know better.
    assert!(!machine.save().unwrap().is_empty());
    assert!(SourceMachine::describe(&machine).is_ok());
    assert!(SourceMachine::pause(&machine).is_ok() && SourceMachine::resume(&machine).is_ok());
}

#[test]
fn machines_that_no_host_can_give_are_refused() {
    let host = Host::open().unwrap();
    let config = |memory: u64, vcpus: u32| MachineConfig {
        serial: SerialOutput::Null,
        ..MachineConfig::new(&host, memory, vcpus).unwrap()
    };
    let refused = |memory, vcpus| Machine::build(&host, config(memory, vcpus)).err().unwrap();
    assert!(matches!(refused(16 << 20, 0), Error::VcpuCount { wanted: 0, .. }));
    assert!(matches!(refused(16 << 20, 100_000), Error::VcpuCount { .. }));
    assert!(matches!(refused(0, 1), Error::Memory(memory::Error::Size { .. })));
    assert!(matches!(refused(1 << 45, 1), Error::Memory(_)));
    let serial = SerialOutput::File("/nonexistent/serial".into());
    let error = Machine::build(&host, MachineConfig { serial, ..config(16 << 20, 1) }).err().unwrap();
    assert!(error.to_string().contains("/nonexistent/serial"), "{error}");
}

/// Bytes of a machine's RAM that are mapped by huge pages, of those from 8 MiB to 24 MiB: mappings of their
/// own.
fn mapped_huge(machine: &Machine) -> u64 {
    let region = &machine.memory().ram().regions()[0];
    assert_eq!(region.part_len(), 8 << 20);
    let ours = region.address() as u64 + (8 << 20)..region.address() as u64 + (24 << 20);
    let (mut inside, mut kib) = (false, 0);
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let start = line.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok());
        match (start, line.strip_prefix("ShmemPmdMapped:")) {
            (Some(start), _) => inside = ours.contains(&start),
            (None, Some(value)) if inside => {
                kib += value.split_whitespace().next().unwrap().parse::<u64>().unwrap();
            }
            _ => {}
        }
    }
    kib << 10
}

#[test]
fn a_running_guest_gets_huge_pages_in_the_background_but_not_while_it_moves() {
    let machine = machine(32, 1);
    machine.boot(&boot(guests::ticker())).unwrap();
    let existing = vec![0xa5; 16 << 20];
    // By file, as a destination does: written through the mapping, memory may be huge at once.
    for piece in machine.memory().ram().regions()[0].pieces(8 << 20, existing.len() as u64) {
        let (bytes, at) = (&existing[..piece.len as usize], piece.offset as i64);
        // SAFETY: the bytes live across the call, and the guest uses none of this memory.
        let put = unsafe { libc::pwrite(piece.fd, bytes.as_ptr().cast(), bytes.len(), at) };
        assert_eq!(put, bytes.len() as isize);
    }
    let before = mapped_huge(&machine);
    // Paused, and then moving: longer than a guest that runs and stays has to wait.
    std::thread::sleep(Duration::from_secs(3));
    SourceMachine::start_tracking(&machine).unwrap();
    machine.resume().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(mapped_huge(&machine), before, "it was in the way");
    SourceMachine::stop_tracking(&machine).unwrap();
    match memory::thp::try_collapse() {
        Ok(()) => {
            let deadline = Instant::now() + PATIENCE;
            while mapped_huge(&machine) == before {
                assert!(Instant::now() < deadline, "none were made");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        Err(why) => println!("this host makes no huge pages: {why}"),
    }
    machine.pause().unwrap();
    let mut read = vec![0; existing.len()];
    machine.memory().ram().regions()[0].read(8 << 20, &mut read).unwrap();
    assert!(read == existing, "the content has changed");
}

#[test]
fn a_running_machine_is_not_saved() {
    let machine = machine(16, 1);
    machine.boot(&boot(guests::ticker())).unwrap();
    machine.resume().unwrap();
    assert!(matches!(machine.save(), Err(Error::NotPaused)));
    assert!(matches!(machine.load(&[]), Err(Error::NotPaused)));
}
