//! A stream of the source: frames, barriers, and new keys in time.
//!
//! **Keys** are good for a number of records. A lane that has sent as many waits until all of it is in place,
//! ends its connection, and opens another one, whose handshake makes new keys. The destination lets it in
//! once it has seen the end of the first. So both ends may encrypt wherever they like; not every kernel can
//! change keys.

use super::send::{check_open, send_protected, send_through};
use super::{Interrupter, Way, not_opened, prepare};
use crate::channel::{Channel, SharedSocket};
use crate::frame::{self, Header, Kind, MAX_FRAME_EXTENTS, UNIT};
use crate::{cause, opening};
use migration::memory::{Extent, Ram};
use migration::transport::{Lane, LaneStats, PlaneError, Session};
use std::io::{self, Read};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

pub(super) struct TcpLane {
    channel: Channel,
    ram: Arc<Ram>,
    timeout: Duration,
    /// Header and table of the frame that is being sent.
    head: Vec<u8>,
    stats: LaneStats,
    interrupter: Arc<Interrupter>,
    /// If its keys are good for a time only.
    renewal: Option<Renewal>,
    /// Records that this connection has sent, or more.
    records: u64,
}

/// What a lane needs to begin anew.
pub(super) struct Renewal {
    pub way: Arc<Way>,
    pub session: Session,
    pub lane: u16,
}

/// Bytes of the largest record of TLS.
const RECORD_BYTES: u64 = 16 << 10;

/// The barrier behind which a connection ends. No round has this number, and nobody would mind.
const LAST_BARRIER: u32 = u32::MAX;

impl TcpLane {
    /// A lane on a channel that is open and prepared.
    pub fn new(
        channel: Channel,
        session: &Session,
        renewal: Option<Renewal>,
        interrupter: &Arc<Interrupter>,
    ) -> Self {
        TcpLane {
            stats: LaneStats::encrypted(channel.encryption()),
            channel,
            ram: Arc::clone(&session.ram),
            timeout: session.timeout,
            head: Vec::with_capacity(UNIT * (MAX_FRAME_EXTENTS + 1)),
            interrupter: Arc::clone(interrupter),
            renewal,
            records: 0,
        }
    }

    /// Begins anew if the keys have encrypted enough.
    fn renew_in_time(&mut self) -> Result<(), PlaneError> {
        let due = |renewal: &Renewal| self.records >= renewal.way.protection.records_per_key();
        if self.renewal.as_ref().is_some_and(due) { self.renew() } else { Ok(()) }
    }

