//! `kill -9` of either side at fifty random moments: afterwards the guest runs at exactly one side, or is
//! held paused at the source, which says so.

use migration::report::Verdict;
use std::net::SocketAddr;
use std::path::Path;
use whimbrel::api::model::VmState;
use whimbrel::node::Node;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::kills::{LINE, Outcomes, Schedule, Side, schedules};
use whimbrel_tests::proxy::{Proxy, Way};
use whimbrel_tests::sides::{
    Guest, PATIENCE, assert_runs, assert_stands_still, hop, is_empty, receiver, request,
};

const KILLS: usize = 50;

#[test]
fn fifty_kills() {
    let mut outcomes = Outcomes::default();
    for schedule in schedules("kill -9", KILLS) {
        let folder = tempfile::tempdir().unwrap();
        let mut source = Guest::SMALL.start(folder.path(), "source");
        let (mut destination, address) = receiver(folder.path(), "destination");
        let proxy = Proxy::start(address, LINE);
        let phase = schedule.strike(&mut source, &mut destination, &proxy, |_| ());
        let case = Case { schedule, proxy };
        let outcome = match case.schedule.victim {
            Side::Source => case.source_died(&mut destination, address, folder.path()),
            Side::Destination => case.destination_died(&mut source, folder.path()),
        };
        outcomes.add(schedule.victim, phase, outcome);
    }
    outcomes.tell(KILLS);
}

#[derive(Debug)]
struct Case {
    schedule: Schedule,
    proxy: Proxy,
}

impl Case {
    /// The guest runs at the destination if that was told so, and nowhere otherwise: it died with its
    /// machine.
    fn source_died(&self, destination: &mut Node, address: SocketAddr, folder: &Path) -> &'static str {
        // Either event is the last word about this guest; the relay delivers what it still has.
        match destination.next_event().unwrap() {
            event if event["event"] == "arrived" => {
                assert!(self.proxy.delivered(Way::Up, "Commit"), "{self:?}: taken over without Commit");
                assert_runs(destination);
                settle(destination, &Guest::SMALL);
                "went on at the destination"
            }
            event => {
                assert_eq!(event["event"], "refused", "{self:?}");
                assert!(!self.proxy.delivered(Way::Up, "Commit"), "{self:?}: discarded after Commit");
                assert!(is_empty(destination), "{self:?}: a guest is there");
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
    fn destination_died(&self, source: &mut Node, folder: &Path) -> &'static str {
        let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
        match report.verdict {
            Verdict::Stayed => {
                assert!(
                    !self.proxy.delivered(Way::Up, "Commit"),
                    "{self:?}: resumed after Commit: {report:?}"
                );
                assert!(!self.proxy.delivered(Way::Down, "Ready"), "{self:?}: {report:?}");
                assert_runs(source);
                settle(source, &Guest::SMALL);
                "went on at the source"
            }
            Verdict::Held => {
                assert!(self.proxy.delivered(Way::Down, "Ready"), "{self:?}: held before Commit: {report:?}");
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
                assert!(self.proxy.delivered(Way::Down, "Running"), "{self:?}: moved without a word");
                // Its process ends: nothing runs here.
                source.expect("moved").unwrap();
                assert_eq!(source.wait_exit(PATIENCE).unwrap().code(), Some(0));
                "had moved, died with its machine"
            }
            other => panic!("{self:?}: {other:?}"),
        }
    }
}
