//! PCI devices under a real guest, and machines with disks that change hands.

mod common;

use common::guests::{self, BAD_READS, LOOPS, TICKS};
use common::{DISK_BYTES, boot, copy_ram, disk, machine_with_devices, peek, wait_above};
use migration::dirty::{DirtySet, runs};
use migration::machine::{DestinationHost, DestinationMachine, SourceMachine};
use migration::{Code, Failure};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use whimbrel_vmm::incoming::{IncomingHost, IncomingMachine, IncomingOptions};
use whimbrel_vmm::limits::Limits;
use whimbrel_vmm::virtio::block::{BlockConfig, Images};
use whimbrel_vmm::virtio::{DeviceConfig, LocalConfig};
use whimbrel_vmm::{Machine, SerialOutput};

/// The code of what the engine is told when the disks are not to be had.
fn refusal(taken: Result<(), whimbrel_vmm::Error>) -> Code {
    Failure::from(taken.unwrap_err()).code
}

/// A host that takes in guests with disks below these folders.
fn host(folders: &[&Path]) -> IncomingHost {
    let images = Images::Below(folders.iter().map(PathBuf::from).collect());
    let local = LocalConfig { images, ..LocalConfig::default() };
    IncomingHost::open(IncomingOptions { serial: SerialOutput::Null, local, ..IncomingOptions::default() })
        .unwrap()
}

/// The same, without proof that the disks are the source's.
fn trusting_host(folder: &Path) -> IncomingHost {
    let local = LocalConfig { images: Images::Below(vec![folder.into()]), ..LocalConfig::default() };
    let serial = SerialOutput::Null;
    let options = IncomingOptions { serial, local, trust_storage: true, ..IncomingOptions::default() };
    IncomingHost::open(options).unwrap()
}

fn shadow(source: &Machine, folders: &[&Path]) -> Result<IncomingMachine, Failure> {
    let layout = source.memory().ram().layout();
    host(folders).build(&source.describe().unwrap(), &layout)
}

/// The parts in which two states of one vCPU differ, time aside.
fn differences(a: &[u8], b: &[u8]) -> Vec<String> {
    let (a, b) = (whimbrel_vmm::state::timeless(a, 1).unwrap(), whimbrel_vmm::state::timeless(b, 1).unwrap());
    assert_eq!(a.len(), b.len());
    a.into_iter().zip(b).filter(|(a, b)| a != b).map(|((name, _), _)| name).collect()
}

/// Moves the guest on, disks and all, as the engine does.
fn hop(source: &Machine, folders: &[&Path]) -> Arc<Machine> {
    let mut target = shadow(source, folders).unwrap();
    SourceMachine::pause(source).unwrap();
    copy_ram(source, &target.machine());
    let saved = SourceMachine::save(source).unwrap();
    target.load(&saved).unwrap();
    let again = target.machine().save().unwrap();
    assert_eq!(differences(&saved, &again), [""; 0], "saved, loaded and saved again");
    source.release_disk_locks().unwrap();
    target.machine().take_disk_locks().unwrap();
    source.stop();
    target.run().unwrap();
    target.machine()
}

#[test]
fn a_guest_that_uses_a_device_goes_on_and_loses_no_interrupt() {
    let folder = tempfile::tempdir().unwrap();
    let devices = vec![DeviceConfig::Rng, disk(folder.path(), "a"), DeviceConfig::Console];
    let first = machine_with_devices(16, 1, devices);
    assert!(first.disk_locks_decide());
    first.boot(&boot(guests::entropy())).unwrap();
    Machine::resume(&first).unwrap();
    let mut current = Arc::new(first);
    wait_above(&current, LOOPS, 5);
    for _ in 0..20 {
        let next = hop(&current, &[folder.path()]);
        wait_above(&next, LOOPS, peek(&current, LOOPS) + 5);
        current = next;
    }
    // Pauses in place do it no harm either.
    for _ in 0..100 {
        Machine::pause(&current).unwrap();
        let (loops, ticks) = (peek(&current, LOOPS), peek(&current, TICKS));
        current.save().unwrap();
        assert_eq!((peek(&current, LOOPS), peek(&current, TICKS)), (loops, ticks));
        Machine::resume(&current).unwrap();
        std::thread::yield_now();
    }
    wait_above(&current, LOOPS, peek(&current, LOOPS) + 5);
    assert_eq!(peek(&current, BAD_READS), 0);
}

