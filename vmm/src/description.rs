//! What the destination must know of a machine before it can build its twin.

use crate::component::{Error as StateError, strict};
use crate::error::Error;
use crate::machine::{Machine, MachineConfig};
use crate::memory::PageSize;
use crate::serial::SerialOutput;
use crate::virtio::{DeviceConfig, LocalConfig};
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

/// The version that this program writes and reads.
const VERSION: u16 = 2;

/// Most CPUID entries that KVM takes.
const MAX_CPUID_ENTRIES: usize = 256;

/// A machine, but for its state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Description {
    memory: u64,
    pages: PageSize,
    vcpus: u32,
    tsc_khz: u32,
    cpuid: Vec<kvm_cpuid_entry2>,
    /// The registers whose values will be in the state.
    msrs: Vec<u32>,
    /// PCI devices by place.
    devices: Vec<DeviceConfig>,
}

impl Description {
    pub fn of(machine: &Machine) -> Self {
        let config = machine.config();
        Description {
            memory: config.memory,
            pages: config.pages,
            vcpus: config.vcpus,
            tsc_khz: machine.tsc_khz(),
            cpuid: config.cpuid.clone(),
            msrs: machine.saved_msrs().to_vec(),
            devices: machine.device_configs(),
        }
    }

    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        Ok(postcard::to_stdvec(&(VERSION, self)).map_err(StateError::Encode)?)
    }

    /// Reads what a peer sent.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let refuse = |what| Error::State(StateError::NotDescription(what));
        // The version first, and alone: another version's fields need not decode.
        let (version, _) = postcard::take_from_bytes::<u16>(bytes).map_err(|e| refuse(e.to_string()))?;
        if version != VERSION {
            return Err(refuse(format!("it has version {version} and this program reads version {VERSION}")));
        }
        let (_, description): (u16, Description) = strict(bytes).map_err(refuse)?;
        if description.cpuid.len() > MAX_CPUID_ENTRIES {
            return Err(refuse(format!("it has {} CPUID entries", description.cpuid.len())));
        }
        Ok(description)
    }

    /// The CPU that the guest was promised.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// The registers that the guest's state will have.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// The machine to be built.
    pub fn into_config(self, serial: SerialOutput, local: LocalConfig) -> MachineConfig {
        MachineConfig {
            memory: self.memory,
            pages: self.pages,
            vcpus: self.vcpus,
            cpuid: self.cpuid,
            tsc_khz: Some(self.tsc_khz),
            serial,
            devices: self.devices,
            local,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_s_description_is_read_exactly() {
        let description = Description {
            memory: 16 << 20,
            pages: PageSize::Huge2M,
            vcpus: 3,
            tsc_khz: 2_000_000,
            cpuid: vec![kvm_cpuid_entry2 { function: 7, ebx: 5, ..Default::default() }],
            msrs: vec![0x10, 0xc000_0080],
            devices: vec![DeviceConfig::Rng, DeviceConfig::Console],
        };
        let bytes = description.encode().unwrap();
        assert_eq!(Description::decode(&bytes).unwrap(), description);
        for end in 0..bytes.len() {
            assert!(Description::decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        assert!(Description::decode(&[&bytes[..], &[0]].concat()).is_err());
        let mut newer = bytes.clone();
        newer[0] = 9;
        assert!(Description::decode(&newer).unwrap_err().to_string().contains("version 9"));
    }
}
