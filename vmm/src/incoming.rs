//! Machines as the migration engine's destination builds them.

use crate::admission::{Admission, Admitted};
use crate::cpuid::{self, Incompatible};
use crate::description::Description;
use crate::error::Error;
use crate::guest::{self, When};
use crate::host::Host;
use crate::limits::Limits;
use crate::machine::{Machine, MachineConfig};
use crate::memory::Thp;
use crate::outgoing::half_a_handover;
use crate::serial::SerialOutput;
use crate::vcpu::msr;
use crate::virtio::LocalConfig;
use migration::machine::{Arbiter, DestinationHost, DestinationMachine};
use migration::memory::{Ram, RegionLayout};
use migration::{Code, Failure};
use std::sync::Arc;
use std::time::Duration;

/// How long after its switchover a guest still feels it: page faults on memory that just arrived.
const AFTERMATH: Duration = Duration::from_millis(300);

/// What a destination decides for itself.
#[derive(Clone, Debug, Default)]
pub struct IncomingOptions {
    /// Where the guest's serial output goes from here on.
    pub serial: SerialOutput,
    /// What of its devices this host decides for itself.
    pub local: LocalConfig,
    /// Whether RAM is populated before the source may write to it.
    pub populate: bool,
    /// Whether RAM may come to lie in transparent huge pages.
    pub thp: Thp,
    /// Whether disks count as those of the source without proof. The proof is that this host sees the
    /// source's locks on them. A guest whose disk is another file reads wrong blocks from then on, and writes
    /// over what is there.
    pub trust_storage: bool,
    /// How large a guest may be, what it may have, and what it may be called.
    pub limits: Limits,
    /// Who else decides whether a guest comes, and what of this host it gets. Without anybody, it comes.
    pub admission: Option<Arc<dyn Admission>>,
}

/// Builds shadow machines on this host.
pub struct IncomingHost {
    host: Host,
    options: IncomingOptions,
}

impl IncomingHost {
    /// Opens this host's KVM, so that what is missing shows before a guest comes.
    ///
    /// # Errors
    /// [`Error::NoKvm`] or [`Error::Capability`].
    pub fn open(options: IncomingOptions) -> Result<Self, Error> {
        Ok(IncomingHost { host: Host::open()?, options })
    }

    fn shadow(&self, description: &[u8], layout: &[RegionLayout]) -> Result<Machine, Failure> {
        let description = Description::decode(description)?;
        self.options.limits.check(&description)?;
        let ours = cpuid::baseline(self.host.kvm()).map_err(Error::from)?;
        let missing = cpuid::missing_features(description.cpuid(), &ours);
        if !missing.is_empty() {
            return Err(Error::Cpu(Incompatible { missing }).into());
        }
        // Whatever is reserved is given up with `reservation`, wherever this ends.
        let admission = self.options.admission.as_ref();
        let admitted = admission.map(|admission| admission.admit(&description.guest())).transpose()?;
        let Admitted { taps, images, reservation } = admitted.unwrap_or_default();
        let mut local = self.options.local.clone();
        local.taps = taps.unwrap_or(local.taps);
        local.images = images.unwrap_or(local.images);
        let stays_paused = description.stays_paused();
        let msrs = description.msrs().to_vec();
        let config = description.into_config(self.options.serial.clone(), local);
        let mut machine = Machine::build(&self.host, MachineConfig { thp: self.options.thp, ..config })?;
        machine.keep(reservation);
        machine.take_in(stays_paused);
        // A register that this host lacks would fail the load in the middle of the blackout.
        let known = machine.saved_msrs();
        let lacking: Vec<_> = msrs
            .iter()
            .filter(|msr| !known.contains(msr) && !msr::TOLERATED.contains(msr))
            .map(|msr| format!("MSR {msr:#x}"))
            .collect();
        if !lacking.is_empty() {
            return Err(Error::Cpu(Incompatible { missing: lacking }).into());
        }
        if machine.memory().ram().layout() != layout {
            let text = "the announced memory layout is not the one that the described machine has";
            return Err(Failure::new(Code::MEMORY, text));
        }
        machine.shared.devices.check_disks_shared(self.options.trust_storage)?;
        if self.options.populate {
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            machine.memory().populate(threads).map_err(Error::from)?;
        }
        Ok(machine)
    }
}

impl DestinationHost for IncomingHost {
    type Machine = IncomingMachine;

    fn build(&mut self, description: &[u8], layout: &[RegionLayout]) -> Result<IncomingMachine, Failure> {
        Ok(IncomingMachine { machine: Arc::new(self.shadow(description, layout)?) })
    }
}

/// A machine that is being taken in.
pub struct IncomingMachine {
    machine: Arc<Machine>,
}

impl IncomingMachine {
    /// The machine, to be kept once its guest runs here.
    pub fn machine(&self) -> Arc<Machine> {
        self.machine.clone()
    }
}

impl DestinationMachine for IncomingMachine {
    fn ram(&self) -> Arc<Ram> {
        self.machine.memory().ram().clone()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        Ok(self.machine.load(state)?)
    }

    fn memory_is_zero(&self) -> bool {
        // Its memfds are new, and only a boot would write to them.
        true
    }

    fn handover_estimate(&self) -> Option<Duration> {
        Some(half_a_handover(self.machine.config().vcpus))
    }

    fn arbiter(&self) -> Option<&dyn Arbiter> {
        Some(&*self.machine)
    }

    fn run(&mut self) -> Result<(), Failure> {
        Ok(self.machine.resume_after_move()?)
    }

    fn announce(&mut self) {
        self.machine.announce();
    }

    /// What the guest says of its move, as JSON, if it keeps such a record.
    fn after_run(&mut self) -> Option<String> {
        guest::testimony(self.machine.memory())?;
        if self.machine.stays_paused() {
            return None;
        }
        std::thread::sleep(AFTERMATH);
        guest::set_phase(&self.machine, When::After);
        guest::testimony(self.machine.memory()).and_then(|t| serde_json::to_string(&t).ok())
    }
}