#[test]
fn what_a_device_writes_is_dirty() {
    // Where the guest has its used ring and the buffer, neither of which it writes itself.
    const DEVICE_PAGES: [u64; 2] = [0x302, 0x303];
    let machine = machine_with_devices(16, 1, vec![DeviceConfig::Rng]);
    machine.boot(&boot(guests::entropy())).unwrap();
    Machine::resume(&machine).unwrap();
    wait_above(&machine, LOOPS, 5);
    machine.start_tracking().unwrap();
    for round in 0..10 {
        SourceMachine::pause(&machine).unwrap();
        let mut set = DirtySet::empty(machine.memory().ram());
        machine.collect_dirty(&mut set).unwrap();
        let dirty: Vec<_> = runs(set.words(0), 0).flat_map(|(first, count)| first..first + count).collect();
        assert!(DEVICE_PAGES.iter().all(|page| dirty.contains(page)), "round {round}: {dirty:x?}");
        assert!(round == 0 || dirty.len() < 20, "round {round}: {dirty:x?}");
        machine.clear_dirty(0, 0, set.words(0)).unwrap();
        let mut set = DirtySet::empty(machine.memory().ram());
        machine.collect_dirty(&mut set).unwrap();
        assert_eq!(set.count(), 0, "a paused machine writes nothing");
        SourceMachine::resume(&machine).unwrap();
        wait_above(&machine, LOOPS, peek(&machine, LOOPS) + 2);
    }
}

#[test]
fn what_exceeds_a_limit_is_refused_before_anything_is_built() {
    let folder = tempfile::tempdir().unwrap();
    let devices =
        vec![disk(folder.path(), "a"), disk(folder.path(), "b"), DeviceConfig::Rng, DeviceConfig::Console];
    let source = machine_with_devices(16, 2, devices);
    source.boot(&boot(guests::hello())).unwrap();
    let (description, layout) = (source.describe().unwrap(), source.memory().ram().layout());
    // Whoever opened a disk would say that it is not there.
    std::fs::remove_file(folder.path().join("a")).unwrap();
    let build = |limits: Limits| {
        let local =
            LocalConfig { images: Images::Below(vec![folder.path().into()]), ..LocalConfig::default() };
        let options =
            IncomingOptions { serial: SerialOutput::Null, local, limits, ..IncomingOptions::default() };
        IncomingHost::open(options).unwrap().build(&description, &layout).err().unwrap()
    };
    let names = |pattern: &str| vec![pattern.parse().unwrap()];
    let none = Limits::default();
    for (limits, what) in [
        (
            Limits { memory: Some((16 << 20) - 1), ..none.clone() },
            "16 MiB of memory, of which at most 15 MiB",
        ),
        (Limits { vcpus: Some(1), ..none.clone() }, "2 vCPUs, of which at most 1 are allowed"),
        (Limits { disks: Some(1), ..none.clone() }, "2 disks, of which at most 1 are allowed"),
        (Limits { rngs: Some(0), ..none.clone() }, "1 entropy devices, of which at most 0 are allowed"),
        (Limits { consoles: Some(0), ..none.clone() }, "1 consoles, of which at most 0 are allowed"),
        (Limits { names: names("web*"), ..none.clone() }, "its name is vm, and only web* may come"),
    ] {
        let refused = build(limits);
        assert_eq!(refused.code, Code::LIMITS, "{refused}");
        assert!(refused.message.contains(what) && refused.message.lines().count() == 1, "{refused}");
    }
    let several = build(Limits { vcpus: Some(1), disks: Some(0), ..none.clone() });
    assert!(several.message.contains("2 vCPUs") && several.message.contains("2 disks"), "{several}");
    // Whatever is within its limits goes on to its disks.
    let within = Limits {
        memory: Some(16 << 20),
        vcpus: Some(2),
        disks: Some(2),
        nics: Some(0),
        rngs: Some(1),
        consoles: Some(1),
        names: names("v*"),
    };
    for limits in [within, none] {
        assert_eq!(build(limits).code, Code::DEVICE);
    }
}

