//! The envelope of saved state: components with their kinds, versions and payloads.

use crate::ioctl::KvmError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Most components a state may have.
const MAX_COMPONENTS: usize = 1024;

/// First bytes of every saved state.
const MAGIC: [u8; 4] = *b"WHIM";

/// Why a state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not a state at all.
    #[error("the machine state cannot be read: {0}")]
    NotState(&'static str),
    /// Not a description of a machine.
    #[error("the machine's description cannot be read: {0}")]
    NotDescription(String),
    /// A kind this version does not know.
    #[error(
        "the machine state has a component of unknown kind {kind}; the source is newer than this program"
    )]
    UnknownKind {
        /// Its number.
        kind: u16,
    },
    /// A version this program does not know.
    #[error("the {kind} state has version {version} and this program reads version {known}")]
    Version {
        /// The component.
        kind: Kind,
        /// Its version.
        version: u16,
        /// The version that is known.
        known: u16,
    },
    /// A component that should be there and is not.
    #[error("the machine state lacks {kind} {index}")]
    Missing {
        /// The component.
        kind: Kind,
        /// Which of them.
        index: u8,
    },
    /// A component that this machine has no place for, or has already had.
    #[error("the machine state has a {kind} {index} that this machine has no place for")]
    Unexpected {
        /// The component.
        kind: Kind,
        /// Which of them.
        index: u8,
    },
    /// A payload that is not what it should be.
    #[error("the state of {kind} {index} is malformed: {what}")]
    Malformed {
        /// The component.
        kind: Kind,
        /// Which of them.
        index: u8,
        /// What is wrong.
        what: String,
    },
    /// An MSR that this host cannot take.
    #[error("MSR {msr:#x} of vCPU {vcpu} cannot be set to {value:#x} on this host")]
    Msr {
        /// The vCPU.
        vcpu: u8,
        /// The register.
        msr: u32,
        /// The guest's value.
        value: u64,
    },
    /// The state could not be encoded.
    #[error("the machine state cannot be encoded: {0}")]
    Encode(#[from] postcard::Error),
    /// KVM refused a call.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal, version $version:literal, $text:literal;)*) => {
        /// What a component is the state of.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            fn from_number(number: u16) -> Option<Kind> {
                match number { $($number => Some(Kind::$name),)* _ => None }
            }

            /// The version that this program writes and reads.
            pub fn version(self) -> u16 {
                match self { $(Kind::$name => $version,)* }
            }
        }

        impl fmt::Display for Kind {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(match self { $(Kind::$name => $text,)* })
            }
        }
    };
}

kinds! {
    /// One vCPU.
    Vcpu = 1, version 1, "vCPU";
    /// Both PICs and the IOAPIC.
    Irqchip = 2, version 1, "interrupt controllers";
    /// The timer.
    Pit = 3, version 1, "timer";
    /// kvmclock and TSC against real time.
    Clock = 4, version 1, "clock";
    /// The serial port.
    Serial = 5, version 1, "serial port";
    /// ACPI's power registers.
    Power = 6, version 2, "power registers";
    /// The PCI bus.
    Pci = 7, version 1, "PCI bus";
    /// A virtio device's PCI function, transport and queues.
    Virtio = 8, version 1, "virtio transport";
    /// What an entropy device has beyond its transport.
    Rng = 9, version 1, "virtio-rng";
    /// What a console has beyond its transport.
    Console = 10, version 1, "virtio-console";
    /// What a disk has beyond its transport.
    Block = 11, version 2, "virtio-blk";
    /// What a network interface has beyond its transport.
    Net = 12, version 1, "virtio-net";
    /// There only if the guest has asked for a reset that is still to be done.
    Reset = 13, version 1, "pending reset";
}

/// One component, as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Component {
    kind: u16,
    index: u8,
    version: u16,
    #[serde(with = "migration::bounded::bytes")]
    payload: Vec<u8>,
}

/// The envelope, whose list is bounded while it is decoded.
#[derive(Serialize, Deserialize)]
struct Envelope(
    [u8; 4],
    #[serde(deserialize_with = "migration::bounded::at_most::<MAX_COMPONENTS, _, _>")] Vec<Component>,
);

impl Component {
    /// The current version of `state`.
    pub fn new<T: Serialize>(kind: Kind, index: u8, state: &T) -> Result<Self, Error> {
        let payload = postcard::to_stdvec(state)?;
        Ok(Component { kind: kind as u16, index, version: kind.version(), payload })
    }

    /// What it is the state of.
    pub fn place(&self) -> Result<(Kind, u8), Error> {
        let kind = Kind::from_number(self.kind).ok_or(Error::UnknownKind { kind: self.kind })?;
        Ok((kind, self.index))
    }

