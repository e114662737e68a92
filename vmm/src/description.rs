//! What the destination must know of a machine before it can build its twin.

use crate::admission::Guest;
use crate::component::{Error as StateError, strict};
use crate::error::Error;
use crate::loader::MAX_COMMAND_LINE;
use crate::machine::{MAX_KEPT, Machine, MachineConfig, Reboot, check_name};
use crate::memory::{PageSize, Thp};
use crate::names;
use crate::pci::MAX_FUNCTIONS;
use crate::serial::SerialOutput;
use crate::vcpu::msr::MAX_MSRS;
use crate::virtio::{DeviceConfig, LocalConfig};
use kvm_bindings::kvm_cpuid_entry2;
use migration::bounded::at_most;
use serde::{Deserialize, Serialize};

/// The version of the description of a machine whose guest is to run.
const VERSION: u16 = 5;

/// The version of one whose guest stays paused. But for that it is the same; a program that does not know it
/// would let the guest run.
const VERSION_PAUSED: u16 = 6;

/// The versions of both if disks or interfaces name a storage or a network: what they name follows. A machine
/// without names has the older versions, which the last release reads.
const VERSION_NAMED: u16 = 7;
const VERSION_NAMED_PAUSED: u16 = 8;

/// What each device names, by place: a disk its storage, an interface its network.
#[derive(Debug, Serialize, Deserialize)]
struct Names(#[serde(deserialize_with = "at_most::<MAX_FUNCTIONS, _, _>")] Vec<Option<String>>);

/// Most CPUID entries that KVM takes.
const MAX_CPUID_ENTRIES: usize = 256;

/// A machine, but for its state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Description {
    memory: u64,
    pages: PageSize,
    vcpus: u32,
    tsc_khz: u32,
    #[serde(deserialize_with = "at_most::<MAX_CPUID_ENTRIES, _, _>")]
    cpuid: Vec<kvm_cpuid_entry2>,
    /// The registers whose values will be in the state.
    #[serde(deserialize_with = "at_most::<MAX_MSRS, _, _>")]
    msrs: Vec<u32>,
    /// PCI devices by place.
    #[serde(deserialize_with = "at_most::<MAX_FUNCTIONS, _, _>")]
    pub(crate) devices: Vec<DeviceConfig>,
    /// What its operators call it.
    name: String,
    /// What follows a reset that the guest asks for.
    reboot: Reboot,
    /// Told by the version.
    #[serde(skip)]
    pub(crate) stays_paused: bool,
}

impl Description {
    pub fn of(machine: &Machine) -> Self {
        let config = machine.config();
        Description {
            name: config.name.clone(),
            reboot: config.reboot.clone(),
            memory: config.memory,
            pages: config.pages,
            vcpus: config.vcpus,
            tsc_khz: machine.tsc_khz(),
            cpuid: config.cpuid.clone(),
            msrs: machine.saved_msrs().to_vec(),
            devices: machine.device_configs(),
            stays_paused: machine.stays_paused(),
        }
    }

    pub fn encode(&self) -> Result<Vec<u8>, Error> {
        let names: Vec<Option<&str>> = self.devices.iter().map(DeviceConfig::belongs_to).collect();
        let encoded = match (names.iter().any(Option::is_some), self.stays_paused) {
            (false, false) => postcard::to_stdvec(&(VERSION, self)),
            (false, true) => postcard::to_stdvec(&(VERSION_PAUSED, self)),
            (true, false) => postcard::to_stdvec(&(VERSION_NAMED, self, names)),
            (true, true) => postcard::to_stdvec(&(VERSION_NAMED_PAUSED, self, names)),
        };
        Ok(encoded.map_err(StateError::Encode)?)
    }

    /// Reads what a peer sent.
    pub fn decode(bytes: &[u8]) -> Result<Self, Error> {
        let refuse = |what| Error::State(StateError::NotDescription(what));
        // The version first, and alone: another version's fields need not decode.
        let (version, _) = postcard::take_from_bytes::<u16>(bytes).map_err(|e| refuse(e.to_string()))?;
        let mut description = match version {
            VERSION | VERSION_PAUSED => strict::<(u16, Description)>(bytes).map_err(refuse)?.1,
            VERSION_NAMED | VERSION_NAMED_PAUSED => {
                let (_, description, names): (u16, Description, Names) = strict(bytes).map_err(refuse)?;
                description.with_names(names).map_err(refuse)?
            }
            _ => {
                let text = format!(
                    "it has version {version} and this program reads versions {VERSION} to {VERSION_NAMED_PAUSED}"
                );
                return Err(refuse(text));
            }
        };
        match &description.reboot {
            Reboot::Kept { len } if *len > MAX_KEPT => {
                return Err(refuse(format!("it keeps {len} bytes to boot from")));
            }
            Reboot::Disk { cmdline } if cmdline.len() > MAX_COMMAND_LINE => {
                return Err(refuse(format!("its command line has {} bytes", cmdline.len())));
            }
            _ => {}
        }
        check_name(&description.name).map_err(|error| refuse(error.to_string()))?;
        description.stays_paused = [VERSION_PAUSED, VERSION_NAMED_PAUSED].contains(&version);
        Ok(description)
    }

    /// The same machine, whose devices name all this.
    fn with_names(mut self, Names(names): Names) -> Result<Self, String> {
        if names.len() != self.devices.len() || names.iter().all(Option::is_none) {
            return Err(format!("it has {} names for {} devices", names.len(), self.devices.len()));
        }
        for (device, name) in self.devices.iter_mut().zip(names) {
            let Some(name) = name else { continue };
            names::check(&name).map_err(|error| error.to_string())?;
            match device {
                DeviceConfig::Block(disk) => {
                    names::check_file(&disk.path).map_err(|error| error.to_string())?;
                    disk.storage = Some(name);
                }
                DeviceConfig::Net(interface) => interface.network = Some(name),
                _ => return Err(format!("a device that belongs to nothing names {name}")),
            }
        }
        Ok(self)
    }

