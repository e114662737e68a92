//! A session's streams: who is let in, the thread of each, and how all are shut out at once.

use migration::transport::MAX_LANES;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// A handle to a stream, as far as shutting it out is concerned.
pub(crate) trait Shut: Send + 'static {
    /// Ends what waits for the stream, now and later.
    fn shut(&self);
}

/// The streams of one session.
pub(crate) struct Streams<S> {
    inner: Mutex<Inner<S>>,
    /// Set by the fence: what is being placed need not be finished.
    over: AtomicBool,
}

pub(crate) struct Inner<S> {
    fenced: bool,
    /// Numbers of the lanes that have been let in.
    lanes: Vec<u16>,
    /// How many lanes there are to be, as the first of them has said.
    announced: Option<u16>,
    /// Of all streams, also those that have not said yet which lane they are.
    handles: Vec<(Option<u16>, S)>,
    threads: Vec<(Option<u16>, JoinHandle<()>)>,
    /// The thread of a stream that was replaced did.
    panicked: bool,
}

impl<S: Shut> Inner<S> {
    /// Whether a stream that has proved to be of this session is let in as number `lane` of `lanes`, which is
    /// then no longer missing.
    pub(crate) fn admit(&mut self, lane: u16, lanes: u16) -> bool {
        let announced = *self.announced.get_or_insert(lanes);
        let right = lanes == announced && lane < lanes;
        if self.fenced || !right || self.lanes.contains(&lane) || self.lanes.len() >= MAX_LANES {
            return false;
        }
        self.lanes.push(lane);
        true
    }

    /// A lane's stream has ended in good order: another one may be let in as this lane. What is left for the
    /// thread to do needs no lock.
    pub(crate) fn leave(&mut self, lane: u16) {
        self.lanes.retain(|other| *other != lane);
        self.handles.retain(|(other, _)| *other != Some(lane));
    }

    /// Has a thread of its own do `work` with the stream of this handle, which is that of a lane if it is
    /// known already which one.
    pub(crate) fn start(
        &mut self,
        name: String,
        lane: Option<u16>,
        handle: S,
        work: impl FnOnce() + Send + 'static,
    ) -> io::Result<()> {
        let left = |(other, _): &mut (Option<u16>, _)| lane.is_some() && *other == lane;
        for (_, thread) in self.threads.extract_if(.., left) {
            self.panicked |= thread.join().is_err();
        }
        let thread = thread::Builder::new().name(name).spawn(work)?;
        self.handles.push((lane, handle));
        self.threads.push((lane, thread));
        Ok(())
    }
}

impl<S: Shut> Streams<S> {
    /// None yet.
    pub(crate) fn new() -> Self {
        let inner = Inner {
            fenced: false,
            lanes: Vec::new(),
            announced: None,
            handles: Vec::new(),
            threads: Vec::new(),
            panicked: false,
        };
        Streams { inner: Mutex::new(inner), over: AtomicBool::new(false) }
    }

    /// All of them. Whoever lets one in holds this until its thread has been started, so that the fence finds
    /// it.
    pub(crate) fn lock(&self) -> MutexGuard<'_, Inner<S>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the session is over.
    pub(crate) fn over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Lets no stream in any more, shuts down those that there are, and waits for their threads.
    ///
    /// # Errors
    /// If one of them panicked.
    pub(crate) fn fence(&self) -> Result<(), ()> {
        let (threads, panicked) = {
            let mut inner = self.lock();
            inner.fenced = true;
            self.over.store(true, Ordering::Release);
            inner.handles.drain(..).for_each(|(_, stream)| stream.shut());
            (std::mem::take(&mut inner.threads), inner.panicked)
        };
        // All of them, also if one has panicked.
        let ended: Vec<_> = threads.into_iter().map(|(_, thread)| thread.join()).collect();
        if panicked || ended.iter().any(Result::is_err) { Err(()) } else { Ok(()) }
    }
}
