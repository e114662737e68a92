//! Migration over TCP: the control link, and a data plane of N streams.
//!
//! One port of the destination takes all connections; their preambles tell them apart
//! ([`listener`]). [`frame`] describes what travels in a data stream.
//!
//! A program that makes its connections by itself hands them over: the control link's to [`StreamLink`], and
//! the lanes' to [`TcpSource::from_streams`], [`TcpDestination::from_streams`] or a [`LaneAcceptor`]. They
//! may be stream sockets of any family.

mod acceptor;
mod cause;
mod destination;
pub mod frame;
mod iovec;
mod link;
pub mod listener;
mod pacing;
mod place;
mod plane;
mod source;
mod stream;
mod streams;

pub use acceptor::LaneAcceptor;
pub use destination::TcpDestination;
pub use link::{Connection, StreamLink, connect_control};
pub use listener::{Call, Listener, Refused};
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
    /// A stream that was accepted did not begin as it should.
    #[error("{PEER} has sent no preamble: {0}; is it a Whimbrel source?")]
    NoPreamble(#[source] io::Error),
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

impl Error {
    fn code(&self) -> Code {
        match self {
            Error::Preamble { why: PreambleError::Version { .. }, .. } => Code::VERSION,
            Error::Preamble { .. } | Error::HungUp { .. } | Error::Session { .. } | Error::NoPreamble(_) => {
                Code::PROTOCOL
            }
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
