//! A machine that is nothing but memory, and its way over TCP to a twin in the same process.

#![allow(dead_code, unreachable_pub)] // each test program uses its own part of this module

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;
use transport_tcp::{Call, Listener, TcpDestination, TcpSource, connect_control};
use whimbrel_migration::destination::{self, Arrival};
use whimbrel_migration::dirty::DirtySet;
use whimbrel_migration::link::ControlLink;
use whimbrel_migration::machine::{Arbiter, DestinationHost, DestinationMachine, SourceMachine};
use whimbrel_migration::memory::{PAGE_SIZE, Ram, RamOwner, RegionLayout};
use whimbrel_migration::report::Report;
use whimbrel_migration::source;
use whimbrel_migration::transport::Token;
use whimbrel_migration::{Failure, scan};

/// Two regions, neither a multiple of 64 pages.
pub const LAYOUT: [RegionLayout; 2] = [
    RegionLayout { guest_address: 0, len: 1003 * PAGE_SIZE },
    RegionLayout { guest_address: 1 << 32, len: 67 * PAGE_SIZE },
];

const PATIENCE: Duration = Duration::from_secs(20);

/// What was called, in order.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<&'static str>>>, Option<&'static str>);

impl Log {
    /// A log for a machine that panics in this call.
    pub fn that_panics(call: &'static str) -> Self {
        Log(Arc::default(), Some(call))
    }

    pub fn note(&self, call: &'static str) {
        let mut calls = self.calls();
        // Rounds come as often as they come.
        if calls.last() != Some(&call) {
            calls.push(call);
        }
        drop(calls);
        assert!(self.1 != Some(call), "this machine panics in {call}");
    }

    pub fn calls(&self) -> MutexGuard<'_, Vec<&'static str>> {
        self.0.lock().unwrap()
    }
}

/// Locks that nobody else wants.
pub struct Locks {
    pub decides: bool,
    log: Log,
}

impl Arbiter for Locks {
    fn decides(&self) -> bool {
        self.decides
    }

    fn release(&self) -> Result<(), Failure> {
        self.log.note("release");
        Ok(())
    }

    fn take(&self) -> Result<(), Failure> {
        self.log.note("take");
        Ok(())
    }
}

/// Which pages were written, in a bitmap that is cleared when it is collected.
pub struct Marks(Vec<Vec<AtomicU64>>);

