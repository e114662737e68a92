//! What single steps of a migration cost. Times are for one GiB of guest memory in pages of 4 KiB, or for one
//! state of a machine.
//!
//!     cargo bench -p whimbrel-bench --bench micro

use criterion::{BenchmarkId, Criterion, SamplingMode, criterion_group, criterion_main};
use migration::dirty::{DirtySet, runs};
use migration::machine::SourceMachine;
use migration::memory::{Extent, PAGE_SIZE, Ram};
use migration::scan;
use migration::transport::{DestinationTransport, Session, SourceTransport, Token};
use std::hint::black_box;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use transport_tcp::{Listener, TcpDestination, TcpSource};
use vmm::guest::{self, Content, Workload};
use vmm::memory::{GuestRam, PageSize};
use vmm::{Host, Machine, MachineConfig, SerialOutput};

const GIB: u64 = 1 << 30;

/// Words of a bitmap with a bit for each page of a GiB.
const WORDS: usize = (GIB / PAGE_SIZE / 64) as usize;

/// Words of one chunk of the engine's scan.
const CHUNK: usize = 32;

/// Shares of memory that are dirty, in per cent.
const SHARES: [u64; 4] = [0, 1, 50, 100];

/// A bitmap in which this share of bits is set at random, which gives many runs. It is the same every time.
fn scattered(percent: u64) -> Vec<u64> {
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut chance = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % 100
    };
    (0..WORDS).map(|_| (0..64).fold(0, |word, bit| word | u64::from(chance() < percent) << bit)).collect()
}

/// Cuts bitmaps into extents, chunk by chunk, as a lane does.
fn extents(c: &mut Criterion) {
    let mut group = c.benchmark_group("bitmap to extents");
    let mut bench = |name: String, words: Vec<u64>| {
        let mut extents: Vec<Extent> = Vec::new();
        group.bench_function(name, |b| {
            b.iter(|| {
                for (chunk, words) in black_box(&words).chunks(CHUNK).enumerate() {
                    extents.clear();
                    let each = runs(words, (chunk * CHUNK * 64) as u64);
                    extents.extend(each.map(|(first, pages)| Extent {
                        region: 0,
                        offset: first * PAGE_SIZE,
                        len: pages * PAGE_SIZE,
                    }));
                    black_box(&extents);
                }
            });
        });
    };
    for share in SHARES {
        bench(format!("{share} %"), scattered(share));
    }
    bench("50 %, every other page".into(), vec![0x5555_5555_5555_5555; WORDS]);
    group.finish();
}

/// Counts a whole set, and adds another set to it.
fn sets(c: &mut Criterion) {
    let ram = GuestRam::new(GIB, PageSize::Small).expect("a GiB of address space");
    let mut group = c.benchmark_group("dirty set");
    for share in [0, 50] {
        let mut set = DirtySet::empty(ram.ram());
        fill(&mut set, &scattered(share));
        let mut other = set.clone();
        group.bench_function(BenchmarkId::new("count", format!("{share} %")), |b| {
            b.iter(|| black_box(&set).count())
        });
        group.bench_function(BenchmarkId::new("union", format!("{share} %")), |b| {
            b.iter(|| black_box(&mut other).union(black_box(&set)))
        });
    }
    group.finish();
}

/// Copies a bitmap into a set, as far as the set has room.
fn fill(set: &mut DirtySet, words: &[u64]) {
    for region in 0..set.regions() {
        set.words_mut(region).iter_mut().zip(words).for_each(|(out, word)| *out = *word);
    }
}

/// Checks whether pages are zero.
fn zeros(c: &mut Criterion) {
    let ram = GuestRam::new(GIB, PageSize::Small).expect("a GiB of address space");
    let mut group = c.benchmark_group("zero detection");
    for (name, byte) in [("zero", 0u8), ("random", 0xa5)] {
        for region in ram.ram().regions() {
            // SAFETY: the whole mapping, to which nobody holds references.
            unsafe { std::ptr::write_bytes(region.address(), byte, region.len() as usize) };
        }
        group.bench_function(name, |b| b.iter(|| count_zero(ram.ram())));
    }
    group.finish();
}

