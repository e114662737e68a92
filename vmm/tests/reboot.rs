//! Guests that reset their machine, before, while and after they move.

mod common;

use common::guests::{self, AP_LOOPS, BAD_READS, BOOTS, LOOPS, RESET, TICKS};
use common::{boot, copy_ram, peek, wait_above};
use migration::dirty::DirtySet;
use migration::machine::{DestinationHost, DestinationMachine, SourceMachine};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use whimbrel_vmm::incoming::{IncomingHost, IncomingOptions};
use whimbrel_vmm::virtio::DeviceConfig;
use whimbrel_vmm::{Boot, Crash, Host, Machine, MachineConfig, Outcome, Reboot, SerialOutput};

const PATIENCE: Duration = Duration::from_secs(60);

/// A machine with this guest in it, which boots again when it is reset.
fn rebooting(guest: &Boot, vcpus: u32, devices: Vec<DeviceConfig>) -> Machine {
    let host = Host::open().unwrap();
    let config = MachineConfig::new(&host, 16 << 20, vcpus).unwrap();
    let reboot = Reboot::keeping(guest).unwrap();
    let machine =
        Machine::build(&host, MachineConfig { serial: SerialOutput::Null, devices, reboot, ..config })
            .unwrap();
    machine.boot(guest).unwrap();
    machine
}

/// Where the machine's guest goes on.
fn twin(source: &Machine) -> Arc<Machine> {
    let options = IncomingOptions { serial: SerialOutput::Null, ..IncomingOptions::default() };
    let mut host = IncomingHost::open(options).unwrap();
    let layout = source.memory().ram().layout();
    let mut shadow = host.build(&source.describe().unwrap(), &layout).unwrap();
    copy_ram(source, &shadow.machine());
    shadow.load(&Machine::save(source).unwrap()).unwrap();
    shadow.machine()
}

#[test]
fn every_way_to_reset_a_pc_boots_the_guest_again_with_all_its_vcpus() {
    let machine = rebooting(&boot(guests::rebooter()), 2, Vec::new());
    let told = Arc::new(AtomicU32::new(0));
    let count = told.clone();
    machine.on_notice(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
    });
    Machine::resume(&machine).unwrap();
    wait_above(&machine, LOOPS, 100);
    assert_eq!((peek(&machine, BOOTS), told.load(Ordering::Relaxed)), (4, 3));
    let other = peek(&machine, AP_LOOPS + 4);
    wait_above(&machine, AP_LOOPS + 4, other);
    assert!(machine.is_running() && machine.outcome().is_none());
}

#[test]
fn a_guest_that_does_nothing_but_reset_is_ended() {
    let machine = rebooting(&boot(guests::storm()), 1, Vec::new());
    Machine::resume(&machine).unwrap();
    let outcome = machine.wait_timeout(PATIENCE);
    let Some(Outcome::Crashed(Crash::NotRebooted { why })) = outcome else { panic!("{outcome:?}") };
    assert!(why.contains("times within"), "{why}");
}

#[test]
fn a_reset_device_works_with_the_driver_that_comes_next() {
    let machine = rebooting(&boot(guests::entropy()), 1, vec![DeviceConfig::Rng]);
    Machine::resume(&machine).unwrap();
    for _ in 0..3 {
        let served = peek(&machine, LOOPS);
        wait_above(&machine, LOOPS, served + 20);
        machine.write_memory().unwrap().memory().write_obj(1u32, GuestAddress(RESET)).unwrap();
        let begin = std::time::Instant::now();
        while peek(&machine, RESET) != 0 {
            assert!(begin.elapsed() < PATIENCE);
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(400)); // so that it is no storm
    }
    let served = peek(&machine, LOOPS);
    wait_above(&machine, LOOPS, served + 20);
    assert_eq!(peek(&machine, BAD_READS), 0);
    assert!(peek(&machine, TICKS) > 0);
}

#[test]
fn pausing_while_a_guest_resets_itself_all_the_time_loses_neither() {
    let machine = rebooting(&boot(guests::again()), 1, Vec::new());
    Machine::resume(&machine).unwrap();
    let begin = std::time::Instant::now();
    while peek(&machine, BOOTS) < 3 {
        Machine::pause(&machine).unwrap();
        let boots = peek(&machine, BOOTS);
        let state = Machine::save(&machine).unwrap();
        assert_eq!(peek(&machine, BOOTS), boots, "it ran while it was paused");
        assert!(!state.is_empty());
        Machine::resume(&machine).unwrap();
        std::thread::sleep(Duration::from_millis(1));
        assert!(begin.elapsed() < PATIENCE);
    }
}

#[test]
fn a_guest_that_has_moved_boots_again_without_the_files_it_came_from() {
    let machine = rebooting(&boot(guests::entropy()), 1, vec![DeviceConfig::Rng]);
    Machine::resume(&machine).unwrap();
    wait_above(&machine, LOOPS, 20);
    Machine::pause(&machine).unwrap();
    let target = twin(&machine);
    drop(machine);
    let (sender, rebooted) = mpsc::channel();
    target.on_notice(move |_| sender.send(()).unwrap_or_default());
    assert!(target.write_memory().is_err());
    Machine::resume(&target).unwrap();
    target.write_memory().unwrap().memory().write_obj(1u32, GuestAddress(RESET)).unwrap();
    rebooted.recv_timeout(PATIENCE).unwrap();
    let served = peek(&target, LOOPS);
    wait_above(&target, LOOPS, served + 20);
    assert_eq!(peek(&target, BAD_READS), 0);
    // And once more, from there to a third.
    Machine::pause(&target).unwrap();
    let third = twin(&target);
    drop(target);
    Machine::resume(&third).unwrap();
    let served = peek(&third, LOOPS);
    wait_above(&third, LOOPS, served + 20);
}

#[test]
fn what_a_reset_writes_is_in_the_dirty_log() {
    let machine = rebooting(&boot(guests::entropy()), 1, vec![DeviceConfig::Rng]);
    let (sender, rebooted) = mpsc::channel();
    machine.on_notice(move |_| sender.send(()).unwrap_or_default());
    Machine::resume(&machine).unwrap();
    wait_above(&machine, LOOPS, 20);
    machine.start_tracking().unwrap();
    let collected = || {
        let mut set = DirtySet::empty(machine.memory().ram());
        machine.collect_dirty(&mut set).unwrap();
        set
    };
    let all: u64 = machine.memory().ram().regions().iter().map(|region| region.pages()).sum();
    let set = collected();
    assert_eq!(set.count(), all, "what it boots from goes along in the first round");
    (0..set.regions()).for_each(|region| machine.clear_dirty(region, 0, set.words(region)).unwrap());
    machine.write_memory().unwrap().memory().write_obj(1u32, GuestAddress(RESET)).unwrap();
    rebooted.recv_timeout(PATIENCE).unwrap();
    let served = peek(&machine, LOOPS);
    wait_above(&machine, LOOPS, served + 20);
    let set = collected();
    let kernel = 0x100;
    assert!(set.words(0)[kernel / 64] >> (kernel % 64) & 1 == 1, "the kernel's page");
    assert!(set.words(1).iter().all(|word| *word == 0), "what it boots from is only read");
}
