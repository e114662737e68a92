//! Saving a machine's state and loading it into another.
//!
//! The state is a list of components (each vCPU, the interrupt controllers, the timer, the clock, the serial
//! port, each PCI device), each with a kind, a version and a payload. A component that this version does not
//! know, or that is missing, or has bytes left over is refused by name: a guest that was restored in part
//! must never run.
//!
//! Order matters. Saving: every vCPU with `mp_state` first, since reading it lets pending INIT and SIPI take
//! effect, and `vcpu_events` last, since reading other state may queue events. The TSC deadline comes before
//! the LAPIC: where hardware counts down to it and delivers interrupts (APICv), KVM clears a deadline that
//! has passed and sets the interrupt's bit in the LAPIC as soon as any call brings the vCPU to another
//! processor. In this order both may be saved, and one interrupt comes of it; in the other order, neither.
//!
//! Loading: vCPUs, then one shift of the TSC for all of them, then the interrupt controllers, the timer and
//! devices (whose queues are checked against RAM, which must be in place), the TSC deadlines (which need
//! LAPIC and TSC in place), and the clock last, so that as little as possible passes between setting it and
//! running.
//!
//! Two saves of one paused machine are equal but for what time itself changes: the clock component (kvmclock,
//! real time and the TSC at that moment), each LAPIC's current count and its processor priority (which KVM
//! works out only when it needs it), IA32_TSC, and what in the PIT and in KVM's clock derives from the host's
//! time at the moment of reading.

mod clock;
mod irqchip;
mod power_on;
pub mod vcpu;

pub(crate) use power_on::PowerOn;

use crate::component::{Component, Error, Kind, check, decode, encode, has, payload};
use crate::devices::Devices;
use crate::lock::lock;
use crate::pci::BusState;
use crate::power::PowerState;
use crate::serial::SerialState;
use crate::vcpu::Vcpu;
use clock::ClockState;
use irqchip::{IrqchipState, PitState};
use kvm_ioctls::VmFd;
use std::sync::Mutex;
use std::time::Duration;
use vcpu::VcpuState;

/// Saves the state of a machine whose vCPUs are all parked. The guest may wait for a `reset`.
pub(crate) fn save(
    vm: &VmFd,
    vcpus: &[Mutex<Vcpu>],
    devices: &Devices,
    reset: bool,
) -> Result<Vec<u8>, Error> {
    let mut components = Vec::with_capacity(vcpus.len() + 4);
    for vcpu in vcpus {
        let mut vcpu = lock(vcpu);
        let index = vcpu.index;
        components.push(Component::new(Kind::Vcpu, index, &VcpuState::save(&mut vcpu)?)?);
    }
    components.push(Component::new(Kind::Irqchip, 0, &IrqchipState::save(vm)?)?);
    components.push(Component::new(Kind::Pit, 0, &PitState::save(vm)?)?);
    components.push(Component::new(Kind::Serial, 0, &devices.serial().save())?);
    components.push(Component::new(Kind::Power, 0, &devices.power().save())?);
    components.push(Component::new(Kind::Pci, 0, &devices.pci().save())?);
    for function in devices.virtio() {
        components.extend(function.save()?);
    }
    if reset {
        components.push(Component::new(Kind::Reset, 0, &())?);
    }
    let boot_vcpu = lock(&vcpus[0]);
    components.push(Component::new(Kind::Clock, 0, &ClockState::save(vm, &boot_vcpu)?)?);
    encode(&components)
}

/// What a state that was loaded says beside what it sets.
pub(crate) struct Loaded {
    /// The guest waits for a reset.
    pub reset: bool,
    /// How much time seems to have passed since it was saved, if that is more than can have passed.
    pub leap: Option<Duration>,
}

/// Loads a state into a machine whose vCPUs are all parked. It was saved no longer ago than `most`, if that
/// is known.
pub(crate) fn load(
    vm: &VmFd,
    vcpus: &[Mutex<Vcpu>],
    devices: &Devices,
    bytes: &[u8],
    most: Option<Duration>,
) -> Result<Loaded, Error> {
    // Everything but the devices' own is decoded before anything is set.
    let components = decode(bytes)?;
    check(&components, &places(vcpus.len(), devices))?;
    let states = (0..vcpus.len())
        .map(|index| payload::<VcpuState>(&components, Kind::Vcpu, index as u8))
        .collect::<Result<Vec<_>, Error>>()?;
    let irqchip: IrqchipState = payload(&components, Kind::Irqchip, 0)?;
    let pit: PitState = payload(&components, Kind::Pit, 0)?;
    let serial: SerialState = payload(&components, Kind::Serial, 0)?;
    let power: PowerState = payload(&components, Kind::Power, 0)?;
    let bus: BusState = payload(&components, Kind::Pci, 0)?;
    let clock: ClockState = payload(&components, Kind::Clock, 0)?;
    let (clock, leap) = match most {
        Some(most) => clock.plausible(most),
        None => (clock, None),
    };
    let reset = has(&components, Kind::Reset);
    if reset {
        payload::<()>(&components, Kind::Reset, 0)?;
    }

    for (vcpu, state) in vcpus.iter().zip(&states) {
        state.load(&mut lock(vcpu))?;
    }
    let mut targets: Vec<_> = vcpus.iter().map(lock).collect();
    clock.advance_tsc(&mut targets, &states)?;
    irqchip.load(vm)?;
    pit.load(vm)?;
    devices.serial().load(&serial).map_err(|what| Error::Malformed { kind: Kind::Serial, index: 0, what })?;
    devices.power().load(&power);
    devices.pci().load(&bus);
    for function in devices.virtio() {
        function.load(&components)?;
    }
    for (target, state) in targets.iter_mut().zip(&states) {
        state.load_deadline(target)?;
    }
    clock.load(vm)?;
    Ok(Loaded { reset, leap })
}

/// The components that a machine can have.
fn places(vcpus: usize, devices: &Devices) -> Vec<(Kind, u8)> {
    let single = [Kind::Irqchip, Kind::Pit, Kind::Serial, Kind::Power, Kind::Pci, Kind::Clock, Kind::Reset];
    let vcpus = (0..vcpus).map(|index| (Kind::Vcpu, index as u8));
    let virtio = devices.virtio().iter().flat_map(|function| function.places());
    single.map(|kind| (kind, 0)).into_iter().chain(vcpus).chain(virtio).collect()
}

/// A saved state's components, each by name and encoded with what time itself changes set to zero
/// (see the module's own text): equal for two saves of a machine that did not run between them.
///
/// # Errors
/// [`Error`] for a state that cannot be read.
pub fn timeless(bytes: &[u8], vcpus: usize) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let components = decode(bytes)?;
    let mut named = Vec::new();
    for index in 0..vcpus {
        let mut state: VcpuState = payload(&components, Kind::Vcpu, index as u8)?;
        state.forget_time();
        state.name_parts(index, &mut named)?;
    }
    for component in &components {
        match component.place()? {
            (Kind::Vcpu | Kind::Clock, _) => {}
            (Kind::Pit, _) => {
                let pit: PitState = payload(&components, Kind::Pit, 0)?;
                named.push((Kind::Pit.to_string(), postcard::to_stdvec(&pit.without_time())?));
            }
            (kind, index) => named.push((format!("{kind} {index}"), component.bytes().to_vec())),
        }
    }
    Ok(named)
}
