//! Which guest goes where, and when, as a host is emptied.
//!
//! The smallest guests go first: they leave soon, and what the largest one needs is free by then. The hosts
//! take turns. A guest that one host refuses is tried at the next; a host that cannot be reached is tried
//! only where the others have refused. A host that is merely busy is asked again later.

use migration::Code;
use migration::report::{Report, Verdict};
use std::collections::VecDeque;

/// How often a guest is offered again to hosts that were busy.
const OFFERS: u32 = 20;

/// What became of an attempt to move a guest to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// There is nothing more to be tried: it has moved, or its failure is not the host's refusal.
    Settled,
    /// The host does not take this guest.
    Refused,
    /// The host takes nobody at this moment.
    Busy,
    /// The host cannot be reached.
    Unreachable,
}

impl Answer {
    /// What a migration's report says about the host. Before any memory has travelled, whatever goes wrong
    /// is the host's answer, but for what is the guest's own.
    pub fn of(report: &Report) -> Self {
        if report.verdict != Verdict::Stayed || !report.rounds.is_empty() {
            return Answer::Settled;
        }
        match report.failure.as_ref().map(|failure| failure.code) {
            Some(Code::CANCELLED | Code::GUEST_ENDED | Code::STATE) | None => Answer::Settled,
            Some(Code::BUSY) => Answer::Busy,
            Some(Code::LINK | Code::TIMEOUT) => Answer::Unreachable,
            Some(_) => Answer::Refused,
        }
    }
}

/// A guest that is to leave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Its number, from 0, in the order in which the schedule was given the guests.
    pub guest: usize,
    /// The host that it is offered to.
    pub host: usize,
    /// Hosts that have refused it.
    refused: Vec<usize>,
    /// Hosts that were busy.
    busy: Vec<usize>,
    /// How often it has been put off.
    pub put_off: u32,
}

/// The guests that are still to be moved.
#[derive(Debug)]
pub struct Schedule {
    /// Which hosts cannot be reached.
    unreachable: Vec<bool>,
    /// Those that have not been offered to anybody, or were put off, with how often.
    waiting: VecDeque<(usize, Vec<usize>, u32)>,
    /// Whose turn it is.
    turn: usize,
}

impl Schedule {
    /// A schedule of guests with this much memory each, to be moved to this number of `hosts`.
    pub fn new(guests: impl IntoIterator<Item = u64>, hosts: usize) -> Self {
        let mut order: Vec<_> = guests.into_iter().enumerate().collect();
        order.sort_by_key(|(_, memory)| *memory);
        let waiting = order.into_iter().map(|(guest, _)| (guest, Vec::new(), 0)).collect();
        Schedule { unreachable: vec![false; hosts], waiting, turn: 0 }
    }

    /// The next guest, and the host to offer it to.
    pub fn next_task(&mut self) -> Option<Task> {
        let (guest, refused, put_off) = self.waiting.pop_front()?;
        let mut task = Task { guest, host: self.turn, refused, busy: Vec::new(), put_off };
        self.turn = (self.turn + 1) % self.unreachable.len().max(1);
        task.host = self.host_for(&task)?;
        Some(task)
    }

    /// What follows an answer: the task with another host, if there is one to be tried at once. Whether the
    /// guest was put off otherwise; if not, there is no host for it.
    pub fn answered(&mut self, mut task: Task, answer: Answer) -> Next {
        if let Some(unreachable) = self.unreachable.get_mut(task.host) {
            *unreachable = answer == Answer::Unreachable;
        }
        match answer {
            Answer::Settled => return Next::Done,
            Answer::Busy => task.busy.push(task.host),
            Answer::Refused | Answer::Unreachable => task.refused.push(task.host),
        }
        match self.host_for(&task) {
            Some(host) => Next::Elsewhere(Task { host, ..task }),
            None if !task.busy.is_empty() && task.put_off < OFFERS => {
                self.waiting.push_back((task.guest, task.refused, task.put_off + 1));
                Next::Later
            }
            None => Next::Done,
        }
    }

