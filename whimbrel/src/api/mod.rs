//! Driving a running virtual machine over a Unix socket: HTTP/1.1 with JSON bodies.
//!
//! Any HTTP client can use it: `curl --unix-socket vm.sock http://vm/v1/vm`. The machine's own
//! threads never wait for it: the server has a thread of its own, and a migration runs in another.

pub mod client;
pub mod events;
pub mod model;
pub(crate) mod openapi;
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
    /// The conversation broke off.
    #[error("the virtual machine's API broke off: {0}")]
    Http(String),
    /// No answer came.
    #[error("the virtual machine's API has not answered within {} s", .0.as_secs())]
    Silent(Duration),
    /// The machine refused.
    #[error("{0}")]
    Refused(Failure),
}
