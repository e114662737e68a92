//! A person's terminal as the guest's serial port.

#[path = "../../vmm/tests/common/elf.rs"]
mod elf;
#[path = "../../vmm/tests/common/guests.rs"]
#[allow(dead_code)] // the machine crate's tests use the rest
mod guests;

use elf::pvh_elf;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);

fn wait_until(what: &str, mut there: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !there() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A pseudo-terminal: the end at which somebody sits, and the other.
fn terminal() -> (File, OwnedFd) {
    let (mut ours, mut theirs) = (0, 0);
    let (name, settings, size) = (std::ptr::null_mut(), std::ptr::null(), std::ptr::null());
    // SAFETY: two descriptors are written, which live across the call; the rest may be null.
    assert_eq!(unsafe { libc::openpty(&mut ours, &mut theirs, name, settings, size) }, 0);
    // SAFETY: both are new, and nobody else's.
    unsafe { (File::from_raw_fd(ours), OwnedFd::from_raw_fd(theirs)) }
}

fn settings(terminal: &OwnedFd) -> [libc::tcflag_t; 4] {
    // SAFETY: all zeros is a valid value of the structure.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives across the call.
    assert_eq!(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &mut settings) }, 0);
    [settings.c_iflag, settings.c_oflag, settings.c_cflag, settings.c_lflag]
}

/// A process whose controlling terminal this is, with a guest that echoes.
fn start(folder: &Path, terminal: &OwnedFd) -> Child {
    let kernel = folder.join("echo");
    std::fs::write(&kernel, pvh_elf(guests::echo())).unwrap();
    let stdio = || Stdio::from(terminal.try_clone().unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_whimbrel"));
    command.args(["run", "--memory", "16M", "--serial", "stdio", "--kernel"]).arg(kernel);
    command.stdin(stdio()).stdout(stdio()).stderr(Stdio::null());
    // SAFETY: both calls may be made between fork and exec, and take no memory.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            if libc::ioctl(0, libc::TIOCSCTTY, 0) == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
        })
    };
    command.spawn().unwrap()
}

/// Reads what the guest says, which has to be this.
fn expect(terminal: &mut File, expected: &[u8]) {
    let mut said = Vec::new();
    let mut poll = libc::pollfd { fd: terminal.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    while said.len() < expected.len() {
        // SAFETY: one pollfd, which lives across the call.
        let ready = unsafe { libc::poll(&mut poll, 1, PATIENCE.as_millis() as libc::c_int) };
        assert_eq!(ready, 1, "only {said:?} of {expected:?}");
        let mut bytes = [0; 64];
        let read = terminal.read(&mut bytes).unwrap();
        said.extend_from_slice(&bytes[..read]);
    }
    assert_eq!(said, expected);
}

#[test]
fn a_terminal_is_the_guest_s_until_the_escape() {
    let folder = tempfile::tempdir().unwrap();
    let (mut person, terminal) = terminal();
    let before = settings(&terminal);
    let mut process = start(folder.path(), &terminal);
    wait_until("a raw terminal", || settings(&terminal) != before);
    // What would end, stop or edit in a line, were it the terminal's.
    let keys = b"login\rpass\x7fword\x03\x04\x1a\x1c\x13\x11";
    person.write_all(keys).unwrap();
    expect(&mut person, keys);
    person.write_all(b"\x01\x01\x01q").unwrap();
    expect(&mut person, b"\x01");
    assert!(process.try_wait().unwrap().is_none());
    person.write_all(b"\x01x").unwrap();
    assert_eq!(process.wait().unwrap().code(), Some(0));
    assert_eq!(settings(&terminal), before, "as it was");
}

#[test]
fn a_terminal_is_given_back_however_a_signal_ends_it() {
    let folder = tempfile::tempdir().unwrap();
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let (mut person, terminal) = terminal();
        let before = settings(&terminal);
        let mut process = start(folder.path(), &terminal);
        person.write_all(b"x").unwrap();
        wait_until("a raw terminal", || settings(&terminal) != before);
        // SAFETY: the process is ours and has not been waited for.
        assert_eq!(unsafe { libc::kill(process.id() as libc::pid_t, signal) }, 0);
        process.wait().unwrap();
        assert_eq!(settings(&terminal), before);
    }
}

/// Input that is no terminal comes to its end, and the guest goes on.
#[test]
fn a_pipe_has_no_escape() {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("echo");
    std::fs::write(&kernel, pvh_elf(guests::echo())).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_whimbrel"));
    command.args(["run", "--memory", "16M", "--serial", "stdio", "--kernel"]).arg(kernel);
    let mut process =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    process.stdin.take().unwrap().write_all(b"\x01x and more").unwrap();
    let mut said = [0; 11];
    process.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
    assert_eq!(&said, b"\x01x and more");
    assert!(process.try_wait().unwrap().is_none());
    process.kill().unwrap();
    process.wait().unwrap();
}
