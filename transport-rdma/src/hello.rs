//! The private data of a connection request, and of its refusal.
//!
//! ```text
//! offset  0      1                          33
//!         32     the protocol's preamble    zeros, up to what the network pads to
//! ```
//! The preamble is the one that begins every TCP connection of the protocol, with its magic, version, lane
//! and session token. The length goes first since rdma_cm delivers private data padded.

use crate::cm::PrivateData;
use migration::preamble::{Kind, LEN, Preamble, PreambleError, Status};
use migration::transport::{MAX_LANES, Token};

/// Stands for the connection for registrations where a lane has its number.
const REGISTRATIONS: u16 = u16::MAX;

/// What a connection of a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Writes, zeros and barriers.
    Lane(u16),
    /// Requests for memory to be registered, and the answers.
    Registrations,
}

/// Encoded private data.
pub(crate) type Hello = [u8; LEN + 1];

fn encode(preamble: &Preamble) -> Hello {
    let mut bytes = [0; LEN + 1];
    bytes[0] = LEN as u8;
    bytes[1..].copy_from_slice(&preamble.encode());
    bytes
}

/// What a source presents.
pub(crate) fn request(token: Token, purpose: Purpose, lanes: u16) -> Hello {
    let lane = match purpose {
        Purpose::Lane(lane) => lane,
        Purpose::Registrations => REGISTRATIONS,
    };
    encode(&Preamble::data(token, lane, lanes))
}

/// What a destination answers. Without the token, which whoever is refused must not learn.
pub(crate) fn refusal(status: Status) -> Hello {
    encode(&Preamble::data(Token([0; 16]), 0, 0).answer(status))
}

fn decode(private_data: &PrivateData) -> Result<Preamble, PreambleError> {
    let (len, rest) = (private_data[0], &private_data[1..=LEN]);
    let mut bytes = [0; LEN];
    bytes.copy_from_slice(rest);
    if usize::from(len) != LEN {
        return Err(PreambleError::Magic);
    }
    Preamble::decode(&bytes)
}

/// What a connection request of the session `token` is for.
///
/// # Errors
/// The status to refuse it with.
pub(crate) fn accept(private_data: &PrivateData, token: Token) -> Result<Purpose, Status> {
    let preamble = decode(private_data).map_err(|error| match error {
        PreambleError::Version { .. } => Status::Version,
        _ => Status::Session,
    })?;
    if (preamble.kind, preamble.status) != (Kind::Data, Status::Ok) {
        return Err(Status::Session);
    }
    let purpose = match preamble.lane {
        REGISTRATIONS => Purpose::Registrations,
        lane if lane < preamble.lanes && usize::from(lane) < MAX_LANES => Purpose::Lane(lane),
        _ => return Err(Status::Session),
    };
    if same(&preamble.token.0, &token.0) { Ok(purpose) } else { Err(Status::Session) }
}

/// Compares in a time that does not depend on how much of a guess is right.
fn same(a: &[u8; 16], b: &[u8; 16]) -> bool {
    a.iter().zip(b).fold(0, |differences, (a, b)| differences | (a ^ b)) == 0
}

/// Why a destination refused; `None` if the private data is no refusal.
pub(crate) fn refused(private_data: &PrivateData) -> Option<&'static str> {
    match decode(private_data) {
        Ok(Preamble { status: Status::Session, .. }) => Some("it does not know this session"),
        Ok(Preamble { status: Status::Version, .. }) => Some("it speaks another version of the protocol"),
        Ok(Preamble { status: Status::Busy, .. }) => Some("it cannot serve the connection"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cm::MAX_PRIVATE_DATA_BYTES;

    const TOKEN: Token = Token([7; 16]);

    fn padded(hello: Hello) -> PrivateData {
        let mut private_data = [0; MAX_PRIVATE_DATA_BYTES];
        private_data[..hello.len()].copy_from_slice(&hello);
        private_data
    }

    #[test]
    fn requests_survive_the_network() {
        for purpose in [Purpose::Lane(0), Purpose::Lane(3), Purpose::Registrations] {
            assert_eq!(accept(&padded(request(TOKEN, purpose, 4)), TOKEN), Ok(purpose));
        }
    }

    #[test]
    fn every_bit_counts() {
        let good = padded(request(TOKEN, Purpose::Lane(1), 4));
        for bit in 0..8 * (LEN + 1) {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            // Lane and lanes may be other valid numbers; anything else must be refused.
            let numbers = (1 + 12)..(1 + 16);
            if !numbers.contains(&(bit / 8)) {
                assert!(accept(&bad, TOKEN).is_err(), "bit {bit}");
            }
        }
        assert_eq!(accept(&padded(request(TOKEN, Purpose::Lane(4), 4)), TOKEN), Err(Status::Session));
        assert_eq!(accept(&padded(request(TOKEN, Purpose::Lane(64), 65)), TOKEN), Err(Status::Session));
        assert_eq!(accept(&[0; MAX_PRIVATE_DATA_BYTES], TOKEN), Err(Status::Session));
        assert_eq!(accept(&[0xff; MAX_PRIVATE_DATA_BYTES], TOKEN), Err(Status::Session));
    }

    #[test]
    fn refusals_say_why_and_not_the_token() {
        let refusal = padded(refusal(Status::Session));
        assert_eq!(refused(&refusal), Some("it does not know this session"));
        assert!(refusal[1 + 16..].iter().all(|b| *b == 0));
        assert_eq!(refused(&[0; MAX_PRIVATE_DATA_BYTES]), None);
    }
}
