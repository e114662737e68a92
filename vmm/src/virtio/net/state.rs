//! The saved form of a network interface.

use super::Mac;
use serde::{Deserialize, Serialize};

/// What an interface has beyond its transport: what the driver asked for on the control queue, and
/// whether it has yet to announce itself. No frame is ever in flight in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Its address, which the driver may change.
    pub mac: Mac,
    /// Pairs of queues in use.
    pub pairs: u16,
    /// The guest's offloads, as bits of the features of the same names; `None` for all that it accepted.
    pub offloads: Option<u64>,
    /// The driver was told to announce itself and has not said that it did.
    pub announce: bool,
}

impl NetState {
    /// As long as no driver has asked for anything.
    pub fn initial(mac: Mac) -> Self {
        NetState { mac, pairs: 1, offloads: None, announce: false }
    }
}
