//! TCP passes the suite of the data-plane contract.

use migration::conformance::Fixture;
use migration::transport::{DestinationTransport, SourceTransport};
use std::net::Ipv4Addr;
use whimbrel_transport_tcp::{Listener, TcpDestination, TcpSource};

struct Tcp(Listener);

impl Fixture for Tcp {
    fn source(&self, lanes: u16) -> Box<dyn SourceTransport> {
        Box::new(TcpSource::new(self.0.local_addr(), lanes))
    }

    fn destination(&self) -> Box<dyn DestinationTransport> {
        Box::new(TcpDestination::new(&self.0))
    }
}

fn tcp() -> impl Fixture {
    Tcp(Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a port on loopback"))
}

migration::conformance_suite!(tcp());
