//! Operators watch a migration, hold it back, hurry it and call it off.

use crate::guest::{Guest, Host};
use crate::{PATIENCE, migrate, migrate_watched};
use migration::Code;
use migration::monitor::{Monitor, Phase, Progress};
use migration::policy::Policy;
use migration::report::Verdict;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// Keeps a list of all that `monitor` tells.
fn record(monitor: &Monitor) -> Arc<Mutex<Vec<Progress>>> {
    let told = Arc::new(Mutex::new(Vec::new()));
    let list = Arc::clone(&told);
    monitor.on_progress(move |progress| list.lock().unwrap().push(progress.clone()));
    told
}

fn wait_until(what: &str, mut met: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !met() {
        assert!(Instant::now() < deadline, "never: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A policy under which a guest that writes all the time never gets to a switchover.
fn never() -> Policy {
    let policy = Policy::default().with_downtime_limit(Duration::ZERO);
    policy.with_max_rounds(u32::MAX).with_stall_rounds(u32::MAX)
}

#[test]
fn phases_and_rounds_are_told_and_nothing_else() {
    let (guest, monitor) = (Guest::start(), Monitor::default());
    let told = record(&monitor);
    let moved = migrate_watched(&guest, Host::default(), &monitor, |migration| migration);
    assert_eq!(moved.report.verdict, Verdict::Moved);
    let told = told.lock().unwrap();
    let mut phases: Vec<_> = told.iter().map(|progress| progress.phase).collect();
    phases.dedup();
    assert_eq!(phases, [Phase::Precopy, Phase::Switchover, Phase::Committed, Phase::Moved]);
    // Each of the four, and each round but the one in the blackout.
    assert_eq!(told.len(), 4 + moved.report.rounds.len() - 1, "{told:?}");
    let last = told.last().unwrap();
    assert_eq!(last.sent, moved.report.sent());
    assert_eq!(told[1].predicted_blackout_us, Some(moved.report.rounds[0].predicted_blackout_us));
    // Before the first round has ended nobody knows.
    assert_eq!((told[0].dirty_rate, told[0].predicted_blackout_us), (None, None));
}

#[test]
fn an_operator_may_switch_over_a_guest_that_does_not_converge() {
    let (guest, monitor) = (Guest::start(), Arc::new(Monitor::default()));
    let hurried = Arc::downgrade(&monitor);
    monitor.on_progress(move |progress| {
        if progress.phase == Phase::Precopy && progress.round == 3 {
            hurried.upgrade().unwrap().switch_now();
        }
    });
    let moved = migrate_watched(&guest, Host::default(), &monitor, |migration| migration.policy(never()));
    assert_eq!(moved.report.verdict, Verdict::Moved, "{:?}", moved.report.failure);
    let why = moved.report.over_limit.expect("over a limit of nothing");
    assert!(why.contains("an operator asked for the switchover"), "{why}");
    // Rounds 0 to 3, and the one in the blackout.
    assert_eq!(moved.report.rounds.len(), 5);
    assert!(moved.arrived.unwrap().is_like(&guest));
}

#[test]
fn a_migration_waits_for_the_word_and_the_guest_runs_on() {
    let (guest, monitor) = (Guest::start(), Monitor::default());
    let told = record(&monitor);
    let moved = thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("ready", || monitor.progress().phase == Phase::ReadyToSwitch);
            // What it writes now is sent although nobody has said anything yet.
            let before = monitor.progress();
            guest.write(5, 1);
            guest.write(6, 2);
            wait_until("a round while waiting", || monitor.progress().round > before.round + 1);
            assert!(monitor.progress().sent >= before.sent + 2 * 4096);
            guest.write(7, 3);
            assert!(guest.runs() && guest.pauses() == 0);
            assert_eq!(monitor.progress().phase, Phase::ReadyToSwitch);
            monitor.proceed();
        });
        migrate_watched(&guest, Host::default(), &monitor, |migration| {
            migration.pause_before_switchover(PATIENCE)
        })
    });
    assert_eq!(moved.report.verdict, Verdict::Moved, "{:?}", moved.report.failure);
    assert!(moved.arrived.unwrap().is_like(&guest));
    let mut phases: Vec<_> = told.lock().unwrap().iter().map(|progress| progress.phase).collect();
    phases.dedup();
    use Phase::*;
    assert_eq!(phases, [Precopy, ReadyToSwitch, Precopy, Switchover, Committed, Moved]);
    // The rounds of the wait are counted, and are one entry all the same.
    let rounds = moved.report.rounds;
    assert!(rounds.last().unwrap().round as usize >= rounds.len(), "{rounds:?}");
}

