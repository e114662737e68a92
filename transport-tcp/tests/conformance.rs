//! Every way to give the transport its streams passes the suite of the data-plane contract.

use migration::conformance::Fixture;
use migration::transport::{DestinationTransport, SourceTransport};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;
use whimbrel_transport_tcp::{LaneAcceptor, Listener, TcpDestination, TcpSource};

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

/// Pairs of Unix sockets: the source's ends, and the destination's.
fn pairs(count: u16) -> (Vec<UnixStream>, Vec<UnixStream>) {
    (0..count).map(|_| UnixStream::pair().expect("a pair of sockets")).unzip()
}

/// Unix sockets that are handed to an acceptor once the source is there.
struct Accepted(LaneAcceptor);

impl Fixture for Accepted {
    fn source(&self, lanes: u16) -> Box<dyn SourceTransport> {
        let (ours, theirs) = pairs(lanes);
        for stream in theirs {
            let acceptor = self.0.clone();
            // What comes of a source that is refused is the source's affair.
            thread::spawn(move || acceptor.accept(stream));
        }
        Box::new(TcpSource::from_streams(ours).expect("stream sockets"))
    }

    fn destination(&self) -> Box<dyn DestinationTransport> {
        Box::new(TcpDestination::from_acceptor(&self.0))
    }
}

/// Unix sockets that the destination has from the beginning. The newest destination's other ends are here.
struct Connected(Mutex<Vec<UnixStream>>);

impl Fixture for Connected {
    fn source(&self, lanes: u16) -> Box<dyn SourceTransport> {
        let streams = self.0.lock().unwrap().drain(..usize::from(lanes)).collect::<Vec<_>>();
        Box::new(TcpSource::from_streams(streams).expect("stream sockets"))
    }

    fn destination(&self) -> Box<dyn DestinationTransport> {
        let (ours, theirs) = pairs(8);
        *self.0.lock().unwrap() = ours;
        Box::new(TcpDestination::from_streams(theirs).expect("stream sockets"))
    }
}

mod over_tcp {
    use super::*;
    migration::conformance_suite!(tcp());
}

mod over_accepted_unix_sockets {
    use super::*;
    migration::conformance_suite!(Accepted(LaneAcceptor::new()));
}

mod over_connected_unix_sockets {
    use super::*;
    migration::conformance_suite!(Connected(Mutex::default()));
}
