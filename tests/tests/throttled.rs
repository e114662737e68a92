//! A guest that writes faster than its memory can be sent is slowed, and moves.

use migration::policy::OnStall;
use migration::report::Verdict;
use std::time::Duration;
use whimbrel::api::model::{MigrationRequest, VmState};
use whimbrel_tests::inspect::settle;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, assert_runs, migrate, receiver, request, wait_until};

/// It rewrites all of 4 MiB many times a second.
const BUSY: Guest = Guest { memory: 16 << 20, vcpus: 1, working_set: 4 << 20, fill: 0 };

/// Bits a second: what it rewrites travels in 1.7 s.
const BANDWIDTH: u64 = 20_000_000;

#[test]
fn a_guest_that_does_not_converge_is_slowed_until_it_does() {
    let folder = tempfile::tempdir().unwrap();
    let source = BUSY.start(folder.path(), "source");
    let (mut destination, address) = receiver(folder.path(), "destination");
    let mut policy: MigrationRequest = request(address);
    policy.on_stall = OnStall::Throttle;
    policy.bandwidth_bps = Some(BANDWIDTH);
    policy.downtime_limit_ms = 300;
    // What makes it fail lets it go.
    policy.timeout_s = Some(3);
    let report = migrate(&source, &policy);
    assert_eq!(report.verdict, Verdict::Stayed, "{report:?}");
    destination.expect("refused").unwrap();
    assert_runs(&source);
    wait_until("the receiver waits again", || destination.status().unwrap().state == VmState::Waiting);

    policy.timeout_s = None;
    let report = migrate(&source, &policy);
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    destination.expect("arrived").unwrap();
    let held = Duration::from_micros(report.throttled_us.iter().sum());
    let slowed = report.rounds.iter().filter(|round| round.throttled_to.is_some()).count();
    assert!(report.over_limit.is_none() && held > Duration::ZERO && slowed > 0, "{report:?}");
    settle(&destination, &BUSY);
    say::figures(
        "a guest that is slowed",
        format_args!(
            "{} rounds, {slowed} of them slowed, {held:.1?} of {:.1} s, blackout {:.1} ms",
            report.rounds.len(),
            report.total_us as f64 / 1e6,
            report.blackout_us as f64 / 1e3
        ),
    );
}
