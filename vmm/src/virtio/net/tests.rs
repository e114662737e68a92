//! The device, driven through its registers, with real taps.

use super::wire::{HEADER as WIRE_HEADER, Wire, add_tap, ip, wait_up, with_taps};
use super::{Error, HEADER, Mac, Net, NetConfig, Promise, TapConfig};
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
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;

fn config(pairs: u16) -> NetConfig {
    NetConfig { number: 0, mac: MAC, pairs, promise: None }
}

fn tap(name: &str) -> [TapConfig; 1] {
    [TapConfig { name: name.into(), offloads: true }]
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
fn uncut(len: usize) -> ([u8; WIRE_HEADER], Vec<u8>) {
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

#[test]
fn frames_go_both_ways() {
    with_taps(&["tap0"], || {
        let wire = Wire::of("tap0");
        let mut bench = bench("tap0");
        for number in 0..40u8 {
            let len = 60 + usize::from(number) * 37;
            transmit(&mut bench, [0; WIRE_HEADER], &frame(len, number));
            assert_eq!(wire.receive().1, frame(len, number));
            let slot = u16::from(number % 8);
            offer(&mut bench, slot);
            wire.send(&frame(len, !number));
            let (header, got) = received(&mut bench, slot);
            assert_eq!(got, frame(len, !number));
            assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "whole, in one buffer");
        }
    });
}

#[test]
fn every_page_it_writes_is_logged_and_no_other() {
    with_taps(&["tap0"], || {
        let wire = Wire::of("tap0");
        let mut bench = bench("tap0");
        // Room for the longest frame in pieces that do not begin with a page.
        let place = |number: u64| BUFFERS + 0xf80 + number * 0x4000;
        for number in 0..6 {
            bench.offer(RECEIVE, number, &[Buffer::In(place(number.into()), 0x3000)]);
        }
        bench.logged(RECEIVE);
        bench.notify(RECEIVE);
        wire.send(&frame(1000, 1));
        assert_eq!(bench.wait_used(RECEIVE), (0, 1012));
        let page = place(0) >> 12;
        assert_eq!(bench.logged(RECEIVE), [Bench::used_page(RECEIVE), page, page + 1]);
        // One frame over two buffers: no more is written of the second than it takes.
        bench.offer(RECEIVE, 6, &[Buffer::In(place(6), 0x3000)]);
        bench.notify(RECEIVE);
        let (header, uncut) = uncut(13_000);
        wire.send_with(header, &uncut);
        assert_eq!(bench.wait_used(RECEIVE), (1, 0x3000));
        assert_eq!(bench.wait_used(RECEIVE), (2, (12 + uncut.len() - 0x3000) as u32));
        let (first, second) = (place(1) >> 12, place(2) >> 12);
        let pages = [first, first + 1, first + 2, first + 3, second, second + 1];
        assert_eq!(bench.logged(RECEIVE), [&[Bench::used_page(RECEIVE)], &pages[..]].concat());
        transmit(&mut bench, [0; WIRE_HEADER], &frame(1000, 2));
        assert_eq!(bench.logged(TRANSMIT), [Bench::used_page(TRANSMIT)]);
        assert_eq!(command(&mut bench, &[3, 0]), OK);
        assert_eq!(bench.logged(CONTROL), [Bench::used_page(CONTROL), ANSWER >> 12]);
    });
}

#[test]
fn a_frame_waits_for_room_and_fills_it() {
    with_taps(&["tap0"], || {
        let wire = Wire::of("tap0");
        for features in [None, Some(WITHOUT_EVENT_INDEX | MERGEABLE | OFFLOADS)] {
            let mut bench = Bench::with(net("tap0", 1));
            bench.function.resume();
            bench.start(features.unwrap_or(bench.offered()));
            let (header, uncut) = uncut(10_000);
            wire.send_with(header, &uncut);
            for number in 0..10 {
                bench.offer(RECEIVE, number, &[Buffer::In(BUFFERS + u64::from(number) * 0x2000, 6000)]);
                bench.notify(RECEIVE);
                std::thread::sleep(Duration::from_millis(2));
            }
            assert_eq!(bench.used(RECEIVE), 0, "there may be a longer frame than this");
            bench.offer(RECEIVE, 10, &[Buffer::In(BUFFERS + 10 * 0x2000, 6000)]);
            bench.notify(RECEIVE);
            assert_eq!(bench.wait_used(RECEIVE), (0, 6000));
            assert_eq!(bench.used(RECEIVE), 2, "the guest sees all of it at once");
            let rest = 12 + uncut.len() - 6000;
            assert_eq!(bench.wait_used(RECEIVE), (1, rest as u32));
            bench.wait_messages(1);
            let bytes = [bench.bytes(BUFFERS, 6000), bench.bytes(BUFFERS + 0x2000, rest)].concat();
            assert_eq!((bytes[10], &bytes[12..]), (2, &uncut[..]), "in two buffers");
        }
    });
}

#[test]
fn without_mergeable_buffers_each_frame_has_its_own_or_none() {
    with_taps(&["tap0"], || {
        let wire = Wire::of("tap0");
        let mut bench = Bench::with(net("tap0", 1));
        bench.function.resume();
        bench.start(WITHOUT_EVENT_INDEX);
        for number in 0..2 {
            let place = BUFFERS + u64::from(number) * 0x1000;
            bench.offer(RECEIVE, number * 2, &[Buffer::In(place, 12), Buffer::In(place + 12, 500)]);
        }
        bench.notify(RECEIVE);
        wire.send(&frame(501, 1));
        wire.send(&frame(500, 2));
        wire.send(&frame(60, 3));
        assert_eq!(bench.wait_used(RECEIVE), (0, 512));
        assert_eq!(bench.wait_used(RECEIVE), (2, 72));
        assert_eq!(bench.bytes(BUFFERS + 12, 500), frame(500, 2), "the longer one was lost");
        assert_eq!(bench.bytes(BUFFERS + 0x1000, 13)[10..], [1, 0, 0xff]);
    });
}

#[test]
fn what_is_left_to_do_is_left_to_whoever_agreed_to_it() {
    with_taps(&["tap0"], || {
        let wire = Wire::of("tap0");
        let (header, long) = uncut(9_000);
        let mut bench = bench("tap0");
        offer(&mut bench, 0);
        wire.send_with(header, &long);
        let (got, frame) = received(&mut bench, 0);
        assert_eq!((got[..2].to_vec(), frame), (vec![1, 1], long.clone()), "checksum to do, TCP over IPv4");
        transmit(&mut bench, header, &long);
        let (got, frame) = wire.receive();
        assert_eq!((got[..2].to_vec(), frame), (vec![1, 1], long.clone()));
        // No longer, by a command.
        assert_eq!(command(&mut bench, &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), OK);
        let whole = |bench: &mut Bench, wire: &Wire, frames: u16| {
            (0..frames).for_each(|number| offer(bench, number));
            wire.send_with(header, &long);
            for number in 0..frames {
                let (header, frame) = received(bench, number);
                assert_eq!((header[0] & 1, header[1], frame.len()), (0, 0, 1054), "cut, with its checksum");
            }
        };
        whole(&mut bench, &wire, 9);
        drop(bench);
        // Nor for a driver that never agreed to it.
        let mut bench = Bench::with(net("tap0", 1));
        bench.function.resume();
        bench.start(WITHOUT_EVENT_INDEX);
        whole(&mut bench, &wire, 9);
    });
}

#[test]
fn offloads_queues_and_address_go_along_to_another_tap() {
    with_taps(&[], || {
        ["tap0", "tap1"].iter().for_each(|name| add_tap(name, "multi_queue"));
        let (wire, other) = (Wire::of("tap0"), Wire::of("tap1"));
        let mut bench = Bench::with(net("tap0", 2)).running();
        assert_eq!(bench.config(offset_of!(virtio_net_config, max_virtqueue_pairs), 2), 2);
        assert_eq!(bench.config(offset_of!(virtio_net_config, mtu), 2), 1500);
        assert_eq!(command(&mut bench, &[4, 0, 2, 0]), OK);
        assert_eq!(command(&mut bench, &[1, 1, 0x52, 0x54, 0, 9, 9, 9]), OK);
        let offloads = (OFFLOADS as u8).to_le_bytes();
        assert_eq!(command(&mut bench, &[5, 0, offloads[0], 0, 0, 0, 0, 0, 0, 0]), OK);
        drop(wire);
        let next = twin(&bench, "tap1").unwrap();
        let mut bench = bench.hop(next);
        assert_eq!(bench.config(0, 6), 0x0909_0900_5452, "its address");
        // Which queue a frame comes by is the tap's choice: both have room for all.
        let place = |queue: u64, number: u64| BUFFERS + (queue * 4 + number) * 0x2_0000;
        for queue in [0, 2] {
            (0..4).for_each(|n| bench.offer(queue, n, &[Buffer::In(place(queue as u64, n.into()), LONG)]));
            bench.notify(queue);
        }
        let (header, long) = uncut(9_000);
        let deadline = Instant::now() + PATIENCE;
        for port in 0..4u8 {
            let mut flow = long.clone();
            flow[35] = port;
            other.send_with(header, &flow);
            while bench.used(0) + bench.used(2) <= u16::from(port) {
                assert!(Instant::now() < deadline, "frame {port} does not come");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(bench.used(0) + bench.used(2), 4, "none was cut up");
        // Both queues have a way out.
        for queue in [1, 3] {
            bench.guest_writes(OUT, &[&[0; 12][..], &frame(60, queue as u8)].concat());
            assert_eq!(bench.request(queue, &[Buffer::Out(OUT, 72)]), (0, 0));
            assert_eq!(other.receive().1, frame(60, queue as u8));
        }
        // A state with more than this device has is refused.
        bench.function.pause();
        let saved = bench.save();
        let single = Bench::beside(net("tap0", 1), bench.ram.clone());
        assert!(single.function.load(&saved).is_err());
    });
}

#[test]
fn several_queues_are_used_only_as_far_as_the_driver_asks() {
    with_taps(&[], || {
        add_tap("tap0", "multi_queue");
        let wire = Wire::of("tap0");
        let mut bench = Bench::with(net("tap0", 2)).running();
        let place = |queue: u64, number: u64| BUFFERS + (queue * 4 + number) * 0x2_0000;
        let all_arrive = |bench: &mut Bench, ports: std::ops::Range<u8>| {
            let before = bench.used(0) + bench.used(2);
            ports.clone().for_each(|port| {
                let (header, mut flow) = uncut(100);
                flow[35] = port;
                wire.send_with(header, &flow);
            });
            let deadline = Instant::now() + PATIENCE;
            while bench.used(0) + bench.used(2) < before + ports.len() as u16 {
                assert!(Instant::now() < deadline, "{} and {}", bench.used(0), bench.used(2));
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        for queue in [0, 2] {
            (0..15).for_each(|n| bench.offer(queue, n, &[Buffer::In(place(0, 0), LONG)]));
            bench.notify(queue);
        }
        all_arrive(&mut bench, 0..6);
        assert_eq!((bench.used(0), bench.used(2)), (6, 0), "one pair at first");
        assert_eq!(command(&mut bench, &[4, 0, 2, 0]), OK);
        all_arrive(&mut bench, 0..6);
        assert!(bench.used(2) > 0, "both from here on");
        let second = bench.used(2);
        assert_eq!(command(&mut bench, &[4, 0, 1, 0]), OK);
        all_arrive(&mut bench, 0..3);
        assert_eq!(bench.used(2), second, "one again");
        for pairs in [0, 3] {
            assert_eq!(command(&mut bench, &[4, 0, pairs, 0]), REFUSED);
        }
        // A driver that knows of one pair only has its control queue behind that.
        bench.start(COMMON_FEATURES | 1 << VIRTIO_NET_F_CTRL_VQ);
        bench.guest_writes(OUT, &[3, 0]);
        bench.request(CONTROL, &[Buffer::Out(OUT, 2), Buffer::In(ANSWER, 1)]);
        assert_eq!(bench.bytes(ANSWER, 1), [OK]);
    });
}

#[test]
fn what_came_before_the_guest_is_thrown_away() {
    with_taps(&["tap0", "tap1"], || {
        let other = Wire::of("tap1");
        let mut bench = bench("tap0");
        offer(&mut bench, 0);
        let next = twin(&bench, "tap1").unwrap();
        for number in 0..50 {
            other.send(&frame(100, number));
        }
        let mut bench = bench.hop(next);
        other.send(&frame(100, 99));
        assert_eq!(received(&mut bench, 0).1, frame(100, 99));
    });
}

#[test]
fn it_rests_while_paused_and_loses_no_frame_that_came_in_time() {
    with_taps(&["tap0"], || {
        let wire = Wire::of("tap0");
        let mut bench = bench("tap0");
        for number in 0..20 {
            offer(&mut bench, 0);
            bench.function.pause();
            bench.logged(RECEIVE);
            wire.send(&frame(100, number));
            bench.guest_writes(OUT, &[&[0; 12][..], &frame(60, number)].concat());
            bench.offer(TRANSMIT, 0, &[Buffer::Out(OUT, 72)]);
            bench.notify(TRANSMIT);
            std::thread::sleep(Duration::from_millis(3));
            assert_eq!((bench.used(RECEIVE), bench.logged(RECEIVE)), (number.into(), vec![]));
            assert!(number != 0 || wire.is_silent(), "a paused device does nothing");
            bench.function.resume();
            assert_eq!(received(&mut bench, 0).1, frame(100, number));
            assert_eq!(wire.receive().1, frame(60, number));
            bench.wait_used(TRANSMIT);
        }
    });
}

#[test]
fn it_says_where_the_guest_is_and_has_the_guest_say_so() {
    with_taps(&["tap0", "tap1"], || {
        let (wire, other) = (Wire::of("tap0"), Wire::of("tap1"));
        let mut bench = bench("tap0");
        let status = |bench: &Bench| bench.config(offset_of!(virtio_net_config, status), 2) as u32;
        bench.function.announce();
        assert_eq!(wire.receive().1, MAC.rarp());
        bench.wait_messages(1);
        assert_eq!(bench.recorder.messages(), [(0xfee0_0000, 0x40)], "the configuration's message");
        assert_eq!(status(&bench), VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE);
        assert_eq!(command(&mut bench, &[3, 0]), OK);
        assert_eq!(status(&bench), VIRTIO_NET_S_LINK_UP);
        // What the guest has not done yet it is to do where it arrives.
        bench.function.announce();
        let next = twin(&bench, "tap1").unwrap();
        let mut bench = bench.hop(next);
        assert_eq!(status(&bench), VIRTIO_NET_S_LINK_UP | VIRTIO_NET_S_ANNOUNCE);
        assert!(other.is_silent(), "loading says nothing");
        // The address is the one that the guest has by now.
        assert_eq!(command(&mut bench, &[1, 1, 2, 0, 0, 0, 0, 5]), OK);
        bench.function.announce();
        assert_eq!(other.receive().1, Mac([2, 0, 0, 0, 0, 5]).rarp());
        // A guest that cannot be asked is not.
        bench.start(WITHOUT_EVENT_INDEX);
        let messages = bench.recorder.messages().len();
        bench.function.announce();
        assert_eq!(other.receive().1, MAC.rarp(), "a reset brings the first address back");
        assert_eq!(bench.recorder.messages().len(), messages);
        assert_eq!(status(&bench), VIRTIO_NET_S_LINK_UP);
    });
}

#[test]
fn commands_that_do_not_apply_are_refused() {
    with_taps(&["tap0"], || {
        let mut bench = bench("tap0");
        let wrong: [&[u8]; 9] = [
            &[0, 0, 1],                      // promiscuous: not offered
            &[1, 1, 0, 0, 0, 0, 0, 0],       // no address
            &[1, 1, 1, 0, 0, 0, 0, 0],       // a group's
            &[1, 1, 2, 0, 0, 0, 0],          // too short
            &[4, 0, 1, 0],                   // no pairs to choose from
            &[5, 0, 0, 4, 0, 0, 0, 0, 0, 0], // UFO
            &[3, 0, 0],                      // too long
            &[200, 200],
            &[3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ];
        for bytes in wrong {
            assert_eq!(command(&mut bench, bytes), REFUSED, "{bytes:?}");
        }
        assert_eq!(command(&mut bench, &[3, 0]), OK);
    });
}

#[test]
fn a_host_that_lacks_what_the_guest_uses_refuses_and_says_what() {
    with_taps(&["tap0", "tap1"], || {
        let running = bench("tap0");
        let refusal = |name: &str| twin(&running, name).err().map(|error| error.to_string()).unwrap();
        assert!(refusal("tap7").contains("no tap tap7"), "{}", refusal("tap7"));
        for name in ["", "tap%d", "a-name-that-is-too-long", "a\0b"] {
            assert!(matches!(twin(&running, name), Err(Error::Missing(_))), "{name:?}");
        }
        assert!(refusal("tap0").contains("in use"), "{}", refusal("tap0"));
        assert!(refusal("lo").contains("is no tap"), "{}", refusal("lo"));
        ip("link set tap1 mtu 1400");
        assert!(refusal("tap1").contains("MTU of 1400"), "{}", refusal("tap1"));
        ip("link set tap1 mtu 9000");
        let longer = Bench::with(twin(&running, "tap1").unwrap());
        assert_eq!(longer.config(offset_of!(virtio_net_config, mtu), 2), 1500, "as it was told");
        drop(longer);
        ip("link set tap1 down");
        assert!(refusal("tap1").contains("is down"), "{}", refusal("tap1"));
        ip("link set tap1 up");
        let DeviceConfig::Net(config) = running.function.device().config() else { panic!() };
        let bare = [TapConfig { name: "tap1".into(), offloads: false }];
        let lacking = Net::open(&config, &bare).err().unwrap().to_string();
        assert!(lacking.contains("GUEST_TSO4") && lacking.contains("HOST_TSO6"), "{lacking}");
        // What the guest was only offered it can do without.
        let modest = Promise { accepted: COMMON_FEATURES | MERGEABLE, ..config.promise.unwrap() };
        let modest = NetConfig { promise: Some(modest), ..config.clone() };
        assert_eq!(Net::open(&modest, &bare).unwrap().features() & OFFLOADS, 0);
        let strange = Promise { accepted: 1 << 57, ..config.promise.unwrap() };
        let strange =
            Net::open(&NetConfig { promise: Some(strange), ..config.clone() }, &bare).err().unwrap();
        assert!(strange.to_string().contains("0x200000000000000"), "{strange}");
        assert!(matches!(Net::open(&config, &[]), Err(Error::NoTap { number: 0 })));
        for (pairs, several) in [(0, false), (9, false), (2, true)] {
            let error = Net::open(&NetConfig { pairs, ..config.clone() }, &tap("tap1")).err().unwrap();
            assert_eq!(matches!(error, Error::Kind { .. }), several, "{error}");
            assert_eq!(matches!(error, Error::Pairs(_)), !several, "{error}");
        }
        for mac in [Mac([0; 6]), Mac([0xff; 6])] {
            assert!(matches!(
                Net::open(&NetConfig { mac, ..config.clone() }, &tap("tap1")),
                Err(Error::Mac(_))
            ));
        }
        // One queue of a tap with several does, if nobody has another one.
        add_tap("tap2", "multi_queue");
        let only = twin(&running, "tap2").unwrap();
        assert!(refusal("tap2").contains("in use"), "{}", refusal("tap2"));
        drop(only);
    });
}

#[test]
fn what_no_driver_does_ends_in_a_reset_and_not_in_a_panic() {
    with_taps(&["tap0"], || {
        let hostile: [(usize, &[Buffer]); 7] = [
            (RECEIVE, &[Buffer::In(u64::MAX - 4, 16)]),
            (RECEIVE, &[Buffer::Out(BUFFERS, 16)]),
            (RECEIVE, &[Buffer::In(BUFFERS, LONG), Buffer::In(16 << 20, 16)]),
            (TRANSMIT, &[Buffer::Out(16 << 20, 72)]),
            (CONTROL, &[Buffer::Out(BUFFERS, 2)]),
            (CONTROL, &[Buffer::Out(BUFFERS, 2), Buffer::In(BUFFERS, 0)]),
            (CONTROL, &[Buffer::Out(16 << 20, 2), Buffer::In(BUFFERS, 1)]),
        ];
        for (queue, buffers) in hostile {
            let mut bench = bench("tap0");
            bench.offer(queue, 0, buffers);
            bench.notify(queue);
            bench.wait_needs_reset();
            bench.start(bench.offered());
            assert_eq!(command(&mut bench, &[3, 0]), OK);
        }
        // Frames that are none are lost, and the next one is not.
        let wire = Wire::of("tap0");
        let mut bench = bench("tap0");
        for len in [0u32, 1, 11, 12, 13, 25, 70_000, 3 << 20] {
            assert_eq!(bench.request(TRANSMIT, &[Buffer::Out(OUT, len)]), (0, 0));
        }
        transmit(&mut bench, [0xff; WIRE_HEADER], &frame(60, 1));
        transmit(&mut bench, [0; WIRE_HEADER], &frame(60, 2));
        assert_eq!(wire.receive().1, frame(60, 2));
    });
}

#[test]
fn an_interface_that_is_deleted_is_no_busy_loop() {
    with_taps(&["tap0"], || {
        let mut bench = bench("tap0");
        offer(&mut bench, 0);
        std::thread::sleep(Duration::from_millis(20));
        ip("link del tap0");
        transmit(&mut bench, [0; WIRE_HEADER], &frame(60, 1));
        let began = Instant::now();
        while bench.function.device().input(RECEIVE).is_some_and(|fd| readable(&fd)) {
            assert!(began.elapsed() < PATIENCE, "what is waited for is always there");
            std::thread::sleep(Duration::from_millis(1));
        }
        bench.function.pause();
    });
}

fn readable(fd: &impl std::os::fd::AsRawFd) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which lives across the call.
    unsafe { libc::poll(&mut poll, 1, 0) > 0 }
}
