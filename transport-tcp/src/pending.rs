//! Callers that have not yet shown who they are.
//!
//! Each costs a descriptor, a thread and a few seconds, and anybody can call. So their number is bounded, for
//! each address and in all. Whoever is one too many takes the place of the oldest, who has had the most time:
//! a caller that says nothing cannot keep a place that another needs.

use crate::channel::SharedSocket;
use std::collections::VecDeque;
use std::net::{IpAddr, Shutdown};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most of them at once.
const MOST: usize = 256;

/// Most of them from one address, or one network of 64 bits.
const MOST_PER_ADDRESS: usize = 64;

/// Most threads that serve them. Some have lost their places and are about to end.
const MOST_THREADS: usize = 2 * MOST;

/// The callers, the oldest first.
#[derive(Default)]
pub(crate) struct Pending(Mutex<Callers>);

#[derive(Default)]
struct Callers {
    places: VecDeque<Caller>,
    /// Of those that have lost their places as well.
    threads: usize,
    next: u64,
}

struct Caller {
    number: u64,
    network: IpAddr,
    socket: SharedSocket,
}

/// A caller's place, until it is dropped.
pub(crate) struct Place {
    pending: Arc<Pending>,
    number: u64,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, Callers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a caller a place, and takes that of another if there is none left. `None` if those that have
    /// lost theirs do not go.
    pub(crate) fn enter(self: &Arc<Self>, from: IpAddr, socket: &SharedSocket) -> Option<Place> {
        let network = network(from);
        let mut callers = self.lock();
        if callers.threads >= MOST_THREADS {
            return None;
        }
        let same = |caller: &Caller| caller.network == network;
        let too_many = callers.places.iter().filter(|caller| same(caller)).count() >= MOST_PER_ADDRESS;
        let oldest = match (too_many, callers.places.len() >= MOST) {
            (true, _) => callers.places.iter().position(same),
            (false, true) => Some(0),
            (false, false) => None,
        };
        if let Some(oldest) = oldest.and_then(|oldest| callers.places.remove(oldest)) {
            // Its thread notices at once. A connection that is down already needs no more.
            let _ = oldest.socket.shutdown(Shutdown::Both);
        }
        let number = callers.next;
        callers.next += 1;
        callers.threads += 1;
        callers.places.push_back(Caller { number, network, socket: socket.clone() });
        Some(Place { pending: Arc::clone(self), number })
    }
}

impl Place {
    /// The caller has shown who it is. Whether it had its place until then.
    pub(crate) fn leave(&self) -> bool {
        let mut callers = self.pending.lock();
        let at = callers.places.iter().position(|caller| caller.number == self.number);
        at.and_then(|at| callers.places.remove(at)).is_some()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
        self.pending.lock().threads -= 1;
    }
}

/// What counts as one address: whoever has an IPv6 address usually has a network of 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((v6.to_bits() >> 64 << 64).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Socket, Type};
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    fn socket() -> (SharedSocket, UnixStream) {
        let (ours, theirs) = Socket::pair(Domain::UNIX, Type::STREAM, None).unwrap();
        (ours.into(), std::os::fd::OwnedFd::from(theirs).into())
    }

    fn is_open(caller: &UnixStream) -> bool {
        caller.set_nonblocking(true).unwrap();
        (&*caller).read(&mut [0]).is_err_and(|e| e.kind() == std::io::ErrorKind::WouldBlock)
    }

    #[test]
    fn one_address_has_room_for_some_and_its_own_oldest_goes() {
        let pending = Arc::new(Pending::default());
        let enter = |from: &str| {
            let (socket, theirs) = socket();
            (pending.enter(from.parse().unwrap(), &socket).unwrap(), theirs)
        };
        let honest = enter("10.0.0.1");
        let hostile: Vec<_> = (0..=MOST_PER_ADDRESS).map(|_| enter("10.0.0.2")).collect();
        assert!(is_open(&honest.1) && !is_open(&hostile[0].1));
        assert!(hostile[1..].iter().all(|(_, caller)| is_open(caller)));
        assert!(honest.0.leave() && !hostile[0].0.leave());
        // A network of 64 bits is one address.
        let neighbours: Vec<_> = (0..=MOST_PER_ADDRESS).map(|n| enter(&format!("fd00::{n:x}"))).collect();
        assert!(!is_open(&neighbours[0].1) && is_open(&neighbours[1].1));
    }

    #[test]
    fn the_oldest_of_all_goes_when_there_is_no_room() {
        let pending = Arc::new(Pending::default());
        let mut callers = Vec::new();
        for number in 0..=MOST {
            let (socket, theirs) = socket();
            let from = IpAddr::from([10, 0, 1, (number % 250) as u8]);
            callers.push((pending.enter(from, &socket).unwrap(), theirs));
        }
        assert!(!is_open(&callers[0].1) && callers[1..].iter().all(|(_, caller)| is_open(caller)));
        // Those whose threads do not end are bounded, too.
        while let Some(place) = pending.enter([10, 0, 2, 1].into(), &socket().0) {
            callers.push((place, socket().1));
        }
        assert_eq!(callers.len(), MOST_THREADS);
        callers.clear();
        assert!(pending.lock().places.is_empty() && pending.lock().threads == 0);
    }
}
