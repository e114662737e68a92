//! The first 32 bytes of every connection.
//!
//! One port takes control and data connections alike; the preamble tells them apart before
//! anything else is parsed. Its layout never changes with the protocol's version, so that two
//! programs of different ages can always tell each other their versions. Both ends send one:
//! the connecting end first, the accepting end in answer.
//!
//! ```text
//! offset  0        8         10     11        12     14      16              32
//!         magic    version   kind   status    lane   lanes   session token
//! ```
//! Integers are little-endian.

use crate::transport::Token;

/// Length of a preamble in bytes.
pub const LEN: usize = 32;

/// Version of the protocol that this crate speaks.
pub const VERSION: u16 = 2;

/// The oldest version that it speaks as well. Version 1 proved nothing, and is spoken no more.
pub const OLDEST: u16 = 2;

/// The bit of the kind that says that the connection goes on encrypted.
const ENCRYPTED: u8 = 0x80;

const MAGIC: [u8; 8] = *b"WHIMBREL";

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Control messages.
    Control,
    /// One lane of the TCP data plane.
    Data,
}

/// The accepting end's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Go on (also what the connecting end sends).
    Ok,
    /// Versions differ: see the answer's version.
    Version,
    /// Another session is under way.
    Busy,
    /// No such session, or the lane is not wanted.
    Session,
    /// This side takes encrypted connections only.
    Encrypted,
    /// This side has no certificate, and cannot encrypt.
    Clear,
    /// This side does not admit this peer.
    Denied,
}

/// A decoded preamble.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preamble {
    /// Protocol version of the sender.
    pub version: u16,
    /// What the connection is for.
    pub kind: Kind,
    /// Whether it goes on encrypted.
    pub encrypted: bool,
    /// Answer of the accepting end.
    pub status: Status,
    /// Number of this lane, for data connections.
    pub lane: u16,
    /// How many lanes the source opens, for data connections.
    pub lanes: u16,
    /// The session.
    pub token: Token,
}

/// Why 32 bytes are no preamble of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    /// Somebody else's protocol.
    #[error("the peer does not speak Whimbrel's protocol: is this the right address and port?")]
    Magic,
    /// A version this program does not speak. Nothing else of the preamble is trusted then.
    #[error(
        "the peer speaks protocol version {theirs}, this program speaks version {VERSION}: update {} side",
        older(*theirs)
    )]
    Version {
        /// The peer's version.
        theirs: u16,
    },
    /// A field holds a value that this version does not define.
    #[error("the peer's preamble is malformed")]
    Malformed,
}

fn older(theirs: u16) -> &'static str {
    if theirs < VERSION { "the other" } else { "this" }
}

impl Preamble {
    /// The preamble of a new control connection.
    pub fn control(token: Token) -> Self {
        let (kind, status) = (Kind::Control, Status::Ok);
        Preamble { version: VERSION, kind, encrypted: false, status, lane: 0, lanes: 0, token }
    }

    /// The preamble of lane `lane` of `lanes`.
    pub fn data(token: Token, lane: u16, lanes: u16) -> Self {
        Preamble { kind: Kind::Data, lane, lanes, ..Preamble::control(token) }
    }

    /// The same, of a connection that goes on encrypted or not.
    pub fn encrypted(self, encrypted: bool) -> Self {
        Preamble { encrypted, ..self }
    }

    /// The answer to this preamble.
    pub fn answer(self, status: Status) -> Self {
        Preamble { status, ..self }
    }

    /// The answer to a preamble of another version, of which nothing but the version is known.
    pub fn version_mismatch() -> Self {
        Preamble { status: Status::Version, ..Preamble::control(Token([0; 16])) }
    }

    /// The 32 bytes.
    pub fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10] = match self.kind {
            Kind::Control => 1,
            Kind::Data => 2,
        } | if self.encrypted { ENCRYPTED } else { 0 };
        bytes[11] = match self.status {
            Status::Ok => 0,
            Status::Version => 1,
            Status::Busy => 2,
            Status::Session => 3,
            Status::Encrypted => 4,
            Status::Clear => 5,
            Status::Denied => 6,
        };
        bytes[12..14].copy_from_slice(&self.lane.to_le_bytes());
        bytes[14..16].copy_from_slice(&self.lanes.to_le_bytes());
        bytes[16..].copy_from_slice(&self.token.0);
        bytes
    }

    /// Reads a preamble.
    ///
    /// # Errors
    /// [`PreambleError`] says what is wrong with it.
    pub fn decode(bytes: &[u8; LEN]) -> Result<Self, PreambleError> {
        if bytes[..8] != MAGIC {
            return Err(PreambleError::Magic);
        }
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let version = u16_at(8);
        if !(OLDEST..=VERSION).contains(&version) {
            return Err(PreambleError::Version { theirs: version });
        }
        let kind = match bytes[10] & !ENCRYPTED {
            1 => Kind::Control,
            2 => Kind::Data,
            _ => return Err(PreambleError::Malformed),
        };
        let status = match bytes[11] {
            0 => Status::Ok,
            1 => Status::Version,
            2 => Status::Busy,
            3 => Status::Session,
            4 => Status::Encrypted,
            5 => Status::Clear,
            6 => Status::Denied,
            _ => return Err(PreambleError::Malformed),
        };
        let mut token = [0; 16];
        token.copy_from_slice(&bytes[16..]);
        let (lane, lanes, token) = (u16_at(12), u16_at(14), Token(token));
        Ok(Preamble { version, kind, encrypted: bytes[10] & ENCRYPTED != 0, status, lane, lanes, token })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_refusals() {
        let sent = Preamble::data(Token([7; 16]), 3, 4).encrypted(true).answer(Status::Session);
        let mut bytes = sent.encode();
        assert_eq!(Preamble::decode(&bytes), Ok(sent));
        assert_eq!(Preamble::decode(&sent.encrypted(false).encode()), Ok(sent.encrypted(false)));
        bytes[10] = 9;
        assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Malformed));
        for theirs in [1, VERSION + 1] {
            bytes[8] = theirs as u8;
            assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Version { theirs }));
        }
        bytes[0] = b'w';
        assert_eq!(Preamble::decode(&bytes), Err(PreambleError::Magic));
    }
}
