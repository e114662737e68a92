//! What a host decides about guests that come.

mod common;

use common::guests;
use common::{DISK_BYTES, boot, disk, machine_with_devices};
use migration::machine::{DestinationHost, SourceMachine};
use migration::{Code, Failure};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use whimbrel_vmm::admission::{Admission, Admitted, Guest};
use whimbrel_vmm::incoming::{IncomingHost, IncomingMachine, IncomingOptions};
use whimbrel_vmm::limits::Limits;
use whimbrel_vmm::virtio::DeviceConfig;
use whimbrel_vmm::virtio::block::{BlockConfig, Images, Storages};
use whimbrel_vmm::{Host, Machine, MachineConfig, SerialOutput};

/// What the host is asked, and how many reservations there are.
#[derive(Debug, Default)]
struct Seen {
    asked: Mutex<Vec<String>>,
    held: AtomicUsize,
}

/// Has one storage, which is this folder.
#[derive(Debug)]
struct Decides {
    seen: Arc<Seen>,
    fast: PathBuf,
    refuses: bool,
}

struct Held(Arc<Seen>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admission for Decides {
    fn admit(&self, guest: &Guest<'_>) -> Result<Admitted, Failure> {
        let disks = guest.disks().map(|disk| format!("{:?} {}", disk.storage, disk.path.display()));
        let said = format!("{} {} {} {:?}", guest.name, guest.memory, guest.vcpus, disks.collect::<Vec<_>>());
        self.seen.asked.lock().unwrap().push(said);
        if self.refuses {
            return Err(Failure::new(Code::LIMITS, "not today"));
        }
        self.seen.held.fetch_add(1, Ordering::Relaxed);
        let storages = Storages::from([("fast".into(), self.fast.clone())]);
        Ok(Admitted {
            images: Some(Images::Named(storages, Box::default())),
            reservation: Some(Box::new(Held(Arc::clone(&self.seen)))),
            ..Admitted::default()
        })
    }
}

/// A machine whose disk is the file `a` of the storage `fast`, which is this folder here.
fn source(folder: &Path) -> Machine {
    let DeviceConfig::Block(by_path) = disk(folder, "a") else { unreachable!("a disk") };
    let named = BlockConfig { storage: Some("fast".into()), path: "a".into(), ..by_path };
    let host = Host::open().unwrap();
    let mut config = MachineConfig::new(&host, 16 << 20, 1).unwrap();
    config.name = "web1".into();
    config.serial = SerialOutput::Null;
    config.devices = vec![DeviceConfig::Rng, DeviceConfig::Block(named)];
    let storages = Storages::from([("fast".into(), folder.into())]);
    config.local.images = Images::Named(storages, Box::default());
    let machine = Machine::build(&host, config).unwrap();
    machine.boot(&boot(guests::hello())).unwrap();
    machine.take_disk_locks().unwrap();
    machine
}

fn build(source: &Machine, admission: Decides, limits: Limits) -> Result<IncomingMachine, Failure> {
    let admission: Option<Arc<dyn Admission>> = Some(Arc::new(admission));
    let serial = SerialOutput::Null;
    let options = IncomingOptions { serial, admission, limits, ..IncomingOptions::default() };
    let layout = source.memory().ram().layout();
    IncomingHost::open(options).unwrap().build(&source.describe().unwrap(), &layout)
}

#[test]
fn a_guest_gets_what_the_host_decides_and_holds_it_while_it_is_there() {
    let (folder, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let source = source(folder.path());
    let seen = Arc::new(Seen::default());
    let decides = |fast: &Path, refuses| Decides { seen: Arc::clone(&seen), fast: fast.into(), refuses };
    let held = || seen.held.load(Ordering::Relaxed);
    let none = Limits::default;

    let tight = Limits { memory: Some(1 << 20), ..none() };
    assert!(build(&source, decides(folder.path(), false), tight).is_err());
    assert!(seen.asked.lock().unwrap().is_empty(), "nobody is asked about a guest beyond the limits");

    let refused = build(&source, decides(folder.path(), true), none()).err().unwrap();
    assert_eq!((refused.code, refused.message.as_str()), (Code::LIMITS, "not today"));
    assert_eq!(seen.asked.lock().unwrap()[..], [format!("web1 {} 1 [\"Some(\\\"fast\\\") a\"]", 16 << 20)]);

    // It has another file by this name, which nobody has locked.
    std::fs::File::create(elsewhere.path().join("a")).unwrap().set_len(DISK_BYTES).unwrap();
    let refused = build(&source, decides(elsewhere.path(), false), none()).err().unwrap();
    assert!(refused.message.contains(elsewhere.path().to_str().unwrap()), "{refused}");
    assert_eq!(held(), 0, "given up with the guest");

    let machine = build(&source, decides(folder.path(), false), none()).unwrap();
    assert_eq!(held(), 1);
    drop(machine);
    assert_eq!(held(), 0);
}

#[test]
fn a_host_that_knows_no_storage_refuses_a_disk_in_one() {
    let folder = tempfile::tempdir().unwrap();
    let source = source(folder.path());
    let options = IncomingOptions { serial: SerialOutput::Null, ..IncomingOptions::default() };
    let layout = source.memory().ram().layout();
    let refused = IncomingHost::open(options).unwrap().build(&source.describe().unwrap(), &layout);
    let refused = refused.err().unwrap();
    assert_eq!(refused.code, Code::DEVICE);
    assert!(refused.message.contains("the storage fast, which this host does not know"), "{refused}");
    // One by path comes as before.
    let unnamed = machine_with_devices(16, 1, vec![DeviceConfig::Rng]);
    let layout = unnamed.memory().ram().layout();
    let options = IncomingOptions { serial: SerialOutput::Null, ..IncomingOptions::default() };
    IncomingHost::open(options).unwrap().build(&unnamed.describe().unwrap(), &layout).unwrap();
}
