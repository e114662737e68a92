//! Images made by the programs that make real ones: `mkfs.ext4` and `sfdisk`.

use super::*;
use crate::loader::Image;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::process::{Command, Stdio};
use tempfile::TempDir;

const UUID: &str = "0f3ae5a1-4c5c-4bb4-9a54-0e4b2d6f3c11";
const MIB: u64 = 1 << 20;

/// A folder that becomes a root file system.
struct Root(TempDir);

impl Root {
    fn new() -> Self {
        let root = Root(tempfile::tempdir().unwrap());
        for folder in ["etc", "boot"] {
            fs::create_dir(root.0.path().join(folder)).unwrap();
        }
        root
    }

    /// As Debian lays it out: links to files with a version in their name.
    fn debian(kernel: &[u8], initramfs: &[u8]) -> Self {
        Root::new()
            .file("boot/vmlinuz-6.1.0-1-amd64", kernel)
            .file("boot/initrd.img-6.1.0-1-amd64", initramfs)
            .link("boot/vmlinuz-6.1.0-1-amd64", "vmlinuz")
            .link("boot/initrd.img-6.1.0-1-amd64", "initrd.img")
    }

    fn file(self, name: &str, content: &[u8]) -> Self {
        fs::write(self.0.path().join(name), content).unwrap();
        self
    }

    fn link(self, target: &str, name: &str) -> Self {
        symlink(target, self.0.path().join(name)).unwrap();
        self
    }

    /// An image of 16 MiB; the file system begins at `start`. `kind` is ext2, ext3 or ext4.
    fn image(&self, kind: &str, table: Option<&str>) -> Disk {
        let disk = Disk::empty(16 * MIB);
        let start = if let Some(table) = table {
            tool("sfdisk", &[Path::new("--quiet"), disk.path()], table);
            MIB
        } else {
            0
        };
        self.put_into(&disk, kind, start, 14 * MIB);
        disk
    }

    /// Makes a file system of `len` bytes at `start`.
    fn put_into(&self, disk: &Disk, kind: &str, start: u64, len: u64) {
        let offset = format!("offset={start}");
        let size = format!("{}k", len >> 10);
        let options = ["-q", "-F", "-t", kind, "-U", UUID, "-E", &offset, "-d"].map(Path::new);
        let rest = [self.0.path(), disk.path(), Path::new(&size)];
        tool("mkfs.ext4", &[&options[..], &rest[..]].concat(), "");
    }
}

struct Disk {
    _folder: TempDir,
    config: BlockConfig,
}

impl Disk {
    fn empty(len: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        File::create(&path).unwrap().set_len(len).unwrap();
        // With direct I/O where the folder has it.
        let config = BlockConfig::new(path);
        let cached = matches!(DiskImage::open(&config, &Images::Any), Err(block::Error::NoDirectIo { .. }));
        Disk { _folder: folder, config: BlockConfig { cached, ..config } }
    }

    fn path(&self) -> &Path {
        &self.config.path
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        File::options().write(true).open(self.path()).unwrap().write_all_at(bytes, at).unwrap();
    }

    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        File::open(self.path()).unwrap().read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn boot(&self) -> Result<Boot, Error> {
        read(&self.config, 0, "console=ttyS0")
    }

    fn refused(&self) -> String {
        self.boot().unwrap_err().to_string()
    }
}

fn tool(program: &str, arguments: &[&Path], input: &str) {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{program}: {e}; ci/setup installs it"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Content of which no two blocks are equal.
fn content(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 4096 * 7 + at) as u8).collect()
}

fn bytes(image: &Image) -> &[u8] {
    match image {
        Image::Bytes(bytes) => bytes,
        Image::File(path) => panic!("{}", path.display()),
    }
}

const GPT: &str = "label: gpt\nstart=1MiB, size=14MiB, uuid=6A1E4C9A-7D7B-4F42-9D53-3A3E0C9B7F10\n";
const MBR: &str = "label: dos\nlabel-id: 0x8badf00d\nstart=1MiB, size=14MiB, type=83, bootable\n";

