//! The messages of both sides. Guest memory is never sent in one.
//!
//! A message fits a buffer of [`MAX_MESSAGE_BYTES`]. Its first byte says what it is; integers are
//! little-endian. A barrier is not a message, but the immediate data of an empty write.

use crate::buffers::MAX_MESSAGE_BYTES;
use migration::memory::Extent;
use migration::transport::PlaneError;

/// Messages that may be in flight to the destination on a lane: it has posted as many receive buffers for
/// them, and the source as many for the answers. Barriers count.
pub(crate) const LANE_CREDITS: usize = 32;

/// The same on the connection for registrations: requests that may be unanswered.
pub(crate) const REGISTRATION_CREDITS: usize = 32;

/// Bytes of an extent in a table.
const EXTENT_BYTES: usize = 20;

/// Bytes before a table of extents.
const TABLE_HEADER_BYTES: usize = 4;

/// Most extents in one message.
pub(crate) const MAX_EXTENTS: usize = (MAX_MESSAGE_BYTES - TABLE_HEADER_BYTES) / EXTENT_BYTES;

/// A message, as it is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Message<'a> {
    /// Source, lane: these extents read as zeros from now on.
    Zero(Extents<'a>),
    /// Source, lane: so many bytes have been written on this lane before this message.
    Progress(u64),
    /// Destination, lane: so many messages have been handled. With a round, its barrier was the last of them.
    Done { messages: u64, round: Option<u32> },
    /// Source, registrations: this chunk is going to be written to.
    Request(Extent),
    /// Destination, registrations: the key for that chunk, or an errno and the limit of locked memory (0 for
    /// none).
    Announce { extent: Extent, outcome: Result<u32, Refusal> },
}

/// Why the destination could not register memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub errno: i32,
    /// Its limit of locked memory in bytes; 0 for none.
    pub limit: u64,
}

/// A table of extents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extents<'a>(&'a [u8]);

impl<'a> Extents<'a> {
    pub(crate) fn iter(self) -> impl Iterator<Item = Extent> + use<'a> {
        let (entries, _) = self.0.as_chunks::<EXTENT_BYTES>();
        entries.iter().map(get_extent)
    }
}

fn get_extent(bytes: &[u8; EXTENT_BYTES]) -> Extent {
    Extent { region: u32_at(bytes, 0), offset: u64_at(bytes, 4), len: u64_at(bytes, 12) }
}

fn put_extent(bytes: &mut [u8], extent: &Extent) {
    bytes[0..4].copy_from_slice(&extent.region.to_le_bytes());
    bytes[4..12].copy_from_slice(&extent.offset.to_le_bytes());
    bytes[12..20].copy_from_slice(&extent.len.to_le_bytes());
}

/// Callers have checked the length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(value)
}

/// Callers have checked the length.
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

const ZERO: u8 = 1;
const PROGRESS: u8 = 2;
const DONE: u8 = 3;
const BARRIER_DONE: u8 = 4;
const REQUEST: u8 = 5;
const ANNOUNCE: u8 = 6;

/// Writes a table of zeros; returns the message's length. At most [`MAX_EXTENTS`].
pub(crate) fn put_zeros(buffer: &mut [u8; MAX_MESSAGE_BYTES], extents: &[Extent]) -> usize {
    debug_assert!(extents.len() <= MAX_EXTENTS);
    buffer[0] = ZERO;
    buffer[1] = 0;
    buffer[2..4].copy_from_slice(&(extents.len() as u16).to_le_bytes());
    let end = TABLE_HEADER_BYTES + extents.len() * EXTENT_BYTES;
    for (entry, extent) in buffer[TABLE_HEADER_BYTES..end].chunks_exact_mut(EXTENT_BYTES).zip(extents) {
        put_extent(entry, extent);
    }
    end
}

/// Writes any message but a table of zeros; returns its length.
pub(crate) fn put(buffer: &mut [u8; MAX_MESSAGE_BYTES], message: &Message<'_>) -> usize {
    match message {
        Message::Zero(extents) => {
            buffer[..TABLE_HEADER_BYTES].copy_from_slice(&[ZERO, 0, 0, 0]);
            let entries = extents.0.len() / EXTENT_BYTES;
            buffer[2..4].copy_from_slice(&(entries as u16).to_le_bytes());
            buffer[TABLE_HEADER_BYTES..TABLE_HEADER_BYTES + extents.0.len()].copy_from_slice(extents.0);
            TABLE_HEADER_BYTES + extents.0.len()
        }
        Message::Progress(bytes) => {
            buffer[0] = PROGRESS;
            buffer[1..9].copy_from_slice(&bytes.to_le_bytes());
            9
        }
        Message::Done { messages, round } => {
            buffer[0] = if round.is_some() { BARRIER_DONE } else { DONE };
            buffer[1..9].copy_from_slice(&messages.to_le_bytes());
            buffer[9..13].copy_from_slice(&round.unwrap_or(0).to_le_bytes());
            13
        }
        Message::Request(extent) => {
            buffer[0] = REQUEST;
            put_extent(&mut buffer[1..21], extent);
            21
        }
        Message::Announce { extent, outcome } => {
            buffer[0] = ANNOUNCE;
            put_extent(&mut buffer[1..21], extent);
            let (key, errno, limit) = match outcome {
                Ok(key) => (*key, 0, 0),
                Err(refusal) => (0, refusal.errno.max(1) as u32, refusal.limit),
            };
            buffer[21..25].copy_from_slice(&key.to_le_bytes());
            buffer[25..29].copy_from_slice(&errno.to_le_bytes());
            buffer[29..37].copy_from_slice(&limit.to_le_bytes());
            37
        }
    }
}