#[test]
fn what_a_destination_lacks_is_refused_before_anything_moves() {
    let folder = tempfile::tempdir().unwrap();
    let source = machine_with_devices(16, 1, vec![disk(folder.path(), "a")]);
    source.boot(&boot(guests::hello())).unwrap();
    source.take_disk_locks().unwrap();
    let refused = |folders: &[&Path]| shadow(&source, folders).err().unwrap();
    let not_allowed = refused(&[]);
    assert_eq!(not_allowed.code, Code::DEVICE);
    assert!(not_allowed.message.contains("--disks"), "{not_allowed}");
    assert!(shadow(&source, &[folder.path()]).is_ok());
    let image = folder.path().join("a");
    std::fs::OpenOptions::new().write(true).open(&image).unwrap().set_len(DISK_BYTES * 2).unwrap();
    let resized = refused(&[folder.path()]);
    assert_eq!(resized.code, Code::DEVICE);
    assert!(resized.message.contains(&(DISK_BYTES * 2).to_string()), "{resized}");
    std::fs::remove_file(&image).unwrap();
    let missing = refused(&[folder.path()]);
    assert_eq!(missing.code, Code::DEVICE);
    assert!(missing.message.contains("cannot open the disk image"), "{missing}");
}

/// Puts an equal file in its place.
fn exchange(image: &Path) {
    let copy = image.with_extension("copy");
    std::fs::copy(image, &copy).unwrap();
    std::fs::rename(copy, image).unwrap();
}

#[test]
fn a_disk_that_only_looks_like_the_source_s_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for readonly in [false, true] {
        let DeviceConfig::Block(config) = disk(folder.path(), "a") else { unreachable!("a disk") };
        let config = DeviceConfig::Block(BlockConfig { readonly, ..config });
        let source = machine_with_devices(16, 1, vec![disk(folder.path(), "b"), config]);
        source.boot(&boot(guests::hello())).unwrap();
        source.take_disk_locks().unwrap();
        assert!(shadow(&source, &[folder.path()]).is_ok(), "readonly: {readonly}");
        exchange(&folder.path().join("a"));
        let refused = shadow(&source, &[folder.path()]).err().unwrap();
        assert_eq!(refused.code, Code::DEVICE);
        assert!(refused.message.contains("--trust-storage"), "{refused}");
        let layout = source.memory().ram().layout();
        assert!(trusting_host(folder.path()).build(&source.describe().unwrap(), &layout).is_ok());
    }
}

#[test]
fn an_image_that_is_not_raw_is_refused_before_it_is_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    let put = |at: u64, bytes: &[u8]| {
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().write_all_at(bytes, at).unwrap();
    };
    let device = disk(folder.path(), "a");
    let build = || {
        let machine = machine_with_devices(16, 1, vec![device.clone()]);
        machine.boot(&boot(guests::hello())).unwrap();
        machine
    };
    let formats: [(u64, &[u8], &str); 6] = [
        (0, b"QFI\xfb\0\0\0\x03", "qcow2"),
        (0, b"KDMV", "vmdk"),
        (0, b"# Disk DescriptorFile\n", "vmdk"),
        (64, b"\x7f\x10\xda\xbe", "vdi"),
        (0, b"vhdxfile", "vhdx"),
        (0, b"conectix", "vpc"),
    ];
    for (at, magic, name) in formats {
        let machine = build();
        put(at, magic);
        let refused = Machine::resume(&machine).unwrap_err().to_string();
        assert!(refused.contains(&format!("format {name}")), "{refused}");
        assert!(refused.contains("qemu-img convert -O raw"), "{refused}");
        put(at, &vec![0; magic.len()]);
        machine.take_disk_locks().unwrap();
    }
    // What is a disk of the guest's already may have what the guest likes.
    let source = build();
    source.take_disk_locks().unwrap();
    put(0, b"QFI\xfb");
    let layout = source.memory().ram().layout();
    let description = source.describe().unwrap();
    assert!(shadow(&source, &[folder.path()]).is_ok());
    source.release_disk_locks().unwrap();
    source.take_disk_locks().unwrap();
    // Where nothing but the operator's word says that it is the same one, it must be raw.
    drop(source);
    let refused = trusting_host(folder.path()).build(&description, &layout).err().unwrap();
    assert!(refused.message.contains("format qcow2"), "{refused}");
}