fn count_zero(ram: &Ram) -> u64 {
    let mut zero = 0;
    for region in ram.regions() {
        for page in 0..region.pages() {
            let address = region.address().wrapping_add((page * PAGE_SIZE) as usize);
            // SAFETY: a page of the region's mapping, aligned as pages are.
            zero += u64::from(unsafe { scan::is_zero(address) });
        }
    }
    zero
}

/// Finds the pages that exist.
fn existing(c: &mut Criterion) {
    let mut group = c.benchmark_group("which pages exist");
    for (name, every) in [("none", 0usize), ("all", 1), ("every other", 2)] {
        let ram = GuestRam::new(GIB, PageSize::Small).expect("a GiB of address space");
        for region in ram.ram().regions() {
            for page in (0..region.pages() as usize).filter(|page| every > 0 && page % every == 0) {
                // SAFETY: inside the mapping, to which nobody holds references.
                unsafe { region.address().add(page * PAGE_SIZE as usize).write_volatile(1) };
            }
        }
        group.bench_function(name, |b| {
            b.iter(|| {
                let mut found = 0;
                for region in ram.ram().regions() {
                    scan::existing(region, 0, region.pages(), |_, pages| found += pages);
                }
                found
            });
        });
    }
    group.finish();
}

/// A machine that has not run.
fn machine(vcpus: u32) -> Result<Machine, vmm::Error> {
    let host = Host::open()?;
    let config = MachineConfig::new(&host, GIB, vcpus)?;
    Machine::build(&host, MachineConfig { serial: SerialOutput::Null, ..config })
}

/// Reads KVM's dirty log, and clears it.
fn harvest(c: &mut Criterion) {
    let machine = match machine(1) {
        Ok(machine) => machine,
        Err(why) => return eprintln!("SKIPPED dirty log: {why}"),
    };
    let ram = SourceMachine::ram(&machine);
    let mut group = c.benchmark_group("dirty log");
    let mut set = DirtySet::empty(&ram);
    for share in SHARES {
        // KVM's log starts with every page dirty, so the pages that should be clean are cleared.
        machine.start_tracking().expect("a dirty log");
        let clean: Vec<u64> = scattered(share).iter().map(|word| !word).collect();
        let pages = ram.regions()[0].pages();
        machine.clear_dirty(0, 0, &clean[..pages.div_ceil(64) as usize]).expect("a range of pages");
        group.bench_function(BenchmarkId::new("harvest", format!("{share} %")), |b| {
            b.iter(|| {
                set.clear();
                machine.collect_dirty(black_box(&mut set)).expect("a dirty log");
            });
        });
        // Collected once more, because a filter may have left the bench above out.
        set.clear();
        machine.collect_dirty(&mut set).expect("a dirty log");
        let dirty = scattered(share);
        let expected =
            dirty[..set.words(0).len()].iter().map(|word| u64::from(word.count_ones())).sum::<u64>();
        // A GiB of guest memory is one region of 262144 pages, whose words fit the bitmap exactly.
        assert_eq!(set.count(), expected, "KVM's log says what it was told");
        group.bench_function(BenchmarkId::new("clear", format!("{share} %")), |b| {
            // Clean pages cost KVM nearly as much. Only the first iteration has pages to write-protect.
            b.iter(|| {
                for (chunk, words) in dirty[..pages.div_ceil(64) as usize].chunks(CHUNK).enumerate() {
                    machine.clear_dirty(0, (chunk * CHUNK * 64) as u64, words).expect("a range of pages");
                }
            });
        });
    }
    group.finish();
}

/// Saves and loads the state of machines with one to eight vCPUs.
fn state(c: &mut Criterion) {
    let mut group = c.benchmark_group("state");
    for vcpus in [1, 2, 4, 8] {
        let machine = match machine(vcpus) {
            Ok(machine) => machine,
            Err(why) => return eprintln!("SKIPPED state of {vcpus} vCPUs: {why}"),
        };
        let state = machine.save().expect("a state");
        group
            .bench_function(BenchmarkId::new("save", vcpus), |b| b.iter(|| machine.save().expect("a state")));
        group.bench_function(BenchmarkId::new("load", vcpus), |b| {
            b.iter(|| machine.load(&state).expect("a state"))
        });
    }
    group.finish();
}