#[test]
fn a_wait_without_a_word_ends_and_the_guest_stays() {
    let (guest, monitor) = (Guest::start(), Monitor::default());
    let moved = migrate_watched(&guest, Host::default(), &monitor, |migration| {
        migration.pause_before_switchover(Duration::from_millis(1))
    });
    let why = moved.report.failure.unwrap();
    assert_eq!((moved.report.verdict, why.code), (Verdict::Stayed, Code::TIMEOUT), "{why}");
    assert!(guest.runs() && guest.pauses() == 0 && moved.arrived.is_err());
}

#[test]
fn a_wait_may_be_called_off() {
    let (guest, monitor) = (Guest::start(), Monitor::default());
    let moved = thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("ready", || monitor.progress().phase == Phase::ReadyToSwitch);
            monitor.cancel();
        });
        migrate_watched(&guest, Host::default(), &monitor, |migration| {
            migration.pause_before_switchover(Duration::MAX)
        })
    });
    let why = moved.report.failure.unwrap();
    assert_eq!((moved.report.verdict, why.code), (Verdict::Stayed, Code::CANCELLED), "{why}");
    assert!(guest.runs() && guest.pauses() == 0);
}

#[test]
fn a_cap_on_the_bandwidth_holds_until_it_is_taken_off() {
    /// Bytes a second: the guest's 300 pages would take three seconds.
    const CAP: u64 = 400 << 10;
    /// What each lane may have sent before it pays for it.
    const AHEAD: u64 = 64 << 10;
    let (guest, monitor) = (Guest::start(), Monitor::default());
    let moved = thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("half of it", || monitor.progress().sent >= 512 << 10);
            let Progress { sent, elapsed_us, .. } = monitor.progress();
            let most =
                CAP * elapsed_us / 1_000_000 + AHEAD * u64::from(whimbrel_transport_tcp::DEFAULT_STREAMS);
            assert!(sent <= most + CAP / 100, "{sent} bytes in {elapsed_us} us, {most} at most");
            monitor.set_bandwidth(None);
        });
        migrate_watched(&guest, Host::default(), &monitor, |migration| {
            migration.policy(Policy::default().with_bandwidth(Some(CAP)))
        })
    });
    assert_eq!(moved.report.verdict, Verdict::Moved, "{:?}", moved.report.failure);
}

#[test]
fn a_guest_that_is_held_back_by_a_cap_can_be_called_off() {
    let (guest, monitor) = (Guest::start(), Monitor::default());
    let moved = thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("memory travels", || monitor.progress().sent > 0);
            monitor.cancel();
        });
        migrate_watched(&guest, Host::default(), &monitor, |migration| {
            migration.policy(Policy::default().with_bandwidth(Some(1)))
        })
    });
    assert_eq!(moved.report.failure.unwrap().code, Code::CANCELLED);
    assert!(guest.runs() && guest.pauses() == 0);
}

