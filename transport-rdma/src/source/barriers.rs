//! The barriers of a lane, from posting to confirmation.

use migration::transport::PlaneError;
use std::collections::VecDeque;

/// Barriers by the number of their round. The destination confirms them in the order in which they were
/// posted.
#[derive(Default)]
pub(super) struct Barriers {
    /// Posted and not confirmed, oldest first.
    posted: VecDeque<u32>,
    /// Confirmed and not waited for, oldest first.
    confirmed: VecDeque<u32>,
}

impl Barriers {
    /// Barrier `round` has been posted.
    pub(super) fn post(&mut self, round: u32) {
        self.posted.push_back(round);
    }

    /// The destination has confirmed barrier `round`.
    ///
    /// # Errors
    /// [`PlaneError::Protocol`] when it is not the oldest one that is not confirmed.
    pub(super) fn confirm(&mut self, round: u32) -> Result<(), PlaneError> {
        if self.posted.front() != Some(&round) {
            return Err(PlaneError::Protocol(format!("barrier {round} is confirmed out of turn")));
        }
        self.posted.pop_front();
        self.confirmed.push_back(round);
        Ok(())
    }

    /// Whether barrier `round` is confirmed. Forgets it then, and all that were confirmed before it.
    pub(super) fn take_confirmed(&mut self, round: u32) -> bool {
        while let Some(confirmed) = self.confirmed.pop_front() {
            if confirmed == round {
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_barrier_is_confirmed_once_and_only_after_it_was_posted() {
        let mut barriers = Barriers::default();
        assert!(barriers.confirm(0).is_err());
        barriers.post(0);
        assert!(!barriers.take_confirmed(0));
        barriers.confirm(0).unwrap();
        assert!(barriers.confirm(0).is_err());
        assert!(barriers.take_confirmed(0));
        assert!(!barriers.take_confirmed(0));
    }

    #[test]
    fn confirmations_come_in_the_order_of_posting() {
        let mut barriers = Barriers::default();
        [7, 8, 9].into_iter().for_each(|round| barriers.post(round));
        assert!(matches!(barriers.confirm(8), Err(PlaneError::Protocol(_))));
        barriers.confirm(7).unwrap();
        barriers.confirm(8).unwrap();
        // Whoever waits for a later one has no use for those before it.
        assert!(barriers.take_confirmed(8));
        assert!(!barriers.take_confirmed(7));
        barriers.confirm(9).unwrap();
        assert!(barriers.take_confirmed(9));
    }
}
