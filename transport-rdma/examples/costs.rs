//! What the source's own code costs by the page and by the request, without a device: for
//! `docs/cost-model.md`.
//!
//! ```sh
//! cargo build --release -p whimbrel-transport-rdma --features null-device --example costs
//! target/release/examples/costs                  # on a machine
//! ci/lab/run -- target/release/examples/costs    # in the lab: how much slower an emulated CPU is
//! target/release/examples/costs lanes pinning    # these parts only
//! ```
//! Every figure is of several repetitions: the median, and the least in parentheses. Only pinning needs the
//! kernel: `io_uring` pins buffers by the same function as a registration does, and is on hosts without RDMA
//! too.

use migration::conformance::bed;
use migration::dirty::{WORD_PAGES, runs};
use migration::memory::{Extent, PAGE_SIZE, Ram};
use migration::scan;
use migration::transport::Lane;
use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use whimbrel_transport_rdma::null;

type Outcome<T> = Result<T, Box<dyn Error>>;

/// What can be asked for by name.
type Part = fn() -> Outcome<()>;

const MIB: u64 = 1 << 20;

/// Repetitions of a measurement.
const REPETITIONS: usize = 9;

/// Prints what one of `units` costs, in nanoseconds.
fn cost(what: &str, unit: &str, units: u64, mut work: impl FnMut() -> Outcome<Duration>) -> Outcome<()> {
    let mut times = Vec::new();
    for _ in 0..REPETITIONS {
        times.push(work()?.as_secs_f64() * 1e9 / units as f64);
    }
    times.sort_by(f64::total_cmp);
    println!("{what}: {:.2} ({:.2}) ns a {unit}", times[times.len() / 2], times[0]);
    Ok(())
}

fn timed<T>(work: impl FnOnce() -> T) -> Duration {
    let began = Instant::now();
    black_box(work());
    began.elapsed()
}

/// Extents of `len` bytes with gaps as long, over the first 8 MiB from `from`: what the engine gives a lane
/// at a time.
fn scattered(from: u64, len: u64) -> Vec<Extent> {
    let end = from + (8 << 20);
    (from..end).step_by((2 * len) as usize).map(|offset| Extent { region: 0, offset, len }).collect()
}

fn lanes() -> Outcome<()> {
    let ram = bed::ram_of(&[(512 * MIB) / PAGE_SIZE]);
    let mut lane = null::lane(&ram)?;
    let mut round = 0;
    for (name, len) in [("4 KiB", 4 << 10), ("64 KiB", 64 << 10), ("1 MiB", MIB), ("8 MiB", 8 * MIB)] {
        let steps: Vec<_> = (0..64).map(|step| scattered(step * 8 * MIB, len)).collect();
        let requests = steps.iter().map(Vec::len).sum::<usize>() as u64;
        cost(&format!("lane, writes of {name}"), "request", requests, || {
            round += 1;
            let began = Instant::now();
            for extents in &steps {
                lane.write(extents)?;
            }
            lane.post_barrier(round)?;
            lane.wait_barrier(round)?;
            Ok(began.elapsed())
        })?;
    }
    cost("lane, barriers", "barrier", 1000, || barriers(lane.as_mut(), &mut round))
}

fn barriers(lane: &mut dyn Lane, round: &mut u32) -> Outcome<Duration> {
    let began = Instant::now();
    for _ in 0..1000 {
        *round += 1;
        lane.post_barrier(*round)?;
        lane.wait_barrier(*round)?;
    }
    Ok(began.elapsed())
}

fn bitmaps() -> Outcome<()> {
    const WORDS: u64 = 1 << 14;
    let pages = WORDS * WORD_PAGES;
    let mut random = fastrand::Rng::with_seed(1);
    let tenth: Vec<u64> =
        (0..WORDS).map(|_| (0..64).map(|bit| u64::from(random.u8(..10) == 0) << bit).sum()).collect();
    let maps = [
        ("clean", vec![0; WORDS as usize]),
        ("all dirty", vec![u64::MAX; WORDS as usize]),
        ("one page in ten dirty, at random", tenth),
        ("every other page dirty", vec![0x5555_5555_5555_5555; WORDS as usize]),
    ];
    for (name, words) in maps {
        let found = runs(&words, 0).count();
        cost(&format!("bitmap to extents, {name} ({found} runs of {pages} pages)"), "page", pages, || {
            Ok(timed(|| runs(&words, 0).map(|(first, pages)| first ^ pages).fold(0, |a, b| a ^ b)))
        })?;
    }
    Ok(())
}

/// Makes every page of `ram` exist, with `first` as its first byte.
fn touch(ram: &Ram, first: u8) {
    let region = &ram.regions()[0];
    for page in 0..region.pages() {
        // SAFETY: inside the mapping, which nobody else uses.
        unsafe { region.address().add((page * PAGE_SIZE) as usize).write_volatile(first) };
    }
}

fn pages() -> Outcome<()> {
    let ram = bed::ram_of(&[(512 * MIB) / PAGE_SIZE]);
    let region = &ram.regions()[0];
    for (name, first) in [("in use", 1), ("of zeros", 0)] {
        touch(&ram, first);
        cost(&format!("zero detection, pages {name}"), "page", region.pages(), || {
            Ok(timed(|| {
                let page = |page: u64| region.address().wrapping_add((page * PAGE_SIZE) as usize);
                // SAFETY: pages of the region, which are aligned and mapped.
                (0..region.pages()).filter(|number| unsafe { scan::is_zero(page(*number)) }).count()
            }))
        })?;
    }
    // As the engine asks: 8 MiB at a time.
    const STEP: u64 = 2048;
    cost("whether pages exist", "page", region.pages(), || {
        Ok(timed(|| {
            let mut found = 0;
            for first in (0..region.pages()).step_by(STEP as usize) {
                scan::existing(region, first, STEP, |_, pages| found += pages);
            }
            found
        }))
    })
}

