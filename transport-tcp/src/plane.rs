//! A session's receiving end: one thread for each stream, which places what arrives straight into guest RAM.

use crate::channel::{Channel, Protection, SharedSocket};
use crate::frame::{self, Header, Kind, MAX_FRAME_EXTENTS, UNIT};
use crate::place::{Placer, Turns};
use crate::stream::{self, Stream};
use crate::streams::{Shut, Streams};
use crate::{Error, copy, opening};
use migration::cpu::thread_cpu;
use migration::memory::Extent;
use migration::preamble::{self, Preamble, Status};
use migration::scan;
use migration::transport::{Coverage, LaneEncryption, PlaneError, Session, Token};
use socket2::Socket;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What the streams of one session write to.
pub(crate) struct Plane {
    session: Session,
    turns: Turns,
    streams: Streams<SharedSocket>,
    placed: AtomicU64,
    coverage: Coverage,
    cpu_us: AtomicU64,
    error: Mutex<Option<String>>,
}

/// Whether a stream is to carry memory.
fn is_data(preamble: &Preamble) -> bool {
    preamble.kind == preamble::Kind::Data
}

impl Shut for SharedSocket {
    fn shut(&self) {
        // Fails only for a connection that is down already.
        let _ = self.shutdown(Shutdown::Both);
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Plane {
    pub(crate) fn new(session: &Session) -> Self {
        Plane {
            session: session.clone(),
            turns: Turns::new(&session.ram),
            streams: Streams::new(),
            placed: AtomicU64::new(0),
            coverage: Coverage::new(&session.ram),
            cpu_us: AtomicU64::new(0),
            error: Mutex::default(),
        }
    }

    pub(crate) fn token(&self) -> Token {
        self.session.token
    }

    /// Takes a stream whose `preamble` names this session and has been answered, if it proves before the
    /// deadline that it is a lane.
    pub(crate) fn join(
        self: &Arc<Self>,
        mut channel: Channel,
        preamble: &Preamble,
        deadline: Option<Instant>,
    ) -> Result<(), Error> {
        if !opening::is_proved(&mut channel, preamble, &self.session.secret, deadline)? {
            return Err(Error::Unproved);
        }
        let mut streams = self.streams.lock();
        let admitted = is_data(preamble) && streams.admit(preamble.lane, preamble.lanes);
        let status = if admitted { Status::Ok } else { Status::Session };
        let answered = channel.set_read_timeout(None).and_then(|()| {
            opening::answer(&mut channel, preamble, status)?;
            if !admitted {
                return Ok(());
            }
            let (plane, handle) = (Arc::clone(self), channel.socket().clone());
            let (name, lane) = (format!("receive-{}", preamble.lane), preamble.lane);
            streams.start(name, Some(lane), handle, move || plane.serve(channel, lane))
        });
        answered.map_err(Error::NoPreamble)
    }

    /// Takes a stream whose preamble is still to come. It is waited for until the fence.
    pub(crate) fn expect(self: &Arc<Self>, stream: Socket) -> io::Result<()> {
        let mut channel = Channel::Clear(stream.into());
        let (plane, handle) = (Arc::clone(self), channel.socket().clone());
        self.streams.lock().start("receive".into(), None, handle, move || {
            // A peer that goes away before it has begun is no failure of this side.
            match plane.let_in(&mut channel) {
                Ok(Some(lane)) => plane.serve(channel, lane),
                _ => channel.socket().shut(),
            }
        })
    }

    /// Opens a stream, and tells which lane of this session it is.
    fn let_in(&self, channel: &mut Channel) -> Result<Option<u16>, Error> {
        let preamble = stream::hear(channel, None)?;
        if preamble.token != self.session.token {
            opening::answer(channel, &preamble, Status::Session).map_err(Error::NoPreamble)?;
            return Ok(None);
        }
        opening::agree(channel, &preamble, &Protection::none())?;
        let proved = opening::is_proved(channel, &preamble, &self.session.secret, None)?;
        let admitted =
            proved && is_data(&preamble) && self.streams.lock().admit(preamble.lane, preamble.lanes);
        if proved {
            let status = if admitted { Status::Ok } else { Status::Session };
            opening::answer(channel, &preamble, status).map_err(Error::NoPreamble)?;
        }
        Ok(admitted.then_some(preamble.lane))
    }

    fn serve(&self, channel: Channel, lane: u16) {
        let placer = Placer::new(channel.encryption() == LaneEncryption::TlsInKernel);
        let mut receiver = Receiver { plane: self, channel, table: Vec::new(), extents: Vec::new(), placer };
        let result = receiver.run();
        self.cpu_us.fetch_add(thread_cpu().all.as_micros() as u64, Ordering::Relaxed);
        if self.streams.over() {
            return;
        }
        match result {
            Err(error) => {
                // The source must not go on writing to a lane that nobody reads.
                receiver.channel.socket().shut();
                lock(&self.error).get_or_insert(error.to_string());
            }
            // Only of a protected one it is certain that the source has ended it, and begins the next.
            Ok(()) if receiver.channel.peer().is_some() => {
                self.streams.lock().leave(lane);
                receiver.channel.socket().shut();
            }
            Ok(()) => {}
        }
    }

    /// Lets no stream in any more, shuts down those that there are, and waits for their threads: whoever was
    /// placing bytes has then ended.
    pub(crate) fn fence(&self) -> Result<(), PlaneError> {
        let panicked = |()| PlaneError::Protocol("a receiving thread panicked".into());
        self.streams.fence().map_err(panicked)
    }

    pub(crate) fn bytes_placed(&self) -> u64 {
        self.placed.load(Ordering::Relaxed)
    }

    pub(crate) fn newly_covered(&self) -> u64 {
        self.coverage.take()
    }

    pub(crate) fn cpu_us(&self) -> u64 {
        self.cpu_us.load(Ordering::Relaxed)
    }

    pub(crate) fn error(&self) -> Option<String> {
        lock(&self.error).clone()
    }
}

/// One stream's receiving thread.
struct Receiver<'a> {
    plane: &'a Plane,
    channel: Channel,
    table: Vec<u8>,
    extents: Vec<Extent>,
    placer: Placer,
}

impl Receiver<'_> {
    /// Serves frames until the stream ends.
    fn run(&mut self) -> Result<(), PlaneError> {
        let broken = |source| PlaneError::Io { what: "receiving memory", source };
        loop {
            if self.plane.streams.over() {
                return Ok(());
            }
            let mut head = [0; UNIT];
            match self.channel.read_exact(&mut head) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(e) => return Err(broken(e)),
            }
            let header = Header::decode(&head).map_err(|e| PlaneError::Protocol(e.to_string()))?;
            self.read_table(header.extents as usize)?;
            match header.kind {
                Kind::Write => {
                    let Plane { session, turns, .. } = self.plane;
                    let (placer, ram, extents) = (&mut self.placer, &session.ram, &self.extents);
                    let placed = match &mut self.channel {
                        Channel::Clear(socket) => placer.place(socket, ram, turns, extents),
                        Channel::Protected(protected) => match protected.decrypted() {
                            Some(decrypted) => copy::place(decrypted, ram, turns, extents),
                            None => {
                                let placed = placer.place(protected.socket(), ram, turns, extents);
                                placed.map_err(|error| protected.explain(error))
                            }
                        },
                    };
                    placed.map_err(broken)?;
                    let bytes = self.extents.iter().map(|e| e.len).sum();
                    self.cover();
                    self.plane.placed.fetch_add(bytes, Ordering::Relaxed);
                }
                Kind::Zero => {
                    for extent in &self.extents {
                        let over = || self.plane.streams.over();
                        // SAFETY: the guest does not run here yet, and no reference to its memory exists.
                        unsafe { scan::clear(&self.plane.session.ram, extent, over) };
                    }
                    self.cover();
                    // Named pages are a sign of life as much as sent ones.
                    self.plane.placed.fetch_add(self.extents.len() as u64, Ordering::Relaxed);
                }
                Kind::Barrier => {
                    let answered = self.channel.write_all(&header.encode());
                    answered.and_then(|()| self.channel.flush()).map_err(broken)?;
                }
            }
        }
    }

    /// The extents of this frame are in place.
    fn cover(&self) {
        self.extents.iter().for_each(|extent| self.plane.coverage.mark(extent));
    }

    /// Reads a table of extents and checks each before anything is touched. Extents that overlap are refused:
    /// a short frame could name all memory thousands of times.
    fn read_table(&mut self, extents: usize) -> Result<(), PlaneError> {
        debug_assert!(extents <= MAX_FRAME_EXTENTS, "the header's bound");
        self.table.resize(extents * UNIT, 0);
        self.channel
            .read_exact(&mut self.table)
            .map_err(|source| PlaneError::Io { what: "receiving a table of extents", source })?;
        self.extents.clear();
        let (entries, _) = self.table.as_chunks::<UNIT>();
        for entry in entries {
            let extent = frame::get_extent(entry);
            self.plane.session.ram.check(&extent)?;
            self.extents.push(extent);
        }
        if overlap(&self.extents) {
            return Err(PlaneError::Protocol("extents of one frame overlap".into()));
        }
        Ok(())
    }
}

