//! A guest whose writers are slowed.

mod common;

use common::guests::{self, AP_LOOPS, LOOPS, WRITES};
use common::{boot, machine, wait_above};
use migration::dirty::DirtySet;
use migration::machine::{SourceMachine, Throttle};
use migration::memory::PAGE_SIZE;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use whimbrel_vmm::Machine;

/// Pages that the first vCPU writes over and over.
const PAGES: u64 = (2 << 20) / PAGE_SIZE;

/// What it may write in a second.
const LIMIT: Throttle = Throttle { limit: 256 << 10, dirty_rate: 1 << 30 };

/// Has all pages sent, as it were, over and over for a while. How many were dirty, and for how long.
fn dirtied(machine: &Machine, lasts: Duration) -> (u64, Duration) {
    let ram = SourceMachine::ram(machine);
    let mut dirty = DirtySet::empty(&ram);
    let (began, mut pages) = (Instant::now(), 0);
    while began.elapsed() < lasts {
        dirty.clear();
        machine.collect_dirty(&mut dirty).unwrap();
        pages += dirty.count();
        for region in 0..ram.regions().len() {
            machine.clear_dirty(region, 0, dirty.words(region)).unwrap();
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    (pages, began.elapsed())
}

/// A guest whose first vCPU writes to all of them, and whose second one counts; what is written is tracked.
fn guest() -> Machine {
    let machine = machine(16, 2);
    machine.boot(&boot(guests::smp())).unwrap();
    machine.resume().unwrap();
    wait_above(&machine, AP_LOOPS + 4, 0);
    machine.write_memory().unwrap().memory().write_obj(1u32, GuestAddress(WRITES)).unwrap();
    // Pages that were never there are not counted.
    wait_above(&machine, LOOPS, common::peek(&machine, LOOPS) + 1);
    machine.start_tracking().unwrap();
    dirtied(&machine, Duration::from_millis(200));
    machine
}

#[test]
fn who_writes_is_slowed_to_the_limit() {
    let machine = guest();
    machine.throttle(Some(LIMIT)).unwrap();
    let (pages, took) = dirtied(&machine, Duration::from_secs(1));
    let allowed = (took.as_secs_f64() * LIMIT.limit as f64) as u64 / PAGE_SIZE;
    // Before it was first held, it may have written all of them, and some since it was looked at last.
    assert!(pages < allowed + 3 * PAGES, "{pages} pages, {allowed} are allowed");
    let held = machine.throttled();
    assert!(held[0] > Duration::ZERO, "{held:?}");

    // Who is held can be paused, and goes on where it was.
    machine.pause().unwrap();
    machine.save().unwrap();
    machine.resume().unwrap();
    dirtied(&machine, Duration::from_millis(200));
    machine.throttle(None).unwrap();
    let loops = common::peek(&machine, LOOPS);
    wait_above(&machine, LOOPS, loops + 10);
    // Again, and dropped while it is held.
    machine.throttle(Some(LIMIT)).unwrap();
    dirtied(&machine, Duration::from_millis(200));
}

#[test]
#[ignore = "needs a KVM that counts who writes: ci/rdma runs it in the lab"]
fn who_does_not_write_is_left_alone() {
    let machine = guest();
    machine.throttle(Some(LIMIT)).unwrap();
    let loops = common::peek(&machine, AP_LOOPS + 4);
    dirtied(&machine, Duration::from_secs(1));
    let held = machine.throttled();
    assert!(held[0] > Duration::ZERO && held[1] == Duration::ZERO, "{held:?}");
    wait_above(&machine, AP_LOOPS + 4, loops);
}
