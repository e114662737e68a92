//! What fuzzing reaches of this crate's inside. It may change in any release.

use crate::description::Description;
use crate::error::Error;
use crate::machine::MachineConfig;
use crate::serial::SerialOutput;
use crate::virtio::LocalConfig;

/// The machine that a peer's description asks for.
///
/// # Errors
/// For what is no description.
pub fn described(bytes: &[u8]) -> Result<MachineConfig, Error> {
    Ok(Description::decode(bytes)?.into_config(SerialOutput::Null, LocalConfig::default()))
}
