//! Frames between the tap and guest RAM.

use super::*;
use crate::poll::poll;
use std::os::fd::AsRawFd;

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
        let (header, long) = unsegmented(13_000);
        wire.send_with(header, &long);
        assert_eq!(bench.wait_used(RECEIVE), (1, 0x3000));
        assert_eq!(bench.wait_used(RECEIVE), (2, (12 + long.len() - 0x3000) as u32));
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
            let (header, long) = unsegmented(10_000);
            wire.send_with(header, &long);
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
            let rest = 12 + long.len() - 6000;
            assert_eq!(bench.wait_used(RECEIVE), (1, rest as u32));
            bench.wait_messages(1);
            let bytes = [bench.bytes(BUFFERS, 6000), bench.bytes(BUFFERS + 0x2000, rest)].concat();
            assert_eq!((bytes[10], &bytes[12..]), (2, &long[..]), "in two buffers");
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
        while bench
            .function
            .device()
            .input(RECEIVE)
            .is_some_and(|fd| poll([Some(fd.as_raw_fd())], libc::POLLIN, 0))
        {
            assert!(began.elapsed() < PATIENCE, "what is waited for is always there");
            std::thread::sleep(Duration::from_millis(1));
        }
        bench.function.pause();
    });
}

/// How many frames have been read from a tap.
fn read_from(tap: &str) -> u64 {
    let shown = std::process::Command::new("ip").args(["-s", "link", "show", tap]).output().unwrap();
    let text = String::from_utf8_lossy(&shown.stdout).into_owned();
    // The kernel has sent what the device reads: bytes, then packets.
    let sent = text.lines().skip_while(|line| !line.trim_start().starts_with("TX:")).nth(1);
    sent.and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap()
}

#[test]
fn frames_that_are_too_long_keep_no_pause_waiting() {
    with_taps(&["tap0"], || {
        const LONG_FRAMES: u64 = 400;
        // A guest without buffers that can be merged, and with a short one: longer frames are dropped, and
        // use no buffer.
        let mut bench = Bench::with(net("tap0", 1));
        let features = bench.offered() & !(MERGEABLE | UNSEGMENTED);
        bench.start(features);
        let wire = Wire::of("tap0");
        bench.offer(RECEIVE, 0, &[Buffer::In(BUFFERS, 100)]);
        bench.notify(RECEIVE);
        // A pause that waits for the frames comes to rest before the first, or after the last of them. One
        // that does not may do so by chance, but not always.
        let interrupted = (0..300).any(|round| {
            let before = read_from("tap0");
            (0..LONG_FRAMES).for_each(|_| wire.send(&frame(1400, 1)));
            bench.function.resume();
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_micros(20 + round * 5 % 400) {
                std::hint::spin_loop();
            }
            bench.function.pause();
            let read = read_from("tap0") - before;
            bench.function.resume();
            while read_from("tap0") - before < LONG_FRAMES {
                assert!(begin.elapsed() < PATIENCE);
            }
            bench.function.pause();
            (1..LONG_FRAMES).contains(&read)
        });
        assert!(interrupted, "a pause waits for the last of the frames");
        assert_eq!(bench.used(RECEIVE), 0);
    });
}
