//! Where a receiver's guests come from: a port of its own, or the gate of a host.

use super::place::{Place, SharedPlace, lock};
use migration::transport::Token;
use migration::{Code, Failure};
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::thread;
use std::time::Duration;
use transport_tcp::Feed;
use vmm::admission::{Admission, Admitted, Guest};
use whimbrel::host::claim;
use whimbrel::host::gate::{self, Gate};

/// How often a name is wanted whose machine is about to give it up, and how long between.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(50);

/// A process at the gate of a host. Who comes there needs a name that is free, and the service's leave.
pub struct AtGate {
    place: SharedPlace,
    /// What the names that guests bring are on this host.
    names: Option<Arc<dyn Admission>>,
    /// Once there may be threads.
    gate: OnceLock<Gate>,
}

impl fmt::Debug for AtGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AtGate").field("gate", &self.gate).finish_non_exhaustive()
    }
}

impl AtGate {
    /// Guests that may come get what `names` gives them.
    pub fn new(place: SharedPlace, names: Option<Arc<dyn Admission>>) -> Self {
        AtGate { place, names, gate: OnceLock::new() }
    }

    /// Goes there, and gives to `feed` who comes.
    pub fn stand(&self, path: &Path, feed: Feed) -> anyhow::Result<()> {
        // One that is down by now is nobody's.
        let gate = Gate::stand(path.into(), move |stream| drop(feed.give(stream)))?;
        let _ = self.gate.set(gate);
        Ok(())
    }

    /// Whether nobody will come any more.
    pub fn is_over(&self) -> bool {
        self.gate.get().is_some_and(Gate::is_over)
    }

    /// A session has begun.
    pub fn session(&self, token: Token) {
        if let Some(gate) = self.gate.get() {
            gate.session(token);
        }
    }

    /// Its guest runs here.
    pub fn settled(&self, name: &str, memory: u64) {
        if let Some(gate) = self.gate.get() {
            gate.settled(gate::Guest { name: name.into(), memory });
        }
    }
}

impl Admission for AtGate {
    fn admit(&self, guest: &Guest<'_>) -> Result<Admitted, Failure> {
        claim(&self.place, guest.name)?;
        let reservation = Name(Arc::downgrade(&self.place));
        let Some(gate) = self.gate.get() else {
            return Err(Failure::new(Code::OTHER, "this process is not at the gate of its host"));
        };
        gate.ask(gate::Guest { name: guest.name.into(), memory: guest.memory })?;
        // Taps are made for a guest that may come.
        let given = self.names.as_ref().map(|names| names.admit(guest)).transpose()?.unwrap_or_default();
        Ok(Admitted { reservation: Some(Box::new((reservation, given.reservation))), ..given })
    }
}

/// The name of a guest that comes, until it comes to nothing or has ended.
struct Name(Weak<Mutex<Place>>);

impl Drop for Name {
    fn drop(&mut self) {
        if let Some(place) = self.0.upgrade() {
            lock(&place).give_name_back();
        }
    }
}

/// Takes the guest's name. A machine that has moved away is about to give it up.
fn claim(place: &SharedPlace, name: &str) -> Result<(), Failure> {
    for attempt in 1.. {
        let Err(error) = lock(place).name(name) else { break };
        let in_use = matches!(error.downcast_ref(), Some(claim::Error::InUse(_)));
        if !in_use || attempt == ATTEMPTS {
            return Err(Failure::new(Code::LIMITS, error));
        }
        thread::sleep(PAUSE);
    }
    Ok(())
}
