//! Telling the network where a guest is once it runs somewhere else.
//!
//! Switches send frames where they last saw their address come from. A guest that has moved sends
//! sooner or later by itself, but one that waits for others may wait for long. So whoever runs it
//! now sends, for each of its network interfaces, a broadcast frame with the guest's address as its
//! sender, and asks the guest's driver to announce its own protocol addresses, which is heard on
//! networks that only the guest knows of (its VLANs). Any of it may be lost, so it is done in
//! several rounds.
//!
//! It is done from a thread of its own, out of the blackout, and only while the guest runs here:
//! a pause waits for a round that has begun, and no round begins while the guest is paused or gone.

use crate::machine::Shared;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How often the network is told, and when. The first time is at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcing {
    /// How often; 0 for not at all.
    pub rounds: u32,
    /// From the first time to the second.
    pub initial: Duration,
    /// How much longer each wait is than the one before.
    pub step: Duration,
    /// No wait is longer.
    pub most: Duration,
}

impl Default for Announcing {
    fn default() -> Self {
        let [initial, step, most] = [50, 100, 550].map(Duration::from_millis);
        Announcing { rounds: 5, initial, step, most }
    }
}

impl Announcing {
    /// The waits between rounds.
    fn waits(self) -> impl Iterator<Item = Duration> {
        let wait = move |number| self.initial.saturating_add(self.step.saturating_mul(number)).min(self.most);
        (0..self.rounds.saturating_sub(1)).map(wait)
    }
}

/// Starts to tell the network. Without a thread for it the network is told once.
pub(crate) fn start(shared: &Arc<Shared>, announcing: &Announcing) {
    let announcing = *announcing;
    if announcing.rounds == 0 {
        return;
    }
    let machine = Arc::downgrade(shared);
    let rounds = move || {
        round(&machine);
        announcing
            .waits()
            .take_while(|wait| {
                std::thread::sleep(*wait);
                round(&machine)
            })
            .for_each(drop);
    };
    if std::thread::Builder::new().name("announce".into()).spawn(rounds).is_err() {
        shared.devices.announce();
    }
}

/// One round; false if the machine is no more.
fn round(machine: &Weak<Shared>) -> bool {
    let Some(shared) = machine.upgrade() else { return false };
    if shared.is_running() {
        shared.devices.announce();
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_limit() {
        let waits = |announcing: Announcing| announcing.waits().map(|w| w.as_millis()).collect::<Vec<_>>();
        assert_eq!(waits(Announcing::default()), [50, 150, 250, 350]);
        assert_eq!(
            waits(Announcing { rounds: 8, ..Announcing::default() }),
            [50, 150, 250, 350, 450, 550, 550]
        );
        assert_eq!(waits(Announcing { rounds: 1, ..Announcing::default() }), [0; 0]);
        assert_eq!(waits(Announcing { rounds: 0, ..Announcing::default() }), [0; 0]);
    }
}