#[test]
fn every_layout_gives_its_kernel_and_names_its_root() {
    let (kernel, initramfs) = (content(3_000_001), content(5_000_003));
    let root = Root::debian(&kernel, &initramfs);
    for (table, device) in [
        (None, format!("UUID={UUID}")),
        (Some(GPT), "PARTUUID=6a1e4c9a-7d7b-4f42-9d53-3a3e0c9b7f10".into()),
        (Some(MBR), "PARTUUID=8badf00d-01".into()),
    ] {
        for kind in ["ext2", "ext3", "ext4"] {
            let boot = root.image(kind, table).boot().unwrap();
            assert_eq!(boot.cmdline, format!("root={device} ro console=ttyS0"));
            assert!(bytes(&boot.kernel) == kernel && bytes(boot.initramfs.as_ref().unwrap()) == initramfs);
        }
    }
}

#[test]
fn a_kernel_without_initramfs_is_told_a_device() {
    let disk = Root::new().file("boot/vmlinuz", b"kernel").image("ext4", None);
    for (index, name) in [(0, "vda"), (25, "vdz"), (26, "vdaa"), (701, "vdzz"), (702, "vdaaa")] {
        let boot = read(&disk.config, index, "").unwrap();
        assert_eq!((boot.cmdline, boot.initramfs.is_none()), (format!("root=/dev/{name} ro"), true));
    }
}

#[test]
fn what_cannot_be_booted_is_said() {
    let refused = Disk::empty(16 * MIB).refused();
    assert!(refused.contains("(the whole disk: no such file system)"), "{refused}");
    assert!(refused.contains("Pass --kernel"), "{refused}");
    let refused = Root::new().image("ext4", Some(GPT)).refused();
    assert!(refused.contains("(partition 1: none there)"), "{refused}");
    // A link to nowhere: another file system is mounted at /boot.
    let refused = Root::new().link("boot/vmlinuz-9", "vmlinuz").image("ext4", None).refused();
    assert!(refused.contains("(the whole disk: none there)"), "{refused}");
    let refused = Root::new().link("vmlinuz", "vmlinuz").image("ext4", None).refused();
    assert!(refused.contains("cannot read /vmlinuz"), "{refused}");
    // A file system for /boot alone.
    let boot = Root(tempfile::tempdir().unwrap()).file("vmlinuz", b"kernel");
    let refused = boot.image("ext4", Some(MBR)).refused();
    assert!(refused.contains("(partition 1: no root file system)"), "{refused}");
    let empty = Disk::empty(16 * MIB);
    tool("sfdisk", &[Path::new("--quiet"), empty.path()], "label: gpt\n");
    assert!(empty.refused().contains("its partition table is empty"));
    assert!(Disk::empty(4096).refused().contains("the whole disk"));
}

#[test]
fn a_separate_boot_file_system_is_found() {
    const TABLE: &str = "label: gpt\n\
        start=1MiB, size=6MiB, uuid=11111111-7D7B-4F42-9D53-3A3E0C9B7F10\n\
        start=8MiB, size=6MiB, uuid=22222222-7D7B-4F42-9D53-3A3E0C9B7F10\n";
    let (kernel, initramfs) = (content(300_001), content(400_003));
    let boot = || {
        let boot = Root(tempfile::tempdir().unwrap());
        boot.file("vmlinuz-9", &kernel).file("initrd.img-9", &initramfs)
    };
    // As Debian has it: the links are in the root directory. And as Ubuntu has it: they are beside the files,
    // with others that have to be gone through as well.
    let debian = Root::new().link("boot/vmlinuz-9", "vmlinuz").link("boot/initrd.img-9", "initrd.img");
    let beside = || boot().link("./../boot//vmlinuz-9", "vmlinuz").link("/boot/initrd.img-9", "initrd.img");
    for (root, boot) in [(&debian, boot()), (&Root::new(), beside())] {
        // Whichever of them is first.
        for (first, second, device) in [(root, &boot, 1), (&boot, root, 2)] {
            let disk = Disk::empty(16 * MIB);
            tool("sfdisk", &[Path::new("--quiet"), disk.path()], TABLE);
            first.put_into(&disk, "ext4", MIB, 6 * MIB);
            second.put_into(&disk, "ext4", 8 * MIB, 6 * MIB);
            let found = disk.boot().unwrap();
            let device = device.to_string().repeat(8);
            let cmdline = format!("root=PARTUUID={device}-7d7b-4f42-9d53-3a3e0c9b7f10 ro console=ttyS0");
            assert_eq!(found.cmdline, cmdline);
            assert!(bytes(&found.kernel) == kernel && bytes(found.initramfs.as_ref().unwrap()) == initramfs);
        }
    }
    // One that has no kernel is not taken for one that has.
    let disk = Disk::empty(16 * MIB);
    tool("sfdisk", &[Path::new("--quiet"), disk.path()], TABLE);
    debian.put_into(&disk, "ext4", MIB, 6 * MIB);
    Root(tempfile::tempdir().unwrap()).put_into(&disk, "ext2", 8 * MIB, 6 * MIB);
    let refused = disk.refused();
    assert!(refused.contains("(partition 1: none there, partition 2: no root file system)"), "{refused}");
}

