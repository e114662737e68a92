//! Registering the chunks that the source asks for.

use super::Plane;
use super::endpoint::{Answer, Endpoint};
use crate::halt::lock;
use crate::limits;
use crate::message::{self, Message, Refusal};
use migration::memory::Extent;
use migration::transport::PlaneError;

impl Plane {
    /// Serves requests until the plane is halted.
    pub(super) fn serve_registrations(&self, endpoint: &mut Endpoint) -> Result<(), PlaneError> {
        endpoint.serve(&self.halt, |immediate, content| match (immediate, message::get(content)) {
            (None, Ok(Message::Request(extent))) => {
                let answer = self.register(extent);
                self.registering.note();
                answer
            }
            (None, Err(error)) => Err(error),
            _ => Err(PlaneError::Protocol("not a request for memory".into())),
        })
    }

    fn register(&self, extent: Extent) -> Result<Answer, PlaneError> {
        self.check(&extent)?;
        let outcome = match self.domain.register_ram(&self.session.ram, &extent, true) {
            Ok(region) => {
                let key = region.rkey();
                lock(&self.regions).insert((extent.region, extent.offset), (extent, region));
                Ok(key)
            }
            Err(error) => Err(Refusal {
                errno: error.raw_os_error().unwrap_or(libc::EIO),
                limit: limits::locked_memory().unwrap_or(0),
            }),
        };
        Ok(Some(Message::Announce { extent, outcome }))
    }

    /// A source may ask for whole chunks, and for each byte once, so that it cannot make this side pin or
    /// keep more than the machine's RAM.
    fn check(&self, extent: &Extent) -> Result<(), PlaneError> {
        let region = self.session.ram.check(extent)?;
        let chunk = 1u64 << self.chunk_shifts[extent.region as usize];
        let end = extent.offset + extent.len;
        let whole = extent.offset.is_multiple_of(chunk) && (end.is_multiple_of(chunk) || end == region.len());
        let regions = lock(&self.regions);
        let before = regions.range(..(extent.region, end)).next_back();
        let free = before.is_none_or(|((number, _), (taken, _))| {
            *number != extent.region || taken.offset + taken.len <= extent.offset
        });
        if whole && free {
            Ok(())
        } else {
            Err(PlaneError::Protocol(format!("{extent:?} is no chunk, or has been asked for before")))
        }
    }
}