impl Marks {
    fn new(ram: &Ram) -> Self {
        let words = |pages: u64| (0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Marks(ram.regions().iter().map(|region| words(region.pages())).collect())
    }

    pub fn mark(&self, region: usize, page: u64) {
        self.0[region][(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
    }

    fn collect(&self, set: &mut DirtySet) {
        for (region, words) in self.0.iter().enumerate() {
            for (out, word) in set.words_mut(region).iter_mut().zip(words) {
                *out |= word.swap(0, Ordering::Acquire);
            }
        }
    }
}

/// A machine that moves away.
pub struct Source {
    pub ram: RamOwner,
    pub marks: Marks,
    pub state: Vec<u8>,
    /// A page that saving writes to, as a kernel does that shares it with the guest.
    pub saving_writes: Option<(usize, u64)>,
    /// Pages that something writes to when all has been collected, unmarked.
    pub late_writes: Vec<(usize, u64)>,
    pub locks: Option<Locks>,
    pub log: Log,
    /// Held by whoever writes to the memory, and by a paused machine.
    pub writing: Mutex<()>,
    pub paused: AtomicBool,
    /// Called when tracking starts.
    pub begins: Box<dyn Fn() + Send + Sync>,
}

impl Source {
    pub fn new() -> Self {
        let ram = RamOwner::new(Ram::allocate(&LAYOUT).unwrap());
        Source {
            marks: Marks::new(&ram),
            ram,
            state: vec![7; 100],
            saving_writes: None,
            late_writes: Vec::new(),
            locks: None,
            log: Log::default(),
            writing: Mutex::new(()),
            paused: AtomicBool::new(false),
            begins: Box::new(|| {}),
        }
    }

    pub fn with_locks(decides: bool) -> Self {
        let log = Log::default();
        Source { locks: Some(Locks { decides, log: log.clone() }), log, ..Source::new() }
    }

    /// Writes to a page, and marks it afterwards. `false` when the machine is paused.
    pub fn write(&self, region: usize, page: u64, bytes: &[u8]) -> bool {
        let _writing = self.writing.lock().unwrap();
        if self.paused.load(Ordering::Relaxed) {
            return false;
        }
        self.ram.write(region, page * PAGE_SIZE, bytes).unwrap();
        self.marks.mark(region, page);
        true
    }
}

impl SourceMachine for Source {
    fn ram(&self) -> Arc<Ram> {
        self.log.note("ram");
        Arc::clone(&self.ram)
    }

    fn describe(&self) -> Result<Vec<u8>, Failure> {
        self.log.note("describe");
        Ok(b"a twin".to_vec())
    }

    fn start_tracking(&self) -> Result<(), Failure> {
        self.log.note("start_tracking");
        (self.begins)();
        Ok(())
    }

    fn stop_tracking(&self) -> Result<(), Failure> {
        self.log.note("stop_tracking");
        Ok(())
    }

    fn collect_dirty(&self, set: &mut DirtySet) -> Result<(), Failure> {
        self.log.note("collect_dirty");
        self.marks.collect(set);
        if self.paused.load(Ordering::Relaxed) {
            for (region, page) in &self.late_writes {
                self.ram.write(*region, page * PAGE_SIZE, b"late").unwrap();
            }
        }
        Ok(())
    }

    fn before_pause(&self) {
        self.log.note("before_pause");
    }

    fn pause(&self) -> Result<(), Failure> {
        self.log.note("pause");
        let _writing = self.writing.lock().unwrap();
        self.paused.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn resume(&self) -> Result<(), Failure> {
        self.log.note("resume");
        self.paused.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        self.log.note("save");
        if let Some((region, page)) = self.saving_writes {
            self.ram.write(region, page * PAGE_SIZE, b"saved").unwrap();
            self.marks.mark(region, page);
        }
        Ok(self.state.clone())
    }

    fn arbiter(&self) -> Option<&dyn Arbiter> {
        self.locks.as_ref().map(|locks| locks as &dyn Arbiter)
    }
}

/// Builds twins.
#[derive(Default)]
pub struct Host {
    pub log: Log,
    /// What is in a twin's memory when it is built: region, page, content.
    pub leaves: Vec<(usize, u64, Vec<u8>)>,
    pub remarks: Option<String>,
}

/// A machine that has come.
pub struct Twin {
    pub ram: Arc<Ram>,
    pub state: Vec<u8>,
    locks: Locks,
    remarks: Option<String>,
    log: Log,
}

impl Drop for Twin {
    fn drop(&mut self) {
        self.log.note("drop");
    }
}

impl DestinationHost for Host {
    type Machine = Twin;

    fn build(&mut self, description: &[u8], layout: &[RegionLayout]) -> Result<Twin, Failure> {
        self.log.note("build");
        assert_eq!(description, b"a twin");
        let ram = RamOwner::new(Ram::allocate(layout)?);
        for (region, page, content) in &self.leaves {
            ram.write(*region, page * PAGE_SIZE, content).unwrap();
        }
        let locks = Locks { decides: true, log: self.log.clone() };
        Ok(Twin {
            ram: Arc::clone(&ram),
            state: Vec::new(),
            locks,
            remarks: self.remarks.clone(),
            log: self.log.clone(),
        })
    }
}

impl DestinationMachine for Twin {
    fn ram(&self) -> Arc<Ram> {
        self.log.note("ram");
        Arc::clone(&self.ram)
    }

    fn memory_is_zero(&self) -> bool {
        self.log.note("memory_is_zero");
        false
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        self.log.note("load");
        self.state = state.to_vec();
        Ok(())
    }

    fn arbiter(&self) -> Option<&dyn Arbiter> {
        Some(&self.locks)
    }

    fn run(&mut self) -> Result<(), Failure> {
        self.log.note("run");
        Ok(())
    }

    fn announce(&mut self) {
        self.log.note("announce");
    }

    fn after_run(&mut self) -> Option<String> {
        self.log.note("after_run");
        self.remarks.clone()
    }
}

/// Moves `source` into a twin of `host`. `there` is done with what comes of it at the destination, in its
/// thread; `wrap` may put something around the source's link.
pub fn move_over<R: Send>(
    source: &Source,
    host: &mut Host,
    monitor: &destination::Monitor,
    wrap: impl FnOnce(Box<dyn ControlLink>) -> Box<dyn ControlLink>,
    there: impl FnOnce(Result<Arrival<'_, Twin>, Failure>) -> R + Send,
) -> (Report, R) {
    let listener = Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = listener.local_addr();
    let take = |host: &mut Host, call: &mut Call| {
        let transport = TcpDestination::new(&listener);
        there(destination::Migration::new(host, call).transport(transport).monitor(monitor).run())
    };
    thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let mut call = listener.next_control(PATIENCE).unwrap().expect("a source calls");
            take(host, &mut call)
        });
        let token = Token::random().unwrap();
        let link = connect_control(&address.to_string(), token, PATIENCE).unwrap();
        let mut link = wrap(Box::new(link));
        let transport = TcpSource::new(address, 2);
        let report = source::Migration::new(source, &mut *link)
            .transport(transport)
            .software("test")
            .compare_memory(true)
            .run();
        // Whoever waits for more learns that there is none.
        drop(link);
        (report, destination.join().unwrap())
    })
}

/// The same, with nothing special, and a twin that is kept.
pub fn moved(source: &Source, host: &mut Host) -> (Report, Result<Twin, Failure>) {
    move_over(
        source,
        host,
        &destination::Monitor::default(),
        |link| link,
        |taken| taken.map(Arrival::conclude),
    )
}

/// All of memory, region by region.
pub fn content(ram: &Ram) -> Vec<Vec<u8>> {
    let read = |region: &whimbrel_migration::memory::RamRegion| {
        let mut bytes = vec![0; region.len() as usize];
        region.read(0, &mut bytes).unwrap();
        bytes
    };
    ram.regions().iter().map(read).collect()
}

/// The pages of a region that exist.
pub fn existing(ram: &Ram, region: usize) -> Vec<u64> {
    let mut pages = Vec::new();
    let region = &ram.regions()[region];
    scan::existing(region, 0, region.pages(), |first, count| pages.extend(first..first + count));
    pages
}
