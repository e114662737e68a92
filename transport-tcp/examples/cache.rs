//! A process that moves 1 GiB of cache to another process while a thread keeps changing it.
//!
//! What moves need not be a virtual machine: whatever has its memory in a [`Ram`], can stop writing to it,
//! and knows which pages it has written, can be moved. This cache has entries of one page, and a thread that
//! renews one entry after the other in an order that looks random. Which renewal an entry is from, and what
//! is in it, follows from the number of renewals alone: so the receiver can tell whether it has the newest of
//! every entry.
//!
//! ```text
//! cargo run --example cache                               both ends, in two processes on this host
//! cargo run --example cache -- receive 0.0.0.0:7000       one end
//! cargo run --example cache -- send other-host:7000       the other end
//! ```
//! Nothing here is `unsafe`.

use migration::dirty::DirtySet;
use migration::machine::{DestinationHost, DestinationMachine, SourceMachine};
use migration::memory::{PAGE_SIZE, Ram, RamOwner, RegionLayout};
use migration::transport::Token;
use migration::{Code, Failure, destination, source};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use whimbrel_transport_tcp::{Listener, TcpDestination, TcpSource, connect_control};

/// What the example itself fails with.
type Error = Box<dyn std::error::Error + Send + Sync>;

/// Bytes that are moved.
const MEMORY: u64 = 1 << 30;

/// Between two batches of renewals: some 40 MiB change in a second.
const BATCH: u64 = 100;
const BETWEEN_BATCHES: Duration = Duration::from_millis(10);

/// The cache, and the thread that renews it.
pub struct Cache {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    ram: RamOwner,
    /// A bit for each page that was written since it was collected.
    written: Vec<AtomicU64>,
    /// Held while entries are written.
    progress: Mutex<Progress>,
    ended: AtomicBool,
}

struct Progress {
    runs: bool,
    /// How many renewals there were. The first as many as there are entries fill the cache.
    renewals: u64,
}

impl Shared {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn entries(&self) -> u64 {
        self.ram.len() / PAGE_SIZE
    }

    /// Which entry a renewal is of.
    fn entry(&self, renewal: u64) -> u64 {
        let entries = self.entries();
        if renewal < entries {
            return renewal;
        }
        (renewal.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) % entries
    }

    fn renew(&self, renewal: u64) -> std::io::Result<()> {
        let entry = self.entry(renewal);
        self.ram.write(0, entry * PAGE_SIZE, &content(renewal))?;
        // Marked after it was written. The other way round, the engine could take the mark away and read the
        // page before it is written, and nobody would ever send what is written then.
        self.written[(entry / 64) as usize].fetch_or(1 << (entry % 64), Ordering::Release);
        Ok(())
    }

    /// The thread's work.
    fn renew_for_ever(&self) {
        while !self.ended.load(Ordering::Acquire) {
            let mut progress = self.progress();
            let mut batch = 0..if progress.runs { BATCH } else { 0 };
            if batch.any(|_| self.renew(progress.renewals).map(|()| progress.renewals += 1).is_err()) {
                return;
            }
            drop(progress);
            thread::sleep(BETWEEN_BATCHES);
        }
    }
}

/// What a renewal writes: its number, and numbers that follow from it.
fn content(renewal: u64) -> Vec<u8> {
    let word = |index: u64| (renewal ^ index.wrapping_mul(0xff51_afd7_ed55_8ccd)).to_le_bytes();
    (0..PAGE_SIZE / 8).flat_map(word).collect()
}

