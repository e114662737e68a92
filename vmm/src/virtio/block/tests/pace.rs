//! How many requests a second either way carries out:
//!
//!     cargo test --release -p whimbrel-vmm --lib -- --ignored --nocapture pace
//!
//! `WHIMBREL_PACE=FOLDER` says where the image is; where that has no direct I/O it is cached.

use super::*;
use crate::virtio::testing::Bench;
use std::time::{Duration, Instant};

const IMAGE: u64 = 256 << 20;
const PAGE: u64 = 4096;
const ROUNDS: usize = 5;
const EACH: Duration = Duration::from_millis(300);

/// A driver that keeps `depth` requests of a page in flight, each with descriptors of its own.
struct Driver {
    bench: Bench,
    kind: u32,
    depth: u16,
    seed: u64,
}

impl Driver {
    fn offer(&mut self, place: u16) {
        self.seed = self.seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let sector = (self.seed >> 33) % (IMAGE / PAGE) * (PAGE / 512);
        offer_page(&mut self.bench, place, self.kind, sector);
        self.bench.notify_if_wanted(0);
    }

    /// Requests a second.
    fn pace(&mut self) -> f64 {
        let mut seen = self.bench.used(0);
        (0..self.depth).for_each(|place| self.offer(place));
        let (began, mut done, mut in_flight) = (Instant::now(), 0u32, self.depth);
        while in_flight > 0 {
            if self.bench.used(0) == seen {
                std::thread::yield_now();
                continue;
            }
            seen = seen.wrapping_add(1);
            let (head, _) = self.bench.wait_used(0);
            let place = head as u16 / 3;
            assert_eq!(self.bench.bytes(STATUS + u64::from(place), 1), [OK]);
            done += 1;
            if began.elapsed() < EACH { self.offer(place) } else { in_flight -= 1 }
        }
        f64::from(done) / began.elapsed().as_secs_f64()
    }
}

#[test]
#[ignore = "a measurement"]
fn requests_a_second() {
    let folder = std::env::var_os("WHIMBREL_PACE").map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = tempfile::tempdir_in(folder).unwrap();
    let path = folder.path().join("disk.raw");
    std::fs::write(&path, vec![0x5a; IMAGE as usize]).unwrap();
    File::open(&path).unwrap().sync_all().unwrap();
    let open = |cached, aio| {
        Block::open(&BlockConfig { cached, ..BlockConfig::new(path.clone()) }, &Images::Any, aio)
    };
    for cached in [false, true] {
        if !cached && open(cached, Aio::Sync).is_err() {
            println!("no direct I/O there");
            continue;
        }
        for (kind, what) in [(VIRTIO_BLK_T_IN, "reads"), (VIRTIO_BLK_T_OUT, "writes")] {
            for depth in [1, 2, 4, 16] {
                let mut figures = [Vec::new(), Vec::new()];
                for round in 0..ROUNDS {
                    // By turns, so that what the machine does meanwhile hits both alike.
                    let order = if round % 2 == 0 { [0, 1] } else { [1, 0] };
                    for way in order {
                        let aio = [Aio::Sync, Aio::IoUring][way];
                        let bench = bench(Arc::new(open(cached, aio).unwrap()));
                        let mut driver = Driver { bench, kind, depth, seed: round as u64 };
                        figures[way].push(driver.pace());
                        driver.bench.function.pause();
                        driver.bench.function.device().release_disk_lock().unwrap();
                    }
                }
                let mut ratios: Vec<_> =
                    figures[0].iter().zip(&figures[1]).map(|(turn, ring)| ring / turn).collect();
                let median = |list: &mut Vec<f64>| {
                    list.sort_by(f64::total_cmp);
                    list[list.len() / 2]
                };
                println!(
                    "{} {what} at depth {depth}: {:.0}/s sync, {:.0}/s by io_uring, ratio {:.2} ({:.2} to {:.2})",
                    if cached { "cached" } else { "direct" },
                    median(&mut figures[0]),
                    median(&mut figures[1]),
                    median(&mut ratios),
                    ratios[0],
                    ratios[ROUNDS - 1],
                );
            }
        }
    }
}
