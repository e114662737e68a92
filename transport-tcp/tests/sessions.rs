//! Several sessions on one port.

mod common;

use common::{assert_moved, cache, receive, send};
use migration::link::ControlLink;
use migration::transport::Token;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;
use whimbrel_transport_tcp::{Call, Error, Listener, TcpDestination, TcpSource, connect_control};

const PATIENCE: Duration = Duration::from_secs(10);

fn listener(sessions: usize) -> Listener {
    Listener::bind_for(sessions, (Ipv4Addr::LOCALHOST, 0).into()).unwrap()
}

fn call(listener: &Listener, token: u8) -> Result<whimbrel_transport_tcp::Connection, Error> {
    connect_control(&listener.local_addr().to_string(), Token([token; 16]), PATIENCE)
}

fn next(listener: &Listener) -> Call {
    listener.next_control(PATIENCE).unwrap().expect("a call")
}

#[test]
fn caches_arrive_side_by_side() {
    const CACHES: usize = 3;
    let listener = listener(CACHES);
    let to = listener.local_addr();
    // Of different sizes, by which they are told apart.
    let caches: Vec<_> = (1..=CACHES as u64).map(|number| cache(8 * number)).collect();
    // Nobody begins before everybody has a session.
    let (all_called, all_answered) = (Barrier::new(CACHES), Barrier::new(CACHES));
    let arrivals: Vec<_> = thread::scope(|scope| {
        for (number, cache) in caches.iter().enumerate() {
            let (listener, all_called) = (&listener, &all_called);
            scope.spawn(move || {
                let mut link = call(listener, number as u8).unwrap();
                all_called.wait();
                send(cache, &mut link, TcpSource::new(to, 2), 2);
            });
        }
        let receiving: Vec<_> = (0..CACHES)
            .map(|_| {
                scope.spawn(|| {
                    let mut call = next(&listener);
                    all_answered.wait();
                    let number = usize::from(call.token().0[0]);
                    (number, receive(&mut call, TcpDestination::new(&listener)).unwrap())
                })
            })
            .collect();
        receiving.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (number, twin) in arrivals {
        assert_moved(&caches[number], &twin);
    }
}

#[test]
fn one_too_many_is_told_that_the_listener_is_busy() {
    for sessions in [1, 2] {
        let listener = listener(sessions);
        let taken: Vec<_> = (0..sessions as u8).map(|token| call(&listener, token).unwrap()).collect();
        let mut calls: Vec<Call> = taken.iter().map(|_| next(&listener)).collect();
        assert!(matches!(call(&listener, 9), Err(Error::Busy { .. })), "{sessions}");
        // The end of any of them makes room for one more, and for no more than that.
        drop(calls.remove(0));
        let _ninth = call(&listener, 9).unwrap();
        assert!(matches!(call(&listener, 10), Err(Error::Busy { .. })), "{sessions}");
        assert_eq!(next(&listener).token(), Token([9; 16]));
    }
}

#[test]
fn a_token_names_one_session() {
    let listener = listener(2);
    let _first = call(&listener, 1).unwrap();
    assert!(matches!(call(&listener, 1), Err(Error::Busy { .. })));
    // The refused one has taken no session away, and has not ended the first one's either.
    let _second = call(&listener, 2).unwrap();
    let mut calls = [next(&listener), next(&listener)];
    calls.sort_by_key(|call| call.token().0);
    assert_eq!(calls.each_ref().map(|call| call.token()), [Token([1; 16]), Token([2; 16])]);
    assert!(matches!(call(&listener, 3), Err(Error::Busy { .. })));
}

#[test]
fn a_listener_takes_one_session_unless_told_otherwise() {
    let listener = Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let _first = call(&listener, 1).unwrap();
    assert!(matches!(call(&listener, 2), Err(Error::Busy { .. })));
}

#[test]
fn refused_callers_are_told_of_once_a_second_and_counted() {
    let listener = Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    listener
        .on_refused(move |refused| tell.send((refused.peer, refused.why.clone(), refused.untold)).unwrap());
    let garbage = || {
        let mut caller = TcpStream::connect(listener.local_addr()).unwrap();
        let address = caller.local_addr().unwrap();
        caller.write_all(&[0xff; 32]).unwrap();
        // Refused by now.
        let _ = caller.read(&mut [0; 32]);
        address
    };
    let first = garbage();
    let (peer, why, untold) = told.recv_timeout(PATIENCE).unwrap();
    assert_eq!((peer, untold), (first, 0), "{why}");
    let mut counted = 0;
    let mut refused = 0;
    while counted == 0 {
        garbage();
        thread::sleep(Duration::from_millis(10));
        refused += 1;
        if let Ok((_, _, untold)) = told.try_recv() {
            counted = untold;
        }
    }
    assert!(counted < refused && refused > 1, "{counted} of {refused}");
}
