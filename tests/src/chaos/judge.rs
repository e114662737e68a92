//! What must hold of every move, whatever went wrong: one side at most runs the guest, it is lost only with
//! its host, its disk and memory are right, and what is said of it is true.

use super::course::Course;
use super::fault::Fault;
use crate::kills::Side;
use crate::proxy::Way;
use crate::scene::Host;
use crate::sides::{PATIENCE, assert_runs, assert_stands_still, migrate, request, wait_until};
use migration::report::Verdict;
use std::time::Duration;
use whimbrel::api::model::VmState;
use whimbrel::node::Node;

/// Exit codes of `whimbrel migrate`.
const MOVED: i32 = 0;
const STAYED: i32 = 3;
const HELD: i32 = 4;
const UNKNOWN: i32 = 6;
const UNREACHABLE: i32 = 8;

/// What became of a move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// In words, the same for all moves of which it is true.
    pub outcome: &'static str,
    /// Over which transport the last round went; empty if over none, or if nobody knows.
    pub transport: String,
    /// How many processes were seen to have the disk, one after the other.
    pub owners: usize,
    /// Whether the guest was seen to wait until its disk has room.
    pub waited: bool,
}

impl Course<'_> {
    /// Examines the move, and ends both sides.
    ///
    /// # Panics
    /// When anything is not as it must be.
    pub fn judge(mut self) -> Judgement {
        let dead = [self.killed(Side::Source), self.killed(Side::Destination) || self.ran_out_of_memory()];
        // Somebody may have been told before the source was killed.
        let told = !dead[0] || [MOVED, STAYED, HELD].map(Some).contains(&self.ran.code);
        let report = if told { self.ran.json()["report"].clone() } else { serde_json::Value::Null };
        let verdict = serde_json::from_value(report["verdict"].clone()).ok();
        assert_eq!(verdict.is_some(), told, "{:?}", self.ran);
        if let Some(verdict) = verdict {
            let code = match verdict {
                Verdict::Moved => MOVED,
                Verdict::Stayed => STAYED,
                _ => HELD,
            };
            assert_eq!(self.ran.code, Some(code), "{:?}", self.ran);
            let explained = report["failure"]["message"].as_str().is_some_and(|why| !why.is_empty());
            assert_eq!(explained, verdict != Verdict::Moved, "{:?}", self.ran);
        }
        let transport = report["transport"].as_str().unwrap_or_default().to_string();
        let outcome = match (verdict, dead) {
            (verdict, [true, dead]) => self.without_source(verdict, dead),
            (Some(Verdict::Moved), [_, dead]) => self.moved(dead),
            (Some(Verdict::Stayed), [_, dead]) => self.stayed(dead),
            (_, [_, dead]) => self.held(dead),
        };
        Judgement { outcome, transport, owners: self.scene.owners(), waited: self.waited }
    }

    /// A process that gets no memory ends by a signal.
    fn ran_out_of_memory(&mut self) -> bool {
        let limited = self.struck.iter().any(|fault| matches!(fault, Fault::Memory(_)));
        limited
            && match self.destination.wait_exit(Duration::ZERO) {
                Ok(status) => {
                    assert_eq!(status.code(), None, "{}", self.destination.stderr());
                    true
                }
                Err(_) => false,
            }
    }

    /// The source was killed: the guest is at the destination, or lost.
    fn without_source(&mut self, verdict: Option<Verdict>, dead: bool) -> &'static str {
        if verdict.is_none() {
            assert!([UNKNOWN, UNREACHABLE].map(Some).contains(&self.ran.code), "{:?}", self.ran);
        }
        if dead {
            self.anew();
            return "both killed, started anew";
        }
        if self.arrived() {
            self.assert_delivered(Way::Up, "Commit");
            assert!(verdict.is_none_or(|verdict| verdict != Verdict::Stayed), "{:?}", self.ran);
            self.finish_at_destination();
            return "source killed, went on at the destination";
        }
        assert!(verdict.is_none_or(|verdict| verdict != Verdict::Moved), "{:?}", self.ran);
        let (scene, known) = (self.scene, self.known);
        self.source = self.cable.at(Host::A, || scene.guest_anew(known));
        self.hop();
        "source killed with its guest, started anew"
    }

    fn moved(&mut self, dead: bool) -> &'static str {
        self.assert_delivered(Way::Up, "Commit");
        self.assert_delivered(Way::Down, "Running");
        self.source_has_ended();
        if dead {
            self.anew();
            return "moved, destination died later, started anew";
        }
        assert!(self.arrived(), "moved, but not there");
        self.finish_at_destination();
        "moved"
    }

    fn stayed(&mut self, dead: bool) -> &'static str {
        self.assert_has_room(&self.source);
        assert_runs(&self.source);
        if dead {
            self.scene.finish_at(&self.source);
            return "stayed, destination died";
        }
        assert!(!self.arrived(), "stayed, but arrived as well");
        assert_runs(&self.source);
        self.hop();
        "stayed, and moved later"
    }

    /// What an operator is told to do.
    fn held(&mut self, dead: bool) -> &'static str {
        assert_eq!(self.source.status().unwrap().state, VmState::Held);
        assert_stands_still(&self.source);
        if !dead && self.arrived() {
            self.assert_delivered(Way::Up, "Commit");
            let refused = self.source.resume(true).unwrap_err().to_string();
            assert!(refused.contains("in use by"), "{refused}");
            assert_eq!(self.source.quit().unwrap().code(), Some(0));
            self.finish_at_destination();
            return "held, and ended there: it runs at the destination";
        }
        match self.source.resume(true) {
            Ok(()) => {
                self.scene.finish_at(&self.source);
                "held, and resumed by force: it runs nowhere else"
            }
            Err(refused) => {
                let refused = refused.to_string();
                assert!(refused.contains("has been used elsewhere since"), "{refused}");
                assert!(dead, "nobody has the guest: {refused}");
                assert_eq!(self.source.quit().unwrap().code(), Some(0));
                self.anew();
                "held, destination died with the guest, started anew"
            }
        }
    }

    /// What can have happened only after this was said.
    fn assert_delivered(&self, way: Way, message: &str) {
        if let Some(proxy) = &self.proxy {
            assert!(proxy.delivered(way, message), "without {message}: {proxy:?}");
        }
    }

    /// Whether the guest is at the destination, as soon as that is certain.
    fn arrived(&mut self) -> bool {
        let mut state = VmState::Receiving;
        wait_until("the destination knows", || {
            state = self.destination.status().unwrap().state;
            state != VmState::Receiving
        });
        let arrived = state != VmState::Waiting;
        if arrived {
            self.assert_has_room(&self.destination);
            assert_eq!(self.destination.status().unwrap().state, VmState::Running);
            event(&mut self.destination, "arrived");
        }
        arrived
    }

    /// A guest whose disk was full goes on by itself, now that there is room again.
    fn assert_has_room(&self, node: &Node) {
        if self.struck.contains(&Fault::FullDisk) {
            // A request that had found no room would keep both from being confirmed.
            let before = node.status().unwrap().guest.map_or(0, |guest| guest.journal);
            let what = "the guest's disk has room again";
            node.wait_guest(what, PATIENCE, |guest| guest.journal > before + 1).unwrap();
        }
    }

    fn finish_at_destination(&mut self) {
        assert_runs(&self.destination);
        self.scene.finish_at(&self.destination);
        assert_eq!(self.destination.wait_exit(PATIENCE).unwrap().code(), Some(0));
    }

    /// Moves the guest to the same destination, now that nothing goes wrong.
    fn hop(&mut self) {
        let report = migrate(&self.source, &request(self.address));
        assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
        self.source_has_ended();
        assert!(self.arrived(), "moved, but not there");
        self.finish_at_destination();
    }

    /// The source has nothing left to do.
    fn source_has_ended(&mut self) {
        event(&mut self.source, "moved");
        assert_eq!(self.source.wait_exit(PATIENCE).unwrap().code(), Some(0));
    }

    /// Nobody has the guest any more.
    fn anew(&self) {
        let (scene, known) = (self.scene, self.known);
        self.cable.at(Host::A, || scene.finish_anew(known, None));
    }
}

/// Waits until a process says this. What it said before is of moves that failed.
fn event(node: &mut Node, expected: &str) {
    loop {
        let event = node.next_event().unwrap();
        if event["event"] == expected {
            return;
        }
        let earlier = ["stayed", "refused", "disk-trouble", "disk-recovered"];
        assert!(earlier.iter().any(|earlier| event["event"] == *earlier), "{event}");
    }
}
