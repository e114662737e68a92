//! What travels in a data stream.
//!
//! ```text
//!   0      4        8        12      16
//!   kind   extents  round    zero    │ extent × n (16 bytes each) │ payload
//!                                    │ region  pages  first page  │ all extents' bytes, in order
//! ```
//! A *write* has a table of extents and their content, a *zero* only the table, a *barrier* neither;
//! its answer comes back on the same stream. One table for many extents, so that a thousand scattered
//! pages cost a handful of system calls at each end, and one copy of a large extent needs no framing
//! in between. Integers are little-endian; lengths are counted in pages of 4096 bytes.

use migration::memory::{Extent, PAGE_SIZE};

/// Length of a header and of an extent in the table, in bytes.
pub const UNIT: usize = 16;

/// Most extents in one frame; bounds what a peer can make us allocate.
pub const MAX_FRAME_EXTENTS: usize = 4096;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Extents and their content.
    Write,
    /// Extents that are to read as zeros.
    Zero,
    /// Everything before this has to be placed before it is answered.
    Barrier,
}

/// A frame's first 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is.
    pub kind: Kind,
    /// Number of extents that follow.
    pub extents: u32,
    /// Number of the barrier.
    pub round: u32,
}

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// An unknown kind, or a field that must be zero.
    #[error("malformed frame header")]
    Header,
    /// More extents than a frame may have, or none where there must be some.
    #[error("a frame of {0} extents")]
    Extents(u32),
}

impl Header {
    /// The 16 bytes.
    pub fn encode(self) -> [u8; UNIT] {
        let kind: u32 = match self.kind {
            Kind::Write => 1,
            Kind::Zero => 2,
            Kind::Barrier => 3,
        };
        let mut bytes = [0; UNIT];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.extents.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.round.to_le_bytes());
        bytes
    }

    /// Reads a header and checks its bounds.
    ///
    /// # Errors
    /// [`FrameError`].
    pub fn decode(bytes: &[u8; UNIT]) -> Result<Self, FrameError> {
        let field = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (extents, round) = (field(4), field(8));
        let kind = match field(0) {
            1 => Kind::Write,
            2 => Kind::Zero,
            3 => Kind::Barrier,
            _ => return Err(FrameError::Header),
        };
        if field(12) != 0 {
            return Err(FrameError::Header);
        }
        if (kind == Kind::Barrier) != (extents == 0) || extents as usize > MAX_FRAME_EXTENTS {
            return Err(FrameError::Extents(extents));
        }
        Ok(Header { kind, extents, round })
    }
}

/// Whether an extent can be put in a table: whole pages, and no more than a table entry can count.
pub fn fits(extent: &Extent) -> bool {
    extent.offset.is_multiple_of(PAGE_SIZE)
        && extent.len.is_multiple_of(PAGE_SIZE)
        && extent.len / PAGE_SIZE <= u64::from(u32::MAX)
}

/// Appends an extent that [`fits`] to a table.
pub fn put_extent(table: &mut Vec<u8>, extent: &Extent) {
    table.extend_from_slice(&extent.region.to_le_bytes());
    table.extend_from_slice(&((extent.len / PAGE_SIZE) as u32).to_le_bytes());
    table.extend_from_slice(&(extent.offset / PAGE_SIZE).to_le_bytes());
}

/// Reads an extent from its 16 bytes. Its bounds are yet to be checked; an offset that no memory can
/// have comes out as one that no check passes.
pub fn get_extent(bytes: &[u8; UNIT]) -> Extent {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let first_page = u64::from(word(8)) | u64::from(word(12)) << 32;
    Extent {
        region: word(0),
        offset: first_page.saturating_mul(PAGE_SIZE),
        len: u64::from(word(4)) * PAGE_SIZE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_extents_round_trip() {
        let header = Header { kind: Kind::Write, extents: 7, round: 3 };
        assert_eq!(Header::decode(&header.encode()), Ok(header));
        let extent = Extent { region: 2, offset: 5 << 30, len: 3 * PAGE_SIZE };
        let mut table = Vec::new();
        put_extent(&mut table, &extent);
        assert_eq!(get_extent(table.as_slice().try_into().unwrap()), extent);
    }

    #[test]
    fn hostile_headers_are_refused() {
        assert_eq!(Header::decode(&[0xff; UNIT]), Err(FrameError::Header));
        let many = Header { kind: Kind::Write, extents: 0, round: 0 }.encode();
        assert_eq!(Header::decode(&many), Err(FrameError::Extents(0)));
        let mut bytes = Header { kind: Kind::Zero, extents: 1, round: 0 }.encode();
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Header::decode(&bytes), Err(FrameError::Extents(u32::MAX)));
        assert_eq!(get_extent(&[0xff; UNIT]).offset, u64::MAX);
    }
}