/// Whether any of the extents overlap. Their order is free, but the engine's is that of their addresses,
/// which costs one pass.
fn overlap(extents: &[Extent]) -> bool {
    let meet = |pair: &[Extent]| {
        let [one, next] = pair else { return false };
        (one.region, one.offset + one.len) > (next.region, next.offset)
    };
    if !extents.windows(2).any(meet) {
        return false;
    }
    let mut sorted = extents.to_vec();
    sorted.sort_unstable_by_key(|extent| (extent.region, extent.offset));
    sorted.windows(2).any(meet)
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::conformance::bed::ram_of;
    use migration::memory::PAGE_SIZE;
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    fn extent(first_page: u64, pages: u64) -> Extent {
        Extent { region: 0, offset: first_page * PAGE_SIZE, len: pages * PAGE_SIZE }
    }

    /// Whether a session goes on that is sent one frame which names these extents as zero; if not, why.
    fn named(extents: &[Extent]) -> Result<(), String> {
        let token = Token([7; 16]);
        let plane = Arc::new(Plane::new(&Session::new(token, ram_of(&[64]), Duration::from_secs(5))));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut source = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let stream = Socket::from(listener.accept().unwrap().0);
        let preamble = Preamble::data(token, 0, 1);
        source.write_all(&plane.session.secret.proof(&preamble.encode())).unwrap();
        plane.join(Channel::Clear(stream.into()), &preamble, None).unwrap();
        source.read_exact(&mut [0; preamble::LEN]).unwrap();
        let mut frame =
            Header { kind: Kind::Zero, extents: extents.len() as u32, round: 0 }.encode().to_vec();
        extents.iter().for_each(|extent| frame::put_extent(&mut frame, extent));
        let barrier = Header { kind: Kind::Barrier, extents: 0, round: 1 };
        frame.extend_from_slice(&barrier.encode());
        source.write_all(&frame).unwrap();
        let confirmed = source.read_exact(&mut [0; UNIT]);
        plane.fence().unwrap();
        confirmed.map_err(|_| plane.error().unwrap_or_default())
    }

    #[test]
    fn a_frame_names_each_page_once_and_at_least_one() {
        named(&[extent(0, 8), extent(8, 1), extent(20, 44)]).unwrap();
        named(&[extent(20, 44), extent(8, 1), extent(0, 8)]).unwrap();
        assert!(named(&[extent(0, 64); 4096]).unwrap_err().contains("overlap"));
        assert!(named(&[extent(20, 1), extent(0, 2), extent(1, 1)]).unwrap_err().contains("overlap"));
        assert!(named(&[extent(3, 0)]).is_err());
    }
}