impl Cache {
    /// A cache that holds nothing yet and is not renewed before it is resumed.
    pub fn new(layout: &[RegionLayout]) -> Result<Self, Failure> {
        if layout.len() != 1 {
            return Err(Failure::new(Code::MEMORY, "a cache is one region of memory"));
        }
        let ram = RamOwner::new(Ram::allocate(layout)?);
        let written = (0..(ram.len() / PAGE_SIZE).div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        let progress = Mutex::new(Progress { runs: false, renewals: 0 });
        let shared = Arc::new(Shared { ram, written, progress, ended: false.into() });
        let renewing = Arc::clone(&shared);
        let thread = thread::Builder::new().spawn(move || renewing.renew_for_ever());
        let thread =
            thread.map_err(|e| Failure::new(Code::HOST, format_args!("cannot start a thread: {e}")))?;
        Ok(Cache { shared, thread: Some(thread) })
    }

    /// A cache of so many bytes with an entry in each page, which is renewed from now on.
    pub fn filled(len: u64) -> Result<Self, Error> {
        let cache = Cache::new(&[RegionLayout { guest_address: 0, len }])?;
        let entries = cache.shared.entries();
        (0..entries).try_for_each(|renewal| cache.shared.renew(renewal))?;
        *cache.shared.progress() = Progress { runs: true, renewals: entries };
        Ok(cache)
    }

    /// Checks that every entry of a paused cache is the newest that there is, and returns how many renewals
    /// there were.
    pub fn check(&self) -> Result<u64, Error> {
        let renewals = self.shared.progress().renewals;
        let mut newest: Vec<u64> = (0..self.shared.entries()).collect();
        (newest.len() as u64..renewals)
            .for_each(|renewal| newest[self.shared.entry(renewal) as usize] = renewal);
        let mut page = vec![0; PAGE_SIZE as usize];
        for (entry, renewal) in (0..).zip(newest) {
            self.shared.ram.regions()[0].read(entry * PAGE_SIZE, &mut page)?;
            if page != content(renewal) {
                return Err(format!("entry {entry} is not from renewal {renewal} of {renewals}"))?;
            }
        }
        Ok(renewals)
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl SourceMachine for Cache {
    fn ram(&self) -> Arc<Ram> {
        Arc::clone(&self.shared.ram)
    }

    fn describe(&self) -> Result<Vec<u8>, Failure> {
        Ok(b"a cache".into())
    }

    /// Pages are marked all the time. What has been written so far is sent in the first round anyway: with
    /// its marks left, all of it would be sent a second time.
    fn start_tracking(&self) -> Result<(), Failure> {
        self.shared.written.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        Ok(())
    }

    fn stop_tracking(&self) -> Result<(), Failure> {
        Ok(())
    }

    /// Marks go when they are collected, so there is no `clear_dirty`.
    fn collect_dirty(&self, set: &mut DirtySet) -> Result<(), Failure> {
        for (word, written) in set.words_mut(0).iter_mut().zip(&self.shared.written) {
            *word |= written.swap(0, Ordering::Acquire);
        }
        Ok(())
    }

    fn pause(&self) -> Result<(), Failure> {
        // Whoever has the lock is not in the middle of an entry.
        self.shared.progress().runs = false;
        Ok(())
    }

    fn resume(&self) -> Result<(), Failure> {
        self.shared.progress().runs = true;
        Ok(())
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        Ok(self.shared.progress().renewals.to_le_bytes().into())
    }
}

/// What makes room for a cache that comes.
pub struct CacheHost;

impl DestinationHost for CacheHost {
    type Machine = Cache;

    fn build(&mut self, description: &[u8], layout: &[RegionLayout]) -> Result<Cache, Failure> {
        if description != b"a cache" {
            return Err(Failure::new(Code::DEVICE, "what comes is no cache"));
        }
        Cache::new(layout)
    }
}

impl DestinationMachine for Cache {
    fn ram(&self) -> Arc<Ram> {
        Arc::clone(&self.shared.ram)
    }

    fn memory_is_zero(&self) -> bool {
        true
    }

    fn load(&mut self, state: &[u8]) -> Result<(), Failure> {
        let none = |_| Failure::new(Code::STATE, "this is not the state of a cache");
        self.shared.progress().renewals = u64::from_le_bytes(state.try_into().map_err(none)?);
        Ok(())
    }

    fn run(&mut self) -> Result<(), Failure> {
        self.resume()
    }
}

/// Takes a cache in, lets it be renewed for a while, and checks it.
fn receive(listen: &str) -> Result<(), Error> {
    let listener = Listener::bind(listen.parse()?)?;
    println!("{}", listener.local_addr());
    let mut link = listener.next_control(Duration::from_secs(60))?.ok_or("nobody has called")?;
    let transport = TcpDestination::new(&listener);
    let cache = destination::Migration::new(&mut CacheHost, &mut link).transport(transport).run()?.conclude();
    let came = cache.shared.progress().renewals;
    thread::sleep(Duration::from_millis(300));
    cache.pause()?;
    let now = cache.check()?;
    println!("all entries are the newest, of {came} renewals when the cache came and {now} now");
    if came < now { Ok(()) } else { Err("the cache is not renewed here".into()) }
}

fn send(to: &str) -> Result<(), Error> {
    let cache = Cache::filled(MEMORY)?;
    let mut link = connect_control(to, Token::random()?, Duration::from_secs(10))?;
    let tcp = TcpSource::new(link.peer(), 0);
    let began = Instant::now();
    let report = source::Migration::new(&cache, &mut link).transport(tcp).run();
    let (seconds, ms) = (began.elapsed().as_secs_f64(), report.blackout_us / 1000);
    report.failure.map_or(Ok(()), Err)?;
    let renewals = cache.check()?;
    let sent = report.rounds.iter().map(|round| round.sent).sum::<u64>() >> 20;
    println!("moved {} MiB in {seconds:.1} s: {sent} MiB sent, {ms} ms of pause", report.memory >> 20);
    println!("the cache was renewed {} times since it was filled", renewals - report.memory / PAGE_SIZE);
    Ok(())
}

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["receive", listen] => receive(listen),
        ["send", to] => send(to),
        [] => {
            let mut receiver = Command::new(std::env::current_exe()?)
                .args(["receive", "127.0.0.1:0"])
                .stdout(Stdio::piped())
                .spawn()?;
            let mut said = BufReader::new(receiver.stdout.take().ok_or("no output")?).lines();
            let to = said.next().ok_or("the receiver does not listen")??;
            let sent = send(&to);
            said.try_for_each(|line| line.map(|line| println!("there: {line}")))?;
            let there = receiver.wait()?;
            sent?;
            if there.success() { Ok(()) } else { Err("the receiver has failed".into()) }
        }
        _ => Err("usage: cache [receive ADDRESS:PORT | send HOST:PORT]".into()),
    }
}
