//! The interface as its driver sees it.

use super::control::{Command, control};
use super::receive::{ReceiveConfig, receive};
use super::state::NetState;
use super::tap::{OFFLOADS, Tap};
use super::transmit::transmit;
use super::{Error, MAX_PAIRS, Negotiated, NetConfig, TapConfig};
use crate::component::{self, Component, Kind};
use crate::lock::lock;
use crate::virtio::queue::{LockedQueue, QueueError, WaitFor};
use crate::virtio::structure::Structure;
use crate::virtio::{DeviceConfig, DeviceType, VirtioDevice};
use std::os::fd::BorrowedFd;
#[cfg(feature = "internals")]
use std::os::unix::net::UnixDatagram;
use std::sync::{Mutex, MutexGuard};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
    VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP, virtio_net_config,
};

/// Network controller, Ethernet.
const CLASS: u32 = 0x02_0000;
const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 64;
/// Smallest MTU that a driver takes.
const MIN_MTU: u16 = 68;

/// What an interface offers whatever its tap can do.
const ALWAYS: u64 = 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_MAC_ADDR
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
/// What the guest may leave to a tap that looks at the header, as all of them here do.
const HOST_OFFLOADS: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN;
/// What a tap may leave to the guest, and the tap's name for it.
const GUEST_OFFLOADS: [(u64, libc::c_uint); 4] = [
    (1 << VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (1 << VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (1 << VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (1 << VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];
/// Frames may be longer than the MTU.
const UNSEGMENTED: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
const CONTROL_OFFLOADS: u64 = 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS;
const MULTIQUEUE: u64 = 1 << VIRTIO_NET_F_MQ;
const ANNOUNCE: u64 = 1 << VIRTIO_NET_F_GUEST_ANNOUNCE;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;

/// The names in the specification, for people.
const NAMES: [(u32, &str); 10] = [
    (VIRTIO_NET_F_CSUM, "CSUM"),
    (VIRTIO_NET_F_GUEST_CSUM, "GUEST_CSUM"),
    (VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, "CTRL_GUEST_OFFLOADS"),
    (VIRTIO_NET_F_GUEST_TSO4, "GUEST_TSO4"),
    (VIRTIO_NET_F_GUEST_TSO6, "GUEST_TSO6"),
    (VIRTIO_NET_F_GUEST_ECN, "GUEST_ECN"),
    (VIRTIO_NET_F_HOST_TSO4, "HOST_TSO4"),
    (VIRTIO_NET_F_HOST_TSO6, "HOST_TSO6"),
    (VIRTIO_NET_F_HOST_ECN, "HOST_ECN"),
    (VIRTIO_NET_F_MQ, "MQ"),
];

/// Bits of guest offloads as the tap has them.
fn tap_offloads(features: u64) -> libc::c_uint {
    let chosen = GUEST_OFFLOADS.iter().filter(|(feature, _)| features & feature != 0);
    chosen.fold(0, |all, (_, offload)| all | offload)
}

fn names(features: u64) -> String {
    let named = NAMES.iter().filter(|(bit, _)| features & 1 << bit != 0).map(|(_, name)| (*name).to_string());
    let known = NAMES.iter().fold(0, |all, (bit, _)| all | 1u64 << bit);
    let others = (features & !known != 0).then(|| format!("{:#x}", features & !known));
    named.chain(others).collect::<Vec<_>>().join(", ")
}

/// The features that the driver accepted, and what it requested on the control queue.
struct Inner {
    accepted: u64,
    requested: NetState,
}

/// A network interface.
pub struct Net {
    config: NetConfig,
    offered: u64,
    mtu: u16,
    tap: Tap,
    queue_sizes: Vec<u16>,
    inner: Mutex<Inner>,
}

/// What a queue is for.
enum Role {
    Receive(usize),
    Transmit(usize),
    Control,
    Unused,
}

impl Net {
    /// Opens an interface's tap.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(config: &NetConfig, taps: &[TapConfig]) -> Result<Self, Error> {
        let &NetConfig { number, mac, pairs, .. } = config;
        if !(1..=MAX_PAIRS).contains(&pairs) {
            return Err(Error::Pairs(pairs));
        }
        if !mac.is_unicast() {
            return Err(Error::Mac(mac));
        }
        let local = taps.get(usize::from(number)).ok_or(Error::NoTap { number })?;
        let tap = match &local.opened {
            Some(opened) => Tap::of(&local.name, opened, pairs)?,
            None => Tap::open(&local.name, pairs)?,
        };
        Self::with_tap(config, local, tap)
    }

    /// An interface over what stands in for a tap: one socket for each pair of queues.
    ///
    /// # Errors
    /// [`Error`], or if a socket cannot be used.
    #[cfg(feature = "internals")]
    pub fn over(config: &NetConfig, queues: Vec<UnixDatagram>) -> Result<Self, Error> {
        let local = TapConfig::named("stand-in");
        let tap = Tap::stand_in(queues, 1500)
            .map_err(|source| Error::System { name: local.name.clone(), source })?;
        Self::with_tap(config, &local, tap)
    }

    fn with_tap(config: &NetConfig, local: &TapConfig, tap: Tap) -> Result<Self, Error> {
        let &NetConfig { mac, pairs, negotiated, .. } = config;
        let multiqueue = if pairs > 1 { MULTIQUEUE } else { 0 };
        let offloads = match tap.offloads() {
            _ if !local.offloads => 0,
            OFFLOADS => {
                HOST_OFFLOADS | CONTROL_OFFLOADS | GUEST_OFFLOADS.iter().fold(0, |all, (f, _)| all | f)
            }
            // The guest's own come in any case from a tap that reads the header.
            some => {
                HOST_OFFLOADS
                    | GUEST_OFFLOADS.iter().filter(|(_, o)| some & o != 0).fold(0, |all, (f, _)| all | f)
            }
        };
        let able = ALWAYS | multiqueue | offloads;
        let (offered, mtu) = match negotiated {
            None => (able, tap.mtu()),
            Some(negotiated) => {
                let missing = negotiated.accepted & !able & !crate::virtio::transport::COMMON_FEATURES;
                if missing != 0 {
                    return Err(Error::Offloads { name: local.name.clone(), missing: names(missing) });
                }
                if negotiated.mtu > tap.mtu() || negotiated.mtu < MIN_MTU {
                    let (found, wanted) = (tap.mtu(), negotiated.mtu);
                    return Err(Error::Mtu { name: local.name.clone(), found, wanted });
                }
                (negotiated.offered & able, negotiated.mtu)
            }
        };
        let mut queue_sizes = vec![QUEUE_SIZE; usize::from(pairs) * 2];
        queue_sizes.push(CONTROL_SIZE);
        let inner = Inner { accepted: 0, requested: NetState::initial(mac) };
        Ok(Net { config: config.clone(), offered, mtu, tap, queue_sizes, inner: Mutex::new(inner) })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// What a queue is for depends on the accepted features: without several pairs the control
    /// queue comes after the first one.
    fn role(&self, index: usize, accepted: u64) -> Role {
        let pairs = if accepted & MULTIQUEUE != 0 { usize::from(self.config.pairs) } else { 1 };
        match index {
            _ if index == pairs * 2 => Role::Control,
            _ if index > pairs * 2 => Role::Unused,
            _ if index.is_multiple_of(2) => Role::Receive(index / 2),
            _ => Role::Transmit(index / 2),
        }
    }

    /// Makes the tap do what was negotiated and requested.
    fn apply(&self, inner: &Inner) {
        // What the tap said it can do when it was opened does not fail; if it is gone, all else is.
        let _ = self.tap.set_offloads(tap_offloads(inner.requested.offloads.unwrap_or(inner.accepted)));
        let _ = self.tap.use_queues(usize::from(inner.requested.pairs));
    }

    /// Carries out a command; false if that is not possible.
    fn execute(&self, command: Command) -> bool {
        let mut inner = self.lock();
        let accepted = inner.accepted;
        let requested = &mut inner.requested;
        match command {
            Command::Announced => requested.announce = false,
            Command::SetMac(mac) if mac.is_unicast() => requested.mac = mac,
            Command::SetPairs(pairs)
                if accepted & MULTIQUEUE != 0 && (1..=self.config.pairs).contains(&pairs) =>
            {
                requested.pairs = pairs;
            }
            Command::SetOffloads(offloads)
                if accepted & CONTROL_OFFLOADS != 0 && offloads & !accepted == 0 =>
            {
                requested.offloads = Some(offloads);
            }
            _ => return false,
        }
        self.apply(&inner);
        true
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        "net"
    }

    fn device_type(&self) -> DeviceType {
        DeviceType { id: VIRTIO_ID_NET as u16, class: CLASS }
    }

    fn config(&self) -> DeviceConfig {
        let accepted = self.lock().accepted;
        let negotiated = Negotiated { offered: self.offered, accepted, mtu: self.mtu };
        DeviceConfig::Net(NetConfig { negotiated: Some(negotiated), ..self.config.clone() })
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let NetState { mac, announce, .. } = self.lock().requested;
        let announce = if announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let fields = virtio_net_config {
            mac: mac.0,
            status: (VIRTIO_NET_S_LINK_UP | announce) as u16,
            max_virtqueue_pairs: self.config.pairs,
            mtu: self.mtu,
            ..Default::default()
        };
        Structure(fields).read_config(offset, data);
    }

    fn activate(&self, features: u64) {
        let mut inner = self.lock();
        inner.accepted = features;
        self.apply(&inner);
    }

    fn reset(&self) {
        let mut inner = self.lock();
        *inner = Inner { accepted: 0, requested: NetState::initial(self.config.mac) };
        self.apply(&inner);
    }

    fn serve(&self, index: usize, queue: &mut LockedQueue<'_>) -> Result<WaitFor, QueueError> {
        let accepted = self.lock().accepted;
        match self.role(index, accepted) {
            Role::Receive(pair) => {
                let config =
                    ReceiveConfig::new(accepted & MERGEABLE != 0, accepted & UNSEGMENTED != 0, self.mtu);
                receive(&self.tap, pair, config, queue)
            }
            Role::Transmit(pair) => transmit(&self.tap, pair, queue),
            Role::Control => control(queue, |command| self.execute(command)),
            // What its driver makes available stays there, and is nothing to go on for.
            Role::Unused => Ok(WaitFor::Input),
        }
    }

    fn input(&self, index: usize) -> Option<BorrowedFd<'_>> {
        match self.role(index, self.lock().accepted) {
            Role::Receive(pair) => self.tap.input(pair),
            _ => None,
        }
    }

    fn announce(&self) -> bool {
        let mut inner = self.lock();
        self.tap.send(&inner.requested.mac.rarp());
        inner.requested.announce = inner.accepted & ANNOUNCE != 0;
        inner.requested.announce
    }

    fn state_kind(&self) -> Kind {
        Kind::Net
    }

    fn save(&self, index: u8) -> Result<Component, component::Error> {
        Component::new(Kind::Net, index, &self.lock().requested)
    }

    fn load(&self, components: &[Component], index: u8) -> Result<(), component::Error> {
        let requested: NetState = component::payload(components, Kind::Net, index)?;
        let offloads = requested.offloads.unwrap_or(0);
        if !requested.mac.is_unicast()
            || !(1..=self.config.pairs).contains(&requested.pairs)
            || offloads & !self.offered != 0
        {
            let what = format!(
                "{requested:?} where {} pairs and {:#x} are offered",
                self.config.pairs, self.offered
            );
            return Err(component::Error::Malformed { kind: Kind::Net, index, what });
        }
        // What has come in so far was for whoever had the guest then, and may have reached it there.
        self.tap.discard();
        self.lock().requested = requested;
        Ok(())
    }
}
