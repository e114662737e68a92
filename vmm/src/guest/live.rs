//! Tests with the guest running: that it notices what a bad move would do to it. A verdict of "all right"
//! is worth as much as these.

use super::abi::{self, COMMAND_NONE, Cpu, PAGE, REPORT_ADDRESS};
use super::{Content, Request, When, Workload, header, request, set_phase, testimony};
use crate::{Boot, Host, Image, Machine, MachineConfig, Outcome, SerialOutput};
use migration::machine::SourceMachine;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 32 << 20;
const WORKING_SET: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A guest at work, with these words added to its command line.
fn start(vcpus: u32, working_set: u64, more: &str) -> Machine {
    let host = Host::open().unwrap();
    let config = MachineConfig::new(&host, MEMORY, vcpus).unwrap();
    let machine = Machine::build(&host, MachineConfig { serial: SerialOutput::Null, ..config }).unwrap();
    let content = Content::Random;
    let workload = Workload { vcpus, working_set, rate: 0, hz: None, fill: 0, content, journal: 0 };
    let cmdline = format!("{} {more}", workload.command_line());
    let kernel = Image::Bytes(super::ELF.into());
    machine.boot(&Boot { kernel, cmdline, initramfs: None }).unwrap();
    machine.resume().unwrap();
    machine
}

fn cpu(machine: &Machine, number: u64) -> Cpu {
    machine.memory().read_obj(GuestAddress(REPORT_ADDRESS + (number + 1) * PAGE)).unwrap()
}

fn wait(machine: &Machine, what: &str, happened: impl Fn() -> bool) {
    let began = Instant::now();
    while !happened() {
        assert!(machine.outcome().is_none(), "the guest ended: {}", machine.outcome().unwrap());
        assert!(began.elapsed() < PATIENCE, "{what} does not happen: {:?}", testimony(machine.memory()));
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Address of a word of the working set, which is at the end of a small guest's memory.
fn word(page: u64, index: u64, words: u64) -> GuestAddress {
    GuestAddress(MEMORY - WORKING_SET + page * PAGE + index * (PAGE / words))
}

/// Damages three pages of a paused guest: one is lost, one is old, one is half old.
fn damage(machine: &Machine, words: u64) {
    let writer = machine.write_memory().unwrap();
    let memory = writer.memory();
    let age = |page: u64, indices: std::ops::Range<u64>| {
        for index in indices {
            let found: u64 = memory.read_obj(word(page, index, words)).unwrap();
            let older = abi::generation_of(found, page, index).checked_sub(1).unwrap();
            memory.write_obj(abi::stamp(page, older, index), word(page, index, words)).unwrap();
        }
    };
    memory.write_slice(&[0; PAGE as usize], word(10, 0, words)).unwrap();
    age(20, 0..words);
    age(30, words / 2..words);
}

fn damage_is_told_apart(words: u64) {
    let machine = start(1, WORKING_SET, &format!("words={words}"));
    wait(&machine, "the third pass", || cpu(&machine, 0).passes >= 3);
    machine.pause().unwrap();
    assert!(testimony(machine.memory()).unwrap().clean);
    damage(&machine, words);
    machine.resume().unwrap();
    let passes = cpu(&machine, 0).passes;
    wait(&machine, "another pass", || cpu(&machine, 0).passes >= passes + 2);
    let cpu = cpu(&machine, 0);
    assert_eq!((cpu.lost, cpu.stale, cpu.torn), (1, 1, 1), "{:?}", testimony(machine.memory()));
    assert!(!testimony(machine.memory()).unwrap().clean);
    machine.stop();
}

#[test]
fn lost_stale_and_torn_pages_are_told_apart() {
    damage_is_told_apart(8);
}

#[test]
fn so_they_are_when_every_word_is_checked() {
    damage_is_told_apart(512);
}

#[test]
fn it_verifies_everything_and_powers_off_when_asked() {
    let machine = start(2, WORKING_SET, "step=3");
    wait(&machine, "the second pass", || (0..2).all(|number| cpu(&machine, number).passes >= 2));
    assert_eq!(header(&machine.memory()).unwrap().command, COMMAND_NONE);
    request(&machine, Request::PowerOff);
    assert_eq!(machine.wait_timeout(PATIENCE), Some(Outcome::PoweredOff));
    let testimony = testimony(machine.memory()).unwrap();
    assert_eq!((testimony.state.as_str(), testimony.verified), ("finished", WORKING_SET / PAGE));
    assert!(testimony.clean, "{testimony}");
}

#[test]
fn an_idle_guest_keeps_time_and_touches_next_to_nothing() {
    let machine = start(2, 0, "");
    wait(&machine, "ticking", || (0..2).all(|number| cpu(&machine, number).ticks >= 20));
    wait(&machine, "ticking of the PIT", || cpu(&machine, 0).pit_ticks >= 2);
    machine.pause().unwrap();
    let mut touched = 0;
    for region in machine.memory().ram().regions() {
        migration::scan::existing(region, 0, region.pages(), |_, pages| touched += pages * PAGE);
    }
    assert!(touched < 1 << 20, "{touched} bytes exist of an idle guest");
    assert!(testimony(machine.memory()).unwrap().clean);
    machine.stop();
}

/// What the guest is told may come at any time, also in the middle of a switchover.
#[test]
fn nothing_that_the_guest_is_told_is_written_while_it_is_being_moved() {
    let machine = start(1, WORKING_SET, "");
    wait(&machine, "the first pass", || cpu(&machine, 0).passes >= 1);
    let (told, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for phase in [When::During, When::After].iter().cycle() {
                if done.load(Ordering::Relaxed) {
                    return;
                }
                set_phase(&machine, *phase);
                told.fetch_add(1, Ordering::Relaxed);
            }
        });
        let report = || {
            let mut page = [0; PAGE as usize];
            machine.memory().read_slice(&mut page, GuestAddress(REPORT_ADDRESS)).unwrap();
            page
        };
        let mut changed = 0;
        for _ in 0..100 {
            SourceMachine::pause(&machine).unwrap();
            let before = report();
            // Two of them have begun and ended after the pause, whatever they did.
            let paused_at = told.load(Ordering::Relaxed);
            while told.load(Ordering::Relaxed) < paused_at + 3 {
                std::hint::spin_loop();
            }
            let after = report();
            changed += usize::from(before != after);
            SourceMachine::resume(&machine).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        assert_eq!(changed, 0, "of 100 pauses in which memory was written to");
    });
    set_phase(&machine, When::Before);
    assert_eq!(header(&machine.memory()).unwrap().phase, abi::PHASE_BEFORE, "a guest that runs is told");
    machine.stop();
}