#[test]
fn nobody_runs_without_all_of_its_disks() {
    let folder = tempfile::tempdir().unwrap();
    let devices = || vec![disk(folder.path(), "a"), disk(folder.path(), "b")];
    let source = machine_with_devices(16, 1, devices());
    source.boot(&boot(guests::ticker())).unwrap();
    Machine::resume(&source).unwrap();
    let second = machine_with_devices(16, 1, devices());
    second.boot(&boot(guests::ticker())).unwrap();
    let refused: Failure = Machine::resume(&second).unwrap_err().into();
    assert_eq!(refused.code, Code::DISKS);
    assert!(refused.message.contains(&format!("process {}", std::process::id())), "{refused}");

    // A destination may be built beside it, but gets the disks only when they are given up.
    let target = shadow(&source, &[folder.path()]).unwrap();
    assert_eq!(refusal(target.machine().take_disk_locks()), Code::DISKS);
    assert!(source.release_disk_locks().is_err(), "not while it runs");
    SourceMachine::pause(&source).unwrap();
    source.release_disk_locks().unwrap();

    // One that gets only one of two has not used it: the source may go on.
    let DeviceConfig::Block(shared) = disk(folder.path(), "b") else { unreachable!("a disk") };
    let reader = DeviceConfig::Block(BlockConfig { readonly: true, ..shared });
    let reader = machine_with_devices(16, 1, vec![reader]);
    reader.take_disk_locks().unwrap();
    assert_eq!(refusal(target.machine().take_disk_locks()), Code::DISKS);
    assert!(source.take_disk_locks().is_err(), "nor does the source get both");
    drop(reader);
    source.take_disk_locks().unwrap();
    SourceMachine::resume(&source).unwrap();
    wait_above(&source, TICKS, peek(&source, TICKS) + 2);
    drop(target);

    // One that gets both may have run: the source has neither, and would go on from memory that is older than
    // they are.
    let target = shadow(&source, &[folder.path()]).unwrap();
    SourceMachine::pause(&source).unwrap();
    source.release_disk_locks().unwrap();
    target.machine().take_disk_locks().unwrap();
    assert_eq!(refusal(source.take_disk_locks()), Code::DISKS);
    let held: Failure = Machine::resume(&source).unwrap_err().into();
    assert_eq!(held.code, Code::DISKS, "not even by force");
    drop(target);
    for _ in 0..2 {
        let older: Failure = Machine::resume(&source).unwrap_err().into();
        assert_eq!(older.code, Code::DISKS);
        assert!(older.message.contains("has been used elsewhere since"), "{older}");
    }

    // The disks are there for one that starts anew.
    let anew = machine_with_devices(16, 1, devices());
    anew.boot(&boot(guests::ticker())).unwrap();
    Machine::resume(&anew).unwrap();
    wait_above(&anew, TICKS, 2);
}

#[test]
fn more_devices_than_the_bus_has_places_are_refused() {
    let host = whimbrel_vmm::Host::open().unwrap();
    let config = whimbrel_vmm::MachineConfig::new(&host, 16 << 20, 1).unwrap();
    let build = |count| {
        let devices = vec![DeviceConfig::Rng; count];
        Machine::build(
            &host,
            whimbrel_vmm::MachineConfig { serial: SerialOutput::Null, devices, ..config.clone() },
        )
    };
    assert!(build(31).is_ok());
    assert!(build(32).err().unwrap().to_string().contains("at most 31"));
}
