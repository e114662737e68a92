//! The destination's streams: one thread each, which places what arrives straight into guest RAM.

use crate::frame::{self, Header, Kind, MAX_EXTENTS, UNIT};
use crate::listener::{Listener, Shared};
use crate::place::{Placer, Turns};
use migration::memory::{Extent, Ram};
use migration::preamble::{Preamble, Status};
use migration::report::thread_cpu;
use migration::scan;
use migration::transport::{DestinationPlane, DestinationTransport, MAX_LANES, PlaneError, Session};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// TCP through the port on which the control link was accepted.
pub struct TcpDestination {
    listener: Arc<Shared>,
}

impl TcpDestination {
    /// Takes data connections from `listener`.
    pub fn new(listener: &Listener) -> Self {
        TcpDestination { listener: Arc::clone(listener.shared()) }
    }
}

impl DestinationTransport for TcpDestination {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn offer(&mut self, session: &Session) -> Result<(Vec<u8>, Box<dyn DestinationPlane>), PlaneError> {
        let plane = Arc::new(Plane {
            session: session.clone(),
            turns: Turns::new(&session.ram),
            streams: Mutex::default(),
            placed: AtomicU64::new(0),
            cpu_us: AtomicU64::new(0),
            error: Mutex::default(),
        });
        if !self.listener.register(session.token, Arc::clone(&plane)) {
            return Err(PlaneError::Unavailable("this session has been offered before".into()));
        }
        let served = Served { plane, listener: Arc::clone(&self.listener) };
        // Nothing to tell: data goes where the control link went.
        Ok((Vec::new(), Box::new(served)))
    }
}

#[derive(Default)]
struct Streams {
    fenced: bool,
    lanes: Vec<(u16, TcpStream)>,
    threads: Vec<JoinHandle<()>>,
}

/// A session's receiving end; the listener hands it its connections.
pub(crate) struct Plane {
    session: Session,
    turns: Turns,
    streams: Mutex<Streams>,
    placed: AtomicU64,
    cpu_us: AtomicU64,
    error: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Plane {
    /// Takes a connection that presented this session's token.
    pub(crate) fn join(self: Arc<Self>, mut stream: TcpStream, preamble: Preamble) -> io::Result<()> {
        let mut streams = lock(&self.streams);
        let known = streams.lanes.iter().any(|(lane, _)| *lane == preamble.lane);
        if streams.fenced || known || streams.lanes.len() >= MAX_LANES || preamble.lane >= preamble.lanes {
            drop(streams);
            return stream.write_all(&preamble.answer(Status::Session).encode());
        }
        stream.set_read_timeout(None)?;
        stream.write_all(&preamble.answer(Status::Ok).encode())?;
        let handle = stream.try_clone()?;
        let plane = Arc::clone(&self);
        let name = format!("receive-{}", preamble.lane);
        let thread = thread::Builder::new().name(name).spawn(move || plane.serve(stream))?;
        streams.lanes.push((preamble.lane, handle));
        streams.threads.push(thread);
        Ok(())
    }

    fn serve(&self, stream: TcpStream) {
        let mut receiver =
            Receiver { plane: self, stream, table: Vec::new(), extents: Vec::new(), placer: Placer::new() };
        let result = receiver.run();
        self.cpu_us.fetch_add(thread_cpu().all.as_micros() as u64, Ordering::Relaxed);
        let fenced = lock(&self.streams).fenced;
        if let Err(error) = result
            && !fenced
        {
            // The source must not go on writing to a lane that nobody reads.
            let _ = receiver.stream.shutdown(Shutdown::Both);
            lock(&self.error).get_or_insert(error.to_string());
        }
    }
}

/// The plane as the engine has it.
struct Served {
    plane: Arc<Plane>,
    listener: Arc<Shared>,
}

impl DestinationPlane for Served {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn fence(&mut self) -> Result<(), PlaneError> {
        // No new connection from here on, the old ones are shut down, and whoever was placing
        // bytes has ended when `join` returns.
        self.listener.unregister(self.plane.session.token);
        let threads = {
            let mut streams = lock(&self.plane.streams);
            streams.fenced = true;
            for (_, stream) in streams.lanes.drain(..) {
                // Fails only for a connection that is down already.
                let _ = stream.shutdown(Shutdown::Both);
            }
            std::mem::take(&mut streams.threads)
        };
        for thread in threads {
            if thread.join().is_err() {
                return Err(PlaneError::Protocol("a receiving thread panicked".into()));
            }
        }
        Ok(())
    }

    fn bytes_placed(&self) -> u64 {
        self.plane.placed.load(Ordering::Relaxed)
    }

    fn cpu_us(&self) -> u64 {
        self.plane.cpu_us.load(Ordering::Relaxed)
    }

    fn error(&self) -> Option<String> {
        lock(&self.plane.error).clone()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // A thread's panic has been reported by its own message.
        let _ = self.fence();
    }
}

/// One stream's receiving thread.
struct Receiver<'a> {
    plane: &'a Plane,
    stream: TcpStream,
    table: Vec<u8>,
    extents: Vec<Extent>,
    placer: Placer,
}

impl Receiver<'_> {
    /// Serves frames until the stream ends.
    fn run(&mut self) -> Result<(), PlaneError> {
        let broken = |source| PlaneError::Io { what: "receiving memory", source };
        loop {
            let mut head = [0; UNIT];
            match self.stream.read_exact(&mut head) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                Err(e) => return Err(broken(e)),
            }
            let header = Header::decode(&head).map_err(|e| PlaneError::Protocol(e.to_string()))?;
            self.read_table(header.extents as usize)?;
            match header.kind {
                Kind::Write => {
                    let Plane { session, turns, .. } = self.plane;
                    self.placer.place(&self.stream, &session.ram, turns, &self.extents).map_err(broken)?;
                    let bytes = self.extents.iter().map(|e| e.len).sum();
                    self.plane.placed.fetch_add(bytes, Ordering::Relaxed);
                }
                Kind::Zero => {
                    self.extents.iter().for_each(|extent| clear(&self.plane.session.ram, extent));
                    // Named pages are a sign of life as much as sent ones.
                    self.plane.placed.fetch_add(self.extents.len() as u64, Ordering::Relaxed);
                }
                Kind::Barrier => self.stream.write_all(&header.encode()).map_err(broken)?,
            }
        }
    }

    /// Reads a table of extents and checks each before anything is touched.
    fn read_table(&mut self, extents: usize) -> Result<(), PlaneError> {
        debug_assert!(extents <= MAX_EXTENTS, "the header's bound");
        self.table.resize(extents * UNIT, 0);
        self.stream
            .read_exact(&mut self.table)
            .map_err(|source| PlaneError::Io { what: "receiving a table of extents", source })?;
        self.extents.clear();
        let (entries, _) = self.table.as_chunks::<UNIT>();
        for entry in entries {
            let extent = frame::get_extent(entry);
            self.plane.session.ram.check(&extent)?;
            self.extents.push(extent);
        }
        Ok(())
    }
}

/// Makes a checked extent read as zeros. Pages that do not exist already do, and are not made to exist.
fn clear(ram: &Ram, extent: &Extent) {
    let Ok(region) = ram.check(extent) else { return };
    let page = migration::memory::PAGE_SIZE;
    scan::existing(region, extent.offset / page, extent.len / page, |first, pages| {
        let address = region.address().wrapping_add((first * page) as usize);
        // SAFETY: `existing` reports only pages of the extent, which lies inside the region's
        // mapping; the guest does not run here yet, and no reference to its memory exists.
        unsafe { std::ptr::write_bytes(address, 0, (pages * page) as usize) };
    });
}
