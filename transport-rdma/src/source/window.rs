//! The send window of a lane: how much is in flight, and which requests ask for a completion.
//!
//! A reliable queue pair executes and completes its requests in order, so that the completion of one stands
//! for all before it. Hence only some requests are signalled. The window remembers these, with what each
//! stands for.

use std::collections::VecDeque;

/// A request is signalled at the latest when this many bytes have been added since the last one that was.
const SIGNAL_INTERVAL_BYTES: u64 = 1 << 20;

/// A request is signalled at the latest after this part of the requests that may be in flight.
const SIGNALS_PER_WINDOW: u64 = 4;

/// Requests and bytes, counted from the beginning of a lane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Total {
    requests: u64,
    bytes: u64,
}

/// What [`Window::push`] has decided about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Admitted {
    /// The request's number, from 1 on: its `wr_id`.
    pub id: u64,
    /// Whether it has to leave a completion.
    pub signaled: bool,
}

/// Bounds the work requests of one queue pair that are in flight. It neither posts nor polls: callers tell it
/// what they did.
pub(super) struct Window {
    max_requests: u64,
    max_bytes: u64,
    pushed: Total,
    /// What had been pushed at the last signalled request, with it.
    signaled: Total,
    completed: Total,
    /// The signalled requests that are not complete, oldest first.
    pending: VecDeque<Total>,
}

impl Window {
    /// An empty window for at most `max_requests` requests (no fewer than 1), and `max_bytes` bytes, in
    /// flight.
    pub(super) fn new(max_requests: u32, max_bytes: u64) -> Window {
        Window {
            max_requests: u64::from(max_requests.max(1)),
            max_bytes,
            pushed: Total::default(),
            signaled: Total::default(),
            completed: Total::default(),
            pending: VecDeque::new(),
        }
    }

    /// Requests in flight: pushed, and not known to be complete.
    pub(super) fn in_flight(&self) -> u64 {
        self.pushed.requests - self.completed.requests
    }

    /// Whether one more request that writes `len` bytes may be pushed now.
    ///
    /// Whenever the answer is no, a signalled request is in flight, so that waiting for a completion helps. A
    /// request that is larger than the window is let through when no signalled one is.
    pub(super) fn has_room(&self, len: u64) -> bool {
        let bytes = self.pushed.bytes - self.completed.bytes + len;
        self.in_flight() < self.max_requests && (bytes <= self.max_bytes || self.pending.is_empty())
    }

    /// Adds a request that writes `len` bytes. It is signalled if `signaled` asks for it, or if it is time.
    pub(super) fn push(&mut self, len: u64, signaled: bool) -> Admitted {
        self.pushed.requests += 1;
        self.pushed.bytes += len;
        let due = self.pushed.requests - self.signaled.requests >= self.max_requests / SIGNALS_PER_WINDOW
            || self.pushed.bytes - self.signaled.bytes >= SIGNAL_INTERVAL_BYTES;
        let signaled = signaled || due;
        if signaled {
            self.signaled = self.pushed;
            self.pending.push_back(self.pushed);
        }
        Admitted { id: self.pushed.requests, signaled }
    }

