//! A lane at the destination: clearing the pages that are named, and confirming barriers. The card places
//! what is written, without us.

use super::Plane;
use super::endpoint::Endpoint;
use crate::message::{self, Extents, LANE_CREDITS, Message};
use crate::pages::check_whole_pages;
use migration::scan;
use migration::transport::PlaneError;
use std::sync::atomic::Ordering;

/// Messages that are handled at the most before the source is told so. Half of the buffers are enough to keep
/// it going.
const REPORT_INTERVAL_MESSAGES: u64 = LANE_CREDITS as u64 / 2;

impl Plane {
    /// Serves a lane until the plane is halted.
    pub(super) fn serve_lane(&self, endpoint: &mut Endpoint) -> Result<(), PlaneError> {
        // Messages that are handled, those of them that the source has been told of, and bytes it says it
        // wrote.
        let (mut handled, mut reported, mut written) = (0u64, 0u64, 0u64);
        endpoint.serve(&self.halt, |immediate, content| {
            handled += 1;
            if let Some(round) = immediate {
                // The card completes this after everything before it on the queue pair is in memory, and the
                // zeros before it have been handled here, in order.
                reported = handled;
                return Ok(Some(Message::Done { messages: handled, round: Some(round) }));
            }
            match message::get(content)? {
                Message::Zero(extents) => self.clear(extents)?,
                Message::Progress(now) => {
                    let more = now.checked_sub(written).ok_or_else(|| {
                        PlaneError::Protocol(format!("{now} bytes written after {written}"))
                    })?;
                    self.placed.fetch_add(more, Ordering::Relaxed);
                    self.claimed.fetch_add(more, Ordering::Relaxed);
                    written = now;
                }
                other => return Err(PlaneError::Protocol(format!("{other:?} on a lane"))),
            }
            if handled - reported < REPORT_INTERVAL_MESSAGES {
                return Ok(None);
            }
            reported = handled;
            Ok(Some(Message::Done { messages: handled, round: None }))
        })
    }

    fn clear(&self, extents: Extents<'_>) -> Result<(), PlaneError> {
        let ram = &self.session.ram;
        extents.iter().try_for_each(|extent| check_whole_pages(ram, &extent))?;
        for extent in extents.iter() {
            // SAFETY: the guest does not run here yet, and no reference to its memory exists.
            unsafe { scan::clear(ram, &extent, || false) };
            self.coverage.mark(&extent);
        }
        // Named pages are a sign of life as much as sent ones.
        self.placed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
