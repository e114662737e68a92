//! Writing into somebody else's RAM: the contract every data plane fulfils.
//!
//! RDMA shapes it, TCP imitates it. A migration has one [`SourcePlane`] of several [`Lane`]s (a
//! TCP stream, a queue pair), each driven by one thread, and one [`DestinationPlane`] that does
//! its work without being asked: through the network card, or through receiving threads.
//!
//! 1. An extent is (region, offset, length); its bounds are checked at both ends before anything
//!    is touched.
//! 2. [`Lane::write`] may return before the bytes have left, and the guest may change the page
//!    meanwhile. What arrives is *some* content of the page, possibly torn; the dirty log
//!    guarantees that a later round repairs it.
//! 3. Two writes to the same page never overtake each other on one lane. Between lanes only a
//!    barrier orders them: the engine sends a page at most once in a round, and ends every round
//!    with a barrier on each lane it used.
//! 4. A barrier is confirmed only when the *destination* has placed everything that was posted on
//!    that lane before it.
//! 5. After [`DestinationPlane::fence`] returns, no write of any age lands.
//!
//! The suite of the feature `conformance` tests all of this against any transport.

pub use crate::coverage::{COVERAGE_UNIT, Coverage};

use crate::cpu::CpuTime;
use crate::failure::{Code, Failure};
use crate::memory::{Extent, OutOfBounds, Ram};
use hmac::digest::KeyInit;
use hmac::{Hmac, Mac};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// Most lanes a session may have; bounds what a peer can make us open.
pub const MAX_LANES: usize = 64;

/// The random name of one migration, 128 bits from the kernel. Every connection of it begins with this name,
/// in the clear, so that it finds its session. It is no secret: what belongs to the session is proved by its
/// [`Secret`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Token(pub [u8; 16]);

impl Token {
    /// A fresh token.
    ///
    /// # Errors
    /// When the kernel has no random numbers to give.
    pub fn random() -> io::Result<Self> {
        random().map(Token)
    }
}

/// Random bytes from the kernel.
fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0u8; N];
    // SAFETY: the pointer and the length describe `bytes`, which lives across the call. So few bytes come
    // whole.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if got == N as isize { Ok(bytes) } else { Err(io::Error::last_os_error()) }
}

/// What the two ends of a session's control link know, and nobody else if that link is protected: 256 random
/// bits, which the destination chooses anew for each session. So whoever proves to know them belongs to this
/// session, and nothing that was recorded of another one is of any use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Secret(pub [u8; Secret::LEN]);

/// What shows that somebody knows a [`Secret`], without telling it.
pub type Proof = [u8; 16];

impl Secret {
    /// Length in bytes.
    pub const LEN: usize = 32;

    /// Of links whose ends trust each other without one.
    pub const NONE: Secret = Secret([0; Secret::LEN]);

    /// A fresh secret.
    ///
    /// # Errors
    /// When the kernel has no random numbers to give.
    pub fn random() -> io::Result<Self> {
        random().map(Secret)
    }

    /// What proves that whoever presents `what`, usually a preamble, knows the secret. It is good for nothing
    /// else: the first half of HMAC-SHA-256.
    pub fn proof(&self, what: &[u8]) -> Proof {
        let mut key = [0; 64];
        key[..Secret::LEN].copy_from_slice(&self.0);
        let mut hmac = <Hmac<Sha256> as KeyInit>::new(&key.into());
        hmac.update(what);
        let mut proof = Proof::default();
        proof.copy_from_slice(&hmac.finalize().into_bytes()[..size_of::<Proof>()]);
        proof
    }

    /// Whether `proof` is the proof for `what`, in a time that tells nothing of how nearly it is.
    pub fn is_proved(&self, what: &[u8], proof: &[u8]) -> bool {
        let right = self.proof(what);
        let differences = right.iter().zip(proof).fold(0, |differences, (a, b)| differences | (a ^ b));
        proof.len() == right.len() && differences == 0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl std::fmt::Debug for Token {
    /// Shows only the first bytes, which are enough to tell sessions apart.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token({:02x}{:02x}…)", self.0[0], self.0[1])
    }
}

/// What went wrong in a data plane.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlaneError {
    /// An extent outside the machine's RAM.
    #[error(transparent)]
    OutOfBounds(#[from] OutOfBounds),
    /// The connection broke or the device failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The peer sent what no correct peer sends.
    #[error("the peer broke the data protocol: {0}")]
    Protocol(String),
    /// The peer did not confirm in time.
    #[error("no confirmation from the peer within {0:?}")]
    Timeout(Duration),
    /// The peer closed the connection in good order, or its process ended.
    #[error("the destination closed the connection ({0}): its process has ended, or its log says why")]
    Closed(&'static str),
    /// The connection was cut off.
    #[error(
        "the connection was reset ({0}): the destination's process has ended, or something between cut it"
    )]
    Reset(&'static str),
    /// The connection is there, and the peer takes nothing.
    #[error("the destination has taken no data for {patience:?} ({what}): {}", stalled(*reachable))]
    Stalled {
        /// What was being done.
        what: &'static str,
        /// How long it may take nothing.
        patience: Duration,
        /// Whether its host answered meanwhile.
        reachable: bool,
    },
    /// This transport cannot be used here; the text says what is missing.
    #[error("{0}")]
    Unavailable(String),
    /// [`Interrupt::interrupt`] was called.
    #[error("interrupted")]
    Interrupted,
}

fn stalled(reachable: bool) -> &'static str {
    if reachable {
        "its host answers, so its process is stopped or stuck"
    } else {
        "nothing comes from its host either, so the network or the host is down"
    }
}

