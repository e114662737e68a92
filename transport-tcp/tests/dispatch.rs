//! One port whose connections are handed to several listeners.

mod common;

use common::{assert_moved, cache, receive, send};
use migration::link::ControlLink;
use migration::preamble::{Kind, LEN, Preamble, Status};
use migration::transport::Token;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;
use whimbrel_transport_tcp::{
    Caller, Dispatcher, Error, Feed, Listener, Protection, TcpDestination, TcpSource, connect_control,
};

const PATIENCE: Duration = Duration::from_secs(30);

fn port() -> TcpListener {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()
}

fn fed() -> (Listener, Feed) {
    Listener::fed(1, || Ok(Protection::none()))
}

/// Hands a caller over, as if to another process.
fn hand(caller: Caller, feed: &Feed) {
    assert!(caller.leave());
    feed.give(TcpStream::from(caller.as_fd().try_clone_to_owned().unwrap())).unwrap();
}

/// Those who take sessions, each with the token of the one that it has.
#[derive(Clone, Default)]
struct Seats(Arc<Mutex<Vec<Seat>>>);

type Seat = (Feed, Option<Token>);

impl Seats {
    /// The feed that this caller is for, when it is there.
    fn find(&self, wanted: Option<Token>) -> Feed {
        loop {
            let found = self.0.lock().unwrap().iter().find(|(_, has)| *has == wanted).cloned();
            match found {
                Some((feed, _)) => return feed,
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

#[test]
fn callers_of_one_port_are_served_by_a_listener_each() {
    const CACHES: usize = 4;
    let seats = Seats::default();
    let finding = seats.clone();
    let dispatcher = Dispatcher::start(port(), move |caller| {
        let preamble = *caller.preamble();
        let lane = preamble.kind == Kind::Data;
        hand(caller, &finding.find(lane.then_some(preamble.token)));
    })
    .unwrap();
    let to = dispatcher.local_addr();
    let caches: Vec<_> = (1..=CACHES as u64).map(|number| cache(8 * number)).collect();
    thread::scope(|scope| {
        for (number, cache) in (0..).zip(&caches) {
            scope.spawn(move || {
                let token = Token([number; 16]);
                let mut link = connect_control(&to.to_string(), token, PATIENCE).unwrap();
                send(cache, &mut link, TcpSource::new(to, 2), 2);
            });
        }
        // One is there at a time: whoever else calls it meanwhile is hung up on, and calls again.
        for at in 0..CACHES {
            let (listener, feed) = fed();
            seats.0.lock().unwrap().push((feed, None));
            let mut call = listener.next_control(PATIENCE).unwrap().expect("a call");
            seats.0.lock().unwrap()[at].1 = Some(call.token());
            let caches = &caches;
            scope.spawn(move || {
                let twin = receive(&mut call, TcpDestination::new(&listener)).unwrap();
                assert_moved(&caches[usize::from(call.token().0[0])], &twin);
            });
        }
    });
}

#[test]
fn whoever_is_one_too_many_is_hung_up_on() {
    let (listener, feed) = fed();
    let dispatcher = Dispatcher::start(port(), move |caller| hand(caller, &feed)).unwrap();
    let call = |token| connect_control(&dispatcher.local_addr().to_string(), Token([token; 16]), PATIENCE);
    let _first = call(1).unwrap();
    let taken = listener.next_control(PATIENCE).unwrap().unwrap();
    assert!(matches!(call(2), Err(Error::HungUp { .. })));
    drop(taken);
    let _second = call(2).unwrap();
    assert_eq!(listener.next_control(PATIENCE).unwrap().unwrap().token(), Token([2; 16]));
    // A closed one takes nobody.
    drop(listener);
    assert!(matches!(call(3), Err(Error::HungUp { .. })));
}

#[test]
fn what_is_no_preamble_is_handed_to_nobody() {
    let (take, taken) = mpsc::channel();
    let dispatcher = Dispatcher::start(port(), move |caller| take.send(caller).unwrap()).unwrap();
    let (tell, told) = mpsc::channel();
    dispatcher.on_refused(move |refused| tell.send(refused.why.clone()).unwrap());
    let call = |bytes: &[u8]| {
        let mut caller = TcpStream::connect(dispatcher.local_addr()).unwrap();
        caller.set_read_timeout(Some(PATIENCE)).unwrap();
        caller.write_all(bytes).unwrap();
        caller
    };
    let answer = |mut caller: TcpStream| {
        let mut answer = Vec::new();
        // A reset says as little as an end.
        let _ = caller.read_to_end(&mut answer);
        answer
    };
    assert_eq!(answer(call(&[0xff; LEN])), [0; 0]);
    assert!(told.recv_timeout(PATIENCE).unwrap().contains("does not speak"));
    let preamble = Preamble::control(Token([7; 16]));
    let newer = Preamble { version: 999, ..preamble };
    assert_eq!(answer(call(&newer.encode())), Preamble::version_mismatch().encode());
    // One that says its preamble in pieces is handed on with all of it.
    let mut slow = call(&preamble.encode()[..5]);
    slow.write_all(&preamble.encode()[5..]).unwrap();
    let caller = taken.recv_timeout(PATIENCE).unwrap();
    assert_eq!((caller.preamble(), caller.peer()), (&preamble, slow.local_addr().unwrap()));
    let mut whole = [0; LEN];
    TcpStream::from(caller.as_fd().try_clone_to_owned().unwrap()).read_exact(&mut whole).unwrap();
    assert_eq!(whole, preamble.encode());
    caller.refuse(Status::Session, "nobody has it");
    assert_eq!(answer(slow), preamble.answer(Status::Session).encode());
    assert!(taken.try_recv().is_err());
}
