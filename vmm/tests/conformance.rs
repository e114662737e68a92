//! The machine and its host keep what `migration::machine` promises for them, with disks and without.

mod common;

use common::{boot, disk, guests, machine_with_devices};
use migration::conformance::machine::MachineFixture;
use migration::machine::SourceMachine;
use migration::memory::Extent;
use vm_memory::{Bytes, GuestAddress};
use whimbrel_vmm::incoming::{IncomingHost, IncomingOptions};
use whimbrel_vmm::virtio::block::Images;
use whimbrel_vmm::virtio::{DeviceConfig, LocalConfig};
use whimbrel_vmm::{Machine, SerialOutput};

const MIB: u64 = 16;

struct Vmm {
    folder: tempfile::TempDir,
    disks: &'static [&'static str],
}

fn with_disks(disks: &'static [&'static str]) -> Vmm {
    Vmm { folder: tempfile::tempdir().unwrap(), disks }
}

impl MachineFixture for Vmm {
    type Machine = Machine;
    type Host = IncomingHost;

    fn machine(&self) -> Machine {
        let disks = self.disks.iter().map(|name| disk(self.folder.path(), name));
        let devices = [DeviceConfig::Rng].into_iter().chain(disks).collect();
        let machine = machine_with_devices(MIB, 1, devices);
        machine.boot(&boot(guests::writer())).unwrap();
        SourceMachine::resume(&machine).unwrap();
        machine
    }

    fn host(&self) -> IncomingHost {
        let images = Images::Below(vec![self.folder.path().into()]);
        let local = LocalConfig { images, ..LocalConfig::default() };
        let serial = SerialOutput::Null;
        IncomingHost::open(IncomingOptions { serial, local, ..IncomingOptions::default() }).unwrap()
    }

    /// At the end of memory, where the guest does not write.
    fn vmm_writes(&self, machine: &Machine) -> Vec<Extent> {
        let offset = (MIB << 20) - 5000;
        machine.write_memory().unwrap().memory().write_slice(&[7; 2000], GuestAddress(offset)).unwrap();
        vec![Extent { region: 0, offset, len: 2000 }]
    }

    fn has_arbiter(&self) -> bool {
        !self.disks.is_empty()
    }
}

mod without_disks {
    migration::machine_conformance_suite!(super::with_disks(&[]));
}

mod with_two_disks {
    migration::machine_conformance_suite!(super::with_disks(&["a", "b"]));
}
