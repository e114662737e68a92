//! Resetting a machine whose guest has asked for it.
//!
//! The machine's [supervisor](super::supervisor) does it, since a vCPU cannot: all are parked. It holds the
//! machine's standing meanwhile, so that nobody pauses, moves or resumes a machine that is half reset. A move
//! that is under way goes on: what is written to RAM is logged as any write is. One that has paused the
//! machine before takes the wish along, and the reset is done where the guest runs next.

use super::{Notice, Shared, reboot};
use crate::acpi;
use crate::boot_disk;
use crate::error::Error;
use crate::loader::{self, Before, Boot};
use crate::lock::lock;
use crate::memory::GuestMemory;
use crate::vcpu::outcome::{Crash, Outcome};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// A guest that has been reset so often within [`STORM`] does nothing else.
const MOST_RESETS: usize = 5;
const STORM: Duration = Duration::from_secs(2);

/// Resets the machine as its guest wants. The supervisor holds its standing.
pub(super) fn serve(shared: &Shared, recent: &mut Recent) {
    if !shared.control.park_for_reset(shared.vcpus.len()) {
        return;
    }
    shared.devices.pause();
    let done = if recent.admit(Instant::now()) {
        reset(shared).map_err(|error| error.to_string())
    } else {
        Err(format!("it was reset {MOST_RESETS} times within {} s", STORM.as_secs()))
    };
    match done {
        Ok(()) => {
            // Before the guest does anything that is told as well.
            shared.tell(Notice::Rebooted);
            shared.devices.resume();
            shared.control.reset_done();
        }
        Err(why) => shared.control.finish(Outcome::Crashed(Crash::NotRebooted { why })),
    }
}

/// When it was reset lately.
#[derive(Default)]
pub(super) struct Recent(VecDeque<Instant>);

impl Recent {
    /// Whether one more reset, now, is not too many.
    fn admit(&mut self, now: Instant) -> bool {
        self.0.push_back(now);
        if self.0.len() <= MOST_RESETS {
            return true;
        }
        self.0.pop_front().is_none_or(|first| now.duration_since(first) >= STORM)
    }
}

/// Resets a machine whose vCPUs are parked and whose devices are paused, and loads what it boots.
fn reset(shared: &Shared) -> Result<(), Error> {
    let boot = boot_again(shared)?;
    if let Some(power_on) = &shared.power_on {
        power_on.restore(&shared.vm, &shared.vcpus)?;
    }
    shared.devices.reset().map_err(Error::Reset)?;
    load(shared, shared.ram.memory(), &boot, Before::Guest)
}

/// What it boots now.
fn boot_again(shared: &Shared) -> Result<Boot, Error> {
    match &shared.reboot {
        reboot::Reboot::Disk { cmdline } => {
            let disk = shared.devices.virtio().iter().find_map(|function| function.device().boot_image());
            let disk = disk.ok_or(Error::NoBootDisk)??;
            Ok(match &shared.boot_reader {
                Some(reader) => reader.read(&disk, 0, cmdline)?,
                None => boot_disk::read_open(disk, 0, cmdline)?,
            })
        }
        _ => Ok(reboot::kept(&shared.ram)?),
    }
}

/// Loads a kernel, and the tables that tell of the machine, and points the boot vCPU at it.
pub(super) fn load(shared: &Shared, memory: &GuestMemory, boot: &Boot, before: Before) -> Result<(), Error> {
    let entry = loader::load(memory, boot, before)?;
    let vcpus = shared.vcpus.len() as u8;
    loader::mptable::write(memory, vcpus)?;
    acpi::write(memory, vcpus).map_err(loader::Error::from)?;
    let boot_vcpu = lock(&shared.vcpus[0]);
    Ok(entry.apply(&boot_vcpu.fd, memory)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Workload, testimony};
    use crate::state::timeless;
    use crate::{Host, Machine, MachineConfig, Reboot, SerialOutput};
    use std::sync::mpsc;

    /// A machine with an idle guest that boots again.
    fn machine() -> Machine {
        let idle = Workload::idle(2);
        let host = Host::open().unwrap();
        let reboot = Reboot::keeping(&idle.guest()).unwrap();
        let config = MachineConfig::new(&host, 32 << 20, 2).unwrap();
        let config = MachineConfig { serial: SerialOutput::Null, reboot, ..config };
        let machine = Machine::build(&host, config).unwrap();
        idle.boot(&machine).unwrap();
        machine
    }

    #[test]
    fn a_reset_that_is_due_at_a_pause_is_done_where_the_guest_runs_next() {
        let source = machine();
        source.resume().unwrap();
        source.pause().unwrap();
        assert!(source.shared.reset_as_guest());
        let state = Machine::save(&source).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert!(source.shared.control.awaits_reset(), "it was done while the machine was paused");
        // The source's RAM is left behind: what it boots from is all that a reset needs.
        let target = machine();
        target.load(&state).unwrap();
        let (sender, rebooted) = mpsc::channel();
        target.on_notice(move |_| sender.send(()).unwrap_or_default());
        target.resume().unwrap();
        rebooted.recv_timeout(Duration::from_secs(60)).unwrap();
        let begin = Instant::now();
        while testimony(target.memory()).is_none_or(|told| told.vcpus != 2) {
            assert!(begin.elapsed() < Duration::from_secs(60) && target.outcome().is_none());
            std::thread::sleep(Duration::from_millis(2));
        }
        target.pause().unwrap();
        assert!(!target.shared.control.awaits_reset());
        // One that never resets refuses such a state.
        let host = Host::open().unwrap();
        let config = MachineConfig::new(&host, 32 << 20, 2).unwrap();
        let config = MachineConfig { serial: SerialOutput::Null, ..config };
        let refused = Machine::build(&host, config).unwrap().load(&state).unwrap_err().to_string();
        assert!(refused.contains("pending reset"), "{refused}");
    }

    #[test]
    fn a_machine_that_was_reset_is_as_one_that_never_ran() {
        let used = machine();
        used.resume().unwrap();
        let begin = Instant::now();
        while testimony(used.memory()).is_none_or(|told| told.vcpus != 2) {
            assert!(begin.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(50));
        used.pause().unwrap();
        let parts = |machine: &Machine| timeless(&machine.save().unwrap(), 2).unwrap();
        let (before, fresh) = (parts(&used), parts(&machine()));
        reset(&used.shared).unwrap();
        let differing = |parts: &[(String, Vec<u8>)]| -> Vec<String> {
            assert_eq!(parts.len(), fresh.len());
            parts.iter().zip(&fresh).filter(|(a, b)| a != b).map(|((name, _), _)| name.clone()).collect()
        };
        assert!(differing(&before).len() > 10, "{:?}", differing(&before));
        assert_eq!(differing(&parts(&used)), [""; 0]);
    }

    #[test]
    fn a_storm_of_resets_is_told_from_a_guest_that_is_reset_now_and_then() {
        let (mut recent, begin) = (Recent::default(), Instant::now());
        let mut at = |ms: u64| recent.admit(begin + Duration::from_millis(ms));
        assert!((0..100).all(|number| at(number * 500)), "every half second for a minute");
        assert!((0..4).all(|number| at(60_000 + number)));
        assert!(at(60_004) && !at(60_005), "the sixth within two seconds");
    }
}
