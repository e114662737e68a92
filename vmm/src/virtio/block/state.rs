//! The saved form of a disk.

use serde::{Deserialize, Serialize};

/// What a disk has beyond its transport: no request is ever in flight in it, and its image is where
/// it is. Length and unit are there to be compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Bytes.
    pub len: u64,
    /// Bytes of the smallest unit of I/O.
    pub unit: u32,
}
