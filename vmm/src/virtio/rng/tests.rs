//! The device, driven through its registers.

use super::Rng;
use crate::virtio::queue::NO_VECTOR;
use crate::virtio::testing::{BUFFERS, Bench, Buffer, SIZE, WITHOUT_EVENT_INDEX};
use std::sync::Arc;

fn bench() -> Bench {
    Bench::with(Arc::new(Rng::new())).running()
}

#[test]
fn it_fills_buffers_and_interrupts() {
    let mut bench = bench();
    for round in 0..40 {
        let buffers = [Buffer::In(BUFFERS, 1000), Buffer::In(BUFFERS + 0x2000, 24)];
        assert_eq!(bench.request(0, &buffers), (0, 1024));
        bench.wait_messages(round + 1);
    }
    assert_eq!(bench.recorder.messages()[0], (0xfee0_0000, 0x41));
    let (first, second) = (bench.bytes(BUFFERS, 1000), bench.bytes(BUFFERS + 0x2000, 24));
    assert!((0..=255).filter(|byte| first.contains(byte)).count() > 200, "that is not random");
    assert_ne!(second, [0; 24]);
    assert_eq!(bench.bytes(BUFFERS + 1000, 100), [0; 100], "nothing beyond the buffer");
}

#[test]
fn every_page_it_writes_is_logged_and_no_other() {
    let mut bench = bench();
    bench.logged(0);
    bench.request(0, &[Buffer::In(BUFFERS + 0xff0, 0x20), Buffer::Out(BUFFERS + 0x8000, 8)]);
    let page = BUFFERS >> 12;
    assert_eq!(bench.logged(0), [Bench::used_page(0), page, page + 1]);
}

#[test]
fn it_rests_while_paused_and_goes_on_in_another_machine() {
    let mut bench = bench();
    bench.request(0, &[Buffer::In(BUFFERS, 16)]);
    for number in 1..4 {
        bench.function.pause();
        bench.logged(0);
        bench.offer(0, 4, &[Buffer::In(BUFFERS + 0x1000, 32)]);
        bench.notify(0);
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!((bench.used(0), bench.logged(0)), (number, vec![]), "a paused device does nothing");
        bench = bench.hop(Arc::new(Rng::new()));
        assert_eq!(bench.wait_used(0), (4, 32), "the notification went astray, the request did not");
        bench.wait_messages(1);
    }
}

#[test]
fn a_driver_without_event_index_is_served_as_well() {
    let mut bench = Bench::with(Arc::new(Rng::new()));
    bench.function.resume();
    bench.start(WITHOUT_EVENT_INDEX);
    assert_eq!(bench.request(0, &[Buffer::In(BUFFERS, 16)]), (0, 16));
    let mut bench = bench.hop(Arc::new(Rng::new()));
    assert_eq!(bench.request(0, &[Buffer::In(BUFFERS, 16)]), (0, 16));
}

#[test]
fn what_no_driver_does_ends_in_a_reset_and_not_in_a_panic() {
    let hostile: [&[Buffer]; 3] = [
        &[Buffer::In(u64::MAX - 4, 16)],
        &[Buffer::In(15 << 20, 2 << 20), Buffer::In(0xc000_0000, 16)],
        &[Buffer::In(16 << 20, 16)],
    ];
    for buffers in hostile {
        let mut bench = bench();
        bench.offer(0, 0, buffers);
        if let [Buffer::In(_, len), Buffer::In(..)] = buffers {
            // More than one request gives: the second buffer is never looked at.
            assert!(*len > 64 << 10);
            bench.notify(0);
            assert_eq!(bench.wait_used(0), (0, 64 << 10));
            continue;
        }
        bench.notify(0);
        bench.wait_needs_reset();
        bench.wait_messages(1);
        assert_eq!(bench.recorder.messages(), [(0xfee0_0000, 0x40)], "told by the configuration's message");
        // A broken queue stays so over a move, and works again after a reset.
        let mut bench = bench.hop(Arc::new(Rng::new()));
        bench.wait_needs_reset();
        bench.start(bench.offered());
        assert_eq!(bench.request(0, &[Buffer::In(BUFFERS, 16)]), (0, 16));
    }
    let bench = bench();
    // An available index that is further ahead than the queue is long.
    bench.guest_writes(0x1_1002, &0x8000u16.to_le_bytes());
    bench.notify(0);
    bench.wait_needs_reset();
}

#[test]
fn registers_hold_what_they_may() {
    let mut bench = bench();
    assert_eq!(bench.read(1, 0x12, 2), 1, "one queue");
    assert_eq!(bench.read(1, 0x18, 2), u64::from(SIZE));
    bench.write(1, 0x18, 2, 8);
    bench.write(1, 0x20, 4, 0x5000);
    assert_eq!((bench.read(1, 0x18, 2), bench.read(1, 0x20, 8)), (u64::from(SIZE), 0x1_0000), "it is in use");
    bench.write(1, 0x1a, 2, 2);
    assert_eq!(bench.read(1, 0x1a, 2), u64::from(NO_VECTOR), "there is no vector 2");
    bench.write(1, 0x16, 2, 1);
    assert_eq!((bench.read(1, 0x18, 2), bench.read(1, 0x1c, 2)), (0, 0), "there is no queue 1");
    bench.write(1, 0x1c, 2, 1);
    bench.write(1, 0x14, 1, 0);
    assert_eq!(bench.status(), 0);
    bench.write(1, 0x16, 2, 0);
    assert_eq!((bench.read(1, 0x18, 2), bench.read(1, 0x1c, 2)), (64, 0));
    bench.write(1, 0x18, 2, 48);
    assert_eq!(bench.read(1, 0x18, 2), 64, "no power of two");
    bench.write(1, 0x20, 8, 0x1_2345_6780);
    assert_eq!(bench.read(1, 0x20, 8), 0x1_2345_6780, "both halves at once");
    bench.start(bench.offered());
    assert_eq!(bench.request(0, &[Buffer::In(BUFFERS, 16)]), (0, 16));
}
