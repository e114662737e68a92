//! A panic in the machine or a transport is a failure like any other: the guest goes on.

use crate::guest::{Call, Guest, Host};
use crate::{migrate, migrate_over};
use migration::monitor::Monitor;
use migration::report::Verdict;
use migration::transport::{PlaneError, Session, SourcePlane, SourceTransport};

/// Has `guest` panic in `call` during a migration to `host`.
fn panic_in(guest: &Guest, call: Call, host: Host) -> Verdict {
    *guest.panics_in.lock().unwrap() = Some(call);
    let moved = migrate(guest, host, |migration| migration);
    *guest.panics_in.lock().unwrap() = None;
    let why = moved.report.failure.expect("a failure");
    assert!(why.message.contains(&format!("on purpose in {call:?}")), "{call:?}: {why}");
    assert!(moved.arrived.is_err(), "{call:?}: it runs at the destination");
    moved.report.verdict
}

#[test]
fn the_guest_goes_on_after_a_panic_before_commit() {
    let guest = Guest::start();
    for call in [
        Call::Ram,
        Call::Describe,
        Call::HandoverEstimate,
        Call::StartTracking,
        Call::ClearDirty,
        Call::CollectDirty,
        Call::BeforePause,
        Call::Pause,
        Call::Save,
        Call::Release,
    ] {
        assert_eq!(panic_in(&guest, call, Host::default()), Verdict::Stayed, "{call:?}");
        assert!(guest.runs() && guest.has_disk(), "{call:?} leaves the guest paused");
    }
    // Nothing of all that is in the way of the next migration.
    let moved = migrate(&guest, Host::default(), |migration| migration);
    assert_eq!(moved.report.verdict, Verdict::Moved, "{:?}", moved.report.failure);
    assert!(moved.arrived.unwrap().is_like(&guest));
}

#[test]
fn a_panic_on_the_way_back_holds_the_guest() {
    let cannot_run = Host { cannot_run: true, ..Host::default() };
    for call in [Call::Take, Call::Resume] {
        let guest = Guest::start();
        *guest.panics_in.lock().unwrap() = Some(call);
        let moved = migrate(&guest, cannot_run, |migration| migration);
        assert_eq!(moved.report.verdict, Verdict::Held, "{call:?}");
        assert!(!guest.runs() && moved.arrived.is_err());
    }
    // Without the panic it takes the guest back.
    let guest = Guest::start();
    let moved = migrate(&guest, cannot_run, |migration| migration);
    assert_eq!(moved.report.verdict, Verdict::Stayed);
    assert!(guest.runs() && guest.has_disk());
}

#[test]
fn a_panic_at_the_very_end_changes_nothing() {
    let guest = Guest::start();
    *guest.panics_in.lock().unwrap() = Some(Call::StopTracking);
    let moved = migrate(&guest, Host { cannot_run: true, ..Host::default() }, |migration| migration);
    assert_eq!(moved.report.verdict, Verdict::Stayed);
    let why = moved.report.failure.unwrap().message;
    assert!(why.contains("dirty tracking could not be stopped") && why.contains("StopTracking"), "{why}");
    assert!(guest.runs());
}

/// A transport that panics when it is to connect.
struct Faulty;

impl SourceTransport for Faulty {
    fn name(&self) -> &'static str {
        whimbrel_transport_tcp::NAME
    }

    fn connect(&mut self, _: &Session, _: &[u8]) -> Result<Box<dyn SourcePlane>, PlaneError> {
        panic!("on purpose in a transport")
    }
}

#[test]
fn a_transport_that_panics_ends_the_migration_and_not_the_guest() {
    let guest = Guest::start();
    let moved = migrate_over(
        |_| Box::new(Faulty),
        &guest,
        Host::default(),
        &Monitor::default(),
        |migration| migration,
    );
    assert_eq!(moved.report.verdict, Verdict::Stayed);
    let why = moved.report.failure.unwrap().message;
    assert!(why.contains("on purpose in a transport"), "{why}");
    assert!(guest.runs() && moved.arrived.is_err());
}
