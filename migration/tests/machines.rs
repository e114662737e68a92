//! What the engine promises to whoever brings a machine, over TCP within one process.

mod common;

use common::{Host, Log, Source, content, existing, move_over, moved};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;
use whimbrel_migration::Code;
use whimbrel_migration::destination::{Arrival, Monitor, Phase};
use whimbrel_migration::link::{ControlLink, LinkError};
use whimbrel_migration::memory::PAGE_SIZE;
use whimbrel_migration::message::{self, MAX_STATE_PART, Message};
use whimbrel_migration::report::Verdict;
use whimbrel_migration::transport::{Secret, Token};

#[test]
fn what_build_leaves_in_memory_does_not_survive_where_the_source_has_zeros() {
    let source = Source::new();
    source.write(0, 3, b"three");
    // A page that exists and holds zeros.
    source.write(0, 4, &[0]);
    let firmware = vec![0x5a; PAGE_SIZE as usize];
    let leaves = vec![
        (0, 3, firmware.clone()),
        (0, 4, firmware.clone()),
        // Where the source has nothing at all, at a region's very end.
        (1, 66, firmware),
        // Populated, as it should stay.
        (0, 9, vec![0]),
    ];
    let mut host = Host { leaves, ..Host::default() };
    let (report, twin) = moved(&source, &mut host);
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    let twin = twin.unwrap();
    assert!(content(&twin.ram) == content(&source.ram), "something of the firmware is left");
    assert_eq!((existing(&twin.ram, 0), existing(&twin.ram, 1)), (vec![3, 4, 9], vec![66]));
}

#[test]
fn calls_come_in_the_order_that_is_documented() {
    let source = Source::with_locks(true);
    let mut host = Host::default();
    let (report, twin) = moved(&source, &mut host);
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    let expected = ["ram", "describe", "start_tracking", "collect_dirty", "before_pause", "pause", "save"];
    assert_eq!(*source.log.calls(), [&expected[..], &["collect_dirty", "release"]].concat());
    // RAM is asked for again to compare it.
    let expected =
        ["build", "ram", "memory_is_zero", "ram", "load", "take", "run", "announce", "after_run", "ram"];
    assert_eq!(*host.log.calls(), expected);
    drop(twin);
}

#[test]
fn locks_that_decide_nothing_are_given_up_all_the_same() {
    let source = Source::with_locks(false);
    let (report, _) = moved(&source, &mut Host::default());
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    assert!(source.log.calls().contains(&"release"));
}

#[test]
fn an_arrival_that_nobody_concludes_tells_the_source_all_the_same() {
    let remarks = Some("it was a pleasure".to_string());
    let mut host = Host { remarks: remarks.clone(), ..Host::default() };
    let source = Source::new();
    source.write(0, 1, b"one");
    let (report, sender) = move_over(
        &source,
        &mut host,
        &Monitor::default(),
        |link| link,
        |taken| taken.unwrap().sender().to_string(),
    );
    assert_eq!(sender, "test");
    assert_eq!(report.remarks, remarks);
    assert_eq!(report.destination_resident, Some(PAGE_SIZE));
    assert!(host.log.calls().ends_with(&["after_run", "ram", "drop"]), "{:?}", host.log.calls());
}

#[test]
fn a_destination_that_is_cancelled_gives_the_guest_back() {
    let monitor = Arc::new(Monitor::default());
    let cancelled = Arc::clone(&monitor);
    // Once the shadow machine is built, and before a page has moved.
    let source = Source { begins: Box::new(move || cancelled.cancel()), ..Source::with_locks(true) };
    source.write(0, 1, b"one");
    let mut host = Host::default();
    let (report, why) =
        move_over(&source, &mut host, &monitor, |link| link, |taken| taken.err().expect("cancelled"));
    assert_eq!((report.verdict, why.code), (Verdict::Stayed, Code::CANCELLED), "{why}");
    let told = report.failure.unwrap();
    assert_eq!(told.code, Code::CANCELLED, "{told}");
    assert!(!source.paused.load(Ordering::Relaxed));
    assert_eq!(monitor.progress().phase, Phase::Discarded);
    assert_eq!(host.log.calls().last(), Some(&"drop"));
    assert!(!host.log.calls().contains(&"run"));

    // The host takes the next one.
    let source = Source::new();
    source.write(0, 1, b"one");
    let monitor = Monitor::default();
    let (report, twin) =
        move_over(&source, &mut host, &monitor, |link| link, |taken| taken.map(Arrival::conclude));
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    let progress = monitor.progress();
    assert_eq!((progress.phase, progress.placed), (Phase::Arrived, report.sent()));
    assert!(progress.placed >= PAGE_SIZE);
    assert_eq!(progress.memory, twin.unwrap().ram.len());
}

