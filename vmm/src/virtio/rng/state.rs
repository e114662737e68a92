//! The saved form of an entropy device.

use serde::{Deserialize, Serialize};

/// An entropy device has nothing beyond its transport.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {}