#[test]
fn the_downtime_limit_may_be_raised_in_mid_move() {
    let (guest, monitor) = (Guest::start(), Arc::new(Monitor::default()));
    let generous = Arc::downgrade(&monitor);
    monitor.on_progress(move |progress| {
        if progress.phase == Phase::Precopy && progress.round == 3 {
            generous.upgrade().unwrap().limit_downtime(PATIENCE);
        }
    });
    assert_eq!((monitor.rounds().len(), monitor.downtime_limit()), (0, None), "nothing has begun");
    let moved = migrate_watched(&guest, Host::default(), &monitor, |migration| migration.policy(never()));
    assert_eq!(moved.report.verdict, Verdict::Moved, "{:?}", moved.report.failure);
    assert!(moved.report.rounds.len() >= 4 && moved.report.over_limit.is_none());
    // Whoever watched has seen the same: all rounds but the one in the blackout.
    let (_, before) = moved.report.rounds.split_last().unwrap();
    assert_eq!(monitor.rounds(), before);
    assert_eq!(monitor.downtime_limit(), Some(PATIENCE));
}

fn within(limit: Duration) -> Policy {
    Policy::default().with_timeout(Some(limit))
}

#[test]
fn the_deadline_holds_while_the_destination_is_waited_for() {
    let guest = Guest::start();
    let builds = Host { build_takes: Duration::from_secs(2), ..Host::default() };
    let moved = migrate(&guest, builds, |migration| migration.policy(within(Duration::from_millis(500))));
    let why = moved.report.failure.unwrap();
    assert_eq!((moved.report.verdict, why.code), (Verdict::Stayed, Code::TIMEOUT), "{why}");
    assert!(why.message.contains("not moved within the time limit"), "{why}");
    assert!(guest.runs() && guest.pauses() == 0 && moved.arrived.is_err());
}

#[test]
fn the_deadline_holds_in_the_switchover_until_commit() {
    let guest = Guest::start();
    let loads = Host { load_takes: Duration::from_secs(4), ..Host::default() };
    let moved = migrate(&guest, loads, |migration| migration.policy(within(Duration::from_secs(1))));
    let why = moved.report.failure.unwrap();
    assert_eq!((moved.report.verdict, why.code), (Verdict::Stayed, Code::TIMEOUT), "{why}");
    assert!(guest.runs() && guest.has_disk() && moved.arrived.is_err());
}

#[test]
fn the_time_of_an_operator_does_not_count() {
    let (guest, monitor) = (Guest::start(), Monitor::default());
    let limit = Duration::from_secs(2);
    let moved = thread::scope(|scope| {
        scope.spawn(|| {
            wait_until("ready", || monitor.progress().phase == Phase::ReadyToSwitch);
            thread::sleep(limit);
            monitor.proceed();
        });
        migrate_watched(&guest, Host::default(), &monitor, |migration| {
            migration.policy(within(limit)).pause_before_switchover(PATIENCE)
        })
    });
    assert_eq!(moved.report.verdict, Verdict::Moved, "{:?}", moved.report.failure);
}

#[test]
fn who_has_the_word_already_does_not_wait() {
    let (guest, monitor) = (Guest::start(), Monitor::default());
    let told = record(&monitor);
    monitor.proceed();
    let moved = migrate_watched(&guest, Host::default(), &monitor, |migration| {
        migration.pause_before_switchover(PATIENCE)
    });
    assert_eq!(moved.report.verdict, Verdict::Moved);
    assert!(told.lock().unwrap().iter().all(|progress| progress.phase != Phase::ReadyToSwitch));
}

#[test]
fn a_second_migration_needs_a_monitor_of_its_own() {
    let (guest, monitor) = (Guest::start(), Monitor::default());
    monitor.cancel();
    let moved = migrate_watched(&guest, Host::default(), &monitor, |migration| migration);
    assert_eq!(moved.report.failure.unwrap().code, Code::CANCELLED, "cancelled before it began");
    let moved = migrate_watched(&guest, Host::default(), &monitor, |migration| migration);
    let why = moved.report.failure.unwrap();
    assert_eq!((moved.report.verdict, why.code), (Verdict::Stayed, Code::BUSY), "{why}");
    assert_eq!(monitor.progress().phase, Phase::Stayed, "it tells of the first migration");
    let moved = migrate_watched(&guest, Host::default(), &Monitor::default(), |migration| migration);
    assert_eq!(moved.report.verdict, Verdict::Moved);
}
