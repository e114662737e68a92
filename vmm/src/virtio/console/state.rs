//! The saved form of a console.

use serde::{Deserialize, Serialize};

/// A console has nothing beyond its transport: no byte of input is ever kept here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {}
