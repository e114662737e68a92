//! The saved form of a disk.

use super::held::Held;
use serde::{Deserialize, Serialize};

/// What a disk has beyond its transport: no request is in flight in it but those that wait until a host can
/// carry them out, and its image is where it is. Length and unit are there to be compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Bytes.
    pub len: u64,
    /// Bytes of the smallest unit of I/O.
    pub unit: u32,
    /// The requests that wait, by queue.
    pub held: Vec<Vec<Held>>,
}
