//! A TCP relay between source and receiver: a network that is slow, and that breaks at a given place.
//!
//! It tells control connections from data connections by the kind in their first 32 bytes, and reads the
//! control messages that pass, so that a test knows what was said.

use migration::message::Message;
use migration::preamble;
use migration::transport::{Proof, Secret};
use std::fmt;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// Bytes that a source opens a connection with: its preamble, and the proof that it has the session's secret.
/// A destination that has not got both on a control link takes the caller for nobody.
pub const OPENING: u64 = (preamble::LEN + size_of::<Proof>()) as u64;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plane {
    /// Control messages.
    Control,
    /// Guest memory.
    Data,
}

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the source to the destination.
    Up,
    /// From the destination to the source.
    Down,
}

/// How a connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// Both ends see it closed.
    Close,
    /// Nothing passes any more, and neither side is notified.
    Silence,
}

/// Where a connection breaks.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// How.
    pub how: Break,
    /// In connections of this kind.
    pub plane: Plane,
    /// By what has passed this way.
    pub way: Way,
    /// Bytes that still pass, over all such connections together.
    pub after: u64,
}

/// How the network behaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rules {
    /// Time that each piece of control traffic takes.
    pub control_delay: Duration,
    /// Time that each 64 KiB of guest memory take.
    pub data_delay: Duration,
    /// Where it breaks.
    pub cut: Option<Cut>,
    /// A control message at which it breaks, for both ends, instead of delivering it.
    pub cut_before: Option<(Way, &'static str)>,
}

struct Shared {
    target: SocketAddr,
    rules: Rules,
    /// Indexed by plane and way.
    passed: [[AtomicU64; 2]; 2],
    /// Way, name, and how many bytes of that plane and way had passed at its end.
    messages: Mutex<Vec<(Way, &'static str, u64)>>,
    closed: AtomicBool,
    streams: Mutex<Vec<TcpStream>>,
}

/// A relay to one receiver. Dropping it closes all its connections.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

impl Proxy {
    /// A relay to `target` on a free loopback port.
    pub fn start(target: SocketAddr, rules: Rules) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let shared = Arc::new(Shared {
            target,
            rules,
            passed: Default::default(),
            messages: Mutex::default(),
            closed: AtomicBool::new(false),
            streams: Mutex::default(),
        });
        let relaying = Arc::clone(&shared);
        let accepting = thread::spawn(move || {
            while let Ok((caller, _)) = listener.accept() {
                if relaying.closed.load(Ordering::Acquire) {
                    return;
                }
                let relaying = Arc::clone(&relaying);
                thread::spawn(move || relaying.relay(caller));
            }
        });
        Proxy { address, shared, accepting: Some(accepting) }
    }

    /// Where sources connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that were delivered.
    pub fn passed(&self, plane: Plane, way: Way) -> u64 {
        self.shared.passed[plane as usize][way as usize].load(Ordering::Acquire)
    }

    /// Whether a whole control message of this name was delivered.
    pub fn delivered(&self, way: Way, name: &str) -> bool {
        let messages = self.shared.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.iter().any(|message| (message.0, message.1) == (way, name))
    }