impl From<PlaneError> for Failure {
    fn from(error: PlaneError) -> Self {
        let code = match error {
            PlaneError::Timeout(_) | PlaneError::Stalled { .. } => Code::TIMEOUT,
            PlaneError::Protocol(_) | PlaneError::OutOfBounds(_) => Code::PROTOCOL,
            PlaneError::Interrupted => Code::CANCELLED,
            PlaneError::Io { .. }
            | PlaneError::Closed(_)
            | PlaneError::Reset(_)
            | PlaneError::Unavailable(_) => Code::TRANSPORT,
        };
        Failure::new(code, error)
    }
}

/// What a data plane needs to know of the session it serves.
#[derive(Clone)]
#[non_exhaustive]
pub struct Session {
    /// The session's name.
    pub token: Token,
    /// What its connections prove to know.
    pub secret: Secret,
    /// This side's RAM.
    pub ram: Arc<Ram>,
    /// How long a peer may be silent while something is expected of it.
    pub timeout: Duration,
}

impl Session {
    /// A session of this name, of a machine with this `ram`, in which a peer may be silent for `timeout`. It
    /// has no secret yet.
    pub fn new(token: Token, ram: Arc<Ram>, timeout: Duration) -> Self {
        Session { token, secret: Secret::NONE, ram, timeout }
    }

    /// The same with the secret of its control link.
    pub fn with_secret(self, secret: Secret) -> Self {
        Session { secret, ..self }
    }
}

/// A way to reach destinations: the source's side of a transport, before a connection.
pub trait SourceTransport: Send {
    /// The transport's name in offers and reports: "tcp", "rdma".
    fn name(&self) -> &'static str;

    /// Connects to what the destination offered. `offer` is the bytes that the other side's
    /// [`DestinationTransport::offer`] returned; they come from a peer and are hostile.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when this host cannot use the transport, saying why; others
    /// when the connection fails.
    fn connect(&mut self, session: &Session, offer: &[u8]) -> Result<Box<dyn SourcePlane>, PlaneError>;
}

/// The destination's side of a transport, before a connection.
pub trait DestinationTransport: Send {
    /// The transport's name in offers and reports.
    fn name(&self) -> &'static str;

    /// Opens the shadow RAM for this session. From here on connections that prove to know the session's
    /// secret may write to it. Returns the bytes that tell the source how to connect.
    ///
    /// # Errors
    /// [`PlaneError::Unavailable`] when this host cannot use the transport, saying why.
    fn offer(&mut self, session: &Session) -> Result<(Vec<u8>, Box<dyn DestinationPlane>), PlaneError>;
}

/// Stops a plane from another thread.
pub trait Interrupt: Send + Sync {
    /// Makes every call that blocks in the plane, now or later, return an error soon. For good.
    fn interrupt(&self);
}

/// The source's connected data plane.
pub trait SourcePlane: Send {
    /// The transport's name.
    fn name(&self) -> &'static str;

    /// The lanes, each to be driven by one thread at a time. The engine wants at least one.
    ///
    /// A caller may wrap them, for instance to count bytes or to cap a rate: it takes the lanes with
    /// [`std::mem::take`], and puts one wrapper around each back. The plane drops whatever it has here when
    /// it is dropped itself. Lanes that are kept elsewhere have to be dropped before their plane.
    fn lanes(&mut self) -> &mut Vec<Box<dyn Lane>>;

    /// A handle that stops all lanes.
    fn interrupter(&self) -> Arc<dyn Interrupt>;

    /// Whether its lanes get on better in different parts of a region (see
    /// [`RamRegion`](crate::memory::RamRegion)) than close to each other, as they do where memory is gone
    /// through in order.
    fn spreads(&self) -> bool {
        false
    }

    /// CPU time that the plane's own threads have used so far, beside those that drive its lanes.
    fn cpu(&self) -> CpuTime {
        CpuTime::default()
    }
}

