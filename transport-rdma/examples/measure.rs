//! Figures of this transport on the devices of this host: source and destination in one process.
//!
//! ```sh
//! measure connect [--to ADDRESS]               # time to make all connections
//! measure write [--mib N] [--lanes N] [--chunk-mib N] [--busy]
//!                                              # rate of random memory, first round and a second one
//! measure first-byte                           # time to the first byte, by size of RAM
//! measure register [--mib N] [--huge]          # cost of registrations, by size of chunk; in pages of 2 MiB
//! measure barrier                              # time of a barrier with nothing before it
//! ```
//! See `docs/rdma.md` for what they mean and how they were taken.

use migration::conformance::bed;
use migration::memory::{Extent, PAGE_SIZE, Ram, RamFile, RamRegion, RegionLayout};
use migration::transport::{
    DestinationPlane, DestinationTransport, Lane, Session, SourcePlane, SourceTransport, Token,
};
use std::error::Error;
use std::fs::File;
use std::net::IpAddr;
use std::os::fd::FromRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use whimbrel_transport_rdma::{Options, RdmaDestination, RdmaSource, Waiting, probe};

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What the engine gives a lane at a time.
const STEP: u64 = 8 << 20;

struct Arguments {
    command: String,
    to: IpAddr,
    mib: u64,
    huge: bool,
    options: Options,
}

fn arguments() -> Outcome<Arguments> {
    let mut words = std::env::args().skip(1);
    let command =
        words.next().ok_or("say what to measure: connect, write, first-byte, register or barrier")?;
    let mut options = Options::default();
    let (mut to, mut mib, mut huge) = (None, 256, false);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} wants a value"));
        match word.as_str() {
            "--to" => to = Some(value()?.parse()?),
            "--mib" => mib = value()?.parse()?,
            "--lanes" => options.lanes = value()?.parse()?,
            "--chunk-mib" => options.chunk = value()?.parse::<u64>()? << 20,
            "--huge" => huge = true,
            "--busy" => options.waiting = Waiting::BusyPoll,
            other => return Err(format!("{other} is unknown").into()),
        }
    }
    let found = probe::addresses(&probe::host()).into_iter().rfind(IpAddr::is_ipv4);
    let to = to.or(found).ok_or("this host has no RDMA device")?;
    Ok(Arguments { command, to, mib, huge, options })
}

/// RAM of one region.
fn ram(len: u64) -> Arc<Ram> {
    bed::ram_of(&[len / PAGE_SIZE])
}

/// Fills memory with noise.
fn scramble(ram: &Ram, mib: u64) {
    let mut random = fastrand::Rng::with_seed(mib);
    for at in 0..mib {
        bed::scramble(ram, &Extent { region: 0, offset: at << 20, len: 1 << 20 }, &mut random);
    }
}

struct Pair {
    plane: Box<dyn SourcePlane>,
    destination: Box<dyn DestinationPlane>,
}

fn connect(arguments: &Arguments, source: &Arc<Ram>, shadow: &Arc<Ram>) -> Outcome<(Pair, Duration)> {
    let timeout = Duration::from_secs(30);
    let there = Session::new(Token::random()?, Arc::clone(shadow), timeout);
    let here = Session::new(there.token, Arc::clone(source), timeout);
    let (offer, destination) = RdmaDestination::new(arguments.to, arguments.options.clone()).offer(&there)?;
    let began = Instant::now();
    let plane = RdmaSource::new(arguments.options.clone()).connect(&here, &offer)?;
    Ok((Pair { plane, destination }, began.elapsed()))
}