    /// Where each control message that was delivered ended, in bytes of its way.
    pub fn ends(&self, way: Way) -> Vec<u64> {
        let messages = self.shared.messages.lock().unwrap_or_else(PoisonError::into_inner);
        messages.iter().filter(|message| message.0 == way).map(|message| message.2).collect()
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let messages = self.shared.messages.lock().unwrap_or_else(PoisonError::into_inner);
        f.debug_list().entries(messages.iter().map(|message| (message.0, message.1))).finish()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.closed.store(true, Ordering::Release);
        // Wakes the accepting thread.
        let woken = TcpStream::connect(self.address);
        if let (Ok(_), Some(thread)) = (woken, self.accepting.take()) {
            let _ = thread.join();
        }
        for stream in self.shared.streams.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    /// Relays one connection. Whatever fails here is a closed connection to both ends.
    fn relay(self: Arc<Self>, mut caller: TcpStream) {
        let Ok(mut receiver) = TcpStream::connect(self.target) else { return };
        let _ = (caller.set_nodelay(true), receiver.set_nodelay(true));
        {
            let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
            streams.extend([&caller, &receiver].into_iter().filter_map(|s| s.try_clone().ok()));
        }
        let mut first = [0; preamble::LEN];
        if caller.read_exact(&mut first).is_err() {
            return;
        }
        let plane = if first[10] == 2 { Plane::Data } else { Plane::Control };
        let (Ok(mut back_from), Ok(mut back_to)) = (receiver.try_clone(), caller.try_clone()) else { return };
        let shared = Arc::clone(&self);
        thread::spawn(move || shared.pump(plane, Way::Down, &mut back_from, &mut back_to, &[]));
        self.pump(plane, Way::Up, &mut caller, &mut receiver, &first);
    }

    fn pump(&self, plane: Plane, way: Way, from: &mut TcpStream, to: &mut TcpStream, first: &[u8]) {
        // What opens the connection: preambles, the session's secret and its proof.
        let skip = match way {
            Way::Up => OPENING as usize,
            Way::Down => 2 * preamble::LEN + Secret::LEN,
        };
        let mut ear = Ear { skip, heard: Vec::new() };
        let mut buffer = vec![0; 64 << 10];
        buffer[..first.len()].copy_from_slice(first);
        let mut filled = first.len();
        loop {
            if filled > 0 {
                thread::sleep(match plane {
                    Plane::Control => self.rules.control_delay,
                    Plane::Data => self.rules.data_delay,
                });
            }
            let whole = self.deliver(plane, way, to, &buffer[..filled], &mut ear);
            if !whole {
                let silent = self.rules.cut.is_some_and(|cut| cut.how == Break::Silence);
                while silent && !self.closed.load(Ordering::Acquire) {
                    thread::sleep(Duration::from_millis(5));
                }
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                return;
            }
            match from.read(&mut buffer) {
                Ok(n) if n > 0 => filled = n,
                _ => {
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
            }
        }
    }

    /// Delivers what the rules let pass; false when that is not all, or nobody takes it.
    fn deliver(&self, plane: Plane, way: Way, to: &mut TcpStream, bytes: &[u8], ear: &mut Ear) -> bool {
        let counter = &self.passed[plane as usize][way as usize];
        let before = counter.fetch_add(bytes.len() as u64, Ordering::AcqRel);
        let allowed = match self.rules.cut {
            Some(cut) if cut.plane == plane && cut.way == way => {
                cut.after.saturating_sub(before).min(bytes.len() as u64) as usize
            }
            _ => bytes.len(),
        };
        if plane == Plane::Control {
            // Noted before it is delivered: whoever acts on a message finds it noted.
            let mut messages = self.messages.lock().unwrap_or_else(PoisonError::into_inner);
            let heard = ear.listen(&bytes[..allowed]);
            if heard.iter().any(|(name, _)| self.rules.cut_before == Some((way, name))) {
                return false;
            }
            let end = before + allowed as u64;
            messages.extend(heard.into_iter().map(|(name, pending)| (way, name, end - pending)));
        }
        to.write_all(&bytes[..allowed]).is_ok() && allowed == bytes.len()
    }
}

/// Understands the control messages in a stream of bytes.
struct Ear {
    skip: usize,
    heard: Vec<u8>,
}

impl Ear {
    /// The messages that these bytes complete, each with the number of bytes that followed it.
    fn listen(&mut self, bytes: &[u8]) -> Vec<(&'static str, u64)> {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        self.heard.extend_from_slice(&bytes[skipped..]);
        let mut names = Vec::new();
        while let Some((head, rest)) = self.heard.split_first_chunk::<4>() {
            let Some(frame) = rest.get(..u32::from_le_bytes(*head) as usize) else { break };
            let name = Message::decode(frame).map(|message| message.name());
            self.heard.drain(..4 + frame.len());
            names.extend(name.map(|name| (name, self.heard.len() as u64)));
        }
        names
    }
}
