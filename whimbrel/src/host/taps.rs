//! Taps for guests' interfaces, on the bridges that the host's configuration names.
//!
//! A tap is made for one machine, and is there for as long as that machine's process has it open: the kernel
//! removes it with the last of its files, also if the process is killed, and whether or not the one who made
//! it is still there. So there is no list of taps to be kept and none to be swept: what `ip link` shows is
//! all that there is. Its alias says whose it is. Bridges are used as they are, and never made.
//!
//! Making one takes `CAP_NET_ADMIN`, which a machine's process gives up. Whoever has it makes the tap and
//! hands over the files ([`TapMaker`]).

use super::config::Network;
use super::links;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use vmm::names;
use vmm::sandbox::{Helper, Mode, Needs};
use vmm::virtio::net::{MAX_PAIRS, Mac, OpenTap, TapConfig};

/// What taps are called; the kernel puts in the lowest number that is free.
const PATTERN: &CStr = c"whim%d";

/// The first byte of taps' own addresses: higher than those of hardware, and than the guests'.
const ADDRESS: u8 = 0xfe;

/// An interface that is to have a tap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The network that it names.
    pub network: String,
    /// The machine to which it belongs.
    pub machine: String,
    /// Which of the machine's interfaces it is, from 0.
    pub number: u8,
    /// Its pairs of queues.
    pub pairs: u16,
}

/// A tap that was made, as it can be handed to another process.
#[derive(Debug)]
pub struct Made {
    /// Its name.
    pub name: String,
    /// Bytes of its longest packet.
    pub mtu: u16,
    /// The files of its queues.
    pub queues: Vec<OwnedFd>,
}

impl From<Made> for TapConfig {
    fn from(made: Made) -> Self {
        TapConfig::opened(made.name, OpenTap::new(made.queues, made.mtu))
    }
}

/// Why there is no tap.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This host has no such network.
    #[error(
        "the guest's network interface {} belongs to the network {network}, which this host does not know; the networks \
         that it knows: {known}. Add [networks.{network}] to the host's configuration (--host-config)",
        number + 1
    )]
    UnknownNetwork {
        /// The network.
        network: String,
        /// Which interface, from 0.
        number: u8,
        /// What this host knows.
        known: String,
    },
    /// There is no bridge of that name.
    #[error(
        "this host has no bridge {bridge}, which is its network {network}; make it with `ip link add {bridge} type bridge` and \
         `ip link set {bridge} up`, or name another one in the host's configuration"
    )]
    NoBridge {
        /// The network.
        network: String,
        /// The bridge.
        bridge: String,
    },
    /// It is something else.
    #[error(
        "{bridge}, which is this host's network {network}, is not a bridge; name one in the host's configuration"
    )]
    NotABridge {
        /// The network.
        network: String,
        /// The interface.
        bridge: String,
    },
    /// It carries nothing.
    #[error(
        "the bridge {bridge}, which is this host's network {network}, is down; put it up with `ip link set {bridge} up`"
    )]
    Down {
        /// The network.
        network: String,
        /// The bridge.
        bridge: String,
    },
    /// The system refuses.
    #[error("cannot make a tap on the bridge {bridge}: {source}; it takes /dev/net/tun and CAP_NET_ADMIN")]
    System {
        /// The bridge.
        bridge: String,
        /// What the system said.
        source: io::Error,
    },
}

/// Whoever makes taps for machines of this host.
pub trait TapMaker: fmt::Debug + Send + Sync {
    /// Makes a tap for an interface.
    ///
    /// # Errors
    /// Why there is none, for the operator who wants the guest here.
    fn make(&self, wanted: &Wanted) -> Result<TapConfig, String>;
}

/// Checks that this host knows a network.
///
/// # Errors
/// [`Error::UnknownNetwork`].
pub fn known<'a>(
    networks: &'a BTreeMap<String, Network>,
    network: &str,
    number: u8,
) -> Result<&'a Network, Error> {
    networks.get(network).ok_or_else(|| Error::UnknownNetwork {
        network: network.into(),
        number,
        known: names::list(networks.keys()),
    })
}