/// Sends `len` bytes as a round: lanes take steps in turn, and each ends with a barrier.
fn round(plane: &mut dyn SourcePlane, len: u64, number: u32) -> Outcome<Duration> {
    let next = std::sync::atomic::AtomicU64::new(0);
    let drive = |lane: &mut dyn Lane| {
        loop {
            let offset = next.fetch_add(STEP, std::sync::atomic::Ordering::Relaxed);
            if offset >= len {
                break;
            }
            lane.write(&[Extent { region: 0, offset, len: STEP.min(len - offset) }])?;
        }
        lane.post_barrier(number)?;
        lane.wait_barrier(number)
    };
    let began = Instant::now();
    thread::scope(|scope| {
        let lanes: Vec<_> =
            plane.lanes().iter_mut().map(|lane| scope.spawn(|| drive(lane.as_mut()))).collect();
        lanes
            .into_iter()
            .try_for_each(|lane| lane.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok(began.elapsed())
}

fn rate(len: u64, elapsed: Duration) -> String {
    // perftest's MB are 2^20 bytes.
    format!("{:8.2} MiB/s", len as f64 / f64::from(1 << 20) / elapsed.as_secs_f64())
}

fn write(arguments: &Arguments) -> Outcome<()> {
    let len = arguments.mib << 20;
    let (source, shadow) = (ram(len), ram(len));
    scramble(&source, arguments.mib);
    let (mut pair, connected) = connect(arguments, &source, &shadow)?;
    println!("connected in {:.1} ms", connected.as_secs_f64() * 1e3);
    for number in 0..2 {
        let elapsed = round(pair.plane.as_mut(), len, number)?;
        println!("round {number}: {}", rate(len, elapsed));
    }
    let lanes: Vec<_> = pair.plane.lanes().iter().map(|lane| lane.stats()).collect();
    lanes.iter().for_each(|stats| println!("{stats:?}"));
    let began = Instant::now();
    pair.destination.fence()?;
    println!("fenced in {:.3} ms", began.elapsed().as_secs_f64() * 1e3);
    let began = Instant::now();
    drop(pair.plane);
    println!("source left in {:.3} ms", began.elapsed().as_secs_f64() * 1e3);
    let whole = Extent { region: 0, offset: 0, len };
    // SAFETY: both mappings have `len` bytes and live for ever, and nobody writes to them any more.
    let [ours, theirs] = [&source, &shadow]
        .map(|ram| ram.address(&whole).map(|at| unsafe { std::slice::from_raw_parts(at, len as usize) }));
    if ours? != theirs? {
        return Err("memory differs".into());
    }
    Ok(())
}

fn first_byte(arguments: &Arguments) -> Outcome<()> {
    for mib in [64, 512, 2048] {
        let (source, shadow) = (ram(mib << 20), ram(mib << 20));
        // All of it exists at the source, as in a guest that has used its memory; one byte a page will do.
        for page in 0..(mib << 20) / PAGE_SIZE {
            let address = source.address(&Extent { region: 0, offset: page * PAGE_SIZE, len: 1 })?;
            // SAFETY: the extent is checked, and nobody else uses this memory yet.
            unsafe { address.write(1) };
        }
        let began = Instant::now();
        let (mut pair, connected) = connect(arguments, &source, &shadow)?;
        let lane = &mut pair.plane.lanes()[0];
        lane.write(&[Extent { region: 0, offset: 0, len: PAGE_SIZE }])?;
        lane.post_barrier(0)?;
        lane.wait_barrier(0)?;
        let (ms, connected) = (began.elapsed().as_secs_f64() * 1e3, connected.as_secs_f64() * 1e3);
        println!("{mib:5} MiB: first page confirmed after {ms:.1} ms, of which connecting {connected:.1} ms");
    }
    Ok(())
}

/// RAM of one region in huge pages, which are taken for ever.
fn huge_ram(len: u64) -> Outcome<Arc<Ram>> {
    // SAFETY: the name is a C string, and lives for ever.
    let fd = unsafe { libc::memfd_create(c"measure".as_ptr(), libc::MFD_HUGETLB | libc::MFD_HUGE_2MB) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(len)?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, access, libc::MAP_SHARED, fd, 0) };
    let address = match NonNull::new(address.cast::<u8>()) {
        Some(address) if address.as_ptr().cast() != libc::MAP_FAILED => address,
        _ => return Err(format!("{} (see vm.nr_hugepages)", std::io::Error::last_os_error()).into()),
    };
    let layout = RegionLayout { guest_address: 0, len };
    // SAFETY: the mapping made above is shared, readable and writable, covers the file's `len` bytes, and
    // is never unmapped.
    let region =
        unsafe { RamRegion::new(layout, address, 2 << 20, vec![RamFile::from(file)], len, Arc::new(())) }?;
    Ok(Arc::new(Ram::new(vec![region])?))
}

fn barrier(arguments: &Arguments) -> Outcome<()> {
    let (source, shadow) = (ram(64 << 20), ram(64 << 20));
    let (mut pair, _) = connect(arguments, &source, &shadow)?;
    let lane = &mut pair.plane.lanes()[0];
    let mut times = Vec::new();
    for round in 0..500 {
        let began = Instant::now();
        lane.post_barrier(round)?;
        lane.wait_barrier(round)?;
        times.push(began.elapsed());
    }
    times.sort();
    println!("a barrier takes {:?}, at least {:?}, at most {:?}", times[250], times[0], times[499]);
    Ok(())
}

fn register(arguments: &Arguments) -> Outcome<()> {
    let len = arguments.mib << 20;
    let source = if arguments.huge { huge_ram(len)? } else { ram(len) };
    // Once for all: the destination's huge pages are not given back.
    let shadow = if arguments.huge { Some(huge_ram(len)?) } else { None };
    // One byte a page: all of it exists at the source.
    for page in 0..len / PAGE_SIZE {
        let address = source.address(&Extent { region: 0, offset: page * PAGE_SIZE, len: 1 })?;
        // SAFETY: the extent is checked, and nobody else uses this memory yet.
        unsafe { address.write(1) };
    }
    for chunk in [2, 4, 8, 16, 32, 64, 128] {
        let options = arguments.options.clone().with_chunk(chunk << 20);
        let arguments = Arguments { command: String::new(), options, ..*arguments };
        // The destination's memory is new every time, unless huge: registering makes it exist.
        let (mut pair, _) = connect(&arguments, &source, &shadow.clone().unwrap_or_else(|| ram(len)))?;
        let began = Instant::now();
        let lane = &mut pair.plane.lanes()[0];
        // One page of every chunk: all are registered, and hardly anything is written.
        for offset in (0..len).step_by((chunk as usize) << 20) {
            lane.write(&[Extent { region: 0, offset, len: PAGE_SIZE }])?;
        }
        lane.post_barrier(0)?;
        lane.wait_barrier(0)?;
        let both = began.elapsed().as_secs_f64() * 1e3;
        let here = lane.stats().registration_us as f64 / 1e3;
        println!(
            "chunks of {chunk:3} MiB: {both:7.1} ms for {} MiB on both sides, {here:7.1} ms of it on the source's",
            arguments.mib
        );
    }
    Ok(())
}

fn main() -> Outcome<()> {
    let arguments = arguments()?;
    match arguments.command.as_str() {
        "connect" => {
            let (source, shadow) = (ram(64 << 20), ram(64 << 20));
            for _ in 0..10 {
                let (pair, elapsed) = connect(&arguments, &source, &shadow)?;
                print!("connected in {:.1} ms", elapsed.as_secs_f64() * 1e3);
                let began = Instant::now();
                drop(pair.plane);
                println!(", left in {:.1} ms", began.elapsed().as_secs_f64() * 1e3);
            }
            Ok(())
        }
        "write" => write(&arguments),
        "first-byte" => first_byte(&arguments),
        "register" => register(&arguments),
        "barrier" => barrier(&arguments),
        other => Err(format!("{other} cannot be measured").into()),
    }
}
