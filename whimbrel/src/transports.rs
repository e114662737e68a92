//! Which data planes a migration may use, best first.

use crate::api::model::{MigrationRequest, TransportChoice};
use crate::security::Encryption;
use migration::transport::{DestinationTransport, SourceTransport};
use transport_rdma::{Options, RdmaDestination, RdmaSource, Waiting};
use transport_tcp::{Call, Connection, Listener, TcpDestination};

/// What a source may use to reach the other end of `connection`. With [`TransportChoice::Auto`], TCP takes
/// over from RDMA, at the start or when RDMA breaks.
pub fn source(request: &MigrationRequest, connection: &Connection) -> Vec<Box<dyn SourceTransport>> {
    let rdma = || -> Box<dyn SourceTransport> {
        let waiting = waiting(request.busy_poll);
        Box::new(RdmaSource::new(Options::default().with_lanes(request.queue_pairs).with_waiting(waiting)))
    };
    let tcp = || -> Box<dyn SourceTransport> { Box::new(connection.lanes(request.streams)) };
    match request.transport {
        // Over RDMA nothing is encrypted.
        TransportChoice::Auto if request.encryption == Encryption::Required => vec![tcp()],
        TransportChoice::Auto => vec![rdma(), tcp()],
        TransportChoice::Rdma => vec![rdma()],
        TransportChoice::Tcp => vec![tcp()],
    }
}

/// Starts to prepare what `source` will need, while the destination is called and builds its machine.
pub fn warm_up(request: &MigrationRequest) {
    if request.transport != TransportChoice::Tcp {
        transport_rdma::warm_up();
    }
}

/// What a destination has for the source that made `call`; the source chooses.
pub fn destination(
    call: &Call,
    listener: &Listener,
    busy_poll: bool,
    encryption: Encryption,
) -> Vec<Box<dyn DestinationTransport>> {
    let mut transports: Vec<Box<dyn DestinationTransport>> = Vec::new();
    // RDMA uses the address that the source has called, because this is the network that the operator chose.
    // A connection that has no address any more is about to fail by itself.
    if let Ok(local) = call.local()
        && encryption != Encryption::Required
    {
        let options = Options::default().with_waiting(waiting(busy_poll));
        transports.push(Box::new(RdmaDestination::new(local.ip(), options)));
    }
    transports.push(Box::new(TcpDestination::new(listener)));
    transports
}

fn waiting(busy_poll: bool) -> Waiting {
    if busy_poll { Waiting::BusyPoll } else { Waiting::Sleep }
}
