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

use crate::virtio::net::Announcing;

/// Calls `round` as often as `announcing` says, until it returns false. Without a thread for it, it is called
/// once.
pub(super) fn start(announcing: Announcing, round: impl Fn() -> bool + Clone + Send + 'static) {
    if announcing.rounds == 0 {
        return;
    }
    let only_once = round.clone();
    let rounds = move || {
        round();
        announcing
            .waits()
            .take_while(|wait| {
                std::thread::sleep(*wait);
                round()
            })
            .for_each(drop);
    };
    if std::thread::Builder::new().name("announce".into()).spawn(rounds).is_err() {
        only_once();
    }
}
