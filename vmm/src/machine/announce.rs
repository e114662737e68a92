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
//! A round whose time comes while the guest is paused is made as soon as it runs again, and one whose time
//! has passed while the thread got no processor is made at once: none is left out.

use crate::virtio::net::Announcing;
use std::thread;
use std::time::{Duration, Instant};

/// How often it is looked whether a paused guest runs again.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// What became of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Round {
    /// The network was told.
    Told,
    /// The guest does not run at this moment.
    NotNow,
    /// The machine is gone.
    Over,
}

/// Has `round` tell the network as often as `announcing` says, or until the machine is gone. Without a thread
/// for it, it is called once.
pub(super) fn start(announcing: Announcing, round: impl Fn() -> Round + Clone + Send + 'static) {
    if announcing.rounds == 0 {
        return;
    }
    let (only_once, began) = (round.clone(), Instant::now());
    let rounds = move || {
        for due in announcing.times() {
            thread::sleep((began + due).saturating_duration_since(Instant::now()));
            loop {
                match round() {
                    Round::Told => break,
                    Round::NotNow => thread::sleep(LOOK_AGAIN),
                    Round::Over => return,
                }
            }
        }
    };
    if thread::Builder::new().name("announce".into()).spawn(rounds).is_err() {
        only_once();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// What becomes of the first `answers.len()` calls; all others have told the network.
    fn calls(answers: &'static [Round]) -> usize {
        let (sender, calls) = mpsc::channel();
        let made = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let brief = Duration::from_millis(1);
        let announcing = Announcing { rounds: 5, initial: brief, step: brief, most: brief };
        start(announcing, move || {
            let number = made.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            sender.send(()).unwrap();
            // As a thread without a processor.
            thread::sleep(Duration::from_millis(10));
            answers.get(number).copied().unwrap_or(Round::Told)
        });
        // Until the thread has ended, and with it the sender.
        calls.iter().count()
    }

    #[test]
    fn no_round_is_left_out() {
        assert_eq!(calls(&[]), 5, "late as it is");
        assert_eq!(calls(&[Round::Told, Round::NotNow, Round::NotNow, Round::NotNow]), 5 + 3);
        assert_eq!(calls(&[Round::Told, Round::Over]), 2);
    }
}
