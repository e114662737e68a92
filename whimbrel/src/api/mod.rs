//! Driving a running virtual machine over a Unix socket, and a host also over mutual TLS: HTTP/1.1 with JSON
//! bodies.
//!
//! Any HTTP client can use it: `curl --unix-socket vm.sock http://vm/v1/vm`. The machine's own
//! threads never wait for it: the server has a thread of its own, and a migration runs in another.

pub mod client;
pub mod events;
pub mod model;
pub(crate) mod openapi;
pub mod port;
pub mod reach;
pub mod server;

use migration::Failure;
use std::path::PathBuf;
use std::time::Duration;

/// Why the API cannot be served or reached.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process serves on the socket.
    #[error("{} is in use by a running virtual machine; choose another path", .0.display())]
    InUse(PathBuf),
    /// The path is something else than a socket.
    #[error("{} exists and is not a socket; remove it or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The socket cannot be created.
    #[error("cannot listen on {}: {source}", path.display())]
    Bind {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// No virtual machine answers.
    #[error("no virtual machine answers on {}: {source}", path.display())]
    Connect {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A text that is no host.
    #[error("{0:?} is no host: write it as https://b.hosts.example, with another port than 8443 behind it")]
    Url(String),
    /// No host answers.
    #[error("no host answers at {to}: {source}")]
    Unreachable {
        /// The host's address.
        to: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// One side does not trust the other. The text is a sentence.
    #[error("{0}")]
    Untrusted(String),
    /// The conversation broke off.
    #[error("the API broke off: {0}")]
    Http(String),
    /// No answer came.
    #[error("the API has not answered within {} s", .0.as_secs())]
    Silent(Duration),
    /// The machine refused.
    #[error("{0}")]
    Refused(Failure),
}
