//! The device, driven through its registers.

use super::{Console, ConsoleConfig};
use crate::serial::SerialOutput;
use crate::virtio::testing::{BUFFERS, Bench, Buffer};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;

/// A console whose output is the file `out` and whose input is the pipe `in` in this folder.
fn console(folder: &Path) -> Arc<Console> {
    let output = SerialOutput::File(folder.join("out"));
    let input = folder.join("in");
    if !input.exists() {
        let path = std::ffi::CString::new(input.to_str().unwrap()).unwrap();
        // SAFETY: a valid C string.
        assert_eq!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }, 0);
    }
    Arc::new(Console::open(&ConsoleConfig { output, input: Some(input) }).unwrap())
}

#[test]
fn output_goes_to_the_file_and_input_to_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = Bench::with(console(folder.path())).running();
    bench.guest_writes(BUFFERS, b"hello, ");
    bench.guest_writes(BUFFERS + 0x1000, &[b'x'; 5000]);
    bench.request(TRANSMIT, &[Buffer::Out(BUFFERS, 7), Buffer::Out(BUFFERS + 0x1000, 5000)]);
    let out = std::fs::read(folder.path().join("out")).unwrap();
    assert_eq!(out, [&b"hello, "[..], &[b'x'; 5000]].concat());

    bench.offer(RECEIVE, 0, &[Buffer::In(BUFFERS + 0x4000, 100)]);
    bench.offer(RECEIVE, 1, &[Buffer::In(BUFFERS + 0x5000, 100)]);
    bench.notify(RECEIVE);
    let mut input = std::fs::OpenOptions::new().write(true).open(folder.path().join("in")).unwrap();
    input.write_all(b"typed").unwrap();
    assert_eq!(bench.wait_used(RECEIVE), (0, 5));
    assert_eq!(bench.bytes(BUFFERS + 0x4000, 6), b"typed\0");
    drop(input);
    let mut input = std::fs::OpenOptions::new().write(true).open(folder.path().join("in")).unwrap();
    input.write_all(b"again").unwrap();
    assert_eq!(bench.wait_used(RECEIVE), (1, 5));
}

#[test]
fn every_page_it_writes_is_logged_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = Bench::with(console(folder.path())).running();
    let mut input = std::fs::OpenOptions::new().write(true).open(folder.path().join("in")).unwrap();
    bench.logged(RECEIVE);
    bench.offer(RECEIVE, 0, &[Buffer::In(BUFFERS + 0xffe, 100)]);
    bench.notify(RECEIVE);
    input.write_all(b"typed").unwrap();
    bench.wait_used(RECEIVE);
    let page = BUFFERS >> 12;
    assert_eq!(bench.logged(RECEIVE), [Bench::used_page(RECEIVE), page, page + 1]);
    bench.request(TRANSMIT, &[Buffer::Out(BUFFERS, 7)]);
    assert_eq!(bench.logged(TRANSMIT), [Bench::used_page(TRANSMIT)]);
}

#[test]
fn no_input_is_lost_when_it_moves() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = Bench::with(console(folder.path())).running();
    let mut input = std::fs::OpenOptions::new().write(true).open(folder.path().join("in")).unwrap();
    let mut received = Vec::new();
    for number in 0..20u8 {
        bench.offer(RECEIVE, 0, &[Buffer::In(BUFFERS, 1)]);
        bench.notify(RECEIVE);
        if number % 4 == 0 {
            bench = bench.hop(console(folder.path()));
        }
        input.write_all(&[number]).unwrap();
        assert_eq!(bench.wait_used(RECEIVE), (0, 1));
        received.extend(bench.bytes(BUFFERS, 1));
    }
    assert_eq!(received, (0..20).collect::<Vec<_>>());
}

#[test]
fn the_end_of_input_is_no_busy_loop() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("in"), b"").unwrap();
    let mut bench = Bench::with(console(folder.path())).running();
    bench.offer(RECEIVE, 0, &[Buffer::In(BUFFERS, 100)]);
    bench.notify(RECEIVE);
    let began = Instant::now();
    while bench.function.device().input(RECEIVE).is_some() {
        assert!(began.elapsed() < Duration::from_secs(20), "the end of input is not noticed");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(bench.used(RECEIVE), 0, "the guest keeps its buffer");
    bench.request(TRANSMIT, &[Buffer::Out(BUFFERS, 7)]);
}