    fn renew(&mut self) -> Result<(), PlaneError> {
        self.post_barrier(LAST_BARRIER)?;
        self.wait_barrier(LAST_BARRIER)?;
        let ended = self.channel.socket().shutdown(Shutdown::Write).and_then(|()| {
            // The destination ends it as well, once it would let the lane in again.
            match self.read_patiently(&mut [0]) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
                Err(error) => Err(error),
                Ok(()) => Err(io::ErrorKind::InvalidData.into()),
            }
        });
        ended.map_err(|error| self.error("ending a connection whose keys have done their part", error))?;
        let Some(Renewal { way, session, lane }) = &self.renewal else { return Ok(()) };
        let known = |stream: &SharedSocket| self.interrupter.replace(*lane, stream);
        let opened = opening::insist(|| way.open(*lane, session, known));
        let channel = opened.map_err(|error| {
            if self.interrupter.interrupted() { PlaneError::Interrupted } else { not_opened(error) }
        })?;
        prepare(&channel, self.timeout).map_err(|error| self.error("preparing a data connection", error))?;
        self.stats.encryption = channel.encryption();
        self.channel = channel;
        self.records = 0;
        Ok(())
    }

    fn error(&self, what: &'static str, source: io::Error) -> PlaneError {
        if self.interrupter.interrupted() {
            return PlaneError::Interrupted;
        }
        cause::of(self.channel.socket(), what, source, self.timeout)
    }

    /// Reads the destination's answer, which comes once it has everything that was sent before. The socket
    /// may hold megabytes of that, so on a slow line the answer may take long. A peer counts as silent only
    /// if it accepts nothing during the time that the stream waits.
    fn read_patiently(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        let mut unconfirmed = self.unconfirmed()?;
        let mut read = 0;
        while read < bytes.len() {
            match self.channel.read(&mut bytes[read..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => read += count,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    let left = self.unconfirmed()?;
                    if left >= unconfirmed {
                        return Err(e);
                    }
                    unconfirmed = left;
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Bytes that the peer's kernel has not confirmed.
    fn unconfirmed(&self) -> io::Result<u32> {
        cause::unconfirmed(self.channel.socket())
    }

    fn check(&self, extents: &[Extent]) -> Result<(), PlaneError> {
        for extent in extents {
            self.ram.check(extent)?;
            if !frame::fits(extent) {
                return Err(PlaneError::Protocol(format!("{extent:?} is not made of whole pages")));
            }
        }
        Ok(())
    }

    fn fill_head(&mut self, kind: Kind, extents: &[Extent], round: u32) {
        self.head.clear();
        self.head.extend_from_slice(&Header { kind, extents: extents.len() as u32, round }.encode());
        extents.iter().for_each(|extent| frame::put_extent(&mut self.head, extent));
        self.stats.requests += 1;
        // A record ends where an extent does. Some kernels also end one after each 64 KiB of a file; there is
        // room for that below the limit.
        let content = if kind == Kind::Write { extents } else { &[] };
        self.records += 1 + content.iter().map(|extent| 2 + extent.len / RECORD_BYTES).sum::<u64>();
    }

    /// Sends the head and then the extents' content.
    fn send_payload(&mut self, extents: &[Extent]) -> io::Result<()> {
        match &mut self.channel {
            Channel::Clear(socket) => send_through(socket, &self.head, &self.ram, extents),
            Channel::Protected(protected) if protected.in_kernel() => {
                send_through(protected.socket(), &self.head, &self.ram, extents)?;
                check_open(protected.socket())
            }
            Channel::Protected(protected) => {
                send_protected(protected.as_mut(), &self.head, &self.ram, extents)
            }
        }
    }
}

impl Lane for TcpLane {
    fn write(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        self.check(extents)?;
        for some in extents.chunks(MAX_FRAME_EXTENTS) {
            self.renew_in_time()?;
            self.fill_head(Kind::Write, some, 0);
            self.send_payload(some).map_err(|e| self.error("sending memory", e))?;
            self.stats.bytes += some.iter().map(|e| e.len).sum::<u64>();
        }
        Ok(())
    }

    fn zero(&mut self, extents: &[Extent]) -> Result<(), PlaneError> {
        self.check(extents)?;
        for some in extents.chunks(MAX_FRAME_EXTENTS) {
            self.renew_in_time()?;
            self.fill_head(Kind::Zero, some, 0);
            self.send_payload(&[]).map_err(|e| self.error("naming zero pages", e))?;
            self.stats.zero_bytes += some.iter().map(|e| e.len).sum::<u64>();
        }
        Ok(())
    }

    fn post_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        self.fill_head(Kind::Barrier, &[], round);
        self.send_payload(&[]).map_err(|e| self.error("sending a barrier", e))
    }

    fn wait_barrier(&mut self, round: u32) -> Result<(), PlaneError> {
        let mut bytes = [0; UNIT];
        let read = self.read_patiently(&mut bytes);
        read.map_err(|e| self.error("waiting for a barrier's confirmation", e))?;
        match Header::decode(&bytes) {
            Ok(Header { kind: Kind::Barrier, round: confirmed, .. }) if confirmed == round => Ok(()),
            other => Err(PlaneError::Protocol(format!("barrier {round} was answered with {other:?}"))),
        }
    }

    fn stats(&self) -> LaneStats {
        self.stats.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream;
    use migration::conformance::bed::ram_of;
    use migration::memory::PAGE_SIZE;
    use socket2::{SockRef, Socket};
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    const PATIENCE: Duration = Duration::from_secs(1);

    /// Bytes that are on their way when the barrier is waited for.
    const BYTES: usize = 2 << 20;

    /// A lane through this socket, of a guest with 256 pages.
    fn lane(stream: Socket) -> TcpLane {
        TcpLane {
            channel: Channel::Clear(stream.into()),
            ram: ram_of(&[256]),
            timeout: PATIENCE,
            head: Vec::new(),
            stats: LaneStats::default(),
            interrupter: Arc::default(),
            renewal: None,
            records: 0,
        }
    }

    /// A lane with a long queue to a peer that takes a few KiB at a time, until it has taken `takes` bytes.
    fn lane_to_slow_peer(takes: usize) -> (TcpLane, thread::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // What the peer's kernel takes for it is little, too.
        SockRef::from(&listener).set_recv_buffer_size(64 << 10).unwrap();
        let stream = Socket::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        stream.set_send_buffer_size(4 * BYTES).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        let peer = thread::spawn(move || {
            let mut some = [0; 64 << 10];
            let mut taken = 0;
            while taken < takes {
                taken += peer.read(&mut some).unwrap();
                thread::sleep(Duration::from_millis(100));
            }
            if takes == BYTES {
                let barrier = Header { kind: Kind::Barrier, extents: 0, round: 7 };
                peer.write_all(&barrier.encode()).unwrap();
            }
            // Open until the other side closes.
            while peer.read(&mut some).is_ok_and(|count| count > 0) {
                thread::sleep(4 * PATIENCE);
            }
        });
        (lane(stream), peer)
    }

    #[test]
    fn a_peer_that_is_slow_is_not_silent() {
        let (mut lane, peer) = lane_to_slow_peer(BYTES);
        lane.channel.write_all(&vec![0; BYTES]).unwrap();
        lane.wait_barrier(7).unwrap();
        drop(lane);
        peer.join().unwrap();
    }

    #[test]
    fn a_peer_that_takes_nothing_is_silent() {
        let (mut lane, _peer) = lane_to_slow_peer(BYTES / 8);
        lane.channel.write_all(&vec![0; BYTES]).unwrap();
        let error = lane.wait_barrier(7).unwrap_err();
        assert!(matches!(error, PlaneError::Stalled { patience: PATIENCE, .. }), "{error}");
    }

    /// What a lane says that writes until it cannot, to a peer of which `fate` has decided.
    fn writes_to(fate: impl FnOnce(TcpStream)) -> PlaneError {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = Socket::from(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        stream::prepare(&stream, PATIENCE).unwrap();
        let (peer, _) = listener.accept().unwrap();
        let mut lane = lane(stream);
        let all = [Extent { region: 0, offset: 0, len: 256 * PAGE_SIZE }];
        lane.write(&all).unwrap();
        fate(peer);
        loop {
            if let Err(error) = lane.write(&all) {
                return error;
            }
        }
    }

    #[test]
    fn a_peer_that_ends_is_told_from_one_that_stands_still() {
        let ended = writes_to(drop);
        assert!(matches!(ended, PlaneError::Closed(_) | PlaneError::Reset(_)), "{ended}");
        let mut kept = None;
        let stopped = writes_to(|peer| kept = Some(peer));
        assert!(matches!(stopped, PlaneError::Stalled { .. }), "{stopped}");
    }
}
