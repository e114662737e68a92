//! The engine moves a machine over TCP, and the machine or its operator interferes.

mod guest;
mod handover;
mod orders;
mod panics;
mod progress;

use guest::{Guest, Host};
use migration::destination;
use migration::monitor::Monitor;
use migration::report::Report;
use migration::source::Migration;
use migration::transport::{SourceTransport, Token};
use std::net::{Ipv4Addr, SocketAddr};
use std::thread;
use std::time::Duration;
use whimbrel_transport_tcp::{Listener, TcpDestination, TcpSource, connect_control};

/// Long enough for everything that is to happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// What came of a migration on both sides.
struct Move {
    report: Report,
    /// The guest as it runs at the destination, or why it does not.
    arrived: Result<Guest, migration::Failure>,
}

/// Moves `guest` over TCP to a destination that is `host`, as `change` asks for.
fn migrate(guest: &Guest, host: Host, change: impl FnOnce(Migration<'_>) -> Migration<'_>) -> Move {
    migrate_watched(guest, host, &Monitor::default(), change)
}

/// Does the same with a monitor.
fn migrate_watched(
    guest: &Guest,
    host: Host,
    monitor: &Monitor,
    change: impl FnOnce(Migration<'_>) -> Migration<'_>,
) -> Move {
    migrate_over(|to| Box::new(TcpSource::new(to, 2)), guest, host, monitor, change)
}

/// Does the same over the transport that `transport` makes of the destination's address.
fn migrate_over(
    transport: impl FnOnce(SocketAddr) -> Box<dyn SourceTransport>,
    guest: &Guest,
    mut host: Host,
    monitor: &Monitor,
    change: impl FnOnce(Migration<'_>) -> Migration<'_>,
) -> Move {
    let listener = Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = listener.local_addr();
    thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            let mut link = listener.next_control(PATIENCE).unwrap().expect("a caller");
            let transport = TcpDestination::new(&listener);
            let arrival = destination::Migration::new(&mut host, &mut link).transport(transport).run();
            arrival.map(|arrival| arrival.conclude().into_guest())
        });
        let mut link = connect_control(&address.to_string(), Token::random().unwrap(), PATIENCE).unwrap();
        let report =
            change(Migration::new(guest, &mut link).transports([transport(address)]).monitor(monitor)).run();
        drop(link);
        Move { report, arrived: arriving.join().unwrap() }
    })
}