    /// The signalled request `id` is complete, and with it all before it. A number that has been reported
    /// before changes nothing.
    pub(super) fn complete(&mut self, id: u64) {
        while let Some(&total) = self.pending.front()
            && total.requests <= id
        {
            self.pending.pop_front();
            self.completed = total;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_LIMIT: u64 = u64::MAX / 2;

    /// Pushes requests of `len` bytes until there is no room; returns the numbers of the signalled ones.
    fn fill(window: &mut Window, len: u64) -> Vec<u64> {
        let mut signaled = Vec::new();
        while window.has_room(len) {
            let request = window.push(len, false);
            if request.signaled {
                signaled.push(request.id);
            }
        }
        signaled
    }

    #[test]
    fn an_empty_window_has_room_and_a_full_one_has_not() {
        let mut window = Window::new(8, NO_LIMIT);
        assert_eq!(window.in_flight(), 0);
        for number in 1..=8 {
            assert!(window.has_room(0), "request {number}");
            assert_eq!(window.push(0, false).id, number);
            assert_eq!(window.in_flight(), number);
        }
        assert!(!window.has_room(0));
    }

    #[test]
    fn every_quarter_of_the_requests_is_signalled() {
        let mut window = Window::new(256, NO_LIMIT);
        assert_eq!(fill(&mut window, 0), [64, 128, 192, 256]);
    }

    #[test]
    fn every_mebibyte_is_signalled() {
        let mut window = Window::new(256, NO_LIMIT);
        let signaled: Vec<bool> = [512 << 10, 512 << 10, 1, (1 << 20) - 1, 1 << 20]
            .map(|len| window.push(len, false).signaled)
            .into();
        assert_eq!(signaled, [false, true, false, true, true]);
    }

    #[test]
    fn asking_for_a_signal_restarts_the_count() {
        let mut window = Window::new(16, NO_LIMIT);
        let asked = [false, true, false, false, false, false];
        assert_eq!(asked.map(|ask| window.push(0, ask).signaled), [false, true, false, false, false, true]);
    }

    #[test]
    fn a_completion_stands_for_all_requests_before_it() {
        let mut window = Window::new(8, NO_LIMIT);
        assert_eq!(fill(&mut window, 0), [2, 4, 6, 8]);
        window.complete(2);
        assert_eq!(window.in_flight(), 6);
        // That of 4 is taken as well, though only 6 has been reported.
        window.complete(6);
        assert_eq!(window.in_flight(), 2);
        window.complete(8);
        assert_eq!(window.in_flight(), 0);
    }

    #[test]
    fn completions_that_are_late_or_of_no_signalled_request_release_nothing_more() {
        let mut window = Window::new(8, NO_LIMIT);
        fill(&mut window, 0);
        window.complete(6);
        for id in [6, 4, 2, 0, 7] {
            window.complete(id);
            assert_eq!(window.in_flight(), 2, "request {id}");
        }
    }

    #[test]
    fn bytes_are_bounded_and_released() {
        let mut window = Window::new(1000, 4 << 20);
        assert_eq!(fill(&mut window, 1 << 20), [1, 2, 3, 4]);
        assert!(!window.has_room(1) && window.has_room(0));
        window.complete(1);
        assert!(window.has_room(1 << 20) && !window.has_room((1 << 20) + 1));
    }

    #[test]
    fn a_request_larger_than_the_window_passes_alone() {
        let mut window = Window::new(8, 4 << 20);
        assert!(window.has_room(1 << 30));
        let large = window.push(1 << 30, false);
        assert!(large.signaled);
        assert!(!window.has_room(1) && !window.has_room(1 << 30));
        window.complete(large.id);
        assert!(window.has_room(1 << 30));
    }

    #[test]
    fn a_window_of_one_request_moves_on() {
        for max_requests in [0, 1] {
            let mut window = Window::new(max_requests, NO_LIMIT);
            for id in 1..=100 {
                assert!(window.has_room(1));
                assert_eq!(window.push(1, false), Admitted { id, signaled: true });
                assert!(!window.has_room(1));
                window.complete(id);
            }
        }
    }

    /// Whoever waits because there is no room waits for something that comes; and bounds hold throughout.
    #[test]
    fn whenever_there_is_no_room_a_signalled_request_is_in_flight() {
        let mut random = fastrand::Rng::with_seed(1);
        for max_requests in 1..=300 {
            let max_bytes = 1 << random.u32(12..26);
            let mut window = Window::new(max_requests, max_bytes);
            let mut signaled = VecDeque::new();
            for _ in 0..1000 {
                let magnitude = random.u32(0..24);
                let len = random.u64(0..=1 << magnitude);
                while !window.has_room(len) {
                    let oldest = signaled.pop_front().expect("no completion would ever come");
                    window.complete(oldest);
                }
                let request = window.push(len, random.u8(..20) == 0);
                if request.signaled {
                    signaled.push_back(request.id);
                }
                assert!(window.in_flight() <= u64::from(max_requests));
            }
        }
    }
}
