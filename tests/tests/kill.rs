//! `kill -9` of either side at fifty random moments: afterwards the guest runs at exactly one side, or is held
//! paused at the source, which says so.
//!
//! The two talk through a relay that is as slow as a long line, so that each phase lasts long enough to be
//! hit, and that knows which messages were delivered. Each schedule aims at a phase, waits until the source
//! says it is in it, and kills some random time later. `WHIMBREL_SEED` repeats a choice of schedules; when
//! exactly each kill strikes is up to the machine.

use migration::monitor::Phase;
use migration::report::Verdict;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::Duration;
use vmm::api::model::VmState;
use vmm::node::Node;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::proxy::{Plane, Proxy, Rules, Way};
use whimbrel_tests::say;
use whimbrel_tests::sides::{
    Guest, PATIENCE, assert_runs, assert_stands_still, hop, receiver, request, wait_until,
};

const KILLS: usize = 50;

/// Each piece of control traffic takes this long.
const LINE: Duration = Duration::from_millis(6);

/// Two of each three kills aim at the second half of a migration, which is the shorter one.
const AIMS: [Phase; 6] = [
    Phase::Preparing,
    Phase::Switchover,
    Phase::Committed,
    Phase::Precopy,
    Phase::Switchover,
    Phase::Committed,
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

#[test]
fn fifty_kills() {
    let seed = std::env::var("WHIMBREL_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| fastrand::u64(..));
    say::figures("kill -9", format_args!("WHIMBREL_SEED={seed} repeats this choice of schedules"));
    let mut random = fastrand::Rng::with_seed(seed);
    let mut table: BTreeMap<String, BTreeMap<&str, usize>> = BTreeMap::new();
    for number in 0..KILLS {
        let victim = if number % 2 == 0 { Side::Source } else { Side::Destination };
        let aim = AIMS[number / 2 % AIMS.len()];
        // Short delays stay in the phase aimed at, long ones reach beyond it.
        let delay = Duration::from_micros(random.u64(0..10_000));
        let (phase, outcome) = Schedule { victim, aim, delay }.run();
        *table.entry(format!("{victim:?} killed in {phase:?}")).or_default().entry(outcome).or_default() += 1;
    }
    let counted: usize = table.values().flat_map(BTreeMap::values).sum();
    for (what, outcomes) in &table {
        let outcomes: Vec<_> = outcomes.iter().map(|(outcome, n)| format!("{n} {outcome}")).collect();
        say::figures(&what.to_lowercase(), outcomes.join(", "));
    }
    assert_eq!(counted, KILLS);
    let reached = |text: &str| table.keys().any(|what| what.ends_with(text));
    assert!(reached("Switchover") && reached("Committed"), "the switchover was never hit: {table:?}");
}

#[derive(Debug)]
struct Schedule {
    victim: Side,
    aim: Phase,
    delay: Duration,
}

impl Schedule {
    /// The phase in which the kill struck, and what came of it.
    fn run(&self) -> (Phase, &'static str) {
        let folder = tempfile::tempdir().unwrap();
        let mut source = Guest::SMALL.start(folder.path(), "source");
        let (mut destination, address) = receiver(folder.path(), "destination");
        let rules = Rules { control_delay: LINE, data_delay: Duration::from_millis(1), cut: None };
        let proxy = Proxy::start(address, rules);
        let mut request = request(proxy.address());
        request.silence_s = 2;
        source.migrate(&request).unwrap();
        // Before that the destination knows nothing of a migration, and has nothing to say of its end.
        wait_until("the first connection", || {
            proxy.passed(Plane::Control, Way::Up) >= migration::preamble::LEN as u64
        });
        let mut phase = wait_phase(&source, self.aim);
        thread::sleep(self.delay);
        if let Some(later) = phase_of(&source) {
            phase = later;
        }
        match self.victim {
            Side::Source => {
                source.kill().unwrap();
                (phase, self.source_died(&mut destination, address, &proxy, folder.path()))
            }
            Side::Destination => {
                destination.kill().unwrap();
                (phase, self.destination_died(&mut source, &proxy, folder.path()))
            }
        }
    }

    /// The guest runs at the destination if that was told so, and nowhere otherwise: it died with its machine.
    fn source_died(
        &self,
        destination: &mut Node,
        address: SocketAddr,
        proxy: &Proxy,
        folder: &Path,
    ) -> &'static str {
        // Either event is the last word about this guest; the relay delivers what it still has.
        match destination.next_event().unwrap() {
            event if event["event"] == "arrived" => {
                assert!(proxy.delivered(Way::Up, "Commit"), "{self:?}: taken over without Commit");
                assert_runs(destination);
                settle(destination, &Guest::SMALL);
                "went on at the destination"
            }
            event => {
                assert_eq!(event["event"], "refused", "{self:?}");
                assert!(!proxy.delivered(Way::Up, "Commit"), "{self:?}: discarded after Commit");
                assert!(destination.status().is_err(), "{self:?}: a guest is there");
                // It listens again, at the same address.
                let other = Guest::SMALL.start(folder, "other");
                hop(&other, destination, address);
                assert_runs(destination);
                "died with its machine, the destination discarded"
            }
        }
    }

    /// The guest runs at the source; or is held there, if the destination may have been told to run it; or
    /// had moved, and died with its machine.
    fn destination_died(&self, source: &mut Node, proxy: &Proxy, folder: &Path) -> &'static str {
        let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
        match report.verdict {
            Verdict::Stayed => {
                assert!(!proxy.delivered(Way::Up, "Commit"), "{self:?}: resumed after Commit: {report:?}");
                assert!(!proxy.delivered(Way::Down, "Ready"), "{self:?}: {report:?}");
                assert_runs(source);
                settle(source, &Guest::SMALL);
                "went on at the source"
            }
            Verdict::Held => {
                assert!(proxy.delivered(Way::Down, "Ready"), "{self:?}: held before Commit: {report:?}");
                assert_eq!(source.status().unwrap().state, VmState::Held);
                assert_stands_still(source);
                let (_other, address) = receiver(folder, "other");
                let refused = source.migrate(&request(address)).unwrap_err().to_string();
                assert!(refused.contains("held"), "{refused}");
                let refused = source.resume(false).unwrap_err().to_string();
                assert!(refused.contains("force"), "{refused}");
                // The destination is dead for certain, and the guest as good as it was.
                source.resume(true).unwrap();
                assert_runs(source);
                settle(source, &Guest::SMALL);
                "held at the source"
            }
            Verdict::Moved => {
                assert!(proxy.delivered(Way::Down, "Running"), "{self:?}: moved without a word");
                // Its process ends: nothing runs here.
                source.expect("moved").unwrap();
                assert_eq!(source.wait_exit(PATIENCE).unwrap().code(), Some(0));
                "had moved, died with its machine"
            }
        }
    }
}

fn phase_of(source: &Node) -> Option<Phase> {
    source.migration().ok().map(|migration| migration.progress.phase)
}

/// Waits until a migration has come to a phase, or past it.
fn wait_phase(source: &Node, aim: Phase) -> Phase {
    let order = |phase: Phase| match phase {
        Phase::Preparing => 0,
        Phase::Precopy => 1,
        Phase::Switchover => 2,
        Phase::Committed => 3,
        Phase::Moved | Phase::Stayed | Phase::Held => 4,
    };
    loop {
        let phase = phase_of(source).unwrap();
        if order(phase) >= order(aim) {
            return phase;
        }
    }
}
