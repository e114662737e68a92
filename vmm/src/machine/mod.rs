//! A KVM machine: building it, running it, pausing it.
//!
//! All that takes time (VM, vCPUs, interrupt controllers, mappings, threads) is done by
//! [`Machine::build`]. A machine built so is parked: it either boots a kernel or is loaded with
//! another machine's state, and both then start by [`Machine::resume`].

mod announce;
mod build;
mod config;
mod ram;
mod reboot;
mod reset;
mod shared;
mod supervisor;

pub use config::{BadName, DEFAULT_NAME, MAX_NAME, MachineConfig, check_name};
pub use ram::{RamView, RamWriter};
pub(crate) use reboot::MAX_KEPT;
pub use reboot::{KeepError, Reboot};
pub use supervisor::Notice;

pub(crate) use shared::Shared;

use self::announce::Round;
use self::shared::Standing;
use crate::admission::Reservation;
use crate::component::{Error as ComponentError, Kind};
use crate::dirty::DirtyTracking;
use crate::error::Error;
use crate::loader::{Before, Boot};
use crate::lock::lock;
use crate::memory::collapse::Collapser;
use crate::serial::SerialPort;
use crate::state;
use crate::vcpu::control::Phase;
use crate::vcpu::outcome::Outcome;
use crate::virtio;
use migration::machine::Throttle;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A machine.
pub struct Machine {
    config: MachineConfig,
    // The threads' handles come before what they use: they are joined in `drop`.
    threads: Vec<JoinHandle<()>>,
    /// Keeps vCPUs to a limit of what they write, while there is one.
    throttling: Mutex<Option<JoinHandle<()>>>,
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

    /// Keeps what the guest writes to a limit, by holding the vCPUs that write; `None` for no limit.
    ///
    /// # Errors
    /// [`Error::Thread`].
    pub fn throttle(&self, limit: Option<Throttle>) -> Result<(), Error> {
        if !self.shared.throttle.set(limit) {
            return Ok(());
        }
        let shared = self.shared.clone();
        let keep = move || shared.throttle.keep(&shared.control);
        match std::thread::Builder::new().name("throttle".into()).spawn(keep) {
            Ok(thread) => *lock(&self.throttling) = Some(thread),
            Err(error) => {
                self.shared.throttle.not_kept();
                return Err(Error::Thread(error));
            }
        }
        Ok(())
    }

    /// How long each vCPU was held since a limit was [set](Self::throttle).
    pub fn throttled(&self) -> Vec<Duration> {
        self.shared.throttle.held()
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
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Who holds vCPUs kicks their threads, which have to be there.
        self.shared.throttle.set(None);
        let throttling = lock(&self.throttling).take();
        self.stop();
        if let Some(thread) = throttling {
            let _ = thread.join();
        }
        for thread in self.threads.drain(..) {
            // A vCPU thread that panicked has printed why; there is nothing left to save here.
            let _ = thread.join();
        }
    }
}
