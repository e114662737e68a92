//! Guests of several sizes move from process to process, ten times, while they rewrite their working
//! sets; an eleventh move brings each into the test, where it verifies all it has.

use migration::report::Report;
use std::time::Instant;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, hop, receiver};

const MOVES: usize = 10;
const MIB: u64 = 1 << 20;

fn chain(memory: u64, vcpus: u32, working_set: u64) {
    let guest = Guest { memory, vcpus, working_set, fill: working_set / 2 };
    let folder = tempfile::tempdir().unwrap();
    let began = Instant::now();
    let mut node = guest.start(folder.path(), "guest-0");
    let mut reports: Vec<Report> = Vec::new();
    for number in 1..=MOVES {
        let (mut next, address) = receiver(folder.path(), &format!("guest-{number}"));
        reports.push(hop(&node, &mut next, address));
        // The process that the guest has left has nothing more to do.
        node.expect("moved").unwrap();
        node = next;
    }
    let testimony = settle(&node, &guest);
    let mut blackouts: Vec<_> = reports.iter().map(|r| r.blackout_us).collect();
    blackouts.sort_unstable();
    let rewritten: u64 = reports.iter().flat_map(|r| &r.rounds[1..]).map(|r| r.sent).sum();
    say::figures(
        &format!("chain of {} MiB, {vcpus} vCPU", memory / MIB),
        format_args!(
            "{} moves in {:.1} s, {} pages rewritten in {} passes ({} MiB sent again), {} timer ticks, median blackout \
             {:.1} ms; all right",
            MOVES + 1,
            began.elapsed().as_secs_f64(),
            testimony.pages,
            testimony.passes,
            rewritten / MIB,
            testimony.ticks,
            blackouts[MOVES / 2] as f64 / 1e3,
        ),
    );
    assert!(rewritten > 0, "the working set was not rewritten while it moved");
}

fn chains(memory: u64, working_set: u64) {
    let available = vmm::memory::host::available().unwrap_or(u64::MAX);
    if available < memory + 512 * MIB {
        let (wanted, available) = (memory / MIB, available / MIB);
        say::skipped(
            &format!("chains of {wanted} MiB"),
            format_args!("{available} MiB of memory are available; free some"),
        );
        return;
    }
    [1, 2, 4].into_iter().for_each(|vcpus| chain(memory, vcpus, working_set));
}

#[test]
fn of_16_mib() {
    chains(16 * MIB, 4 * MIB);
}

#[test]
fn of_1_gib() {
    chains(1024 * MIB, 16 * MIB);
}

/// The last quarter of a GiB lies above the hole below 4 GiB, and the working set on both sides of it.
#[test]
fn of_3_gib_and_a_quarter() {
    chains((3 * 1024 + 256) * MIB, 24 * MIB);
}

#[test]
fn of_6_gib() {
    chains(6 * 1024 * MIB, 32 * MIB);
}
