//! Typing to a guest.

mod common;

use common::guests::{self, DEAF, LOOPS};
use common::{boot, copy_ram, machine_with, wait_above};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};
use vm_memory::{Bytes, GuestAddress};
use whimbrel_vmm::{Machine, SerialOutput};

const PATIENCE: Duration = Duration::from_secs(60);

fn wait_until(what: &str, mut there: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !there() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Bytes that nobody has read yet.
fn unread(pipe: &impl AsRawFd) -> libc::c_int {
    let mut count = 0;
    #[allow(clippy::disallowed_methods)] // nothing signals this test
    // SAFETY: the request writes one int, which lives across the call.
    let asked = unsafe { libc::ioctl(pipe.as_raw_fd(), libc::FIONREAD, &mut count) };
    assert_eq!(asked, 0);
    count
}

fn listen(machine: &Machine, deaf: u32) {
    machine.write_memory().unwrap().memory().write_obj(deaf, GuestAddress(DEAF)).unwrap();
}

fn attach(machine: &Machine, input: &impl std::os::fd::AsFd) {
    let input = input.as_fd().try_clone_to_owned().unwrap();
    machine.serial().attach_input(input.into(), Some).unwrap();
}

/// What a guest has been sent and has not read moves with it; what was typed while it was paused waits for
/// it.
#[test]
fn no_input_is_lost_or_doubled_when_a_guest_moves() {
    let folder = tempfile::tempdir().unwrap();
    let said = folder.path().join("said");
    let (reader, mut writer) = io::pipe().unwrap();
    let source = machine_with(16, 1, SerialOutput::Null);
    source.boot(&boot(guests::echo())).unwrap();
    listen(&source, 1);
    attach(&source, &reader);
    source.resume().unwrap();
    wait_above(&source, LOOPS, 0);
    writer.write_all(b"typed before").unwrap();
    wait_until("the port takes input", || unread(&reader) == 0);
    source.pause().unwrap();
    writer.write_all(b" and after").unwrap();
    let saved = source.save().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(unread(&reader), 10, "a paused machine takes nothing");
    let timeless = |state: &[u8]| whimbrel_vmm::state::timeless(state, 1).unwrap();
    assert_eq!(timeless(&source.save().unwrap()), timeless(&saved));

    let target = machine_with(16, 1, SerialOutput::File(said.clone()));
    copy_ram(&source, &target);
    target.load(&saved).unwrap();
    drop(source);
    attach(&target, &reader);
    target.resume().unwrap();
    // More than the port holds at a time.
    writer.write_all(&[b'.'; 500]).unwrap();
    wait_until("the port takes as much as it holds", || unread(&reader) < 500);
    listen(&target, 0);
    let expected = format!("typed before and after{}", ".".repeat(500));
    wait_until("the guest's answer", || std::fs::read_to_string(&said).unwrap().len() >= expected.len());
    assert_eq!(std::fs::read_to_string(&said).unwrap(), expected);
}
