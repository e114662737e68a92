//! A disk to boot from: its partition table and its file system, as a guest may have left them. The first
//! byte chooses a good disk; the rest changes it.

#![no_main]

use libfuzzer_sys::fuzz_target;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use tempfile::TempDir;
use vmm::boot_disk;
use vmm::virtio::block::BlockConfig;
use whimbrel_fuzz::{Input, change};

/// Bytes of a disk, and of its file system where it has partitions.
const LEN: usize = 512 << 10;
const START: usize = 64 << 10;
/// Bytes of each of two file systems.
const HALF: usize = 192 << 10;

/// Disks: empty; a file system; a GPT with one; an MBR with one; an MBR with one for /boot and one for the
/// rest. Each is a file with its content.
struct Disks {
    _folder: TempDir,
    good: [(PathBuf, File, Vec<u8>); 5],
}

/// The folder of a whole system, and of one without and with nothing but what is in /boot.
fn systems(folder: &TempDir) -> [PathBuf; 3] {
    let [whole, rest, boot] = ["whole", "rest", "boot"].map(|name| folder.path().join(name));
    for folder in [&whole.join("boot"), &whole.join("etc"), &rest.join("boot"), &rest.join("etc"), &boot] {
        std::fs::create_dir_all(folder).expect("a folder");
    }
    for boot in [&whole.join("boot"), &boot] {
        std::fs::write(boot.join("vmlinuz-1"), [0x90; 3000]).expect("a kernel");
        std::fs::write(boot.join("initrd-1"), [0x91; 2000]).expect("an initramfs");
    }
    for root in [&whole, &rest] {
        for (target, link) in [("boot/vmlinuz-1", "vmlinuz"), ("boot/initrd-1", "initrd.img")] {
            std::os::unix::fs::symlink(target, root.join(link)).expect("a link");
        }
    }
    [whole, rest, boot]
}

fn file_system(root: &Path, kind: &str, len: usize) -> Vec<u8> {
    let image = root.with_extension(kind);
    let status = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-t", kind, "-b", "1024", "-N", "32", "-O", "^has_journal", "-d"])
        .args([root, image.as_path()])
        .arg(format!("{}k", len >> 10))
        .status();
    assert!(status.expect("mkfs.ext4").success());
    std::fs::read(image).expect("an image")
}

/// A disk with these bytes.
fn disk(pieces: &[(usize, &[u8])]) -> Vec<u8> {
    let mut disk = vec![0; LEN];
    pieces.iter().for_each(|(at, bytes)| disk[*at..at + bytes.len()].copy_from_slice(bytes));
    disk
}

fn disks() -> &'static Disks {
    static DISKS: OnceLock<Disks> = OnceLock::new();
    DISKS.get_or_init(|| {
        let folder = tempfile::tempdir().expect("a folder");
        let [whole, rest, boot] = systems(&folder);
        let small = file_system(&whole, "ext2", LEN - START - 4096);
        let halves = [file_system(&rest, "ext4", HALF), file_system(&boot, "ext2", HALF)];
        let sectors = |bytes: usize| (bytes as u32 / 512).to_le_bytes();
        let gpt = disk(&[
            (512, b"EFI PART"),
            (512 + 72, &[2]),
            (512 + 80, &[4]),
            (512 + 84, &[128]),
            (1024, &[0xaf; 32]),
            (1024 + 32, &sectors(START)),
            (1024 + 40, &sectors(START + small.len() - 512)),
            (START, &small),
        ]);
        let mbr = disk(&[
            (446 + 4, &[0x83]),
            (446 + 8, &sectors(START)),
            (446 + 12, &sectors(small.len())),
            (510, &[0x55, 0xaa]),
            (START, &small),
        ]);
        let two = disk(&[
            (446 + 4, &[0x83]),
            (446 + 8, &sectors(START)),
            (446 + 12, &sectors(HALF)),
            (462 + 4, &[0x83]),
            (462 + 8, &sectors(START + HALF)),
            (462 + 12, &sectors(HALF)),
            (510, &[0x55, 0xaa]),
            (START, &halves[0]),
            (START + HALF, &halves[1]),
        ]);
        let whole = disk(&[(0, &file_system(&whole, "ext4", LEN))]);
        let mut number = 0;
        let good = [vec![0; LEN], whole, gpt, mbr, two].map(|content| {
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
    let (path, file, good) = &disks().good[usize::from(which % 5)];
    let mut changed = Vec::new();
    while let Some((at, bytes)) = change(LEN, &mut input) {
        file.write_all_at(bytes, at as u64).expect("a change");
        changed.push(at..at + bytes.len());
    }
    let read = boot_disk::read(&BlockConfig { cached: true, ..BlockConfig::new(path.clone()) }, 0, "quiet");
    assert!(!changed.is_empty() || read.is_ok() != (which % 5 == 0), "{:?}", read.err());
    for range in changed {
        file.write_all_at(&good[range.clone()], range.start as u64).expect("the disk as it was");
    }
});
