//! Guests that go on in another machine: state, time, interrupts and dirty pages.

mod common;

use common::guests::{self, AP_LOOPS, BACKWARDS, BAD_READS, LOOPS, TICKS};
use common::{boot, copy_ram, machine, peek, wait_above};
use migration::dirty::DirtySet;
use migration::machine::{DestinationHost, DestinationMachine, SourceMachine};
use std::sync::Arc;
use vm_memory::{Bytes, GuestAddress};
use whimbrel_vmm::incoming::{IncomingHost, IncomingOptions};
use whimbrel_vmm::{Machine, SerialOutput};

/// A paused machine's twin, not running yet.
fn twin(source: &Machine) -> Arc<Machine> {
    let options = IncomingOptions { serial: SerialOutput::Null, ..IncomingOptions::default() };
    let mut host = IncomingHost::open(options).unwrap();
    let layout = source.memory().ram().layout();
    let mut shadow = host.build(&source.describe().unwrap(), &layout).unwrap();
    // What it says of its memory, and what the engine then leaves out, is true.
    assert!(shadow.memory_is_zero());
    for region in shadow.machine().memory().ram().regions() {
        migration::scan::existing(region, 0, region.pages(), |first, _| panic!("page {first:#x} exists"));
    }
    copy_ram(source, &shadow.machine());
    shadow.load(&Machine::save(source).unwrap()).unwrap();
    shadow.machine()
}

/// Moves a running machine's guest into its twin, which then runs.
fn hop(source: &Machine) -> Arc<Machine> {
    Machine::pause(source).unwrap();
    let target = twin(source);
    source.stop();
    Machine::resume(&target).unwrap();
    target
}

#[test]
fn a_guest_goes_on_with_its_timer_and_its_tsc() {
    let first = machine(16, 1);
    first.boot(&boot(guests::ticker())).unwrap();
    Machine::resume(&first).unwrap();
    let mut current = Arc::new(first);
    for _ in 0..10 {
        let ticks = peek(&current, TICKS);
        wait_above(&current, TICKS, ticks + 2);
        let next = hop(&current);
        let (ticks, loops) = (peek(&current, TICKS), peek(&current, LOOPS));
        wait_above(&next, LOOPS, loops + 10);
        wait_above(&next, TICKS, ticks + 2);
        current = next;
    }
    Machine::pause(&current).unwrap();
    assert_eq!((peek(&current, BACKWARDS), peek(&current, BAD_READS)), (0, 0));
}

#[test]
fn a_deadline_timer_is_never_lost() {
    let first = machine(16, 1);
    first.boot(&boot(guests::deadline())).unwrap();
    Machine::resume(&first).unwrap();
    let mut current = Arc::new(first);
    wait_above(&current, TICKS, 2);
    for _ in 0..20 {
        let next = hop(&current);
        wait_above(&next, TICKS, peek(&current, TICKS) + 2);
        current = next;
    }
}

#[test]
fn ram_above_the_hole_is_tracked_and_moves() {
    let source = machine((3 << 10) + 256, 1);
    source.boot(&boot(guests::ticker())).unwrap();
    source.start_tracking().unwrap();
    clear_all(&source, &collected(&source));
    let high = GuestAddress((4 << 30) + (255 << 20) + 17);
    source.write_memory().unwrap().memory().write_obj(0x1234_5678u32, high).unwrap();
    let set = collected(&source);
    assert_eq!(set.count(), 1);
    assert_eq!(migration::dirty::runs(set.words(1), 0).next(), Some((255 << 8, 1)));
    source.stop_tracking().unwrap();
    Machine::resume(&source).unwrap();
    wait_above(&source, TICKS, 2);
    let target = hop(&source);
    wait_above(&target, TICKS, peek(&source, TICKS) + 2);
    assert_eq!(target.memory().read_obj::<u32>(high).unwrap(), 0x1234_5678);
}

#[test]
fn every_vcpu_goes_on() {
    let source = machine(16, 4);
    source.boot(&boot(guests::smp())).unwrap();
    Machine::resume(&source).unwrap();
    let counters = [LOOPS, AP_LOOPS + 4, AP_LOOPS + 8, AP_LOOPS + 12];
    for at in counters {
        wait_above(&source, at, 0);
    }
    let target = hop(&source);
    for at in counters {
        wait_above(&target, at, peek(&source, at));
    }
}