#[test]
fn a_link_that_lies_about_its_length_allocates_nothing() {
    // Longer than what an inode holds, so that it has a block, whose content counts.
    let target = format!("{}boot/vmlinuz-9", "./".repeat(40));
    let root = Root::new().file("boot/vmlinuz-9", b"kernel").link(&target, "vmlinuz");
    let disk = root.image("ext2", None);
    disk.boot().unwrap();
    let found = Command::new("debugfs").args(["-R", "stat /vmlinuz"]).arg(disk.path()).output().unwrap();
    assert!(String::from_utf8_lossy(&found.stdout).contains("Type: symlink"));
    // 2^33 bytes.
    let change = ["-w", "-R", "set_inode_field /vmlinuz size 8589934592"].map(Path::new);
    tool("debugfs", &[&change[..], &[disk.path()]].concat(), "");
    let refused = disk.refused();
    assert!(
        refused.contains("cannot read /vmlinuz") && refused.contains("a link of 8589934592 bytes"),
        "{refused}"
    );
}

#[test]
fn a_disk_in_use_is_not_read() {
    let disk = Root::debian(b"kernel", b"initramfs").image("ext4", None);
    let owner = DiskImage::open(&disk.config, &Images::Any).unwrap();
    owner.take_lock().unwrap();
    let refused = disk.refused();
    assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
    owner.release_lock().unwrap();
    disk.boot().unwrap();
    // And the lock is free again.
    owner.take_lock().unwrap();
}

#[test]
fn sizes_that_are_lies_allocate_nothing() {
    let disk = Root::debian(&content(8192), b"initramfs").image("ext2", None);
    let superblock: [u8; 1024] = disk.get(1024);
    for (at, value) in [
        (24, 7u32),     // blocks of 128 KiB
        (24, u32::MAX), // and of far more
        (4, 1 << 30),   // more blocks than the disk has
        (32, 0),        // in groups of none
    ] {
        disk.put(1024 + at, &value.to_le_bytes());
        let refused = disk.refused();
        assert!(refused.contains("the whole disk: ") && !refused.contains("none there"), "{refused}");
        disk.put(1024, &superblock);
    }
    disk.boot().unwrap();

    let disk = Root::new().file("vmlinuz", b"kernel").image("ext2", None);
    File::options().write(true).open(disk.path()).unwrap().set_len(MIB * MIB).unwrap();
    disk.put(1024 + 4, &(1u32 << 30).to_le_bytes());
    disk.put(1024 + 32, &1u32.to_le_bytes());
    let refused = disk.refused();
    assert!(refused.contains("in groups of 1"), "{refused}");

    // A hole of 300 MiB is a file of that size.
    let root = Root::new();
    File::create(root.0.path().join("vmlinuz")).unwrap().set_len(300 * MIB).unwrap();
    let error = root.image("ext4", None).boot().unwrap_err();
    assert!(matches!(error, Error::TooBig { file: "/vmlinuz", len, .. } if len == 300 * MIB), "{error}");
}

