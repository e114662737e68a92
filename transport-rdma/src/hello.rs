//! The private data of a connection request, and of its refusal.
//!
//! ```text
//! offset  0      1                          33                    49
//!         48     the protocol's preamble    proof of the secret   zeros, up to what the network pads to
//! ```
//! The preamble is the one that begins every TCP connection of the protocol, with its magic, version, lane
//! and session token. The proof shows that whoever connects knows the secret of the session's control link;
//! it is good for this preamble alone, so that one that was seen on the wire opens no other lane. A refusal
//! ends with the preamble. The length goes first since rdma_cm delivers private data padded.

use crate::cm::PrivateData;
use migration::preamble::{Kind, LEN, Preamble, PreambleError, Status};
use migration::transport::{MAX_LANES, Proof, Secret, Token};

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

/// Length of a preamble and its proof.
const PROVED_LEN: usize = LEN + size_of::<Proof>();

/// What a source presents to the session `token`, whose secret it proves to know.
pub(crate) fn request(token: Token, secret: &Secret, purpose: Purpose, lanes: u16) -> [u8; PROVED_LEN + 1] {
    let lane = match purpose {
        Purpose::Lane(lane) => lane,
        Purpose::Registrations => REGISTRATIONS,
    };
    let preamble = Preamble::data(token, lane, lanes).encode();
    let mut bytes = [0; PROVED_LEN + 1];
    bytes[0] = PROVED_LEN as u8;
    bytes[1..=LEN].copy_from_slice(&preamble);
    bytes[LEN + 1..].copy_from_slice(&secret.proof(&preamble));
    bytes
}

/// What a destination answers. Without the token, which whoever is refused must not learn.
pub(crate) fn refusal(status: Status) -> [u8; LEN + 1] {
    let mut bytes = [0; LEN + 1];
    bytes[0] = LEN as u8;
    bytes[1..].copy_from_slice(&Preamble::data(Token([0; 16]), 0, 0).answer(status).encode());
    bytes
}

/// The preamble in private data of `len` bytes.
fn decode(private_data: &PrivateData, len: usize) -> Result<Preamble, PreambleError> {
    let mut bytes = [0; LEN];
    bytes.copy_from_slice(&private_data[1..=LEN]);
    let preamble = Preamble::decode(&bytes);
    // A program of another version may say more or less than this one.
    let other = matches!(preamble, Err(PreambleError::Version { .. }));
    if other || usize::from(private_data[0]) == len { preamble } else { Err(PreambleError::Magic) }
}

/// What a connection request of the session `token`, whose secret it must prove to know, is for.
///
/// # Errors
/// The status to refuse it with.
pub(crate) fn accept(private_data: &PrivateData, token: Token, secret: &Secret) -> Result<Purpose, Status> {
    let preamble = decode(private_data, PROVED_LEN).map_err(|error| match error {
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
    let (preamble_bytes, proof) = (&private_data[1..=LEN], &private_data[LEN + 1..=PROVED_LEN]);
    let ours = preamble.token == token && secret.is_proved(preamble_bytes, proof);
    if ours { Ok(purpose) } else { Err(Status::Session) }
}

/// Why a destination refused; `None` if the private data is no refusal.
pub(crate) fn refused(private_data: &PrivateData) -> Option<&'static str> {
    match decode(private_data, LEN) {
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
    const SECRET: Secret = Secret([9; 32]);

    fn request(purpose: Purpose) -> PrivateData {
        padded(&super::request(TOKEN, &SECRET, purpose, 4))
    }

    fn accept(private_data: &PrivateData) -> Result<Purpose, Status> {
        super::accept(private_data, TOKEN, &SECRET)
    }

    fn padded(hello: &[u8]) -> PrivateData {
        let mut private_data = [0; MAX_PRIVATE_DATA_BYTES];
        private_data[..hello.len()].copy_from_slice(hello);
        private_data
    }

    #[test]
    fn requests_survive_the_network() {
        for purpose in [Purpose::Lane(0), Purpose::Lane(3), Purpose::Registrations] {
            assert_eq!(accept(&request(purpose)), Ok(purpose));
        }
    }

    #[test]
    fn every_bit_counts() {
        let good = request(Purpose::Lane(1));
        for bit in 0..8 * (PROVED_LEN + 1) {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(accept(&bad).is_err(), "bit {bit}");
        }
        assert_eq!(accept(&request(Purpose::Lane(4))), Err(Status::Session));
        let many = padded(&super::request(TOKEN, &SECRET, Purpose::Lane(64), 65));
        assert_eq!(accept(&many), Err(Status::Session));
        assert_eq!(super::accept(&good, Token([8; 16]), &SECRET), Err(Status::Session));
        assert_eq!(super::accept(&good, TOKEN, &Secret::NONE), Err(Status::Session));
        assert_eq!(accept(&[0; MAX_PRIVATE_DATA_BYTES]), Err(Status::Session));
        assert_eq!(accept(&[0xff; MAX_PRIVATE_DATA_BYTES]), Err(Status::Session));
    }

    #[test]
    fn a_proof_that_was_seen_opens_no_other_lane() {
        let seen = request(Purpose::Lane(1));
        for lane in [0, 2, 3] {
            let mut forged = request(Purpose::Lane(lane));
            forged[LEN + 1..=PROVED_LEN].copy_from_slice(&seen[LEN + 1..=PROVED_LEN]);
            assert_eq!(accept(&forged), Err(Status::Session), "lane {lane}");
        }
    }

    #[test]
    fn version_1_is_told_so() {
        let mut request = [0; LEN + 1];
        request[0] = LEN as u8;
        request[1..].copy_from_slice(&Preamble::data(TOKEN, 0, 1).encode());
        request[9] = 1;
        assert_eq!(accept(&padded(&request)), Err(Status::Version));
    }

    #[test]
    fn refusals_say_why_and_not_the_token() {
        let refusal = padded(&refusal(Status::Session));
        assert_eq!(refused(&refusal), Some("it does not know this session"));
        assert!(refusal[1 + 16..].iter().all(|b| *b == 0));
        assert_eq!(refused(&[0; MAX_PRIVATE_DATA_BYTES]), None);
    }
}
