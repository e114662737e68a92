//! A disk to boot from: its partition table and its file system, as a guest may have left them. The first byte chooses a
//! good disk; the rest changes it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;
use vmm::boot_disk;
use vmm::virtio::block::BlockConfig;
use whimbrel_fuzz::{Input, patch};

/// Bytes of a disk, and of its file system where it has partitions.
const LEN: usize = 512 << 10;
const START: usize = 64 << 10;

/// Disks: empty; a file system; a GPT with one; an MBR with one.
struct Disks {
    folder: TempDir,
    good: [Vec<u8>; 4],
}

fn file_system(folder: &TempDir, kind: &str, len: usize) -> Vec<u8> {
    let (root, image) = (folder.path().join("root"), folder.path().join(kind));
    for folder in ["boot", "etc"] {
        std::fs::create_dir_all(root.join(folder)).expect("a folder");
    }
    std::fs::write(root.join("boot/vmlinuz-1"), [0x90; 3000]).expect("a kernel");
    std::fs::write(root.join("boot/initrd-1"), [0x91; 2000]).expect("an initramfs");
    for (target, link) in [("boot/vmlinuz-1", "vmlinuz"), ("boot/initrd-1", "initrd.img")] {
        let _ = std::os::unix::fs::symlink(target, root.join(link));
    }
    let status = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-t", kind, "-b", "1024", "-N", "32", "-O", "^has_journal", "-d"])
        .args([root.as_path(), image.as_path()])
        .arg(format!("{}k", len >> 10))
        .status();
    assert!(status.expect("mkfs.ext4").success());
    std::fs::read(image).expect("an image")
}

fn partitioned(table: &[(usize, &[u8])], file_system: &[u8]) -> Vec<u8> {
    let mut disk = vec![0; LEN];
    table.iter().for_each(|(at, bytes)| disk[*at..at + bytes.len()].copy_from_slice(bytes));
    disk[START..START + file_system.len()].copy_from_slice(file_system);
    disk
}

fn disks() -> &'static Disks {
    static DISKS: OnceLock<Disks> = OnceLock::new();
    DISKS.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let mut whole = file_system(&folder, "ext4", LEN);
        whole.resize(LEN, 0);
        let small = file_system(&folder, "ext2", LEN - START - 4096);
        let first = (START as u32 / 512).to_le_bytes();
        let sectors = (small.len() as u32 / 512).to_le_bytes();
        let last = (START as u32 / 512 + small.len() as u32 / 512 - 1).to_le_bytes();
        let gpt = partitioned(
            &[
                (512, b"EFI PART"),
                (512 + 72, &[2]),
                (512 + 80, &[4]),
                (512 + 84, &[128]),
                (1024, &[0xaf; 32]),
                (1024 + 32, &first),
                (1024 + 40, &last),
            ],
            &small,
        );
        let mbr = partitioned(
            &[(446 + 4, &[0x83]), (446 + 8, &first), (446 + 12, &sectors), (510, &[0x55, 0xaa])],
            &small,
        );
        Disks { folder, good: [vec![0; LEN], whole, gpt, mbr] }
    })
}

fuzz_target!(|bytes: &[u8]| {
    let Disks { folder, good } = disks();
    let mut input = Input(bytes);
    let Some(which) = input.byte() else { return };
    let unchanged = input.0.is_empty();
    let mut disk = good[usize::from(which % 4)].clone();
    patch(&mut disk, &mut input);
    let path = folder.path().join("disk");
    std::fs::write(&path, &disk).expect("a disk");
    let read = boot_disk::read(&BlockConfig { cached: true, ..BlockConfig::new(path) }, 0, "quiet");
    assert!(!unchanged || read.is_ok() != (which % 4 == 0), "{:?}", read.err());
});
