//! A KVM machine: building it, running it, pausing it.
//!
//! All that takes time (VM, vCPUs, interrupt controllers, mappings, threads) is done by
//! [`Machine::build`]. A machine built so is parked: it either boots a kernel or is loaded with
//! another machine's state, and both then start by [`Machine::resume`].

mod announce;
mod config;
mod ram;
mod reboot;
mod reset;
mod supervisor;

pub use config::{BadName, MAX_NAME, MachineConfig, check_name};
pub use ram::{RamView, RamWriter};
pub(crate) use reboot::MAX_KEPT;
pub use reboot::{KeepError, Reboot};
pub use supervisor::Notice;

use self::announce::Round;
use crate::admission::Reservation;
use crate::boot_disk::BootReader;
use crate::component::{Error as ComponentError, Kind};
use crate::cpuid;
use crate::devices::Devices;
use crate::dirty::DirtyTracking;
use crate::error::Error;
use crate::fatal::EndOnPanic;
use crate::host::Host;
use crate::ioctl::{self, KvmError};
use crate::loader::{Before, Boot};
use crate::lock::lock;
use crate::memory::collapse::Collapser;
use crate::memory::{self, GuestRam};
use crate::pci::{KvmPlatform, Platform};
use crate::power::{Power, SCI};
use crate::sandbox;
use crate::serial::SerialPort;
use crate::state::{self, PowerOn};
use crate::vcpu::control::{Control, Phase};
use crate::vcpu::kick::{self, KickTarget};
use crate::vcpu::outcome::Outcome;
use crate::vcpu::{Vcpu, msr};
use crate::virtio;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Three pages for Intel's virtual-8086 task, and one for its identity map: in the hole below 4
/// GiB, above the APICs' pages, where no RAM can be.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What the machine shares with its vCPU threads.
pub(crate) struct Shared {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) vcpus: Vec<Mutex<Vcpu>>,
    pub(crate) devices: Devices,
    ram: Arc<GuestRam>,
    control: Control,
    /// Serialises pause, resume, save, load, resets, and this process's own writes to guest memory.
    standing: Mutex<Standing>,
    reboot: Reboot,
    /// What reads the disk then.
    boot_reader: Option<BootReader>,
    /// What a reset makes of vCPUs and interrupt controllers, if it is to.
    power_on: Option<PowerOn>,
    notices: Mutex<Notices>,
    /// The guest is paused until a disk can carry out its requests. Changes only under the lock of
    /// `standing`.
    waits_for_disk: AtomicBool,
    /// How often the network was to be told where the guest is.
    announcements: AtomicU64,
}

type Listener = dyn Fn(&Notice) + Send;

/// Who hears of what happens to the machine, and what happened before there was somebody: a guest that
/// arrives may run before its new owner knows.
#[derive(Default)]
struct Notices {
    listener: Option<Box<Listener>>,
    untold: Vec<Notice>,
}

/// Most notices that are kept for a listener.
const MOST_UNTOLD: usize = 16;

impl Shared {
    /// Whether vCPUs run.
    pub(crate) fn is_running(&self) -> bool {
        self.control.status().0 == Phase::Running
    }

    /// Brings vCPUs to rest, and then the devices, which they can no longer set to work.
    fn park(&self) {
        self.control.pause(self.vcpus.len());
        self.devices.pause();
    }

    /// Lets vCPUs and devices go on.
    fn go_on(&self, standing: &Standing) -> Result<(), Error> {
        if standing.interrupted && !self.is_running() {
            for vcpu in &self.vcpus {
                // Tells a guest that uses kvmclock not to take the pause for a hang. One that does
                // not use it makes this EINVAL, and needs no telling.
                let _ = ioctl::retried!("KVM_KVMCLOCK_CTRL", lock(vcpu).fd.kvmclock_ctrl());
            }
        }
        self.control.resume().map_err(|outcome| match outcome {
            Outcome::Stopped => Error::Stopped,
            outcome => Error::Ended(outcome),
        })?;
        self.waits_for_disk.store(false, Ordering::Relaxed);
        self.devices.resume();
        Ok(())
    }

    /// Does what a vCPU does whose guest asks for a reset.
    #[cfg(test)]
    pub(crate) fn reset_as_guest(&self) -> bool {
        self.control.end(Outcome::Reset);
        self.control.awaits_reset()
    }

