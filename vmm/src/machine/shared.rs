//! What a machine's owner and its threads share.

use super::reboot::Reboot;
use super::supervisor::Notice;
use crate::boot_disk::BootReader;
use crate::devices::Devices;
use crate::error::Error;
use crate::ioctl;
use crate::lock::lock;
use crate::memory::GuestRam;
use crate::state::PowerOn;
use crate::vcpu::Vcpu;
use crate::vcpu::control::{Control, Phase};
use crate::vcpu::outcome::Outcome;
use crate::vcpu::throttle::Throttle;
use kvm_ioctls::VmFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// What the machine shares with its vCPU threads.
pub(crate) struct Shared {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) vcpus: Vec<Mutex<Vcpu>>,
    pub(crate) devices: Devices,
    pub(super) ram: Arc<GuestRam>,
    pub(super) control: Control,
    pub(super) throttle: Throttle,
    /// Serialises pause, resume, save, load, resets, and this process's own writes to guest memory.
    pub(super) standing: Mutex<Standing>,
    pub(super) reboot: Reboot,
    /// What reads the disk then.
    pub(super) boot_reader: Option<BootReader>,
    /// What a reset makes of vCPUs and interrupt controllers, if it is to.
    pub(super) power_on: Option<PowerOn>,
    pub(super) notices: Mutex<Notices>,
    /// The guest is paused until a disk can carry out its requests. Changes only under the lock of
    /// `standing`.
    pub(super) waits_for_disk: AtomicBool,
    /// How often the network was to be told where the guest is.
    pub(super) announcements: AtomicU64,
}

pub(super) type Listener = dyn Fn(&Notice) + Send;

/// Who hears of what happens to the machine, and what happened before there was somebody: a guest that
/// arrives may run before its new owner knows.
#[derive(Default)]
pub(super) struct Notices {
    pub(super) listener: Option<Box<Listener>>,
    pub(super) untold: Vec<Notice>,
}

/// Most notices that are kept for a listener.
const MOST_UNTOLD: usize = 16;

impl Shared {
    /// Whether vCPUs run.
    pub(crate) fn is_running(&self) -> bool {
        self.control.status().0 == Phase::Running
    }

    /// Brings vCPUs to rest, and then the devices, which they can no longer set to work.
    pub(super) fn park(&self) {
        self.control.pause(self.vcpus.len());
        self.devices.pause();
    }

    /// Lets vCPUs and devices go on.
    pub(super) fn go_on(&self, standing: &Standing) -> Result<(), Error> {
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

    pub(super) fn tell(&self, notice: Notice) {
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
pub(super) struct Standing {
    /// The guest has run and was paused, or was loaded: it has to be told that its clock stood still.
    pub(super) interrupted: bool,
    /// RAM is the migration engine's: it is being moved away or taken in, and nobody here may write to it.
    pub(super) engine_has_ram: bool,
    /// When the machine was made for a guest that is taken in.
    pub(super) taken_in: Option<Instant>,
    /// An operator has paused the guest: wherever it is, it runs again only when an operator says so.
    pub(super) stays_paused: bool,
}