    /// Replaces its payload.
    #[cfg(test)]
    pub(crate) fn set_bytes(&mut self, payload: &[u8]) {
        self.payload = payload.to_vec();
    }

    /// Its payload as it travels.
    pub fn bytes(&self) -> &[u8] {
        &self.payload
    }
}

/// All components as bytes.
pub fn encode(components: &[Component]) -> Result<Vec<u8>, Error> {
    Ok(postcard::to_stdvec(&(MAGIC, components))?)
}

/// The components of a state: each known, of the known version, and there once.
pub fn decode(bytes: &[u8]) -> Result<Vec<Component>, Error> {
    let Envelope(magic, components) =
        strict(bytes).map_err(|_| Error::NotState("it is damaged, or not from this program"))?;
    if magic != MAGIC {
        return Err(Error::NotState("it is not from this program"));
    }
    for (at, component) in components.iter().enumerate() {
        let kind = Kind::from_number(component.kind).ok_or(Error::UnknownKind { kind: component.kind })?;
        let (version, index) = (component.version, component.index);
        if version != kind.version() {
            return Err(Error::Version { kind, version, known: kind.version() });
        }
        if components[..at].iter().any(|c| (c.kind, c.index) == (component.kind, index)) {
            return Err(Error::Unexpected { kind, index });
        }
    }
    Ok(components)
}

/// Refuses components that a machine has no place for. (One that is lacking shows when its payload
/// is asked for.)
pub fn check(components: &[Component], places: &[(Kind, u8)]) -> Result<(), Error> {
    for component in components {
        let (kind, index) = component.place()?;
        if !places.contains(&(kind, index)) {
            return Err(Error::Unexpected { kind, index });
        }
    }
    Ok(())
}

/// Whether there is a component `kind`.
pub fn has(components: &[Component], kind: Kind) -> bool {
    components.iter().any(|c| c.kind == kind as u16)
}

/// The payload of component `kind` number `index`.
pub fn payload<T: DeserializeOwned + Serialize>(
    components: &[Component],
    kind: Kind,
    index: u8,
) -> Result<T, Error> {
    let component = components
        .iter()
        .find(|c| c.kind == kind as u16 && c.index == index)
        .ok_or(Error::Missing { kind, index })?;
    strict(&component.payload).map_err(|what| Error::Malformed { kind, index, what })
}

/// Decodes exactly what encoding the result would give. The comparison with a second encoding is what makes
/// it exact: KVM's structures decode from too few or too many bytes without complaint.
pub(crate) fn strict<T: DeserializeOwned + Serialize>(bytes: &[u8]) -> Result<T, String> {
    let value: T = postcard::from_bytes(bytes).map_err(|e| e.to_string())?;
    let again = postcard::to_stdvec(&value).map_err(|e| e.to_string())?;
    if again == bytes { Ok(value) } else { Err("bytes are missing or left over".into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn component(kind: u16, index: u8, version: u16) -> Component {
        Component { kind, index, version, payload: postcard::to_stdvec(&7u32).unwrap() }
    }

    fn refused(components: &[Component]) -> String {
        decode(&encode(components).unwrap()).unwrap_err().to_string()
    }

    #[test]
    fn what_is_not_known_is_refused_by_name() {
        let two = decode(&encode(&[component(1, 0, 1), component(1, 1, 1)]).unwrap()).unwrap();
        assert!(check(&two, &[(Kind::Vcpu, 0), (Kind::Vcpu, 1)]).is_ok());
        let refusal = check(&two, &[(Kind::Vcpu, 0), (Kind::Pci, 1)]).unwrap_err().to_string();
        assert!(refusal.contains("vCPU 1"), "{refusal}");
        assert!(refused(&[component(99, 0, 1)]).contains("kind 99"));
        assert!(refused(&[component(3, 0, 2)]).contains("timer state has version 2"));
        assert!(refused(&[component(4, 0, 1), component(4, 0, 1)]).contains("clock 0"));
    }

    #[test]
    fn leftovers_and_cuts_are_refused_at_every_byte() {
        let bytes = encode(&[component(1, 0, 1)]).unwrap();
        for end in 0..bytes.len() {
            assert!(decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        assert!(decode(&[&bytes[..], &[0]].concat()).is_err());
        let mut long = component(1, 0, 1);
        long.payload.push(0);
        let error = payload::<u32>(&[long], Kind::Vcpu, 0).unwrap_err();
        assert!(matches!(error, Error::Malformed { kind: Kind::Vcpu, index: 0, .. }));
        assert!(matches!(payload::<u32>(&[], Kind::Pit, 0), Err(Error::Missing { kind: Kind::Pit, .. })));
    }
}
