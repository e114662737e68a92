//! Guests that are not ours: a bare-metal program and Debian's kernel, as a bzImage and as an ELF file with a
//! PVH entry. The loader takes them and they can be moved. How far they come is up to the host's KVM: one
//! that emulates guest kernels stops at instructions that it does not know, and the test says how far it was.

use migration::report::{Report, Verdict};
use std::path::{Path, PathBuf};
use std::process::Command;
use whimbrel::api::model::VmState;
use whimbrel::node::Node;
use whimbrel_tests::command::run_command;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::say;
use whimbrel_tests::sides::{PATIENCE, migrate, request, wait_until};

#[path = "../../vmm/tests/common/elf.rs"]
mod elf;

/// Machine code, entered in 32-bit mode, that says the alphabet on the serial port over and over, and counts
/// in memory between any two letters.
const ALPHABET: &[u8] = &[
    0xba,
    0xf8,
    0x03,
    0x00,
    0x00, //       mov edx, 0x3f8
    0xb3,
    b'a', //                         mov bl, 'a'
    0xb9,
    0x00,
    0x08,
    0x00,
    0x00, // next: mov ecx, 0x800
    0xff,
    0x05,
    0x00,
    0x00,
    0x20,
    0x00, // count: inc dword [0x200000]
    0x49, //                               dec ecx
    0x75,
    0xf7, //                         jnz count
    0x88,
    0xd8, //                         mov al, bl
    0xee, //                               out dx, al
    0xfe,
    0xc3, //                         inc bl
    0x80,
    0xfb,
    b'z' + 1, //               cmp bl, 'z' + 1
    0x75,
    0xe8, //                         jnz next
    0xb3,
    b'a', //                         mov bl, 'a'
    0xeb,
    0xe4, //                         jmp next
];

/// A guest whose serial port is a file at each side.
struct Foreign {
    folder: tempfile::TempDir,
    node: Node,
    sides: usize,
}

impl Foreign {
    fn start(kernel: &Path, memory: &str, cmdline: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let serial = serial_file(folder.path(), 0);
        let arguments = ["run", "--memory", memory, "--cmdline", cmdline, "--kernel"];
        let arguments = arguments.map(PathBuf::from).into_iter();
        let arguments = arguments.chain([kernel.into(), "--serial".into(), serial]);
        let mut node = Node::start(whimbrel(), folder.path(), "side-0", arguments).unwrap();
        node.expect("running").unwrap();
        assert!(node.status().unwrap().guest.is_none(), "a foreign guest has no testimony");
        Foreign { folder, node, sides: 1 }
    }

    /// What it has said on the serial port of one of its sides.
    fn said(&self, side: usize) -> String {
        let bytes = std::fs::read(serial_file(self.folder.path(), side)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Moves it to another process, with all memory compared.
    fn hop(&mut self) -> Report {
        let serial = serial_file(self.folder.path(), self.sides);
        let arguments = ["receive", "--listen", "127.0.0.1:0", "--serial", serial.to_str().unwrap()];
        let name = format!("side-{}", self.sides);
        let mut next = Node::start(whimbrel(), self.folder.path(), &name, arguments).unwrap();
        let event = next.expect("listening").unwrap();
        let mut request = request(event["address"].as_str().unwrap().parse().unwrap());
        request.compare_memory = true;
        let report = migrate(&self.node, &request);
        assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
        next.expect("arrived").unwrap();
        self.node = next;
        self.sides += 1;
        report
    }

    /// `runs`, or how it ended.
    fn state(&mut self) -> String {
        match self.node.status() {
            Ok(vm) if vm.state == VmState::Running => "runs".into(),
            _ => self.node.expect("ended").unwrap()["how"].to_string(),
        }
    }
}

fn serial_file(folder: &Path, side: usize) -> PathBuf {
    folder.join(format!("serial-{side}"))
}

#[test]
fn a_bare_metal_program() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("alphabet.elf");
    std::fs::write(&kernel, elf::pvh_elf(ALPHABET)).unwrap();
    let mut guest = Foreign::start(&kernel, "16M", "");
    for side in 0..5 {
        wait_until("thirty more letters", || guest.said(side).len() >= 30);
        guest.hop();
    }
    wait_until("thirty more letters", || guest.said(5).len() >= 30);
    assert_eq!(guest.node.quit().unwrap().code(), Some(0));
    // What it said at all sides, one after the other, is the alphabet without a gap or a repetition.
    let said: String = (0..6).map(|side| guest.said(side)).collect();
    let wrong = said.bytes().zip((b'a'..=b'z').cycle()).position(|(found, letter)| found != letter);
    assert_eq!(wrong, None, "{said}");
    say::figures("a bare-metal program", format_args!("{} letters over 6 processes, none lost", said.len()));
}

/// The folder with Debian's kernel, downloaded unless it is there.
fn kernels(scenario: &str) -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ci/kernel");
    let ran = run_command(&mut Command::new(script));
    if ran.code == Some(0) {
        return Some(ran.stdout.trim_end().into());
    }
    say::skipped(
        scenario,
        format_args!("`ci/kernel` gets no kernel here: {}", ran.stderr.trim().replace('\n', "; ")),
    );
    None
}

/// Boots a kernel until it has said something, moves it twice, and tells how far it came. One that is
/// talkative must go on talking where it arrives, unless it cannot go on at all.
fn boots_and_moves(scenario: &str, image: &str, first_words: &str, talkative: bool) {
    let Some(folder) = kernels(scenario) else { return };
    let cmdline = "console=ttyS0 earlyprintk=serial,ttyS0 nokaslr";
    let mut guest = Foreign::start(&folder.join(image), "512M", cmdline);
    wait_until("the kernel's first words", || guest.said(0).contains(first_words));
    let mut reports = vec![guest.hop()];
    // What KVM cannot run any further has ended by now.
    if guest.node.status().is_ok_and(|vm| vm.state == VmState::Running) {
        reports.push(guest.hop());
    }
    let last = guest.sides - 1;
    if talkative {
        wait_until("a further word", || !guest.said(last).is_empty() || guest.node.status().is_err());
    }
    let dirtied = reports.iter().any(|report| report.rounds.iter().any(|round| round.remaining > 0));
    let spoke = (1..guest.sides).any(|side| !guest.said(side).is_empty());
    assert!(dirtied || spoke, "it did nothing while it moved and after: {reports:?}");
    let state = guest.state();
    let lines: Vec<_> = (0..guest.sides).map(|side| guest.said(side).lines().count()).collect();
    let sent: u64 = reports.iter().map(Report::sent).sum();
    say::figures(
        scenario,
        format_args!(
            "{lines:?} lines on the serial ports of its sides, moved {} times ({} MiB); then: {state}",
            reports.len(),
            sent >> 20
        ),
    );
    if state == "runs" {
        assert_eq!(guest.node.quit().unwrap().code(), Some(0));
    } else {
        assert!(guest.node.wait_exit(PATIENCE).unwrap().code().is_some());
    }
}

#[test]
fn debian_s_kernel_as_a_bzimage() {
    boots_and_moves("Debian's bzImage", "vmlinuz", "KASLR disabled", false);
}

#[test]
fn debian_s_kernel_as_an_elf_file() {
    boots_and_moves("Debian's kernel by PVH", "vmlinux", "Linux version", true);
}
