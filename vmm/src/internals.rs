//! What fuzzing reaches of this crate's inside. It may change in any release.

use crate::description::Description;
use crate::error::Error;
use crate::machine::MachineConfig;
use crate::serial::SerialOutput;
use crate::virtio::{DeviceConfig, LocalConfig};

/// The machine that a peer's description asks for.
///
/// # Errors
/// For what is no description.
pub fn described(bytes: &[u8]) -> Result<MachineConfig, Error> {
    Ok(Description::decode(bytes)?.into_config(SerialOutput::Null, LocalConfig::default()))
}

/// The description of the same machine, but with these devices, whose guest may be one that stays paused.
///
/// # Errors
/// For what is no description.
pub fn described_with(
    bytes: &[u8],
    devices: Vec<DeviceConfig>,
    stays_paused: bool,
) -> Result<Vec<u8>, Error> {
    let mut description = Description::decode(bytes)?;
    description.devices = devices;
    description.stays_paused = stays_paused;
    description.encode()
}