/// Reads a message.
///
/// # Errors
/// [`PlaneError::Protocol`] for anything but a whole message of its kind.
pub(crate) fn get(bytes: &[u8]) -> Result<Message<'_>, PlaneError> {
    let message = match (bytes.first(), bytes.len()) {
        (Some(&ZERO), TABLE_HEADER_BYTES..) => {
            let entries = usize::from(u16::from_le_bytes([bytes[2], bytes[3]]));
            (bytes.len() == TABLE_HEADER_BYTES + entries * EXTENT_BYTES)
                .then(|| Message::Zero(Extents(&bytes[TABLE_HEADER_BYTES..])))
        }
        (Some(&PROGRESS), 9) => Some(Message::Progress(u64_at(bytes, 1))),
        (Some(&kind @ (DONE | BARRIER_DONE)), 13) => {
            let round = (kind == BARRIER_DONE).then(|| u32_at(bytes, 9));
            Some(Message::Done { messages: u64_at(bytes, 1), round })
        }
        (Some(&REQUEST), 21) => bytes[1..].first_chunk().map(|entry| Message::Request(get_extent(entry))),
        (Some(&ANNOUNCE), 37) => bytes[1..].first_chunk().map(|entry| {
            let errno = u32_at(bytes, 25) as i32;
            let outcome = match errno {
                0 => Ok(u32_at(bytes, 21)),
                errno => Err(Refusal { errno, limit: u64_at(bytes, 29) }),
            };
            Message::Announce { extent: get_extent(entry), outcome }
        }),
        _ => None,
    };
    message.ok_or_else(|| {
        let kind = bytes.first().copied().unwrap_or(0);
        PlaneError::Protocol(format!("a message of {} bytes and kind {kind}", bytes.len()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: Extent = Extent { region: 3, offset: 0x1234_5000, len: 0x2000 };

    fn all() -> Vec<Message<'static>> {
        let refusal = Refusal { errno: libc::ENOMEM, limit: 8 << 20 };
        vec![
            Message::Progress(u64::MAX),
            Message::Done { messages: 7, round: None },
            Message::Done { messages: 8, round: Some(u32::MAX) },
            Message::Request(EXTENT),
            Message::Announce { extent: EXTENT, outcome: Ok(99) },
            Message::Announce { extent: EXTENT, outcome: Err(refusal) },
        ]
    }

    #[test]
    fn messages_survive_and_parts_of_them_do_not() {
        let mut buffer = [0; MAX_MESSAGE_BYTES];
        for message in all() {
            let len = put(&mut buffer, &message);
            assert_eq!(get(&buffer[..len]).unwrap(), message);
            for end in 0..len {
                assert!(get(&buffer[..end]).is_err(), "{message:?} cut to {end}");
            }
            assert!(get(&buffer[..len + 1]).is_err());
        }
    }

    #[test]
    fn tables_fit_a_buffer_and_are_whole() {
        let extents: Vec<_> =
            (0..MAX_EXTENTS as u64).map(|n| Extent { region: 1, offset: n << 12, len: 4096 }).collect();
        let mut buffer = [0; MAX_MESSAGE_BYTES];
        for count in [0, 1, MAX_EXTENTS] {
            let len = put_zeros(&mut buffer, &extents[..count]);
            let Ok(Message::Zero(table)) = get(&buffer[..len]) else { panic!("{count}") };
            assert!(table.iter().eq(extents[..count].iter().copied()));
            if count > 0 {
                assert!(get(&buffer[..len - 1]).is_err());
                // A count that promises more than there is.
                buffer[2] = buffer[2].wrapping_add(1);
                assert!(get(&buffer[..len]).is_err());
            }
        }
    }

    #[test]
    fn noise_is_refused_and_never_panics() {
        let mut random = fastrand::Rng::with_seed(1);
        for _ in 0..100_000 {
            let mut bytes = vec![0; random.usize(..64)];
            random.fill(&mut bytes);
            if let Ok(Message::Zero(table)) = get(&bytes) {
                assert!(table.iter().count() <= 3);
            }
        }
    }
}
