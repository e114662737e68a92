//! How often the network is told that a guest has moved.

use std::time::Duration;

/// How often the network is told, and when. The first time is at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcing {
    /// How often; 0 for not at all.
    pub rounds: u32,
    /// From the first time to the second.
    pub initial: Duration,
    /// How much longer each wait is than the one before.
    pub step: Duration,
    /// No wait is longer.
    pub most: Duration,
}

impl Default for Announcing {
    fn default() -> Self {
        let [initial, step, most] = [50, 100, 550].map(Duration::from_millis);
        Announcing { rounds: 5, initial, step, most }
    }
}

impl Announcing {
    /// When the rounds are due, from the guest's start here on.
    pub(crate) fn times(self) -> impl Iterator<Item = Duration> {
        let mut due = Duration::ZERO;
        let later = self.waits().map(move |wait| {
            due += wait;
            due
        });
        std::iter::once(Duration::ZERO).chain(later)
    }

    /// The waits between rounds.
    fn waits(self) -> impl Iterator<Item = Duration> {
        let wait = move |number| self.initial.saturating_add(self.step.saturating_mul(number)).min(self.most);
        (0..self.rounds.saturating_sub(1)).map(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_their_limit() {
        let waits = |announcing: Announcing| announcing.waits().map(|w| w.as_millis()).collect::<Vec<_>>();
        assert_eq!(waits(Announcing::default()), [50, 150, 250, 350]);
        let times = Announcing::default().times().map(|time| time.as_millis()).collect::<Vec<_>>();
        assert_eq!(times, [0, 50, 200, 450, 800]);
        assert_eq!(
            waits(Announcing { rounds: 8, ..Announcing::default() }),
            [50, 150, 250, 350, 450, 550, 550]
        );
        assert_eq!(waits(Announcing { rounds: 1, ..Announcing::default() }), [0; 0]);
        assert_eq!(waits(Announcing { rounds: 0, ..Announcing::default() }), [0; 0]);
    }
}
