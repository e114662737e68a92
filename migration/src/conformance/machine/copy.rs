//! A move without an engine: memory is copied in rounds, as the engine has it sent.

use crate::dirty::{DirtySet, runs};
use crate::machine::SourceMachine;
use crate::memory::{PAGE_SIZE, Ram};
use std::thread;
use std::time::Duration;

/// Words of a chunk, which is cleared and copied as a whole. The engine's are larger, and memory here is
/// smaller.
const CHUNK_WORDS: usize = 4;

/// Between two rounds, so that the guest can write.
const BETWEEN_ROUNDS: Duration = Duration::from_millis(5);

/// Copies `machine`'s memory to `to`: everything in the first of `rounds` rounds, what has been written since
/// in the others; then pauses the machine and copies the rest. Tracking goes on. Returns how many pages each
/// round but the first has found, that of the pause being the last.
///
/// # Panics
/// If the machine fails.
pub fn copy(machine: &impl SourceMachine, to: &Ram, rounds: usize) -> Vec<u64> {
    let ram = machine.ram();
    let mut set = DirtySet::empty(&ram);
    set.fill();
    machine.start_tracking().expect("tracking starts");
    let mut found = Vec::new();
    for _ in 0..rounds {
        send(machine, &ram, to, &set, true);
        thread::sleep(BETWEEN_ROUNDS);
        set.clear();
        machine.collect_dirty(&mut set).expect("dirty pages");
        found.push(set.count());
    }
    machine.pause().expect("the machine pauses");
    machine.collect_dirty(&mut set).expect("dirty pages of a paused machine");
    found.push(set.count());
    send(machine, &ram, to, &set, false);
    found
}

/// Copies a set of pages, with `clear` marking each chunk clean just before it is read. Two threads share the
/// chunks, as lanes do.
fn send(machine: &impl SourceMachine, ram: &Ram, to: &Ram, set: &DirtySet, clear: bool) {
    thread::scope(|scope| {
        for first in 0..2 {
            scope.spawn(move || {
                for region in 0..set.regions() {
                    let chunks = set.words(region).chunks(CHUNK_WORDS).enumerate();
                    for (number, words) in chunks.skip(first).step_by(2) {
                        let first_page = (number * CHUNK_WORDS * 64) as u64;
                        if clear && words.iter().any(|word| *word != 0) {
                            machine.clear_dirty(region, first_page, words).expect("pages marked clean");
                        }
                        for (page, pages) in runs(words, first_page) {
                            copy_pages(ram, to, region, page, pages);
                        }
                    }
                }
            });
        }
    });
}

/// Copies all of memory, which nobody writes.
pub fn copy_all(from: &Ram, to: &Ram) {
    for (number, region) in from.regions().iter().enumerate() {
        copy_pages(from, to, number, 0, region.pages());
    }
}

fn copy_pages(from: &Ram, to: &Ram, region: usize, page: u64, pages: u64) {
    let mut content = vec![0; (pages * PAGE_SIZE) as usize];
    from.regions()[region].read(page * PAGE_SIZE, &mut content).expect("readable memory");
    to.regions()[region].write(page * PAGE_SIZE, &content).expect("writable memory");
}

/// All that memory holds, region by region. A guest that runs may be writing it.
pub fn content(ram: &Ram) -> Vec<Vec<u8>> {
    let read = |region: &crate::memory::RamRegion| {
        let mut bytes = vec![0; region.len() as usize];
        region.read(0, &mut bytes).expect("readable memory");
        bytes
    };
    ram.regions().iter().map(read).collect()
}

/// The pages in which two memories of one layout differ, as region and page.
pub fn differences(a: &Ram, b: &Ram) -> Vec<(usize, usize)> {
    let pages = |region: &[u8]| region.chunks(PAGE_SIZE as usize).map(<[u8]>::to_vec).collect::<Vec<_>>();
    let mut different = Vec::new();
    for (region, (a, b)) in content(a).iter().zip(content(b)).enumerate() {
        let both = pages(a).into_iter().zip(pages(&b)).enumerate();
        different.extend(both.filter(|(_, (a, b))| a != b).map(|(page, _)| (region, page)));
    }
    different
}