/// A machine that was paused while our guest worked, and its state.
fn stopped(vcpus: u32) -> Result<(Machine, Vec<u8>), vmm::Error> {
    let machine = small(vcpus)?;
    let (working_set, content) = (1 << 20, Content::Random);
    Workload { vcpus, working_set, rate: 0, hz: None, fill: 0, content, journal: 0 }.boot(&machine)?;
    machine.resume()?;
    // After its first pass the guest only rewrites pages.
    while pages(&machine) < 10_000 {
        assert!(machine.outcome().is_none(), "the guest ended");
        std::thread::sleep(Duration::from_millis(1));
    }
    machine.pause()?;
    let state = machine.save()?;
    Ok((machine, state))
}

/// A machine with so little memory that moving it costs next to nothing.
fn small(vcpus: u32) -> Result<Machine, vmm::Error> {
    let host = Host::open()?;
    let config = MachineConfig::new(&host, 32 << 20, vcpus)?;
    Machine::build(&host, MachineConfig { serial: SerialOutput::Null, ..config })
}

/// Pages that the guest has rewritten.
fn pages(machine: &Machine) -> u64 {
    guest::testimony(machine.memory()).map_or(0, |testimony| testimony.pages)
}

/// Moves `source` to a new machine over TCP. Returns the time from the confirmation of the last write until
/// the guest makes progress there.
fn arrive(source: &Machine, state: &[u8], vcpus: u32) -> Duration {
    let machine = small(vcpus).expect("a machine");
    let listener = Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).expect("a port");
    let token = Token::random().expect("a token");
    let session =
        |machine: &Machine| Session::new(token, machine.memory().ram().clone(), Duration::from_secs(30));
    let (offer, mut there) =
        TcpDestination::new(&listener).offer(&session(&machine)).expect("a destination's plane");
    let mut here =
        TcpSource::new(listener.local_addr(), 1).connect(&session(source), &offer).expect("a plane");
    let lane = &mut here.lanes()[0];
    let len = machine.memory().ram().regions()[0].len();
    // The page of the last write exists already.
    for (round, len) in [(0, len), (1, PAGE_SIZE)] {
        lane.write(&[Extent { region: 0, offset: 0, len }]).expect("a write");
        lane.post_barrier(round).expect("a barrier");
        lane.wait_barrier(round).expect("its confirmation");
    }
    let before = pages(&machine);
    let began = Instant::now();
    there.fence().expect("a fence");
    machine.load(state).expect("the source's state");
    machine.resume().expect("a guest that runs");
    while pages(&machine) == before {
        assert!(machine.outcome().is_none(), "the guest ended");
        std::hint::spin_loop();
    }
    let elapsed = began.elapsed();
    machine.stop();
    elapsed
}

/// From the last write until the guest works again: fence, load, resume. A network adds its round trips.
fn last_write(c: &mut Criterion) {
    let mut group = c.benchmark_group("last write to running guest");
    // The untimed part takes a hundred times as long as the timed part, so iterations are as few as possible.
    group.sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(1));
    group.measurement_time(Duration::from_millis(15));
    for vcpus in [1, 2, 8] {
        let (source, state) = match stopped(vcpus) {
            Ok(stopped) => stopped,
            Err(why) => return eprintln!("SKIPPED last write, {vcpus} vCPUs: {why}"),
        };
        group.bench_function(BenchmarkId::new("vCPUs", vcpus), |b| {
            b.iter_custom(|times| (0..times).map(|_| arrive(&source, &state, vcpus)).sum())
        });
        source.stop();
    }
    group.finish();
}

criterion_group! {
    name = micro;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_millis(1500));
    targets = extents, sets, zeros, existing, harvest, state, last_write
}
criterion_main!(micro);
