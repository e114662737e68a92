//! What the tests of this crate share.
#![allow(dead_code)] // not every test uses all of it

use migration::conformance::Fixture;
use migration::transport::{DestinationTransport, SourceTransport};
use std::net::IpAddr;
use transport_rdma::{Options, RdmaDestination, RdmaSource, probe};

/// RDMA devices of this host.
pub struct Devices {
    /// The destination's address.
    pub to: IpAddr,
    pub options: Options,
}

impl Devices {
    /// The last device's address: where there are two, routing has the source take the other.
    ///
    /// # Errors
    /// Why there is none.
    pub fn find() -> Result<Devices, String> {
        let host = probe::host();
        host.devices.clone().map_err(|why| format!("no RDMA device: {why}"))?;
        host.connections.clone()?;
        let v4 = |address: &IpAddr| address.is_ipv4();
        let to = probe::addresses(&host).into_iter().rfind(v4);
        let to = to.ok_or("no RDMA device: none has an active port with an IPv4 address")?;
        Ok(Devices { to, options: Options::default() })
    }
}

impl Fixture for Devices {
    fn source(&self, lanes: u16) -> Box<dyn SourceTransport> {
        Box::new(RdmaSource::new(Options { lanes, ..self.options.clone() }))
    }

    fn destination(&self) -> Box<dyn DestinationTransport> {
        Box::new(RdmaDestination::new(self.to, self.options.clone()))
    }
}

/// The devices, or a line that says that the test is skipped.
#[macro_export]
macro_rules! devices_or_skip {
    ($test:literal) => {
        match $crate::common::Devices::find() {
            Ok(devices) => devices,
            Err(why) => {
                println!("SKIPPED {}: {why}", $test);
                return;
            }
        }
    };
}
