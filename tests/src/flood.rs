//! Callers from many addresses who are not let in, hundreds a second.

use crate::mitm::Mitm;
use migration::preamble::Preamble;
use migration::transport::Token;
use socket2::{Domain, Socket, Type};
use std::collections::VecDeque;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use transport_tcp::Connector;

/// Threads that call, each in its turn.
const CALLERS: u64 = 8;

/// Addresses that they call from: 127.0.0.2 and those that follow.
const ADDRESSES: u64 = 8;

/// Connections that each thread keeps open: more than a receiver serves.
const HELD: usize = 75;

/// How long a call may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// What one of them does.
#[derive(Clone, Copy)]
enum Caller {
    /// It hangs up at once.
    Leaves,
    /// It sends half a preamble, and waits.
    SaysHalf,
    /// It sends a preamble, and waits.
    Begins,
    /// It speaks another protocol.
    Babbles,
    /// It begins a handshake of TLS, and waits.
    Greets,
    /// It makes a handshake with a certificate that is not trusted here.
    Pretends,
}

const CALLERS_OF_ALL_KINDS: [Caller; 6] =
    [Caller::Leaves, Caller::SaysHalf, Caller::Begins, Caller::Babbles, Caller::Greets, Caller::Pretends];

/// What all of them know.
struct Plan {
    target: Mutex<SocketAddr>,
    /// The beginning of an encrypted connection: the preamble, and the client's first record.
    greeting: Vec<u8>,
    stranger: Connector,
    made: AtomicU64,
    /// Calls since the target has changed.
    at_target: AtomicU64,
    ended: AtomicBool,
}

impl Plan {
    fn target(&self) -> SocketAddr {
        *self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The callers, until this is dropped.
pub struct Flood {
    plan: Arc<Plan>,
    threads: Vec<JoinHandle<()>>,
    begun: Instant,
}

impl Flood {
    /// Calls `target` so many times a second. `greeting` is what [`greeting`] has made, and the certificate
    /// of `stranger` is one that the target does not trust.
    pub fn start(target: SocketAddr, per_second: u64, greeting: Vec<u8>, stranger: Connector) -> Self {
        let plan = Arc::new(Plan {
            target: Mutex::new(target),
            greeting,
            stranger,
            made: AtomicU64::new(0),
            at_target: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let begun = Instant::now();
        let threads = (0..CALLERS)
            .map(|caller| {
                let plan = Arc::clone(&plan);
                thread::spawn(move || call(&plan, caller, per_second))
            })
            .collect();
        Flood { plan, threads, begun }
    }

    /// Goes on against another target.
    pub fn aim(&self, target: SocketAddr) {
        *self.plan.target.lock().unwrap_or_else(PoisonError::into_inner) = target;
        self.plan.at_target.store(0, Ordering::Relaxed);
    }

    /// Connections so far.
    pub fn made(&self) -> u64 {
        self.plan.made.load(Ordering::Relaxed)
    }

    /// Connections to the present target.
    pub fn at_target(&self) -> u64 {
        self.plan.at_target.load(Ordering::Relaxed)
    }

    /// Ends it; returns how many connections a second there were.
    pub fn end(mut self) -> f64 {
        let rate = self.made() as f64 / self.begun.elapsed().as_secs_f64();
        assert!(self.stop(), "a caller has found something wrong");
        rate
    }

    /// Whether nothing was wrong.
    fn stop(&mut self) -> bool {
        self.plan.ended.store(true, Ordering::Relaxed);
        let failed = self.threads.drain(..).filter_map(|thread| thread.join().err()).count();
        failed == 0
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Calls again and again, as one thread of [`CALLERS`].
fn call(plan: &Plan, first: u64, per_second: u64) {
    let begun = Instant::now();
    let mut held = VecDeque::new();
    let mut number = first;
    while !plan.ended.load(Ordering::Relaxed) {
        let due = begun + Duration::from_micros(number * 1_000_000 / per_second);
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let target = plan.target();
        // Kinds and addresses are not in step, so that every kind comes from every address.
        let kind = CALLERS_OF_ALL_KINDS[(number / CALLERS) as usize % CALLERS_OF_ALL_KINDS.len()];
        let from = Ipv4Addr::new(127, 0, 0, 2 + (number / 7 % ADDRESSES) as u8);
        if let Some(connection) = behave(plan, kind, from, target, number) {
            plan.made.fetch_add(1, Ordering::Relaxed);
            if target == plan.target() {
                plan.at_target.fetch_add(1, Ordering::Relaxed);
            }
            held.extend(connection);
        }
        if held.len() > HELD {
            held.pop_front();
        }
        number += CALLERS;
    }
}

/// Makes one connection; `None` if it cannot be made, as between two receivers. Of those that wait it returns
/// the socket.
fn behave(
    plan: &Plan,
    kind: Caller,
    from: Ipv4Addr,
    target: SocketAddr,
    number: u64,
) -> Option<Option<Socket>> {
    if matches!(kind, Caller::Pretends) {
        return match plan.stranger.connect(&target.to_string(), token(number), PATIENCE) {
            Ok(_) => panic!("a stranger was let in"),
            Err(transport_tcp::Error::Connect { .. }) => None,
            Err(_) => Some(None),
        };
    }
    let mut socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    socket.connect_timeout(&target.into(), PATIENCE).ok()?;
    let preamble = Preamble::control(token(number)).encrypted(true).encode();
    // Whoever is not welcome any more cannot write.
    let waits = match kind {
        Caller::Leaves | Caller::Pretends => return Some(None),
        Caller::SaysHalf => socket.write_all(&preamble[..preamble.len() / 2]),
        Caller::Begins => socket.write_all(&preamble),
        Caller::Babbles => socket.write_all(b"GET / HTTP/1.1\r\nHost: somebody.else.example\r\n\r\n"),
        Caller::Greets => socket.write_all(&plan.greeting),
    };
    Some(waits.is_ok().then_some(socket))
}

fn token(number: u64) -> Token {
    Token(u128::from(number).to_le_bytes())
}

/// How a caller begins that encrypts: the preamble and its first record of TLS, as `connector` makes them.
pub fn greeting(connector: &Connector, receiver: SocketAddr) -> Vec<u8> {
    let mitm = Mitm::start(receiver, false);
    // Whatever becomes of it.
    let _ = connector.connect(&mitm.address().to_string(), token(0), PATIENCE);
    let recorded = mitm.recorded().swap_remove(0);
    let record = &recorded[migration::preamble::LEN..];
    assert_eq!(record[0], 22, "a handshake begins");
    let length = usize::from(u16::from_be_bytes([record[3], record[4]]));
    recorded[..migration::preamble::LEN + 5 + length].to_vec()
}

/// What a process has at the moment: bytes of memory beside guests', and descriptors.
pub fn holds(pid: u32) -> (u64, usize) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib = |name: &str| -> u64 {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
    };
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
    // Guests' memory is shared.
    ((kib("RssAnon:") + kib("RssFile:")) << 10, descriptors)
}