    /// The first host from the task's own on that it was not offered to; one that can be reached if possible.
    fn host_for(&self, task: &Task) -> Option<usize> {
        let hosts = self.unreachable.len();
        let turn = |offset: usize| (task.host + offset) % hosts;
        let open: Vec<_> = (0..hosts)
            .map(turn)
            .filter(|host| !task.refused.contains(host) && !task.busy.contains(host))
            .collect();
        open.iter().find(|host| !self.unreachable[**host]).or(open.first()).copied()
    }
}

/// What follows an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// The guest is to be offered to another host.
    Elsewhere(Task),
    /// It waits for its next turn.
    Later,
    /// There is nothing more to be done for it.
    Done,
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::Failure;

    fn order(schedule: &mut Schedule) -> Vec<(usize, usize)> {
        std::iter::from_fn(|| schedule.next_task()).map(|task| (task.guest, task.host)).collect()
    }

    #[test]
    fn the_largest_goes_last_and_hosts_take_turns() {
        let mut schedule = Schedule::new([64, 16, 512, 32, 16], 2);
        assert_eq!(order(&mut schedule), [(1, 0), (4, 1), (3, 0), (0, 1), (2, 0)]);
        assert_eq!(schedule.next_task(), None);
    }

    #[test]
    fn who_is_refused_is_offered_to_every_other_host() {
        let mut schedule = Schedule::new([1, 2], 3);
        let task = schedule.next_task().unwrap();
        assert_eq!(task.host, 0);
        let Next::Elsewhere(task) = schedule.answered(task, Answer::Refused) else { panic!() };
        let Next::Elsewhere(task) = schedule.answered(task, Answer::Refused) else { panic!() };
        assert_eq!(task.host, 2);
        assert_eq!(schedule.answered(task, Answer::Refused), Next::Done);
        // Another guest is another matter.
        let task = schedule.next_task().unwrap();
        assert_eq!((task.guest, task.host), (1, 1));
        assert_eq!(schedule.answered(task, Answer::Settled), Next::Done);
    }

    #[test]
    fn a_host_that_cannot_be_reached_comes_last() {
        let mut schedule = Schedule::new([1, 2, 3], 2);
        let task = schedule.next_task().unwrap();
        let Next::Elsewhere(task) = schedule.answered(task, Answer::Unreachable) else { panic!() };
        assert_eq!(task.host, 1);
        assert_eq!(schedule.answered(task, Answer::Settled), Next::Done);
        let _second = schedule.next_task().unwrap();
        let third = schedule.next_task().unwrap();
        assert_eq!(third.host, 1, "it would be the turn of the other");
        let Next::Elsewhere(third) = schedule.answered(third, Answer::Refused) else { panic!() };
        assert_eq!(third.host, 0, "it may be back");
    }

    #[test]
    fn a_busy_host_is_asked_again_but_not_for_ever() {
        let mut schedule = Schedule::new([1, 2], 2);
        let task = schedule.next_task().unwrap();
        let Next::Elsewhere(task) = schedule.answered(task, Answer::Busy) else { panic!() };
        assert_eq!(schedule.answered(task, Answer::Refused), Next::Later);
        assert_eq!(schedule.next_task().unwrap().guest, 1, "others first");
        for time in 1..=OFFERS {
            let task = schedule.next_task().unwrap();
            assert_eq!((task.guest, task.host, task.put_off), (0, 0, time), "the other has refused it");
            let next = schedule.answered(task, Answer::Busy);
            assert_eq!(next, if time < OFFERS { Next::Later } else { Next::Done });
        }
        assert_eq!(schedule.next_task(), None);
    }

    #[test]
    fn what_a_report_says_of_the_host() {
        let failed = |code| Report::not_begun(Failure::new(code, "why"), 1);
        assert_eq!(Answer::of(&failed(Code::LIMITS)), Answer::Refused);
        assert_eq!(Answer::of(&failed(Code::BUSY)), Answer::Busy);
        assert_eq!(Answer::of(&failed(Code::LINK)), Answer::Unreachable);
        assert_eq!(Answer::of(&failed(Code::CANCELLED)), Answer::Settled);
        let mut broken = failed(Code::LINK);
        broken.rounds.push(Default::default());
        assert_eq!(Answer::of(&broken), Answer::Settled, "memory has travelled");
        assert_eq!(Answer::of(&Report::new(Verdict::Moved, 1)), Answer::Settled);
        assert_eq!(Answer::of(&Report::new(Verdict::Held, 1)), Answer::Settled);
    }
}
