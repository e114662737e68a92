//! Building a machine: the VM, its vCPUs, devices and threads.

use super::config::MachineConfig;
use super::reboot::Reboot;
use super::shared::Shared;
use super::{Machine, supervisor};
use crate::cpuid;
use crate::devices::Devices;
use crate::dirty::DirtyTracking;
use crate::error::Error;
use crate::fatal::EndOnPanic;
use crate::host::Host;
use crate::ioctl::{self, KvmError};
use crate::lock::lock;
use crate::memory::collapse::Collapser;
use crate::memory::{self, GuestRam};
use crate::pci::{KvmPlatform, Platform};
use crate::power::{Power, SCI};
use crate::sandbox;
use crate::serial::SerialPort;
use crate::state::PowerOn;
use crate::vcpu::control::Control;
use crate::vcpu::kick::{self, KickTarget};
use crate::vcpu::stats::Counter;
use crate::vcpu::throttle::Throttle;
use crate::vcpu::{Vcpu, msr};
use crate::virtio;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Three pages for Intel's virtual-8086 task, and one for its identity map: in the hole below 4
/// GiB, above the APICs' pages, where no RAM can be.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

impl Machine {
    /// Builds a machine, parked, with nothing in its RAM.
    ///
    /// # Errors
    /// [`Error`] for a configuration this host cannot give.
    pub fn build(host: &Host, config: MachineConfig) -> Result<Self, Error> {
        let vcpus = host.check_vcpus(config.vcpus)?;
        let end = memory::layout::regions(config.memory)?.last().map_or(0, |r| r.guest_address + r.len);
        let bits = cpuid::physical_address_bits(&config.cpuid);
        if end > 1u64.checked_shl(u32::from(bits)).unwrap_or(u64::MAX) {
            return Err(memory::Error::AddressBits { size: config.memory, bits }.into());
        }
        kick::install_kick_handler().map_err(Error::Thread)?;
        let ram = Arc::new(GuestRam::with_boot_store(
            config.memory,
            config.pages,
            config.thp,
            config.reboot.store(),
        )?);
        let vm = Arc::new(create_vm(host)?);
        memory::slot::set_all(&vm, &ram)?;
        let tracking = DirtyTracking::new(&vm, &ram)?;
        let platform: Arc<dyn Platform> = Arc::new(KvmPlatform(vm.clone()));
        let virtio = virtio::transport::functions(&config.devices, &config.local, &platform, ram.memory())?;
        let line = vm.clone();
        // A line that exists can be set.
        let power = Power::new(Box::new(move |level| {
            let _ = ioctl::retried!("KVM_IRQ_LINE", line.set_irq_line(SCI.into(), level));
        }));
        let devices = Devices::new(SerialPort::new(vm.clone(), &config.serial)?, power, virtio);
        let msrs = msr::savable(host.kvm())?;
        let vcpus = (0..vcpus)
            .map(|index| {
                let cpuid = cpuid::for_vcpu(&config.cpuid, index, vcpus)?;
                Vcpu::new(&vm, index, &cpuid, config.tsc_khz, &msrs).map(Mutex::new)
            })
            .collect::<Result<Vec<_>, KvmError>>()?;
        let (tsc_khz, saved_msrs) = {
            let boot_vcpu = lock(&vcpus[0]);
            (ioctl::retried!("KVM_GET_TSC_KHZ", boot_vcpu.fd.get_tsc_khz())?, boot_vcpu.msrs.indices())
        };
        let counters = vcpus.iter().map(|vcpu| Counter::of_first_writes(&lock(vcpu).fd)).collect();
        let reboot = config.reboot.clone();
        let reboots = reboot != Reboot::Never;
        let shared = Arc::new(Shared {
            power_on: reboots.then(|| PowerOn::of(&vm, &vcpus)).transpose()?,
            vm,
            vcpus,
            devices,
            ram: ram.clone(),
            control: Control::new(reboots),
            throttle: Throttle::new(counters),
            standing: Mutex::default(),
            reboot,
            boot_reader: config.local.boot_reader.clone(),
            announcements: AtomicU64::new(0),
            notices: Mutex::default(),
            waits_for_disk: AtomicBool::new(false),
        });
        let alarmed = Arc::downgrade(&shared);
        let alarm: virtio::Alarm = Arc::new(move || {
            if let Some(shared) = alarmed.upgrade() {
                shared.control.alarm();
            }
        });
        shared.devices.set_alarm(&alarm);
        let (running, tracked) = (shared.clone(), tracking.is_on());
        let collapser =
            Collapser::start(&ram, move || running.is_running() && !tracked.load(Ordering::Relaxed));
        let mut machine = Machine {
            config,
            threads: Vec::new(),
            throttling: Mutex::default(),
            shared,
            tracking,
            _collapser: collapser,
            tsc_khz,
            saved_msrs,
            given_up: AtomicBool::new(false),
            _reservation: None,
        };
        machine.spawn_threads()?;
        Ok(machine)
    }

    fn spawn_threads(&mut self) -> Result<(), Error> {
        for index in 0..self.shared.vcpus.len() {
            let shared = self.shared.clone();
            let run = move || run_vcpu(&shared, index);
            let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(run);
            self.threads.push(thread.map_err(Error::Thread)?);
        }
        self.shared.control.set_threads(self.threads.iter().map(JoinHandleExt::as_pthread_t).collect());
        let shared = self.shared.clone();
        let supervise = move || supervisor::supervise(&shared);
        let thread = std::thread::Builder::new().name("supervisor".into()).spawn(supervise);
        self.threads.push(thread.map_err(Error::Thread)?);
        // Whoever starts the machine must find every thread ready to be woken or kicked.
        self.shared.control.pause(self.shared.vcpus.len());
        Ok(())
    }
}

fn run_vcpu(shared: &Shared, index: usize) {
    let _end = EndOnPanic;
    sandbox::serve();
    let run_page = lock(&shared.vcpus[index]).run_page();
    // SAFETY: the vCPU, and with it the page, belongs to `shared`, which outlives this function.
    let _target = unsafe { KickTarget::set(run_page) };
    while shared.control.park() {
        lock(&shared.vcpus[index]).run(&shared.control, &shared.devices);
    }
}

fn create_vm(host: &Host) -> Result<VmFd, Error> {
    let vm = ioctl::retried!("KVM_CREATE_VM", host.kvm().create_vm())?;
    ioctl::retried!("KVM_SET_IDENTITY_MAP_ADDR", vm.set_identity_map_address(IDENTITY_MAP_ADDRESS))?;
    ioctl::retried!("KVM_SET_TSS_ADDR", vm.set_tss_address(TSS_ADDRESS))?;
    ioctl::retried!("KVM_CREATE_IRQCHIP", vm.create_irq_chip())?;
    // With the dummy, KVM answers port 0x61 as well, by which guests calibrate against the PIT.
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    ioctl::retried!("KVM_CREATE_PIT2", vm.create_pit2(pit))?;
    Ok(vm)
}
