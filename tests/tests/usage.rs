//! Commands that cannot do what they are asked to: one clear message and the documented exit code.

use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use whimbrel_tests::command::run;
use whimbrel_tests::say;
use whimbrel_tests::sides::Guest;

#[path = "../../vmm/tests/common/elf.rs"]
mod elf;

/// `hlt`, over and over.
const HALT: &[u8] = &[0xf4, 0xeb, 0xfd];

#[test]
fn wrong_usage() {
    let long = "x".repeat(129);
    let commands: [&[&str]; 11] = [
        &["run", "--no-such-flag"],
        &["run", "--memory", "much"],
        &["run", "--vcpus", "0"],
        &["run", "--vcpus", "255"],
        &["run", "--initramfs", "file-without-kernel"],
        &["receive"],
        &["receive", "--listen", "nowhere"],
        &["migrate", "--api", "x", "--to", "y:1", "--on-stall", "panic"],
        &["fly"],
        &["run", "--name", ""],
        &["run", "--name", &long],
    ];
    for command in commands {
        let ran = run(command);
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.stderr.starts_with("error: ") && ran.stdout.is_empty(), "{ran:?}");
    }
    say::figures("wrong usage", format_args!("{} commands, exit code 2 each", commands.len()));
}

#[test]
fn configuration_files_that_are_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm.toml");
    let config = path.to_str().unwrap();
    run(["run", "--config", config]).refused(2, "cannot read the configuration file");
    for (content, message) in [
        (&b"memory = '64M'\ncolour = 'red'\n"[..], "vm.toml:2: \"colour\" is not an option"),
        (b"memory = 'much'\n", "vm.toml:1: invalid value 'much'"),
        (b"memory = \n", "vm.toml:1: "),
        (b"\xff\xfe", "cannot read the configuration file"),
    ] {
        std::fs::write(&path, content).unwrap();
        run(["run", "--config", config]).refused(2, message);
    }
    run(["receive", "--config", "/"]).refused(2, "cannot read the configuration file");
    say::figures("configuration files that are wrong", "6 refused, exit code 2 each");
}

#[test]
fn machines_that_cannot_be() {
    let run = |memory: &str| run(["run", "--serial", "none", "--memory", memory]);
    for (memory, message) in [
        ("0", "0 bytes of guest memory: use at least 16 MiB"),
        ("15M", "use at least 16 MiB"),
        ("17000000", "in whole MiB"),
    ] {
        let ran = run(memory);
        assert!(ran.code == Some(2) && ran.stderr.contains(message), "{ran:?}");
    }
    run("900G").refused(1, "the host has");
    run("1000000T").refused(1, "of guest memory");
    whimbrel_tests::command::run(["run", "--serial", "none", "--vcpus", "65"])
        .refused(1, "the embedded guest has at most 64");
    say::figures("machines that cannot be", "5 sizes and a number of vCPUs refused");
}

#[test]
fn kernels_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| -> PathBuf {
        let path = folder.path().join(name);
        std::fs::File::create(&path).unwrap().write_all(content).unwrap();
        path
    };
    let run = |kernel: &Path| {
        run(["run", "--serial", "none", "--memory", "16M", "--kernel", kernel.to_str().unwrap()])
    };
    let good = elf::pvh_elf(HALT);
    let mut of_32_bits = good.clone();
    of_32_bits[4] = 1;
    let mut without_entry = good.clone();
    without_entry[64 + 56] = 0;
    let absent = run(&folder.path().join("absent"));
    absent.refused(1, "cannot read kernel");
    assert_eq!(absent.stderr.matches("os error 2").count(), 1, "the cause is told once: {absent:?}");
    run(folder.path()).refused(1, "cannot read kernel");
    run(&file("empty", b"")).refused(1, "kernel");
    run(&file("garbage", &[0x5a; 100_000])).refused(1, "kernel");
    run(&file("truncated", &good[..good.len() - 2])).refused(1, "kernel");
    run(&file("headers-only", &good[..70])).refused(1, "kernel");
    run(&file("32-bit", &of_32_bits)).refused(1, "kernel");
    run(&file("no-entry", &without_entry)).refused(1, "PVH");
    say::figures("kernels that are none", "8 files refused");
}

#[test]
fn addresses_that_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    run(["receive", "--listen", &address]).refused(1, "another program listens there");
    run(["receive", "--listen", "192.0.2.1:4444", "--insecure"]).refused(1, "this host has no such address");
    let receive = |option, value| run(["receive", "--listen", "127.0.0.1:0", option, value]);
    receive("--disks", "/nonexistent").refused(1, "cannot use /nonexistent as a folder of disks");
    receive("--disks", "/dev/null").refused(1, "cannot use /dev/null as a folder of disks");
    receive("--net", "tap=nonexistent").refused(1, "there is no tap nonexistent");
    receive("--record", "/nonexistent/moves").refused(1, "cannot keep records in /nonexistent/moves");

    let guest = Guest::SMALL.start(folder.path(), "guest");
    let api = guest.api_path().to_str().unwrap();
    run(["run", "--serial", "none", "--api", api]).refused(1, "in use by a running virtual machine");
    let file = folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    let ran = run(["run", "--serial", "none", "--api", file.to_str().unwrap()]);
    ran.refused(1, "not a socket");
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    run(["status", "--api", "/nonexistent.sock"]).refused(8, "no virtual machine answers");
    say::figures("addresses", "5 that are taken or are nowhere refused");
}
