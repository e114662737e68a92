//! What KVM's dirty log costs by the page on this machine: for `docs/cost-model.md`.
//!
//! ```sh
//! cargo run --release -p whimbrel-vmm --example dirty_log
//! ```
//! Nothing of the machine's memory is mapped by KVM, so that clearing has no page to write-protect: what is
//! measured is the calls and the bitmaps. The median of several repetitions, and the least in parentheses.

use migration::dirty::DirtySet;
use migration::machine::SourceMachine;
use std::error::Error;
use std::time::Instant;
use whimbrel_vmm::{Host, Machine, MachineConfig, SerialOutput};

const GIB: u64 = 1 << 30;

/// Bitmap words of what a lane takes at a time: 8 MiB.
const CHUNK_WORDS: usize = 32;

fn print(what: &str, mut times: Vec<f64>, pages: u64) {
    times.sort_by(f64::total_cmp);
    let per_page = |seconds: f64| seconds * 1e9 / pages as f64;
    println!("{what}: {:.3} ({:.3}) ns a page", per_page(times[times.len() / 2]), per_page(times[0]));
}

fn main() -> Result<(), Box<dyn Error>> {
    let host = Host::open()?;
    let config = MachineConfig { serial: SerialOutput::Null, ..MachineConfig::new(&host, 2 * GIB, 1)? };
    let machine = Machine::build(&host, config)?;
    let ram = SourceMachine::ram(&machine);
    let mut set = DirtySet::empty(&ram);
    let (mut started, mut collected, mut cleared) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..9 {
        let began = Instant::now();
        machine.start_tracking()?;
        started.push(began.elapsed().as_secs_f64());
        set.clear();
        let began = Instant::now();
        machine.collect_dirty(&mut set)?;
        collected.push(began.elapsed().as_secs_f64());
        if set.bytes() != ram.len() {
            return Err("not every page counts as dirty at first".into());
        }
        let began = Instant::now();
        for region in 0..set.regions() {
            for (number, words) in set.words(region).chunks(CHUNK_WORDS).enumerate() {
                machine.clear_dirty(region, (number * CHUNK_WORDS * 64) as u64, words)?;
            }
        }
        cleared.push(began.elapsed().as_secs_f64());
        machine.stop_tracking()?;
    }
    let pages = ram.len() / 4096;
    print("beginning to track", started, pages);
    print("asking for all dirty pages", collected, pages);
    print("clearing 8 MiB at a time", cleared, pages);
    Ok(())
}
