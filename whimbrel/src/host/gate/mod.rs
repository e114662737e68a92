//! How the host service and the processes of its machines talk: short messages on `gate.sock`, a socket of
//! packets, of which each is one JSON object and may carry descriptors.
//!
//! ```text
//!                    port
//!                     │ accepts, looks at 32 bytes, takes none
//!   ┌─────────────────┴──────────────────┐
//!   │ host service                       │
//!   └──┬──────────────┬──────────────┬───┘
//!      │ new callers  │ lanes of A   │ lanes of B          gate.sock
//!   ┌──┴───────┐   ┌──┴───────┐   ┌──┴───────┐
//!   │ standby  │   │ process  │   │ process  │  web1.sock, web2.sock
//!   │          │   │ session A│   │ session B│
//!   └──────────┘   └──────────┘   └──────────┘
//! ```
//! A process that is to take a guest in is there before one comes: a *standby*. It is given callers, and lets
//! them show who they are. As soon as one of them has begun a session with it, the process says so, and is
//! given the lanes of this session; another standby takes its place.
//!
//! The host service may die at any time. So it keeps nothing that cannot be asked for: a process calls again
//! until a service answers, and says anew what it is ([`Presence`]). The listening sockets outlive the
//! service as well, since each process has them, and brings them along.

mod desk;
mod line;
mod process;

pub(in crate::host) use desk::hand_over;
pub use desk::{Count, Desk, Rules, Starting};
pub use line::{Door, Line};
pub use process::Gate;

use migration::Failure;
use migration::transport::Token;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How long a process keeps the listening sockets, and a standby waits, when there is no service. Callers
/// wait to be accepted meanwhile.
pub const ABSENCE: Duration = Duration::from_secs(30);

/// How long a caller at most keeps a process busy that it does not begin a session with: a little longer than
/// a listener waits for it.
const OPENING: Duration = Duration::from_secs(6);

/// What a process is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// It waits for a session.
    Standby,
    /// It has a session.
    Arriving,
    /// It has a machine.
    Settled,
}

/// What a process is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// Its number.
    pub pid: u32,
    /// What it is at.
    pub phase: Phase,
    /// Its session.
    pub token: Option<Token>,
    /// The guest that it takes in, or has.
    pub guest: Option<Guest>,
}

/// A guest as far as a host has to know it to admit it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    /// What it is called.
    pub name: String,
    /// Its memory in bytes.
    pub memory: u64,
}

/// What a process says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FromProcess {
    /// What it is now. With the first message of a connection come the listening sockets.
    Here(Presence),
    /// Whether it may take this guest in.
    Ask(Guest),
}

/// What the service says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum FromHost {
    /// The listening sockets that are in use now.
    Listeners,
    /// A connection.
    Caller,
    /// No further caller comes: end, unless there is a session.
    Retire,
    /// The guest may come.
    Admitted,
    /// It may not.
    Refused(Failure),
}