#[test]
fn a_vcpu_that_was_never_started_stays_so_and_can_be_started_later() {
    let source = machine(16, 2);
    source.boot(&boot(guests::smp())).unwrap();
    let target = twin(&source);
    Machine::resume(&target).unwrap();
    wait_above(&target, AP_LOOPS + 4, 0);
}

#[test]
fn state_that_is_cut_or_changed_is_refused_and_never_panics() {
    let source = machine(16, 2);
    source.boot(&boot(guests::smp())).unwrap();
    let state = Machine::save(&source).unwrap();
    let target = machine(16, 2);
    for end in (0..state.len()).step_by(97) {
        assert!(Machine::load(&target, &state[..end]).is_err(), "cut at {end}");
    }
    assert!(Machine::load(&target, &[&state[..], b"x"].concat()).is_err());
    for at in (0..state.len()).step_by(13) {
        let mut damaged = state.clone();
        damaged[at] ^= 0x81;
        // KVM itself may take some values that make no sense; what matters is that it is asked.
        let _ = Machine::load(&target, &damaged);
    }
    assert!(Machine::load(&machine(16, 1), &state).is_err(), "two vCPUs do not go into one");
    assert!(Machine::load(&machine(16, 3), &state).is_err(), "two vCPUs do not make three");
    let target = machine(16, 2);
    copy_ram(&source, &target);
    Machine::load(&target, &state).unwrap();
    Machine::resume(&target).unwrap();
    wait_above(&target, AP_LOOPS + 4, 0);
}

#[test]
fn a_host_refuses_a_cpu_it_does_not_have() {
    let host = whimbrel_vmm::Host::open().unwrap();
    let mut config = whimbrel_vmm::MachineConfig::new(&host, 16 << 20, 1).unwrap();
    config.serial = SerialOutput::Null;
    // Itanium emulation: a bit that no KVM offers.
    config.cpuid.iter_mut().filter(|e| e.function == 1).for_each(|e| e.edx |= 1 << 30);
    let source = Machine::build(&host, config).unwrap();
    let mut here = IncomingHost::open(IncomingOptions::default()).unwrap();
    let refused = here.build(&source.describe().unwrap(), &source.memory().ram().layout()).err().unwrap();
    assert_eq!(refused.code, migration::Code::CPU);
    assert!(refused.message.contains("CPUID 0x1 EDX bit 30"), "{refused}");
}

fn collected(machine: &Machine) -> DirtySet {
    let mut set = DirtySet::empty(machine.memory().ram());
    machine.collect_dirty(&mut set).unwrap();
    set
}

fn clear_all(machine: &Machine, set: &DirtySet) {
    (0..set.regions()).for_each(|region| machine.clear_dirty(region, 0, set.words(region)).unwrap());
}

/// Pauses the guest of `guests::toucher`, once it has been round again since its pages were cleared. The page
/// with its count of rounds is then all that is dirty.
fn pause_after_another_round(machine: &Machine) {
    let loops = peek(machine, LOOPS);
    wait_above(machine, LOOPS, loops);
    Machine::pause(machine).unwrap();
    let set = collected(machine);
    assert_eq!(migration::dirty::runs(set.words(0), 0).collect::<Vec<_>>(), [(0x200, 1)]);
}

#[test]
fn writes_of_guest_and_vmm_show_until_cleared_and_again_after() {
    let machine = machine(16, 1);
    machine.boot(&boot(guests::toucher())).unwrap();
    let pages = machine.memory().ram().regions()[0].pages();
    machine.start_tracking().unwrap();
    assert_eq!(collected(&machine).count(), pages, "at first everything counts as dirty");
    clear_all(&machine, &collected(&machine));
    assert_eq!(collected(&machine).count(), 0);

    machine.write_memory().unwrap().memory().write_obj(1u8, GuestAddress(0x30_0fff)).unwrap();
    let set = collected(&machine);
    assert_eq!(migration::dirty::runs(set.words(0), 0).collect::<Vec<_>>(), [(0x300, 1)]);
    assert_eq!(collected(&machine), set, "collecting clears nothing");
    // Only the pages asked for are cleared.
    machine.clear_dirty(0, 0x2c0, &[u64::MAX]).unwrap();
    assert_eq!(collected(&machine), set);
    machine.clear_dirty(0, 0x300, &[1]).unwrap();
    assert_eq!(collected(&machine).count(), 0);

    Machine::resume(&machine).unwrap();
    wait_above(&machine, LOOPS, 0x20_0000);
    Machine::pause(&machine).unwrap();
    let set = collected(&machine);
    for page in 0x200..0x400u64 {
        assert!(set.words(0)[(page / 64) as usize] >> (page % 64) & 1 == 1, "page {page:#x}");
    }
    clear_all(&machine, &set);
    assert_eq!(collected(&machine).count(), 0);
    Machine::resume(&machine).unwrap();
    pause_after_another_round(&machine);

    // A second attempt starts with everything, whatever the first had cleared.
    machine.stop_tracking().unwrap();
    machine.start_tracking().unwrap();
    assert_eq!(collected(&machine).count(), pages);
    assert!(machine.clear_dirty(0, 1, &[1]).is_err());
    assert!(machine.clear_dirty(0, pages, &[1]).is_err());
    assert!(machine.clear_dirty(7, 0, &[1]).is_err());
}

