//! Frames between the tap and guest RAM.

use super::*;
use crate::poll::poll;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

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

#[test]
fn frames_that_are_too_long_keep_no_pause_waiting() {
    with_taps(&["tap0"], || {
        // A guest without buffers that can be merged, whose buffer is shorter than any frame that comes. Each
        // frame is dropped without a buffer being used.
        let mut bench = Bench::with(net("tap0", 1));
        let features = bench.offered() & !(MERGEABLE | OFFLOADS);
        bench.start(features);
        bench.function.resume();
        bench.offer(RECEIVE, 0, &[Buffer::In(BUFFERS, 64)]);
        bench.notify(RECEIVE);
        let paused = AtomicBool::new(false);
        let wires: Vec<_> = (0..4).map(|_| Wire::of("tap0")).collect();
        std::thread::scope(|scope| {
            for wire in &wires {
                scope.spawn(|| {
                    while !paused.load(Ordering::Relaxed) {
                        wire.try_send(&frame(1000, 1));
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(100));
            let (sender, done) = mpsc::channel();
            let function = &bench.function;
            scope.spawn(move || {
                for _ in 0..50 {
                    function.pause();
                    function.resume();
                }
                sender.send(()).unwrap_or_default();
            });
            let ended = done.recv_timeout(PATIENCE);
            paused.store(true, Ordering::Relaxed);
            assert!(ended.is_ok(), "a pause waits for frames to end");
        });
        assert_eq!(bench.used(RECEIVE), 0);
    });
}
