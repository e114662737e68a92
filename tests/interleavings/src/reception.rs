//! A receiver that takes a guest in, and an operator who wants it to end.

use crate::{explore, finds};

taken!(slot);
taken!(slot_is_filled_in_silence);
taken!(slot_is_filled_without_the_lock);
taken!(slot_takes_in_who_comes_late);

/// What a receiver tells of itself, as far as the place of its guest has to do with it.
pub mod api {
    /// Nobody listens.
    pub mod events {
        use super::model::Event;

        #[derive(Default)]
        pub struct Events;

        impl Events {
            pub fn add(&self, _: Event) {}
        }
    }

    pub mod model {
        use crate::Failure;
        use crate::destination::Progress;
        use crate::security::Secured;
        use std::net::SocketAddr;

        #[derive(Debug, PartialEq)]
        pub enum VmState {
            Waiting,
            Receiving,
        }

        pub struct Vm {
            pub name: String,
            pub state: VmState,
            pub memory: u64,
            pub vcpus: u32,
            pub pid: u32,
            pub guest: Option<()>,
            pub trouble: Option<String>,
        }

        #[derive(Clone)]
        pub struct Arrival {
            pub number: u64,
            pub from: SocketAddr,
            pub secured: Option<Secured>,
            pub began: String,
            pub ended: Option<String>,
            pub sender: Option<String>,
            pub progress: Progress,
            pub failure: Option<Failure>,
        }

        pub struct Event;

        pub enum EventKind {
            ArrivalBegun,
            ArrivalEnded,
        }

        impl Event {
            pub fn state(_: &str, _: VmState) -> Self {
                Event
            }

            pub fn arrival(_: EventKind, _: &str, _: Arrival) -> Self {
                Event
            }
        }
    }
}

/// How a connection is protected.
pub mod security {
    #[derive(Clone)]
    pub struct Secured;
}

/// A guest that has arrived.
pub mod instance {
    use super::api::events::Events;
    use super::api::model::Vm;
    use crate::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    pub struct Instance(AtomicBool);

    impl Instance {
        pub fn quit(&self) {
            self.0.store(true, Ordering::Release);
        }

        pub fn has_quit(&self) -> bool {
            self.0.load(Ordering::Acquire)
        }

        pub fn tell(&self, _: &Events) {}

        pub fn name(&self) -> &str {
            "web1"
        }

        pub fn status(&self) -> Vm {
            unreachable!("nobody asks")
        }
    }
}

macro_rules! scenarios {
    ($slot:ident) => {
        pub mod $slot {
            use super::super::$slot::Slot;
            use crate::destination::Phase;
            use crate::instance::Instance;
            use crate::{Code, Failure};
            use loom::thread;
            use std::sync::Arc;

            /// As `whimbrel receive` does: looks whether it is to end, takes in the next caller, of whom
            /// there are so many, and stays with the first guest that arrives.
            fn receive(slot: &Slot, callers: usize) {
                for caller in 0.. {
                    if slot.told_to_quit() {
                        return slot.close();
                    }
                    if caller >= callers {
                        thread::yield_now();
                        continue;
                    }
                    let Some(monitor) = slot.begin(([192, 0, 2, 1], 7).into(), None) else { continue };
                    monitor.enter(Phase::Switchover);
                    let wanted = !slot.told_to_quit() || monitor.cancelled();
                    assert!(wanted, "a guest is taken in that nobody wants any more");
                    if monitor.cancelled() {
                        monitor.enter(Phase::Discarded);
                        slot.end(Err(Failure::new(Code::CANCELLED, "cancelled")));
                        continue;
                    }
                    // `Commit` is here.
                    monitor.enter(Phase::Committed);
                    monitor.enter(Phase::Arrived);
                    slot.put(Arc::new(Instance::default()));
                    slot.end(Ok("a sender"));
                    return;
                }
            }

            pub fn quits(callers: usize) {
                let slot = Arc::new(Slot::receiver(None));
                let receiver = thread::spawn({
                    let slot = slot.clone();
                    move || receive(&slot, callers)
                });
                let told = slot.quit();
                receiver.join().unwrap();
                match slot.get() {
                    None => assert!(told.is_ok(), "no guest, and {told:?}"),
                    Some(instance) => {
                        assert_eq!(instance.has_quit(), told.is_ok(), "a guest of whom nobody was told");
                    }
                }
            }
        }
    };
}

mod over {
    scenarios!(slot);
    scenarios!(slot_is_filled_in_silence);
    scenarios!(slot_is_filled_without_the_lock);
    scenarios!(slot_takes_in_who_comes_late);
}

#[test]
fn a_receiver_that_was_told_to_quit_has_no_guest_or_says_so() {
    explore(3, || over::slot::quits(1));
    explore(2, || over::slot::quits(2));
}

#[test]
fn every_broken_rule_is_found() {
    finds(3, || over::slot_is_filled_in_silence::quits(1));
    finds(3, || over::slot_is_filled_without_the_lock::quits(1));
    finds(3, || over::slot_takes_in_who_comes_late::quits(1));
}