/// A ring whose only use is that buffers can be registered with it.
struct Ring(OwnedFd);

impl Ring {
    fn new() -> io::Result<Ring> {
        let mut parameters = [0u64; 15];
        // SAFETY: the kernel reads and writes its structure of 120 bytes there, of which zeros are the
        // defaults.
        let fd = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor and nobody else has it.
        Ok(Ring(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    fn call(&self, operation: u32, argument: *const libc::iovec, count: u32) -> io::Result<()> {
        // SAFETY: the argument is null or one valid buffer, which is only pinned.
        let result = unsafe {
            libc::syscall(libc::SYS_io_uring_register, self.0.as_raw_fd(), operation, argument, count)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Pins `len` bytes, and lets go of them again. Returns how long each took.
    fn pin(&self, address: *mut u8, len: u64) -> io::Result<[Duration; 2]> {
        const REGISTER_BUFFERS: u32 = 0;
        const UNREGISTER_BUFFERS: u32 = 1;
        let buffer = libc::iovec { iov_base: address.cast(), iov_len: len as usize };
        let began = Instant::now();
        self.call(REGISTER_BUFFERS, &buffer, 1)?;
        let pinned = began.elapsed();
        self.call(UNREGISTER_BUFFERS, std::ptr::null(), 0)?;
        Ok([pinned, began.elapsed() - pinned])
    }
}

/// A shared mapping of a file, as guest memory is one; kept for ever.
fn mapping(file: &File, len: u64) -> io::Result<*mut u8> {
    file.set_len(len)?;
    let access = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing of ours.
    let address = unsafe {
        libc::mmap(std::ptr::null_mut(), len as usize, access, libc::MAP_SHARED, file.as_raw_fd(), 0)
    };
    if address == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(address.cast()) }
}

fn memfd(flags: u32) -> io::Result<File> {
    // SAFETY: the name is a C string, and lives for ever.
    let fd = unsafe { libc::memfd_create(c"costs".as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave us this descriptor and nobody else has it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn pinning() -> Outcome<()> {
    const CHUNK: u64 = 16 * MIB;
    const CHUNKS: u64 = 8;
    let ring = Ring::new()?;
    let kinds = [("4 KiB", 0, CHUNKS), ("2 MiB", libc::MFD_HUGETLB | libc::MFD_HUGE_2MB, 4)];
    for (name, flags, chunks) in kinds {
        let mut rows = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..REPETITIONS {
            let file = memfd(flags)?;
            let address = match mapping(&file, chunks * CHUNK) {
                Ok(address) => address,
                Err(error) => {
                    println!("pinning pages of {name}: not measured ({error}; see vm.nr_hugepages)");
                    break;
                }
            };
            // New at first; then the same again, which exists.
            for kind in 0..2 {
                let mut spent = [Duration::ZERO; 2];
                for chunk in 0..chunks {
                    let at = address.wrapping_add((chunk * CHUNK) as usize);
                    let [pinned, unpinned] = ring.pin(at, CHUNK)?;
                    spent[0] += pinned;
                    spent[1] += unpinned;
                }
                let mib = (chunks * CHUNK / MIB) as f64;
                rows[kind].push(spent[0].as_secs_f64() * 1e6 / mib);
                if kind == 1 {
                    rows[2].push(spent[1].as_secs_f64() * 1e6 / mib);
                }
            }
            // SAFETY: the mapping made above, which nobody uses any more.
            unsafe { libc::munmap(address.cast(), (chunks * CHUNK) as usize) };
        }
        for (what, row) in ["pinning new", "pinning existing", "unpinning"].into_iter().zip(&mut rows) {
            row.sort_by(f64::total_cmp);
            if let Some(median) = row.get(row.len() / 2) {
                println!("{what} pages of {name}: {median:.2} ({:.2}) µs a MiB", row[0]);
            }
        }
    }
    Ok(())
}

/// Two threads that wake each other by turns, as lanes and devices do: through a descriptor and `poll`.
fn wakes() -> Outcome<()> {
    const TURNS: u64 = 5000;
    // SAFETY: no pointers are involved.
    let [ping, pong] = [(); 2].map(|()| unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) });
    let wait = |fd: i32| {
        let mut polled = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut value = 0u64;
        // SAFETY: one entry, and eight bytes, of locals.
        unsafe {
            libc::poll(&mut polled, 1, -1);
            libc::read(fd, (&raw mut value).cast(), 8);
        }
    };
    let wake = |fd: i32| {
        let one = 1u64;
        // SAFETY: eight bytes of a local.
        unsafe { libc::write(fd, (&raw const one).cast(), 8) };
    };
    cost("waking a thread that sleeps on a descriptor", "wake", 2 * TURNS, || {
        Ok(std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..TURNS {
                    wait(ping);
                    wake(pong);
                }
            });
            timed(|| {
                for _ in 0..TURNS {
                    wake(ping);
                    wait(pong);
                }
            })
        }))
    })
}

fn main() -> Outcome<()> {
    let parts: [(&str, Part); 5] =
        [("lanes", lanes), ("bitmaps", bitmaps), ("pages", pages), ("wakes", wakes), ("pinning", pinning)];
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = wanted.iter().find(|name| parts.iter().all(|(part, _)| part != name)) {
        return Err(format!("there is no {unknown}; ask for lanes, bitmaps, pages, wakes or pinning").into());
    }
    let chosen = parts.iter().filter(|(part, _)| wanted.is_empty() || wanted.iter().any(|name| name == part));
    for (_, measure) in chosen {
        measure()?;
    }
    Ok(())
}
