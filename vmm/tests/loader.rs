//! Kernel images, good and bad.

mod common;

use common::{guests, machine, pvh_elf};
use whimbrel_vmm::{Boot, Error, Image, Machine, loader};

fn boot_bytes(machine: &Machine, image: Vec<u8>) -> Result<(), Error> {
    let kernel = Image::Bytes(image.into());
    machine.boot(&Boot { kernel, cmdline: "console=ttyS0".into(), initramfs: None })
}

/// A bzImage of `len` bytes of kernel, which are never run.
fn bzimage(len: usize) -> Vec<u8> {
    let mut image = vec![0u8; 1024 + len];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // one setup sector after the boot sector
    put(0x1f4, &((len / 16) as u32).to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]); // loaded high
    put(0x214, &0x10_0000u32.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes()); // highest initramfs address
    put(0x236, &1u16.to_le_bytes()); // has a 64-bit entry
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x10_0000u64.to_le_bytes());
    put(0x260, &(4u32 << 20).to_le_bytes());
    image
}

#[test]
fn what_is_no_kernel_is_refused_by_name() {
    let machine = machine(16, 1);
    let refused = |image: Vec<u8>| match boot_bytes(&machine, image).unwrap_err() {
        Error::Loader(error) => error,
        other => panic!("{other}"),
    };
    for image in [vec![], vec![0; 100], vec![0x55; 100_000], b"#!/bin/sh\n".to_vec()] {
        assert!(matches!(refused(image), loader::Error::UnknownFormat));
    }
    let elf = pvh_elf(guests::hello());
    for end in 4..elf.len() {
        assert!(matches!(refused(elf[..end].to_vec()), loader::Error::Elf(_)), "cut at {end}");
    }
    let mut without_note = elf.clone();
    without_note[64 + 56] = 0;
    assert!(matches!(refused(without_note), loader::Error::NoPvhEntry));
    let mut for_arm = elf.clone();
    for_arm[18] = 183;
    assert!(matches!(refused(for_arm), loader::Error::WrongMachine { machine: 183, .. }));
    let mut too_big = elf.clone();
    too_big[64 + 40..64 + 48].copy_from_slice(&(1u64 << 40).to_le_bytes());
    assert!(matches!(refused(too_big), loader::Error::TooBig { what: "kernel", .. }));

    let good = bzimage(64 << 10);
    assert!(matches!(refused(good[..good.len() - 100].to_vec()), loader::Error::Truncated { .. }));
    let mut without_entry = good.clone();
    without_entry[0x236] = 0;
    assert!(matches!(refused(without_entry), loader::Error::No64BitEntry { version: 0x20f }));
    let mut greedy = good;
    greedy[0x260..0x264].copy_from_slice(&(64u32 << 20).to_le_bytes());
    assert!(matches!(refused(greedy), loader::Error::TooBig { .. }));
}

#[test]
fn files_and_command_lines_that_cannot_be_are_refused() {
    let machine = machine(16, 1);
    let boot = |kernel: &str, cmdline: &str, initramfs: Option<&str>| {
        let kernel = match kernel {
            "" => Image::Bytes(pvh_elf(guests::hello()).into()),
            path => Image::File(path.into()),
        };
        let initramfs = initramfs.map(|path| Image::File(path.into()));
        machine.boot(&Boot { kernel, cmdline: cmdline.into(), initramfs })
    };
    for path in ["/nonexistent", "/", "/dev/zero"] {
        let error = boot(path, "", None).unwrap_err().to_string();
        assert!(error.contains("cannot read kernel") && error.contains(path), "{error}");
    }
    let error = boot("", "", Some("/nonexistent")).unwrap_err().to_string();
    assert!(error.contains("cannot read initramfs"), "{error}");
    for cmdline in ["a\0b".to_string(), "x".repeat(2048)] {
        let error = boot("", &cmdline, None).unwrap_err();
        assert!(matches!(error, Error::Loader(loader::Error::CommandLine { most: 2047, .. })), "{error}");
    }
    let directory = tempfile::tempdir().unwrap();
    let huge = directory.path().join("initramfs");
    std::fs::File::create(&huge).unwrap().set_len(20 << 20).unwrap();
    let error = boot("", "", huge.to_str()).unwrap_err();
    assert!(matches!(error, Error::Loader(loader::Error::TooBig { what: "initramfs", .. })), "{error}");
    std::fs::File::create(&huge).unwrap().set_len(8 << 20).unwrap();
    boot("", &"x".repeat(2047), huge.to_str()).unwrap();
}

#[test]
fn damaged_images_never_panic() {
    let machine = machine(16, 1);
    // A fixed linear congruential generator: the same damage in every run.
    let mut seed = 42u64;
    let mut next = |below: usize| {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 33) as usize % below
    };
    let (elf, linux) = (pvh_elf(guests::hello()), bzimage(4096));
    assert!(boot_bytes(&machine, elf.clone()).is_ok() && boot_bytes(&machine, linux.clone()).is_ok());
    for _ in 0..4000 {
        for (image, headers) in [(&elf, 4..200), (&linux, 0x1f1..0x270)] {
            let mut damaged = image.clone();
            for _ in 0..=next(4) {
                let at = headers.start + next(headers.len());
                damaged[at] = [0, 0xff, 0x80, next(256) as u8][next(4)];
            }
            // Some damage does not matter to a loader; what it may not do is panic.
            let _ = boot_bytes(&machine, damaged);
        }
    }
}
