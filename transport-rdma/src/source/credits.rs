//! Flow control of a lane's messages.
//!
//! A message needs a receive buffer at the destination; without one the queue pair would fail (RNR). The
//! destination has posted a number of buffers, and reports now and then how many messages it has handled: it
//! has posted their buffers again. No more than the difference is ever in flight. A barrier counts as a
//! message, since a write with immediate data uses up a buffer too.

use migration::transport::PlaneError;

/// Counts messages against the peer's receive buffers, and says which of as many send buffers is free.
pub(super) struct Credits {
    capacity: u64,
    sent: u64,
    handled: u64,
}

impl Credits {
    /// Credits towards a peer that has posted `capacity` receive buffers.
    pub(super) fn new(capacity: usize) -> Credits {
        Credits { capacity: capacity as u64, sent: 0, handled: 0 }
    }

    /// Takes one credit: one message may be sent. Returns the send buffer for it, from 0 to `capacity` - 1,
    /// or `None` while the peer has no receive buffer.
    ///
    /// Buffers are given out in turn. So the last message from the same buffer was `capacity` messages ago,
    /// and the peer has handled it, or there would be no credit.
    pub(super) fn take(&mut self) -> Option<usize> {
        if self.sent - self.handled >= self.capacity {
            return None;
        }
        let buffer = (self.sent % self.capacity) as usize;
        self.sent += 1;
        Some(buffer)
    }

    /// The peer reports that it has handled `handled` messages since the beginning.
    ///
    /// # Errors
    /// [`PlaneError::Protocol`] when it had reported more before, or when fewer have been sent.
    pub(super) fn release(&mut self, handled: u64) -> Result<(), PlaneError> {
        if handled < self.handled || handled > self.sent {
            return Err(PlaneError::Protocol(format!(
                "the destination reports {handled} messages handled of {} sent, after {}",
                self.sent, self.handled
            )));
        }
        self.handled = handled;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes credits until there are none; returns the buffers.
    fn exhaust(credits: &mut Credits) -> Vec<usize> {
        std::iter::from_fn(|| credits.take()).collect()
    }

    #[test]
    fn as_many_messages_as_buffers_and_no_more() {
        let mut credits = Credits::new(4);
        assert_eq!(exhaust(&mut credits), [0, 1, 2, 3]);
        assert_eq!(credits.take(), None);
    }

    #[test]
    fn exhausted_credits_come_back_one_by_one() {
        let mut credits = Credits::new(3);
        exhaust(&mut credits);
        for handled in 1..=10 {
            credits.release(handled).unwrap();
            assert_eq!(credits.take(), Some((handled as usize + 2) % 3));
            assert_eq!(credits.take(), None);
        }
    }

    #[test]
    fn buffers_wrap_around() {
        let mut credits = Credits::new(3);
        assert_eq!(credits.take(), Some(0));
        credits.release(1).unwrap();
        assert_eq!(exhaust(&mut credits), [1, 2, 0]);
        credits.release(4).unwrap();
        assert_eq!(exhaust(&mut credits), [1, 2, 0]);
    }

    #[test]
    fn a_report_may_come_again_but_not_go_back() {
        let mut credits = Credits::new(4);
        exhaust(&mut credits);
        credits.release(2).unwrap();
        credits.release(2).unwrap();
        assert!(matches!(credits.release(1), Err(PlaneError::Protocol(_))));
        // A refused report changes nothing.
        assert_eq!(exhaust(&mut credits), [0, 1]);
    }

    #[test]
    fn a_report_of_messages_that_were_never_sent_is_refused() {
        let mut credits = Credits::new(4);
        assert!(matches!(credits.release(1), Err(PlaneError::Protocol(_))));
        credits.take();
        assert!(matches!(credits.release(2), Err(PlaneError::Protocol(_))));
        assert!(matches!(credits.release(u64::MAX), Err(PlaneError::Protocol(_))));
        credits.release(1).unwrap();
        assert_eq!(exhaust(&mut credits), [1, 2, 3, 0]);
    }

    #[test]
    fn a_buffer_is_free_when_it_is_given_out() {
        let mut random = fastrand::Rng::with_seed(1);
        for capacity in 1..=40 {
            let mut credits = Credits::new(capacity);
            // The messages that are not handled, oldest first, by buffer.
            let mut in_use = std::collections::VecDeque::new();
            let mut handled = 0;
            for _ in 0..500 {
                match credits.take() {
                    Some(buffer) => {
                        assert!(buffer < capacity && !in_use.contains(&buffer), "buffer {buffer}");
                        in_use.push_back(buffer);
                    }
                    None => assert_eq!(in_use.len(), capacity),
                }
                if random.bool() {
                    let some = random.usize(..=in_use.len());
                    in_use.drain(..some);
                    handled += some as u64;
                    credits.release(handled).unwrap();
                }
            }
        }
    }
}
