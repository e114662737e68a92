//! What threads share by hand, under every interleaving of them within bounds.
//!
//! The code under test is that of the other crates: `build.rs` takes the files and puts [loom]'s locks,
//! condition variables and atomics in the place of the standard library's. Loom then runs each test again and
//! again, until it has seen every order of what the threads do to them that differs, with what the memory
//! model lets each load return. Orders with more than a stated number of preemptions are left out where there
//! would be too many. No wait ends by time, so that a wake-up that is lost shows as a deadlock.
//!
//! Around that code is a model of what it has to do with: a vCPU that KVM runs and a signal stops, a
//! doorbell, a guest that fills a queue, a receiver that takes a guest in.
//!
//! Each rule is also broken on purpose (see `BROKEN` in `build.rs`). Loom has to find every one of these.
//!
//! | under test | what has to hold |
//! |---|---|
//! | `vcpu/control.rs` | a pause returns, and no vCPU runs then; no kick is lost; all threads end |
//! | `awake.rs`, `ended.rs` | nothing is announced in a pause; a thread that rests ends when it is told |
//! | `virtio/service.rs` | nothing is served in a pause; what the guest offered is served; the thread ends |
//! | `memory/write_log.rs` | a page that was written is sent as it is then, or logged |
//! | `migration/src/monitor.rs` | an order wakes who waits; a stop reaches each plane; nothing settled expires |
//! | `transport-tcp/src/streams.rs` | behind the fence no lane writes, and none is let in |
//! | `slot.rs` | a receiver that was told to quit has no guest, or whoever told it hears of the guest |
//!
//! [loom]: https://docs.rs/loom

#![cfg(test)]
// Of the files under test, not all is used here.
#![allow(dead_code)]

/// Includes a file that `build.rs` has taken.
macro_rules! taken {
    ($module:ident) => {
        #[allow(unused_imports, clippy::all)]
        pub(crate) mod $module {
            include!(concat!(env!("OUT_DIR"), "/", stringify!($module), ".rs"));
        }
    };
}

mod lanes;
mod memory;
mod monitors;
mod reception;
mod rest;
mod sync;
mod vcpus;
mod virtio;

taken!(destination);
taken!(lock);
taken!(pacer);

// What the files name.
extern crate self as migration;
use engine::{Code, Failure, failure, report, transport};
use reception::{api, instance, security};

/// Checks every order of what happens in `scenario`, with at most so many preemptions.
fn explore(preemptions: usize, scenario: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(preemptions);
    model.check(scenario);
}

/// Checks that it is found that something is wrong with a scenario.
fn finds(preemptions: usize, scenario: impl Fn() + Send + Sync + std::panic::UnwindSafe + 'static) {
    let found = std::panic::catch_unwind(|| explore(preemptions, scenario));
    let Err(panic) = found else { panic!("a rule that is broken went unnoticed") };
    let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
    assert!(!text.contains("exceeded"), "loom gave up: {text}");
}