#[test]
fn huge_pages_leave_the_dirty_log_as_fine_as_it_was() {
    let machine = machine(64, 1);
    machine.boot(&boot(guests::toucher())).unwrap();
    // As huge as this host has them: at once, where the kernel makes them when it is asked.
    machine.memory().populate(1).unwrap();
    if let Err(why) = whimbrel_vmm::memory::thp::try_collapse() {
        println!("this host makes no huge pages: {why}");
    }
    machine.start_tracking().unwrap();
    Machine::resume(&machine).unwrap();
    wait_above(&machine, LOOPS, 0x20_0000);
    for _ in 0..3 {
        Machine::pause(&machine).unwrap();
        clear_all(&machine, &collected(&machine));
        assert_eq!(collected(&machine).count(), 0);
        Machine::resume(&machine).unwrap();
        pause_after_another_round(&machine);
        Machine::resume(&machine).unwrap();
    }
}

#[test]
fn a_second_save_after_a_load_is_equal_but_for_time() {
    let source = machine(16, 2);
    source.boot(&boot(guests::smp())).unwrap();
    Machine::resume(&source).unwrap();
    wait_above(&source, AP_LOOPS + 4, 10);
    Machine::pause(&source).unwrap();
    let saved = Machine::save(&source).unwrap();
    assert_eq!(differences(&saved, &Machine::save(&source).unwrap()), [""; 0], "saving changes nothing");
    let target = twin(&source);
    assert_eq!(differences(&saved, &Machine::save(&target).unwrap()), [""; 0], "loading gives the same");
}

/// The parts in which two states of two vCPUs differ, time aside.
fn differences(a: &[u8], b: &[u8]) -> Vec<String> {
    let (a, b) = (whimbrel_vmm::state::timeless(a, 2).unwrap(), whimbrel_vmm::state::timeless(b, 2).unwrap());
    assert_eq!(a.len(), b.len());
    a.into_iter().zip(b).filter(|(a, b)| a != b).map(|((name, _), _)| name).collect()
}

/// Not a test of speed: prints what each step of a blackout costs on this host.
#[test]
#[ignore = "prints measurements; run it with --ignored --nocapture"]
fn blackout_costs() {
    for vcpus in [1, 4] {
        let mut spans: [Vec<f64>; 5] = Default::default();
        let mut timed = |number: usize, step: &mut dyn FnMut()| {
            let begin = std::time::Instant::now();
            step();
            spans[number].push(begin.elapsed().as_secs_f64() * 1e6);
        };
        let source = machine(1024, vcpus);
        source.boot(&boot(if vcpus == 1 { guests::ticker() } else { guests::smp() })).unwrap();
        Machine::resume(&source).unwrap();
        wait_above(&source, LOOPS, 1000);
        for _ in 0..50 {
            let mut target = None;
            timed(4, &mut || target = Some(machine(1024, vcpus)));
            let target = target.unwrap();
            let mut state = Vec::new();
            timed(0, &mut || Machine::pause(&source).unwrap());
            timed(1, &mut || state = Machine::save(&source).unwrap());
            timed(2, &mut || Machine::load(&target, &state).unwrap());
            timed(3, &mut || Machine::resume(&source).unwrap());
            let loops = peek(&source, LOOPS);
            wait_above(&source, LOOPS, loops);
        }
        for (name, span) in ["pause", "save", "load", "resume", "build"].iter().zip(&mut spans) {
            span.sort_by(f64::total_cmp);
            println!(
                "{vcpus} vCPU {name:>6}: median {:7.0} us, worst {:7.0} us",
                span[span.len() / 2],
                span[49]
            );
        }
    }
}
