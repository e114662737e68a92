//! What the tests of this crate share.
#![allow(dead_code)] // not every test uses all of it

use migration::conformance::Fixture;
use migration::transport::{DestinationTransport, SourceTransport};
use std::net::IpAddr;
use whimbrel_transport_rdma::{Options, RdmaDestination, RdmaSource, probe};

/// RDMA devices of this host.
pub struct Devices {
    /// The destination's address.
    pub to: IpAddr,
    pub options: Options,
}

impl Devices {
    /// The last device's address: where there are two, routing has the source take the other.
    ///
    /// # Panics
    /// When there is none.
    pub fn of_this_host() -> Devices {
        let host = probe::host();
        host.devices.clone().expect("RDMA devices");
        host.connections.clone().expect("connections over RDMA");
        let to = probe::addresses(&host).into_iter().rfind(IpAddr::is_ipv4);
        let to = to.expect("an active port with an IPv4 address");
        Devices { to, options: Options::default() }
    }
}

impl Fixture for Devices {
    fn source(&self, lanes: u16) -> Box<dyn SourceTransport> {
        Box::new(RdmaSource::new(self.options.clone().with_lanes(lanes)))
    }

    fn destination(&self) -> Box<dyn DestinationTransport> {
        Box::new(RdmaDestination::new(self.to, self.options.clone()))
    }
}