    /// The CPU that the guest was promised.
    pub fn cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Bytes of RAM, or of what the machine keeps to boot from if that is more.
    pub fn memory(&self) -> u64 {
        self.memory.max(self.reboot.store())
    }

    /// Number of vCPUs.
    pub fn vcpus(&self) -> u32 {
        self.vcpus
    }

    /// PCI devices by place.
    pub fn devices(&self) -> &[DeviceConfig] {
        &self.devices
    }

    /// What the machine is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the guest is to stay paused.
    pub fn stays_paused(&self) -> bool {
        self.stays_paused
    }

    /// What a host must know of the guest to decide about it.
    pub fn guest(&self) -> Guest<'_> {
        Guest {
            name: self.name(),
            memory: self.memory(),
            vcpus: self.vcpus,
            stays_paused: self.stays_paused,
            devices: self.devices(),
        }
    }

    /// The registers that the guest's state will have.
    pub fn msrs(&self) -> &[u32] {
        &self.msrs
    }

    /// The machine to be built.
    pub fn into_config(self, serial: SerialOutput, local: LocalConfig) -> MachineConfig {
        MachineConfig {
            name: self.name,
            memory: self.memory,
            pages: self.pages,
            thp: Thp::default(),
            vcpus: self.vcpus,
            cpuid: self.cpuid,
            tsc_khz: Some(self.tsc_khz),
            reboot: self.reboot,
            serial,
            devices: self.devices,
            local,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::block::BlockConfig;
    use crate::virtio::net::{Mac, NetConfig};

    fn description() -> Description {
        Description {
            name: "web1".into(),
            memory: 16 << 20,
            pages: PageSize::Huge2M,
            vcpus: 3,
            tsc_khz: 2_000_000,
            cpuid: vec![kvm_cpuid_entry2 { function: 7, ebx: 5, ..Default::default() }],
            msrs: vec![0x10, 0xc000_0080],
            devices: vec![DeviceConfig::Rng, DeviceConfig::Console],
            reboot: Reboot::Kept { len: 12_345 },
            stays_paused: false,
        }
    }

    #[test]
    fn what_devices_name_travels_beside_them() {
        let mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
        let net = |network: Option<&str>| {
            let network = network.map(String::from);
            DeviceConfig::Net(NetConfig { number: 0, mac, pairs: 1, negotiated: None, network })
        };
        let disk = |file: &str| DeviceConfig::Block(BlockConfig::in_storage("fast".into(), file.into()));
        let with = |devices: Vec<DeviceConfig>| Description { devices, ..description() };
        let named = with(vec![DeviceConfig::Rng, net(Some("blue")), net(None), disk("web/1.raw")]);
        let bytes = named.encode().unwrap();
        assert_eq!(Description::decode(&bytes).unwrap(), named);
        let paused = Description { stays_paused: true, ..named.clone() };
        let of_paused = paused.encode().unwrap();
        assert_eq!(Description::decode(&of_paused).unwrap(), paused);
        assert_eq!((bytes[0], of_paused[0]), (7, 8), "the last release must not take them for unnamed ones");
        assert_eq!(with(vec![net(None)]).encode().unwrap()[0], 5, "the last release reads this");
        for end in 0..bytes.len() {
            assert!(Description::decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        assert!(Description::decode(&[&bytes[..], &[0]].concat()).is_err());
        for wrong in [net(Some("a b")), net(Some("")), disk("../web"), disk("/etc/shadow"), disk("")] {
            assert!(Description::decode(&with(vec![wrong]).encode().unwrap()).is_err());
        }
        // As no program here says it.
        let said = |names: &[Option<&str>]| {
            let devices = with(vec![DeviceConfig::Rng, net(None)]);
            Description::decode(&postcard::to_stdvec(&(VERSION_NAMED, devices, names)).unwrap())
        };
        assert!(said(&[None, Some("blue")]).is_ok());
        let many = vec![Some("blue"); MAX_FUNCTIONS + 1];
        for wrong in [
            &[][..],
            &[None, None],
            &[Some("blue"), None],
            &[Some("blue")],
            &[None, Some("blue"), None],
            &many,
        ] {
            assert!(said(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_peer_s_description_is_read_exactly() {
        let description = description();
        let bytes = description.encode().unwrap();
        assert_eq!(Description::decode(&bytes).unwrap(), description);
        for end in 0..bytes.len() {
            assert!(Description::decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        assert!(Description::decode(&[&bytes[..], &[0]].concat()).is_err());
        for bad in [String::new(), "a\nb".into(), "x".repeat(129)] {
            let unnamed = Description { name: bad, ..description.clone() };
            let refused = Description::decode(&unnamed.encode().unwrap()).unwrap_err().to_string();
            assert!(refused.contains("1 to 128 bytes"), "{refused}");
        }
        for bad in [Reboot::Kept { len: 5 << 30 }, Reboot::Disk { cmdline: "x".repeat(5000) }] {
            let greedy = Description { reboot: bad, ..description.clone() };
            assert!(Description::decode(&greedy.encode().unwrap()).is_err());
        }
        let paused = Description { stays_paused: true, ..description };
        let of_paused = paused.encode().unwrap();
        assert_eq!(Description::decode(&of_paused).unwrap(), paused);
        assert_eq!((bytes[0], of_paused[0]), (5, 6), "a program that knows only 5 must not run it");
        let mut newer = bytes.clone();
        newer[0] = 9;
        assert!(Description::decode(&newer).unwrap_err().to_string().contains("version 9"));
    }
}
