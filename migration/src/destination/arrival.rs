//! What follows once the guest runs here.

use crate::link::ControlLink;
use crate::machine::DestinationMachine;
use crate::memory::{PAGE_SIZE, Ram};
use crate::message::{Epilogue, MAX_REMARKS, Message};
use crate::scan;
use crate::unwind;
use std::time::Duration;

/// A guest that has arrived and runs.
///
/// The source waits for some last words, for five seconds at most: what the migration cost here, and what the
/// machine has to [remark](DestinationMachine::after_run). They are sent when the arrival is
/// [concluded](Self::conclude), or else when it is dropped. Losing the link meanwhile changes nothing.
///
/// Dropping it without `conclude` also drops the machine. That ends the guest, unless the VMM has kept what
/// runs it.
#[must_use = "dropping it drops the machine"]
pub struct Arrival<'a, M: DestinationMachine> {
    /// `None` once it has been given away.
    machine: Option<M>,
    link: &'a mut dyn ControlLink,
    sender: String,
    cpu: Duration,
}

impl<'a, M: DestinationMachine> Arrival<'a, M> {
    pub(super) fn new(machine: M, link: &'a mut dyn ControlLink, sender: String, cpu: Duration) -> Self {
        Arrival { machine: Some(machine), link, sender, cpu }
    }

    /// The machine. Its guest runs.
    pub fn machine(&self) -> &M {
        match &self.machine {
            Some(machine) => machine,
            // Only `conclude` takes it, and takes the arrival with it.
            None => unreachable!("an arrival has its machine until it is concluded"),
        }
    }

    /// Who sent it, as the source called itself: printable, at most 2 KiB.
    pub fn sender(&self) -> &str {
        &self.sender
    }

    /// Tells the source how it went, which ends the migration there, and returns the machine. Takes as long
    /// as [`DestinationMachine::after_run`] does.
    pub fn conclude(mut self) -> M {
        self.tell();
        match self.machine.take() {
            Some(machine) => machine,
            None => unreachable!("an arrival has its machine until it is concluded"),
        }
    }

    fn tell(&mut self) {
        let Some(machine) = &mut self.machine else { return };
        // The guest does not end for the lack of a remark. While a panic unwinds, nothing may panic again.
        let remarks = match std::thread::panicking() {
            true => None,
            false => unwind::catch("after run", || Ok(machine.after_run())).ok().flatten(),
        };
        let epilogue = Epilogue {
            remarks: remarks.filter(|text| text.len() <= MAX_REMARKS),
            cpu_us: self.cpu.as_micros() as u64,
            resident: resident(&machine.ram()),
        };
        // The guest runs here whether or not the source hears of it.
        let _ = self.link.send(&Message::Epilogue(epilogue).encode());
    }
}

impl<M: DestinationMachine> Drop for Arrival<'_, M> {
    fn drop(&mut self) {
        self.tell();
    }
}

/// Bytes of RAM that exist in memory.
fn resident(ram: &Ram) -> u64 {
    let mut pages = 0;
    for region in ram.regions() {
        scan::existing(region, 0, region.pages(), |_, n| pages += n);
    }
    pages * PAGE_SIZE
}
