//! Migration over TCP: the control link, and a data plane of N streams.
//!
//! One port of the destination takes all connections; their preambles tell them apart
//! ([`listener`]). [`frame`] describes what travels in a data stream.
//!
//! A program that makes its connections by itself hands them over: the control link's to [`StreamLink`], and
//! the lanes' to [`TcpSource::from_streams`], [`TcpDestination::from_streams`] or a [`LaneAcceptor`]. They
//! may be stream sockets of any family.
//!
//! Every connection proves that it belongs to its session (`opening`). With the feature `tls` the connections
//! of [`Listener::bind_protected`] and [`Connector`] are encrypted, and both ends prove who they are by
//! certificates ([`tls`]).

mod accepting;
mod acceptor;
mod cause;
mod channel;
mod copy;
mod destination;
mod dispatch;
pub mod frame;
mod iovec;
mod link;
pub mod listener;
mod opening;
mod pacing;
mod pending;
mod place;
mod plane;
mod refusals;
mod source;
mod stream;
mod streams;
#[cfg(feature = "tls")]
pub mod tls;

pub use acceptor::LaneAcceptor;
pub use channel::{Peer, Protection};
pub use destination::TcpDestination;
pub use dispatch::{Caller, Dispatcher};
pub use link::{Connection, Connector, StreamLink, connect_control, host_of};
pub use listener::{Call, Feed, Listener};
pub use refusals::{Refusals, Refused};
pub use source::{DEFAULT_STREAMS, TcpSource};
pub use stream::Stream;

/// The name of this transport in offers and reports.
pub const NAME: &str = "tcp";

use migration::preamble::PreambleError;
use migration::{Code, Failure};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use stream::PEER;

/// Why a connection or a listening port could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}{}", hint(source))]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// The destination is not written as one is.
    #[error("{to:?} is no destination: {why}; write the destination as host:port")]
    Form {
        /// What was asked for.
        to: String,
        /// What is wrong with it.
        why: String,
    },
    /// The destination's name means nothing.
    #[error(
        "cannot find the host of {to:?}: {why}; is its name right, and does this host's resolver know it?"
    )]
    Resolve {
        /// What was asked for.
        to: String,
        /// What was wrong with it.
        why: String,
    },
    /// The destination cannot be reached.
    #[error("cannot connect to {to}: {source}; is `whimbrel receive` running there, and the port open?")]
    Connect {
        /// Its address, or what it is called.
        to: String,
        /// What the system said.
        source: io::Error,
    },
    /// It accepted and then said nothing.
    #[error("{to} accepted the connection but says nothing for {waited:?}; is it a Whimbrel receiver?")]
    Silent {
        /// Its address, or what it is called.
        to: String,
        /// How long it was silent.
        waited: Duration,
    },
    /// It hung up, or said something that is not ours.
    #[error("{to}: {why}")]
    Preamble {
        /// Its address, or what it is called.
        to: String,
        /// What it said.
        why: PreambleError,
    },
    /// It hung up before it answered.
    #[error("{to} closed the connection without an answer; is it a Whimbrel receiver?")]
    HungUp {
        /// Its address, or what it is called.
        to: String,
    },
    /// It takes in another guest.
    #[error("{to} is busy taking in another guest; wait, or use another receiver")]
    Busy {
        /// Its address, or what it is called.
        to: String,
    },
    /// It knows no such session.
    #[error("{to} does not know this migration")]
    Session {
        /// Its address, or what it is called.
        to: String,
    },
    /// It takes encrypted connections only.
    #[error(
        "{to} takes encrypted connections only: give this side a certificate, or let both leave memory unencrypted"
    )]
    WantsEncryption {
        /// Its address, or what it is called.
        to: String,
    },
    /// It cannot encrypt.
    #[error("{to} has no certificate, and this side sends no guest unencrypted: give the receiver one")]
    CannotEncrypt {
        /// Its address, or what it is called.
        to: String,
    },
    /// It does not admit this host.
    #[error(
        "{to} does not admit the host that this side's certificate is for: its operator says who may come"
    )]
    Denied {
        /// Its address, or what it is called.
        to: String,
    },
    /// One side does not trust the other. The text is a sentence.
    #[error("{0}")]
    Untrusted(String),
    /// An unprotected connection leads to another host.
    #[error(
        "{to} is another host, and this side has no certificate: anyone on the way could read and change the guest"
    )]
    Exposed {
        /// The address.
        to: SocketAddr,
    },
    /// A stream that was accepted did not begin as it should.
    #[error("{PEER} has sent no preamble: {0}; is it a Whimbrel source?")]
    NoPreamble(#[source] io::Error),
    /// A caller that wants no encryption where it is demanded.
    #[error("it does not encrypt, and this side takes encrypted connections only")]
    NotEncrypted,
    /// A caller that wants encryption where there is no certificate.
    #[error("it encrypts, and this side has no certificate")]
    NoCertificate,
    /// A caller that does not know its session's secret.
    #[error(
        "it has not proved to belong to a session of this side: is something repeating what it has recorded?"
    )]
    Unproved,
    /// A caller that asks for a lane of a session that is not under way.
    #[error("it asks for a lane of a migration that is not under way here")]
    Stray,
    /// A caller that is not admitted.
    #[error("{name} is not among those that are admitted")]
    NotAdmitted {
        /// What its certificate calls it.
        name: String,
    },
    /// A descriptor that is no connected stream socket.
    #[error("a lane needs a stream socket: {0}")]
    Descriptor(#[source] io::Error),
    /// The listener can take no more connections.
    #[error("the listener has stopped: {0}")]
    Stopped(io::Error),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrInUse => "; another program listens there: end it or choose another port",
        io::ErrorKind::AddrNotAvailable => "; this host has no such address",
        io::ErrorKind::PermissionDenied => "; ports below 1024 need privileges",
        _ => "",
    }
}

/// What a peer says, or what is said of it, on a connection that was trusted until then: the end of a
/// sentence that begins with its name.
#[derive(Debug, thiserror::Error)]
#[error("the peer {0}")]
pub(crate) struct Untrusted(pub String);

impl Error {
    /// The error of a connection to `to` that failed by `error`, if trust was the cause.
    fn refused_by(error: &io::Error, to: &str) -> Option<Error> {
        let Untrusted(what) = error.get_ref()?.downcast_ref()?;
        Some(Error::Untrusted(format!("{to} {what}")))
    }

    fn code(&self) -> Code {
        match self {
            Error::Preamble { why: PreambleError::Version { .. }, .. } => Code::VERSION,
            Error::Preamble { .. } | Error::HungUp { .. } | Error::Session { .. } | Error::NoPreamble(_) => {
                Code::PROTOCOL
            }
            Error::WantsEncryption { .. }
            | Error::CannotEncrypt { .. }
            | Error::Denied { .. }
            | Error::Untrusted(_)
            | Error::Exposed { .. }
            | Error::NotEncrypted
            | Error::NoCertificate
            | Error::Unproved
            | Error::Stray
            | Error::NotAdmitted { .. } => Code::AUTHENTICATION,
            Error::Busy { .. } => Code::BUSY,
            Error::Silent { .. } => Code::TIMEOUT,
            Error::Bind { .. }
            | Error::Form { .. }
            | Error::Resolve { .. }
            | Error::Connect { .. }
            | Error::Descriptor(_)
            | Error::Stopped(_) => Code::LINK,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::new(error.code(), error)
    }
}

#[cfg(doctest)]
#[doc = include_str!("../../docs/bring-your-own-machine.md")]
mod bring_your_own_machine {}