/// Makes a tap for an interface of a machine that is in the process `pid`.
///
/// # Errors
/// [`Error`].
pub fn make(networks: &BTreeMap<String, Network>, wanted: &Wanted, pid: u32) -> Result<Made, Error> {
    let Wanted { network, machine, number, pairs } = wanted;
    let bridge = &known(networks, network, *number)?.bridge;
    let failed = |source| Error::System { bridge: bridge.clone(), source };
    let names = || (network.clone(), bridge.clone());
    let Some(link) = links::find(bridge).map_err(failed)? else {
        let (network, bridge) = names();
        return Err(Error::NoBridge { network, bridge });
    };
    if link.kind != "bridge" {
        let (network, bridge) = names();
        return Err(Error::NotABridge { network, bridge });
    }
    if !link.up {
        let (network, bridge) = names();
        return Err(Error::Down { network, bridge });
    }
    if !(1..=MAX_PAIRS).contains(pairs) {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    let (queues, name) = OpenTap::make(PATTERN, *pairs).map_err(failed)?;
    // Whatever fails from here on, the tap goes with its files.
    let tap = links::find(&name).map_err(failed)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    let Mac(mut address) = Mac::random().map_err(failed)?;
    address[0] = ADDRESS;
    let alias = format!("whimbrel {pid}: interface {} of {machine}, network {network}", number + 1);
    links::join(tap.index, &link, address, &alias).map_err(failed)?;
    Ok(Made { name, mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX), queues })
}

/// Makes them in this process, which has the right to.
#[derive(Clone, Debug)]
pub struct Here {
    /// The networks of this host.
    pub networks: BTreeMap<String, Network>,
}

impl TapMaker for Here {
    fn make(&self, wanted: &Wanted) -> Result<TapConfig, String> {
        let made = make(&self.networks, wanted, std::process::id());
        made.map(TapConfig::from).map_err(|error| error.to_string())
    }
}

/// Has them made by a process that keeps the right to, after this one has given it up.
#[derive(Clone, Debug)]
pub struct Beside(Helper);

/// What that process answers; the files come with it.
type Answer = Result<(String, u16), String>;

impl Beside {
    /// Starts that process, confined by `mode`. To be called before this process is confined, and while it
    /// has a single thread.
    ///
    /// # Errors
    /// The system's answer.
    pub fn start(networks: BTreeMap<String, Network>, mode: Mode) -> io::Result<Self> {
        let pid = std::process::id();
        let needs = Needs { taps: true, ..Needs::default() };
        let serve = move |question: &[u8]| {
            let wanted = serde_json::from_slice::<Wanted>(question).map_err(|error| error.to_string());
            let made = wanted.and_then(|w| make(&networks, &w, pid).map_err(|error| error.to_string()));
            let (answer, queues): (Answer, _) = match made {
                Ok(Made { name, mtu, queues }) => (Ok((name, mtu)), queues),
                Err(why) => (Err(why), Vec::new()),
            };
            (serde_json::to_vec(&answer).unwrap_or_default(), queues)
        };
        Helper::start(mode, &needs, serve).map(Beside)
    }
}

impl TapMaker for Beside {
    fn make(&self, wanted: &Wanted) -> Result<TapConfig, String> {
        let failed =
            |error: &dyn fmt::Display| format!("the process that makes taps does not answer: {error}");
        let question = serde_json::to_vec(wanted).map_err(|error| failed(&error))?;
        let (answer, queues) = self.0.ask(&question).map_err(|error| failed(&error))?;
        let (name, mtu) = serde_json::from_slice::<Answer>(&answer).map_err(|error| failed(&error))??;
        Ok(Made { name, mtu, queues }.into())
    }
}