/// One ordered stream of writes.
pub trait Lane: Send {
    /// Writes this machine's RAM at `extents` to the same extents at the destination. Extents do
    /// not overlap each other.
    ///
    /// # Errors
    /// [`PlaneError::OutOfBounds`] before anything is sent; others leave the lane unusable.
    fn write(&mut self, extents: &[Extent]) -> Result<(), PlaneError>;

    /// Makes `extents` at the destination read as zeros, without sending them.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    fn zero(&mut self, extents: &[Extent]) -> Result<(), PlaneError>;

    /// Posts barrier number `round` and pushes out everything before it. Does not wait, so that
    /// all lanes' barriers travel at once.
    ///
    /// # Errors
    /// When the lane is broken.
    fn post_barrier(&mut self, round: u32) -> Result<(), PlaneError>;

    /// Waits until the destination has confirmed barrier number `round`.
    ///
    /// # Errors
    /// [`PlaneError::Timeout`] when the session's time-out passes, or when the lane is broken.
    fn wait_barrier(&mut self, round: u32) -> Result<(), PlaneError>;

    /// What this lane has done so far.
    fn stats(&self) -> LaneStats;
}

/// How what a lane carries is hidden from the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum LaneEncryption {
    /// Not at all, as far as the transport knows.
    #[default]
    None,
    /// By TLS 1.3, in the program.
    TlsInUserSpace,
    /// By TLS 1.3, in the kernel.
    TlsInKernel,
}

impl std::fmt::Display for LaneEncryption {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            LaneEncryption::None => "not encrypted",
            LaneEncryption::TlsInUserSpace => "TLS 1.3 in user space",
            LaneEncryption::TlsInKernel => "TLS 1.3 in the kernel",
        })
    }
}

/// Counters of one lane, and how it is encrypted.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[non_exhaustive]
pub struct LaneStats {
    /// How what it carries is encrypted.
    #[serde(default)]
    pub encryption: LaneEncryption,
    /// Bytes of guest RAM written.
    pub bytes: u64,
    /// Bytes named as zero.
    pub zero_bytes: u64,
    /// Messages, frames or work requests posted.
    pub requests: u64,
    /// Most requests that were in flight at once, where the transport knows.
    pub max_in_flight: u64,
    /// Microseconds spent registering memory, where the transport does.
    pub registration_us: u64,
    /// Of these, microseconds in which data was already moving.
    pub registration_overlap_us: u64,
}

impl LaneStats {
    /// Those of a new lane.
    pub fn encrypted(encryption: LaneEncryption) -> Self {
        LaneStats { encryption, ..LaneStats::default() }
    }
}

/// The destination's data plane. It places what arrives without being called.
pub trait DestinationPlane: Send {
    /// The transport's name.
    fn name(&self) -> &'static str;

    /// Shuts every connection of the session out. When it returns, no write of any age can land
    /// any more, whatever the peer or the network still holds. Idempotent. Must be quick: it is
    /// on the blackout's path, so what can be torn down later is.
    ///
    /// # Errors
    /// When that cannot be guaranteed: the guest must then not run here.
    fn fence(&mut self) -> Result<(), PlaneError>;

    /// Bytes placed so far: grows while the source is alive and writing.
    fn bytes_placed(&self) -> u64;

    /// Bytes of memory that have been placed to since this was last called, each counted once however often,
    /// as far as the plane can tell: whoever sends one page again and again does not get on. [`Coverage`]
    /// helps to know. `None` if the plane cannot tell: [`bytes_placed`](Self::bytes_placed) counts then.
    fn newly_covered(&self) -> Option<u64> {
        None
    }

    /// CPU time in microseconds that the plane's own threads have used so far.
    fn cpu_us(&self) -> u64 {
        0
    }

    /// Why the plane broke, if it did. A plane nobody connected to is not broken.
    fn error(&self) -> Option<String>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_is_good_for_one_secret_and_one_thing() {
        // RFC 4231 has no key of 32 bytes; this is what OpenSSL says of one.
        let secret = Secret([0x0b; 32]);
        let proof = secret.proof(b"Hi There");
        assert_eq!(proof, *b"\x19\x8a\x60\x7e\xb4\x4b\xfb\xc6\x99\x03\xa0\xf1\xcf\x2b\xbd\xc5");
        assert!(secret.is_proved(b"Hi There", &proof));
        assert!(!secret.is_proved(b"Hi there", &proof) && !Secret::NONE.is_proved(b"Hi There", &proof));
        assert!(!secret.is_proved(b"Hi There", &proof[..15]) && !secret.is_proved(b"Hi There", &[]));
        let mut near = proof;
        near[15] ^= 1;
        assert!(!secret.is_proved(b"Hi There", &near));
    }
}
