//! A network for guests, as seen by a client of theirs: a bridge for each of two hosts, a third one as the
//! switch between, and a client behind it in a namespace of its own. In the lab.

use crate::command::must;
use crate::namespace::Namespace;
use crate::wire::{HEADER, Wire};
use std::process::Command;
use std::time::Duration;

/// The guest's address.
pub const GUEST: &str = "10.9.0.2";
/// The guest's hardware address.
pub const MAC: &str = "52:54:00:00:00:07";
/// The same as bytes.
pub const MAC_BYTES: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
/// Each host's tap.
pub const TAPS: [&str; 2] = ["tap-a", "tap-b"];
/// The switch's port to each host.
pub const PORTS: [&str; 2] = ["port-a", "port-b"];

/// The network; all of it goes when it is dropped.
pub struct Bridges(());

impl Bridges {
    /// Builds it.
    ///
    /// # Panics
    /// Where networks cannot be built.
    pub fn build() -> Self {
        let bridges = Bridges(());
        must("ip netns add client");
        for bridge in ["bridge-a", "bridge-b", "switch"] {
            must(&format!("ip link add {bridge} type bridge"));
        }
        for (host, (tap, port)) in ["a", "b"].into_iter().zip(TAPS.into_iter().zip(PORTS)) {
            must(&format!("ip tuntap add dev {tap} mode tap multi_queue"));
            must(&format!("ip link set {tap} master bridge-{host}"));
            must(&format!("ip link add uplink-{host} type veth peer name {port}"));
            must(&format!("ip link set uplink-{host} master bridge-{host}"));
            must(&format!("ip link set {port} master switch"));
        }
        must("ip link add port-c type veth peer name eth0 netns client");
        must("ip link set port-c master switch");
        let all = ["bridge-a", "bridge-b", "switch", "uplink-a", "uplink-b", "port-c"];
        for interface in all.iter().chain(&TAPS).chain(&PORTS) {
            // The hosts themselves have nothing to say here.
            must(&format!("ip link set {interface} addrgenmode none"));
            must(&format!("ip link set {interface} up"));
        }
        must("ip -n client address add 10.9.0.1/24 dev eth0");
        must("ip -n client link set eth0 up");
        bridges
    }

    /// The switch's port by which it reaches the guest, if it knows.
    pub fn way(&self) -> Option<String> {
        let table = must("bridge fdb show br switch");
        let entry = table.lines().find(|line| line.starts_with(MAC))?;
        entry.split_whitespace().skip_while(|word| *word != "dev").nth(1).map(Into::into)
    }

    /// Moves this thread to where the client is.
    pub fn enter_client(&self) {
        let namespace = Namespace::at("/run/netns/client").expect("the client's namespace");
        namespace.enter().expect("the right to enter it");
    }
}

impl Drop for Bridges {
    fn drop(&mut self) {
        let links = ["bridge-a", "bridge-b", "switch", "uplink-a", "uplink-b", "port-c", TAPS[0], TAPS[1]];
        for link in links {
            // What was not built yet cannot be deleted.
            let _ = Command::new("ip").args(["link", "delete", link]).output();
        }
        let _ = Command::new("ip").args(["netns", "delete", "client"]).output();
    }
}

/// A frame that came out of a host's tap.
#[derive(Clone, Debug)]
pub struct Captured {
    /// When, since 1970.
    pub at: Duration,
    /// Which host's: 0 or 1.
    pub host: usize,
    /// The frame.
    pub frame: Vec<u8>,
}

impl Captured {
    /// Its protocol.
    pub fn protocol(&self) -> u16 {
        self.frame.get(12..14).map_or(0, |bytes| u16::from_be_bytes([bytes[0], bytes[1]]))
    }
}

/// The frames that come out of the guest, on either host, from now on.
pub struct Capture([Wire; 2]);

impl Capture {
    /// Begins with all of them.
    pub fn all() -> Self {
        Capture(TAPS.map(Wire::of))
    }

    /// Begins with those of one protocol.
    pub fn of(protocol: u16) -> Self {
        Capture(TAPS.map(|tap| Wire::with_protocol(tap, protocol)))
    }

    /// What has come so far, in its order.
    pub fn take(&self) -> Vec<Captured> {
        let mut all = Vec::new();
        for (host, wire) in self.0.iter().enumerate() {
            while let Some(bytes) = wire.next(Duration::ZERO) {
                all.push(Captured { at: wire.stamp(), host, frame: bytes[HEADER..].to_vec() });
            }
        }
        all.sort_by_key(|captured| captured.at);
        all
    }
}
