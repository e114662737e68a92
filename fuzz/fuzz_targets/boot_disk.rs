//! A disk to boot from: its partition table and its file system, as a guest may have left them. The first
//! byte chooses a good disk; the rest changes it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;
use vmm::boot_disk;
use vmm::virtio::block::BlockConfig;
use whimbrel_fuzz::{Input, change};

/// Bytes of a disk, and of its file system where it has partitions.
const LEN: usize = 512 << 10;
const START: usize = 64 << 10;

/// Disks: empty; a file system; a GPT with one; an MBR with one. Each is a file with its content.
struct Disks {
    _folder: TempDir,
    good: [(PathBuf, File, Vec<u8>); 4],
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
        let mut number = 0;
        let good = [vec![0; LEN], whole, gpt, mbr].map(|content| {
            number += 1;
            let path = folder.path().join(number.to_string());
            std::fs::write(&path, &content).expect("a disk");
            let file = File::options().write(true).open(&path).expect("the disk");
            (path, file, content)
        });
        Disks { _folder: folder, good }
    })
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let Some(which) = input.byte() else { return };
    let (path, file, good) = &disks().good[usize::from(which % 4)];
    let mut changed = Vec::new();
    while let Some((at, bytes)) = change(LEN, &mut input) {
        file.write_all_at(bytes, at as u64).expect("a change");
        changed.push(at..at + bytes.len());
    }
    let read = boot_disk::read(&BlockConfig { cached: true, ..BlockConfig::new(path.clone()) }, 0, "quiet");
    assert!(!changed.is_empty() || read.is_ok() != (which % 4 == 0), "{:?}", read.err());
    for range in changed {
        file.write_all_at(&good[range.clone()], range.start as u64).expect("the disk as it was");
    }
});