    fn tell(&self, notice: Notice) {
        let mut notices = lock(&self.notices);
        match &notices.listener {
            Some(listener) => listener(&notice),
            None if notices.untold.len() < MOST_UNTOLD => notices.untold.push(notice),
            None => {}
        }
    }
}

/// How a machine stands between two runs of its guest.
#[derive(Default)]
pub(crate) struct Standing {
    /// The guest has run and was paused, or was loaded: it has to be told that its clock stood still.
    interrupted: bool,
    /// RAM is the migration engine's: it is being moved away or taken in, and nobody here may write to it.
    engine_has_ram: bool,
    /// When the machine was made for a guest that is taken in.
    taken_in: Option<Instant>,
    /// An operator has paused the guest: wherever it is, it runs again only when an operator says so.
    stays_paused: bool,
}

/// A machine.
pub struct Machine {
    config: MachineConfig,
    // The threads' handles come before what they use: they are joined in `drop`.
    threads: Vec<JoinHandle<()>>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) tracking: DirtyTracking,
    /// Works while the guest runs and its writes are not tracked for a migration.
    _collapser: Option<Collapser>,
    tsc_khz: u32,
    saved_msrs: Vec<u32>,
    /// The guest was given up, and may have run elsewhere meanwhile.
    given_up: AtomicBool,
    /// What this host holds for it. It comes after what has the devices.
    _reservation: Option<Reservation>,
}

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
        let reboot = config.reboot.clone();
        let reboots = reboot != Reboot::Never;
        let shared = Arc::new(Shared {
            power_on: reboots.then(|| PowerOn::of(&vm, &vcpus)).transpose()?,
            vm,
            vcpus,
            devices,
            ram: ram.clone(),
            control: Control::new(reboots),
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

    /// Loads a kernel and points the boot vCPU at it. A machine that is to keep what it boots from
    /// ([`Reboot::Kept`]) keeps this.
    ///
    /// # Errors
    /// [`Error::Loader`] for an image that cannot be booted, [`Error::Keep`], [`Error::MemoryIsMoving`].
    pub fn boot(&self, boot: &Boot) -> Result<(), Error> {
        let writer = self.write_memory()?;
        reboot::keep(&self.shared.ram, boot)?;
        reset::load(&self.shared, writer.memory(), boot, Before::Zeros)
    }

    /// Has the machine tell what happens to it, to this listener from here on. It must not call the machine.
    pub fn on_notice(&self, listener: impl Fn(&Notice) + Send + 'static) {
        let mut notices = lock(&self.shared.notices);
        notices.untold.drain(..).for_each(|notice| listener(&notice));
        notices.listener = Some(Box::new(listener));
    }

    /// Presses the guest's power button. False if it does not listen to it.
    pub fn press_power_button(&self) -> bool {
        self.shared.devices.power().press()
    }

    /// Lets the guest run, for the first time or again.
    ///
    /// Whoever runs a guest holds the locks of its disks: they are taken here unless they are held already.
    ///
    /// # Errors
    /// [`Error::Ended`] if the guest has ended, [`Error::Stopped`] after [`stop`](Self::stop),
    /// [`Error::Disk`] if somebody else has a disk.
    pub fn resume(&self) -> Result<(), Error> {
        let mut standing = lock(&self.shared.standing);
        self.shared.devices.take_disk_locks()?;
        self.shared.go_on(&standing)?;
        standing.engine_has_ram = false;
        standing.stays_paused = false;
        if self.given_up.swap(false, Ordering::Relaxed) {
            self.announce();
        }
        Ok(())
    }

    /// Tells the network, in the background, where the guest is from now on. Rounds of an earlier call that
    /// are still to come are not made.
    pub fn announce(&self) {
        let machine = Arc::downgrade(&self.shared);
        let number = self.shared.announcements.fetch_add(1, Ordering::Relaxed) + 1;
        announce::start(self.config.local.announcing, move || {
            let Some(shared) = machine.upgrade() else { return Round::Over };
            if shared.announcements.load(Ordering::Relaxed) != number {
                return Round::Over;
            }
            match shared.control.status() {
                (Phase::Running, _) if shared.devices.announce() => Round::Told,
                (Phase::Paused | Phase::Running, None) => Round::NotNow,
                _ => Round::Over,
            }
        });
    }

    /// Stops all vCPUs and devices. When it returns, no vCPU runs, no device access is half done, no request
    /// is in flight, and RAM no longer changes. Pausing a paused machine, or one whose guest has ended,
    /// changes nothing.
    ///
    /// # Errors
    /// [`Error::Stopped`] after [`stop`](Self::stop).
    pub fn pause(&self) -> Result<(), Error> {
        self.pause_for(false)
    }

    /// Pauses as [`pause`](Self::pause) does. From then until the guest runs again, nobody but the migration
    /// engine has any business with its RAM.
    pub(crate) fn pause_to_move(&self) -> Result<(), Error> {
        self.pause_for(true)
    }

    fn pause_for(&self, moving: bool) -> Result<(), Error> {
        let mut standing = lock(&self.shared.standing);
        standing.interrupted |= self.is_running();
        standing.engine_has_ram |= moving;
        self.shared.park();
        // Whoever has paused it also decides when it runs again.
        self.shared.waits_for_disk.store(false, Ordering::Relaxed);
        match self.shared.control.status() {
            (Phase::Stopping, _) => Err(Error::Stopped),
            _ => Ok(()),
        }
    }

    /// Decides that the paused guest stays paused, also when it is moved, until [`resume`](Self::resume).
    ///
    /// # Errors
    /// [`Error::NotPaused`], [`Error::Stopped`].
    pub fn stay_paused(&self) -> Result<(), Error> {
        self.guard_paused()?.stays_paused = true;
        Ok(())
    }

    /// Whether the guest is to stay paused until it is resumed.
    pub fn stays_paused(&self) -> bool {
        lock(&self.shared.standing).stays_paused
    }

    /// What follows a move: the guest runs, or it stays as paused as it was.
    pub(crate) fn resume_after_move(&self) -> Result<(), Error> {
        let mut standing = lock(&self.shared.standing);
        if !standing.stays_paused {
            drop(standing);
            return self.resume();
        }
        self.shared.devices.take_disk_locks()?;
        standing.engine_has_ram = false;
        Ok(())
    }

    /// Why the guest is paused until a disk can carry out its requests, if it is.
    pub fn disk_trouble(&self) -> Option<String> {
        let waits = self.shared.waits_for_disk.load(Ordering::Relaxed);
        waits.then(|| self.shared.devices.trouble()).flatten()
    }

    /// Whether the guest is running.
    pub fn is_running(&self) -> bool {
        self.shared.is_running()
    }

    /// How the guest ended, if it has.
    pub fn outcome(&self) -> Option<Outcome> {
        self.shared.control.status().1
    }

    /// Waits for the guest's end.
    pub fn wait(&self) -> Outcome {
        self.shared.control.wait()
    }

    /// Waits for the guest's end for at most `patience`.
    pub fn wait_timeout(&self, patience: Duration) -> Option<Outcome> {
        self.shared.control.wait_timeout(patience)
    }

    /// Ends the machine for good. Whoever [waits](Self::wait) learns of it.
    pub fn stop(&self) {
        self.shared.control.stop();
    }

    /// Waits until whoever reads the guest's serial port and consoles has all that it wrote, for at most
    /// `patience` each. Returns how many bytes were dropped since the machine was built, as they did not keep
    /// up.
    pub fn drain_output(&self, patience: Duration) -> u64 {
        let devices = &self.shared.devices;
        let consoles = devices.virtio().iter().filter_map(|function| function.device().output());
        let outputs = consoles.chain([devices.serial().output().clone()]);
        outputs
            .map(|output| {
                output.drain(patience);
                output.lost()
            })
            .sum()
    }

    /// Takes the locks of all disks. If it fails, the machine holds those that it held before and no others.
    ///
    /// # Errors
    /// [`Error::Disk`] if somebody else holds one of the locks, or has used the disk since it was released
    /// here.
    pub fn take_disk_locks(&self) -> Result<(), Error> {
        self.shared.devices.take_disk_locks()
    }

    /// Flushes all disks and releases their locks: from here on the guest may run elsewhere. If it comes
    /// back, the network is told where it is.
    ///
    /// # Errors
    /// [`Error::Disk`], [`Error::NotPaused`].
    pub fn release_disk_locks(&self) -> Result<(), Error> {
        let _guard = self.guard_paused()?;
        self.given_up.store(true, Ordering::Relaxed);
        self.shared.devices.release_disk_locks()
    }

    /// Whether there is a disk lock that can decide which of two hosts owns the guest.
    pub fn disk_locks_decide(&self) -> bool {
        self.shared.devices.disk_locks_decide()
    }

    /// Its PCI devices, as another host must be told of them.
    pub(crate) fn device_configs(&self) -> Vec<virtio::DeviceConfig> {
        self.shared.devices.virtio().iter().map(|function| function.device().config()).collect()
    }

    /// The state of the paused machine, RAM excepted.
    ///
    /// # Errors
    /// [`Error::NotPaused`], or what KVM refused.
    pub fn save(&self) -> Result<Vec<u8>, Error> {
        let _guard = self.guard_paused()?;
        let Shared { vm, vcpus, devices, .. } = &*self.shared;
        Ok(state::save(vm, vcpus, devices, self.shared.control.awaits_reset())?)
    }

    /// Restores what [`save`](Self::save) saved. RAM must be in place. Whole for a machine that has
    /// never run; one whose load failed part-way is to be dropped.
    ///
    /// # Errors
    /// [`Error::State`] for a state that is not one of an equal machine; [`Error::NotPaused`].
    pub fn load(&self, state: &[u8]) -> Result<(), Error> {
        let mut standing = self.guard_paused()?;
        let Shared { vm, vcpus, devices, .. } = &*self.shared;
        let most = standing.taken_in.map(|began| began.elapsed());
        let loaded = state::load(vm, vcpus, devices, state, most)?;
        if let Some(seemed) = loaded.leap {
            self.shared.tell(Notice::ClockAhead { seemed, most: most.unwrap_or_default() });
        }
        if loaded.reset && !self.shared.control.set_reset() {
            return Err(ComponentError::Unexpected { kind: Kind::Reset, index: 0 }.into());
        }
        standing.interrupted = true;
        Ok(())
    }

    fn guard_paused(&self) -> Result<MutexGuard<'_, Standing>, Error> {
        let guard = lock(&self.shared.standing);
        match self.shared.control.status() {
            (Phase::Running, _) => Err(Error::NotPaused),
            (Phase::Stopping, _) => Err(Error::Stopped),
            (Phase::Paused, _) => {
                // After a guest's own end, its other vCPUs may still be on their way here.
                self.shared.park();
                Ok(guard)
            }
        }
    }

    /// What the machine consists of.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Its RAM, to be read.
    pub fn memory(&self) -> RamView<'_> {
        RamView::new(&self.shared.ram)
    }

    /// Leave to write to its RAM. Pausing waits until it is dropped.
    ///
    /// # Errors
    /// [`Error::MemoryIsMoving`] from the pause for a move on until the guest runs here again, and before a
    /// guest that is taken in runs here.
    pub fn write_memory(&self) -> Result<RamWriter<'_>, Error> {
        let standing = lock(&self.shared.standing);
        if standing.engine_has_ram {
            return Err(Error::MemoryIsMoving);
        }
        Ok(RamWriter::new(&self.shared.ram, standing))
    }

    /// Leaves RAM to the migration engine until the guest runs, or has come to stay paused.
    pub(crate) fn take_in(&self, stays_paused: bool) {
        let mut standing = lock(&self.shared.standing);
        standing.engine_has_ram = true;
        standing.taken_in = Some(Instant::now());
        standing.stays_paused = stays_paused;
        // Whenever it runs here, the network has to be told.
        self.given_up.store(stays_paused, Ordering::Relaxed);
    }

    /// Keeps what this host holds for the guest until the machine is dropped.
    pub(crate) fn keep(&mut self, reservation: Option<Reservation>) {
        self._reservation = reservation;
    }

    /// Its serial port.
    pub fn serial(&self) -> &SerialPort {
        self.shared.devices.serial()
    }

    /// The guest's TSC frequency in kHz.
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// The model-specific registers that its state has.
    pub(crate) fn saved_msrs(&self) -> &[u32] {
        &self.saved_msrs
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

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
        for thread in self.threads.drain(..) {
            // A vCPU thread that panicked has printed why; there is nothing left to save here.
            let _ = thread.join();
        }
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
