//! virtio-net: a network interface whose other end is a tap of this host.
//!
//! Each host chooses the tap itself, so that nobody who sends a guest can choose one. What
//! travels is what the guest knows: its address, its queues, and the features that it was offered. The
//! destination's tap must have what the guest uses, or the guest is refused.
//!
//! Frames go between the tap and guest RAM without a copy of ours, with a header before each that
//! says what is left to do: a checksum to fill in, a segment to be cut up. Offloads are features of
//! the device on one side and of the tap on the other.
//!
//! A destination has the tap open before it owns the guest. Until then it sends nothing. What has come
//! in by the time the guest is loaded is thrown away.
//!
//! | file | what |
//! |---|---|
//! | `device.rs` | features, configuration, what each queue is for |
//! | `receive.rs` | frames from the tap into the guest's buffers |
//! | `transmit.rs` | frames from the guest to the tap |
//! | `control.rs` | what the driver asks for on the control queue |
//! | `tap.rs` | the tap |
//! | `open_tap.rs` | one that somebody else has opened, or made |
//! | `mac.rs` | hardware addresses, and the frame that tells switches where one is |
//! | `announcing.rs` | how often switches are told |

mod announcing;
mod control;
mod device;
mod mac;
mod open_tap;
mod receive;
mod state;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
#[cfg(test)]
pub(crate) mod wire;

pub use announcing::Announcing;
pub use device::Net;
pub use mac::Mac;
pub use open_tap::OpenTap;
pub use tap::find as find_tap;

use serde::{Deserialize, Serialize};
use std::io;
use virtio_bindings::virtio_net::virtio_net_hdr_v1;

/// Most pairs of queues that an interface has.
pub const MAX_PAIRS: u16 = 8;

/// Bytes of the virtio header before each frame.
const HEADER: usize = size_of::<virtio_net_hdr_v1>();
/// Bytes of a frame's Ethernet header, with a VLAN tag.
const ETHERNET_HEADER: usize = 18;
/// Longest frame: an IP packet of 64 KiB behind that.
const MAX_FRAME: usize = 65535 + ETHERNET_HEADER;

/// What a network interface is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// Which of the machine's interfaces it is, from 0: it gets the host's tap of that number.
    pub number: u8,
    /// Its address.
    pub mac: Mac,
    /// Number of pairs of queues, 1 to [`MAX_PAIRS`].
    pub pairs: u16,
    /// What the guest has negotiated; `None` for a new guest, which is offered whatever the tap has.
    pub negotiated: Option<Negotiated>,
    /// The network that it belongs to. Each host knows what that is there. It travels beside the rest, and
    /// only if a machine has such names.
    #[serde(skip)]
    pub network: Option<String>,
}

/// What a guest has negotiated for its interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Negotiated {
    /// The features that it was offered.
    pub offered: u64,
    /// Those of them that it uses.
    pub accepted: u64,
    /// Bytes of the longest packet.
    pub mtu: u16,
}

/// A tap, and what of it an interface may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapConfig {
    /// The tap's name.
    pub name: String,
    /// Whether checksums and segmentation may be left to the other end.
    pub offloads: bool,
    /// The tap, if it was opened before.
    pub opened: Option<OpenTap>,
}

impl TapConfig {
    /// The tap of this name, with all that it can do. It is opened when the interface is built.
    pub fn named(name: impl Into<String>) -> Self {
        TapConfig { name: name.into(), offloads: true, opened: None }
    }

    /// One that somebody else has opened, with all that it can do.
    pub fn opened(name: impl Into<String>, tap: OpenTap) -> Self {
        TapConfig { opened: Some(tap), ..TapConfig::named(name) }
    }
}

/// Why an interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No tap was set aside for it.
    #[error(
        "the guest's network interface {} has no tap here; start the receiver with --net tap=NAME once for each \
         of its interfaces",
        number + 1
    )]
    NoTap {
        /// Which interface, from 0.
        number: u8,
    },
    /// There is no tap of that name.
    #[error(
        "there is no tap {0}; make it with `ip tuntap add dev {0} mode tap` and join it to the guest's network"
    )]
    Missing(String),
    /// It cannot carry anything.
    #[error("the tap {0} is down; put it up with `ip link set {0} up`")]
    Down(String),
    /// It is no tap, or it has one queue where several are needed.
    #[error(
        "{name} is not a tap with {pairs} queue(s); make one with `ip tuntap add dev {name} mode tap{}`",
        if *pairs > 1 { " multi_queue" } else { "" }
    )]
    Kind {
        /// The interface.
        name: String,
        /// Pairs of queues that the guest has.
        pairs: u16,
    },
    /// Somebody else has it open.
    #[error("the tap {0} is in use by another process")]
    InUse(String),
    /// The system refuses it.
    #[error("cannot use the tap {name}: {source}")]
    System {
        /// The tap.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// It has less than the guest uses.
    #[error("the tap {name} does not offer what the guest uses: {missing}")]
    Offloads {
        /// The tap.
        name: String,
        /// The features, by their names in the virtio specification.
        missing: String,
    },
    /// It takes only packets that are shorter than the guest's.
    #[error(
        "the tap {name} has an MTU of {found}, the guest sends packets of up to {wanted} bytes; use `ip link set {name} mtu {wanted}`"
    )]
    Mtu {
        /// The tap.
        name: String,
        /// Its MTU in bytes.
        found: u16,
        /// The guest's.
        wanted: u16,
    },
    /// A number of queues that no interface has.
    #[error("a network interface with {0} pairs of queues: use 1 to {MAX_PAIRS}")]
    Pairs(u16),
    /// An address that no interface may have.
    #[error("{0} is not an address of a network interface; use one such as 52:54:00:12:34:56")]
    Mac(Mac),
}
