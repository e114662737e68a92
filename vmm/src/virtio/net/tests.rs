//! The device, driven through its registers, with real taps. Here is what all its tests use.

mod commands;
mod frames;
mod moves;

use super::wire::{HEADER as WIRE_HEADER, Wire, add_tap, ip, wait_up, with_taps};
use super::{Error, HEADER, Mac, Negotiated, Net, NetConfig, OpenTap, TapConfig, find_tap};
use crate::virtio::testing::{BUFFERS, Bench, Buffer, WITHOUT_EVENT_INDEX};
use crate::virtio::transport::COMMON_FEATURES;
use crate::virtio::{DeviceConfig, VirtioDevice};
use std::mem::offset_of;
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_net::*;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 2;
const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 7]);
/// How long what is sure to come may take.
const PATIENCE: Duration = Duration::from_secs(20);
/// Longer than any frame.
const LONG: u32 = 66_000;
/// Where tests put what goes out, and a command's answer.
const OUT: u64 = BUFFERS + 0x80_0000;
const ANSWER: u64 = OUT + 0x1_0000;

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const UNSEGMENTED: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_GUEST_TSO6;
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;

fn config(pairs: u16) -> NetConfig {
    NetConfig { number: 0, mac: MAC, pairs, negotiated: None, network: None }
}

fn tap(name: &str) -> [TapConfig; 1] {
    [TapConfig::named(name)]
}

fn net(name: &str, pairs: u16) -> Arc<Net> {
    let began = Instant::now();
    loop {
        match Net::open(&config(pairs), &tap(name)) {
            // A process that another test is just starting has a copy of each descriptor for a moment.
            Err(Error::InUse(_)) if began.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(1))
            }
            opened => {
                wait_up(name);
                return Arc::new(opened.unwrap());
            }
        }
    }
}

fn bench(name: &str) -> Bench {
    Bench::with(net(name, 1)).running()
}

/// The twin of a device, on another tap.
fn twin(bench: &Bench, name: &str) -> Result<Arc<Net>, Error> {
    let DeviceConfig::Net(config) = bench.function.device().config() else { panic!() };
    Net::open(&config, &tap(name)).map(Arc::new).inspect(|_| wait_up(name))
}

/// A broadcast frame with something to tell it by.
fn frame(len: usize, number: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1, 0x88, 0xb5]); // for experiments
    frame.extend((frame.len()..len).map(|at| (at as u8).wrapping_mul(31) ^ number));
    frame
}

/// A TCP segment over IPv4 with `len` bytes of data, to be cut into pieces of 1000 by whoever must:
/// its header and itself.
fn unsegmented(len: usize) -> ([u8; WIRE_HEADER], Vec<u8>) {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 7, 2, 0, 0, 0, 0, 1, 8, 0];
    let total = (40 + len) as u16;
    frame.extend([0x45, 0]);
    frame.extend(total.to_be_bytes());
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    let sum: u32 =
        frame[14..34].chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    frame.extend([0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0]);
    frame.extend((0..len).map(|at| at as u8));
    // Checksum to do from byte 34 on, at 16; TCP over IPv4, 54 bytes of headers, pieces of 1000.
    let header = [1, 1, 54, 0, 0xe8, 3, 34, 0, 16, 0];
    (header, frame)
}

/// Sends a frame as a driver does: its header in a buffer of its own.
fn transmit(bench: &mut Bench, header: [u8; WIRE_HEADER], frame: &[u8]) {
    bench.guest_writes(OUT, &[&header[..], &[0; 2]].concat());
    bench.guest_writes(OUT + 0x1000, frame);
    let half = frame.len() as u32 / 2;
    let rest = frame.len() as u32 - half;
    let data = [Buffer::Out(OUT + 0x1000, half), Buffer::Out(OUT + 0x1000 + u64::from(half), rest)];
    let buffers = [&[Buffer::Out(OUT, HEADER as u32)], &data[..]].concat();
    assert_eq!(bench.request(TRANSMIT, &buffers), (0, 0));
}

/// Gives the device room for one frame, as its `number`th buffer.
fn offer(bench: &mut Bench, number: u16) {
    bench.offer(RECEIVE, number, &[Buffer::In(BUFFERS + u64::from(number) * 0x2_0000, LONG)]);
    bench.notify(RECEIVE);
}

/// The frame in that buffer, once it is there, and what its header says.
fn received(bench: &mut Bench, number: u16) -> (Vec<u8>, Vec<u8>) {
    let (head, len) = bench.wait_used(RECEIVE);
    assert_eq!(head, u32::from(number));
    let bytes = bench.bytes(BUFFERS + u64::from(number) * 0x2_0000, len as usize);
    (bytes[..HEADER].to_vec(), bytes[HEADER..].to_vec())
}

/// A command's outcome.
fn command(bench: &mut Bench, bytes: &[u8]) -> u8 {
    let queue = bench.queues() - 1;
    bench.guest_writes(OUT, bytes);
    bench.guest_writes(ANSWER, &[0x77]);
    let data = Buffer::Out(OUT + 2, bytes.len() as u32 - 2);
    let (head, answer) = (Buffer::Out(OUT, 2), Buffer::In(ANSWER, 1));
    let buffers = if bytes.len() > 2 { vec![head, data, answer] } else { vec![head, answer] };
    bench.request(queue, &buffers);
    bench.bytes(ANSWER, 1)[0]
}

const OK: u8 = VIRTIO_NET_OK as u8;
const REFUSED: u8 = VIRTIO_NET_ERR as u8;
