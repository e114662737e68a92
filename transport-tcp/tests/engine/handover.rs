//! What a switchover takes beyond memory is part of the prediction, and the downtime limit counts it.

use crate::guest::{Guest, Host};
use crate::migrate;
use migration::Code;
use migration::policy::Policy;
use migration::report::{Report, Verdict};
use std::time::Duration;

const SAVE: Duration = Duration::from_millis(300);

fn slow_guest(estimate: Option<Duration>) -> Guest {
    let mut guest = Guest::start();
    (guest.save_takes, guest.estimate) = (SAVE, estimate);
    guest
}

fn limit(limit: Duration) -> Policy {
    Policy::default().with_downtime_limit(limit)
}

/// The shortest blackout that was predicted after any round but the last, which is in the blackout.
fn predicted(report: &Report) -> Duration {
    let rounds = report.rounds.iter().map(|round| round.predicted_blackout_us).filter(|us| *us > 0);
    Duration::from_micros(rounds.min().expect("a prediction"))
}

#[test]
fn what_both_machines_say_is_predicted() {
    let guest = slow_guest(Some(SAVE));
    let host = Host { estimate: Some(Duration::from_millis(50)), ..Host::default() };
    let moved = migrate(&guest, host, |migration| migration.policy(limit(Duration::from_secs(5))));
    assert_eq!(moved.report.verdict, Verdict::Moved, "{:?}", moved.report.failure);
    assert!(predicted(&moved.report) >= Duration::from_millis(350), "{:?}", moved.report.rounds);
    // What was predicted at least was felt at least: saving is a part of the blackout.
    assert!(moved.report.blackout_us >= 300_000, "{}", moved.report.blackout_us);
    assert_eq!(moved.report.over_limit, None);
}

#[test]
fn a_handover_over_the_limit_is_not_tried() {
    let guest = slow_guest(Some(SAVE));
    let moved = migrate(&guest, Host::default(), |migration| migration.policy(limit(SAVE)));
    let why = moved.report.failure.unwrap();
    assert_eq!((moved.report.verdict, why.code), (Verdict::Stayed, Code::NOT_CONVERGING), "{why}");
    assert!(why.message.contains("for the handover itself"), "{why}");
    assert!(guest.runs() && guest.pauses() == 0, "the guest felt it");
}

#[test]
fn what_one_move_took_the_next_may_be_told() {
    let says_nothing = slow_guest(None);
    let moved = migrate(&says_nothing, Host::default(), |migration| migration);
    let took = moved.report.handover().expect("it has moved");
    assert!(took >= SAVE, "{took:?}");
    let next = slow_guest(None);
    let moved = migrate(&next, Host::default(), |migration| migration.policy(limit(SAVE)).handover(took));
    assert_eq!(moved.report.failure.expect("known to take longer").code, Code::NOT_CONVERGING);
    assert_eq!(next.pauses(), 0);
    let moved = migrate(&next, Host::default(), |migration| {
        migration.policy(limit(Duration::from_secs(5))).handover(took)
    });
    assert!(predicted(&moved.report) >= took, "{:?}", moved.report.rounds);
    assert_eq!(moved.report.verdict, Verdict::Moved);
}
