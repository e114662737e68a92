//! Moves through streams that were connected elsewhere.

mod common;

use common::{assert_moved, cache, receive, send};
use migration::link::ControlLink;
use migration::transport::Token;
use migration::{Code, Failure};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::thread;
use std::time::Duration;
use whimbrel_transport_tcp::{LaneAcceptor, Stream, StreamLink, TcpDestination, TcpSource};

const PATIENCE: Duration = Duration::from_secs(10);

/// Two ends of a TCP connection.
fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (ours, listener.accept().unwrap().0)
}

/// Moves a cache through one stream for control and three for memory, all of which the destination has from
/// the beginning.
fn moves<S: Stream + Into<OwnedFd> + 'static>(pair: impl Fn() -> (S, S)) {
    let (control, their_control) = pair();
    let (lanes, their_lanes): (Vec<S>, Vec<S>) = (0..3).map(|_| pair()).unzip();
    let cache = cache(16);
    let token = Token([7; 16]);
    let twin = thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let mut link = StreamLink::accept(their_control, PATIENCE).unwrap();
            assert_eq!(link.token(), token, "the source has told its token");
            receive(&mut link, TcpDestination::from_streams(their_lanes).unwrap())
        });
        let mut link = StreamLink::connect(control, token, PATIENCE).unwrap();
        send(&cache, &mut link, TcpSource::from_streams(lanes).unwrap(), 3);
        destination.join().unwrap().unwrap()
    });
    assert_moved(&cache, &twin);
}

#[test]
fn a_cache_moves_through_unix_sockets() {
    moves(|| UnixStream::pair().unwrap());
}

#[test]
fn a_cache_moves_through_tcp_streams_from_elsewhere() {
    moves(tcp_pair);
}

/// As where one process accepts connections and another has the cache.
#[test]
fn lanes_are_handed_over_when_they_come() {
    let (control, their_control) = UnixStream::pair().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let cache = cache(16);
    let token = Token([8; 16]);
    let acceptor = LaneAcceptor::new();
    let destination = TcpDestination::from_acceptor(&acceptor);
    let twin = thread::scope(|scope| {
        let to = listener.local_addr().unwrap();
        scope.spawn(move || {
            for stream in listener.incoming().take(2) {
                // As from an asynchronous runtime, which does not wait in its calls.
                let stream = stream.unwrap();
                stream.set_nonblocking(true).unwrap();
                acceptor.accept(stream).unwrap();
            }
        });
        let receiving = scope.spawn(|| receive(&mut StreamLink::new(their_control, token), destination));
        send(&cache, &mut StreamLink::new(control, token), TcpSource::new(to, 2), 2);
        receiving.join().unwrap().unwrap()
    });
    assert_moved(&cache, &twin);
}

#[test]
fn what_is_no_stream_is_refused() {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    assert!(TcpSource::from_streams([ours]).is_err());
    assert!(LaneAcceptor::new().accept(theirs).is_err());
    let file = std::fs::File::open("/proc/self/status").unwrap();
    assert!(TcpDestination::from_streams([file]).is_err());
}

#[test]
fn a_stream_that_begins_with_something_else_is_refused() {
    let refused = |first: &'static [u8]| -> Code {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            ours.write_all(first).unwrap();
            // An end in the middle of a preamble is one as well.
            ours.shutdown(std::net::Shutdown::Write).unwrap();
            ours.read_to_end(&mut Vec::new())
        });
        Failure::from(StreamLink::accept(theirs, PATIENCE).err().expect("refused")).code
    };
    assert_eq!(refused(b""), Code::PROTOCOL);
    assert_eq!(refused(b"WHIMB"), Code::PROTOCOL);
    assert_eq!(refused(b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"), Code::PROTOCOL);
    assert_eq!(refused(b"WHIMBREL\xff\xff\x01\0\0\0\0\0aaaaaaaaaaaaaaaa"), Code::VERSION);
}

#[test]
fn streams_serve_one_session() {
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let mut source = TcpSource::from_streams([ours]).unwrap();
    let ram = migration::conformance::bed::ram();
    let session = migration::transport::Session::new(Token([1; 16]), ram, Duration::from_millis(200));
    use migration::transport::{PlaneError, SourceTransport};
    // Nobody answers at the other end.
    assert!(matches!(source.connect(&session, &[]), Err(PlaneError::Timeout(_))));
    let Err(PlaneError::Unavailable(why)) = source.connect(&session, &[]) else { panic!("connected") };
    assert!(why.contains("one session"), "{why}");
}