#[test]
fn partition_tables_that_are_lies_are_survived() {
    let disk = Root::debian(b"kernel", b"initramfs").image("ext4", Some(GPT));
    let header: [u8; 512] = disk.get(512);
    for (at, value) in [
        (80, vec![0xff; 4]),                         // entries without end
        (84, vec![0xff; 4]),                         // of a size without bounds
        (84, vec![0; 4]),                            // of none
        (72, vec![0xff; 8]),                         // beyond all numbers
        (72, (16 * MIB / 512).to_le_bytes().into()), // beyond the disk
    ] {
        disk.put(512 + at, &value);
        // More entries than are looked at still leave the first ones.
        assert!(disk.boot().is_ok() == (at == 80), "{at}");
        disk.put(512, &header);
    }
    let entry: [u8; 128] = disk.get(1024);
    for (at, value) in [(32, u64::MAX), (40, u64::MAX), (40, 0), (32, 0), (40, 1 << 40)] {
        disk.put(1024 + at, &value.to_le_bytes());
        assert!(disk.refused().contains("its partition table is empty"));
        disk.put(1024, &entry);
    }
    disk.boot().unwrap();
}

#[test]
fn damaged_disks_never_panic() {
    // A fixed linear congruential generator: the same damage in every run.
    let mut seed = 42u64;
    let mut next = |below: u64| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) % below
    };
    let root = Root::debian(&content(200_000), &content(300_000));
    for (kind, table) in [("ext2", None), ("ext4", Some(GPT))] {
        let disk = root.image(kind, table);
        let len = fs::metadata(disk.path()).unwrap().len();
        // Where there is something: damage to holes of the image shows nothing.
        let used: Vec<u64> = (0..len / 1024).filter(|b| disk.get::<1024>(b * 1024) != [0; 1024]).collect();
        let mut booted = 0;
        for _ in 0..300 {
            let mut undo = Vec::new();
            for _ in 0..=next(8) {
                // Structures mostly, which come before content.
                let among = next(used.len() as u64) + 1;
                let block = used[next(among) as usize];
                let at = block * 1024 + next(1024);
                undo.push((at, disk.get::<1>(at)));
                disk.put(at, &[[0, 0xff, 0x80, next(256) as u8][next(4) as usize]]);
            }
            booted += u32::from(disk.boot().is_ok());
            undo.iter().rev().for_each(|(at, byte)| disk.put(*at, byte));
        }
        assert!((1..300).contains(&booted), "{booted} of 300 damaged disks");
        disk.boot().unwrap();
    }
}

#[test]
fn a_guest_that_is_reset_boots_the_kernel_that_is_then_on_its_disk() {
    use crate::guest::{ELF, testimony};
    use crate::virtio::DeviceConfig;
    use crate::{Host, Machine, MachineConfig, Reboot, SerialOutput};
    use std::time::{Duration, Instant};

    let disk = Root::new().file("vmlinuz", ELF).image("ext4", None);
    let host = Host::open().unwrap();
    let config = MachineConfig {
        serial: SerialOutput::Null,
        devices: vec![DeviceConfig::Rng, DeviceConfig::Block(disk.config.clone())],
        reboot: Reboot::Disk { cmdline: "vcpus=1 hz=100".into() },
        ..MachineConfig::new(&host, 32 << 20, 1).unwrap()
    };
    let machine = Machine::build(&host, config).unwrap();
    machine.boot(&read(&disk.config, 0, "vcpus=1 hz=20").unwrap()).unwrap();
    let (sender, rebooted) = std::sync::mpsc::channel();
    machine.on_notice(move |_| sender.send(()).unwrap_or_default());
    machine.resume().unwrap();
    let wait_running = || {
        let begin = Instant::now();
        while testimony(machine.memory()).is_none_or(|told| told.vcpus != 1) {
            assert!(begin.elapsed() < Duration::from_secs(60) && machine.outcome().is_none());
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    wait_running();
    // As its own driver does.
    assert!(machine.shared.reset_as_guest());
    rebooted.recv_timeout(Duration::from_secs(60)).unwrap();
    wait_running();
    let mut cmdline = vec![0; 64];
    machine.memory().read_slice(&mut cmdline, vm_memory::GuestAddress(0x2_0000)).unwrap();
    let cmdline = String::from_utf8_lossy(&cmdline);
    assert!(cmdline.contains("root=") && cmdline.contains("hz=100"), "{cmdline}");
    // Without a kernel it ends, and says why.
    disk.put(1024, &[0; 1024]);
    assert!(machine.shared.reset_as_guest());
    let why = machine.wait_timeout(Duration::from_secs(60)).unwrap().to_string();
    assert!(why.contains("cannot boot again") && why.contains("no kernel to boot"), "{why}");
}