/// A tracker that is cleared when it is collected, and a machine that implements no `clear_dirty`.
#[test]
fn writes_of_a_machine_in_software_are_not_lost() {
    let source = Source::new();
    let pages = [1003, 67];
    let (report, twin) = thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = fastrand::Rng::with_seed(1);
            for number in 1u64.. {
                let region = random.usize(..2);
                let page = random.u64(..pages[region]);
                if !source.write(region, page, &number.to_le_bytes()) {
                    return;
                }
                if number % 64 == 0 {
                    thread::sleep(Duration::from_micros(100));
                }
            }
        });
        let result = moved(&source, &mut Host::default());
        // If it has stayed, the writer still writes.
        source.paused.store(true, Ordering::Relaxed);
        result
    });
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    assert!(report.rounds.len() > 1 && report.sent() > PAGE_SIZE, "{:?}", report.rounds);
    assert!(content(&twin.unwrap().ram) == content(&source.ram), "a write was lost");
}

#[test]
fn what_saving_writes_to_memory_moves_as_well() {
    let source = Source { saving_writes: Some((1, 66)), ..Source::new() };
    let (report, twin) = moved(&source, &mut Host::default());
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    assert!(content(&twin.unwrap().ram) == content(&source.ram), "the page that saving wrote was lost");
}

#[test]
fn pages_that_differ_are_named() {
    let source = Source { late_writes: vec![(0, 5), (0, 600), (1, 66)], ..Source::new() };
    source.ram.write(0, 5 * PAGE_SIZE, b"early").unwrap();
    let (report, twin) = moved(&source, &mut Host::default());
    assert_eq!(report.verdict, Verdict::Stayed);
    let why = report.failure.unwrap();
    assert_eq!(why.code, Code::DIGEST);
    assert!(why.message.ends_with("these pages differ: 0x5000, 0x258000, 0x100042000"), "{why}");
    assert_eq!(twin.err().unwrap().code, Code::DIGEST);
}

#[test]
fn a_destination_that_panics_leaves_the_guest_where_it_runs() {
    for (call, verdict) in [
        ("build", Verdict::Stayed),
        ("load", Verdict::Stayed),
        ("take", Verdict::Stayed),
        ("run", Verdict::Stayed),
        ("announce", Verdict::Moved),
        ("after_run", Verdict::Moved),
    ] {
        let source = Source::with_locks(true);
        source.write(0, 1, b"one");
        let mut host = Host { log: Log::that_panics(call), ..Host::default() };
        let (report, taken) = moved(&source, &mut host);
        assert_eq!(report.verdict, verdict, "{call}: {:?}", report.failure);
        assert_eq!(source.paused.load(Ordering::Relaxed), verdict == Verdict::Moved, "{call}");
        match taken {
            Ok(twin) => assert!(content(&twin.ram) == content(&source.ram), "{call}"),
            Err(why) => {
                assert!(why.message.contains(&format!("this machine panics in {call}")), "{why}");
                // The source is told once the machine is gone, if there was one.
                assert_eq!(host.log.calls().contains(&"drop"), call != "build");
                let told = report.failure.unwrap();
                assert!(told.message.contains(&why.message), "{told}");
            }
        }
    }
}

/// Bytes that are not alike anywhere.
fn state(len: usize) -> Vec<u8> {
    let mut state = vec![0; len];
    fastrand::Rng::with_seed(2).fill(&mut state);
    state
}

#[test]
fn a_state_of_two_hundred_mebibytes_moves() {
    for len in [0, MAX_STATE_PART + 1, 200 << 20] {
        let source = Source { state: state(len), ..Source::new() };
        let (report, twin) = moved(&source, &mut Host::default());
        assert_eq!(report.verdict, Verdict::Moved, "{len}: {:?}", report.failure);
        assert!(twin.unwrap().state == source.state, "{len}");
    }
}

/// A link to a destination of an earlier version, which knows no feature.
struct Earlier(Box<dyn ControlLink>);

impl ControlLink for Earlier {
    fn token(&self) -> Token {
        self.0.token()
    }

    fn secret(&self) -> Secret {
        self.0.secret()
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), LinkError> {
        assert!(!matches!(Message::decode(frame), Ok(Message::StatePart(_))), "it would not know this");
        self.0.send(frame)
    }

    fn receive(&mut self, wait: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        let frame = self.0.receive(wait)?;
        Ok(frame.map(|frame| match Message::decode(&frame) {
            Ok(Message::Welcome(hello)) => Message::Welcome(message::Hello { features: 0, ..hello }).encode(),
            _ => frame,
        }))
    }
}

#[test]
fn an_earlier_destination_takes_a_small_state_and_a_large_one_stays() {
    for (len, verdict) in [(MAX_STATE_PART, Verdict::Moved), (MAX_STATE_PART + 1, Verdict::Stayed)] {
        let source = Source { state: state(len), ..Source::new() };
        let earlier = |link| Box::new(Earlier(link)) as Box<dyn ControlLink>;
        let take = |taken: Result<Arrival<'_, _>, _>| drop(taken.map(Arrival::conclude));
        let (report, ()) = move_over(&source, &mut Host::default(), &Monitor::default(), earlier, take);
        assert_eq!(report.verdict, verdict, "{:?}", report.failure);
        assert_eq!(source.paused.load(Ordering::Relaxed), verdict == Verdict::Moved, "it runs where it is");
        if let Some(why) = report.failure {
            assert_eq!(why.code, Code::STATE, "{why}");
        }
    }
}
