//! The device, driven through its registers.

use super::Rng;
use super::device::QUEUE_SIZE;
use crate::virtio::common_config::Register;
use crate::virtio::queue::NO_VECTOR;
use crate::virtio::registers::{CapabilityType, DRIVER_OK, FEATURES_OK};
use crate::virtio::testing::{BUFFERS, Bench, Buffer, DRIVER, SIZE, WITHOUT_EVENT_INDEX};
use std::sync::Arc;
use std::time::{Duration, Instant};

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
        std::thread::sleep(Duration::from_millis(20));
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
    let size = |bench: &Bench| bench.register(Register::QueueSize);
    assert_eq!(bench.register(Register::NumQueues), 1);
    assert_eq!(size(&bench), u32::from(SIZE));
    bench.set_register(Register::QueueSize, 8);
    bench.set_register(Register::QueueDescLow, 0x5000);
    assert_eq!(
        (size(&bench), bench.register(Register::QueueDescLow)),
        (u32::from(SIZE), 0x1_0000),
        "it is in use"
    );
    bench.set_register(Register::QueueMsixVector, 2);
    assert_eq!(bench.register(Register::QueueMsixVector), u32::from(NO_VECTOR), "there is no vector 2");
    bench.set_register(Register::QueueSelect, 1);
    assert_eq!((size(&bench), bench.register(Register::QueueEnable)), (0, 0), "there is no queue 1");
    assert_eq!(bench.register(Register::QueueMsixVector), u32::from(NO_VECTOR));
    bench.set_register(Register::QueueEnable, 1);
    bench.set_status(0);
    assert_eq!(bench.status(), 0);
    bench.set_register(Register::QueueSelect, 0);
    assert_eq!((size(&bench), bench.register(Register::QueueEnable)), (u32::from(QUEUE_SIZE), 0));
    bench.set_register(Register::QueueSize, 48);
    assert_eq!(size(&bench), u32::from(QUEUE_SIZE), "no power of two");
    let (address, _) = Register::QueueDescLow.place();
    bench.write(CapabilityType::Common, address, 8, 0x1_2345_6780);
    assert_eq!(bench.read(CapabilityType::Common, address, 8), 0x1_2345_6780, "both halves at once");
    bench.start(bench.offered());
    assert_eq!(bench.request(0, &[Buffer::In(BUFFERS, 16)]), (0, 16));
}

/// A driver that looks at the status does not wait for whoever serves a queue, nor stop it.
#[test]
fn registers_that_are_no_queue_s_are_read_without_its_lock() {
    let bench = bench();
    let read = || {
        [Register::DeviceStatus, Register::NumQueues, Register::ConfigMsixVector, Register::QueueMsixVector]
            .map(|register| bench.register(register))
    };
    let expected = [u32::from(DRIVER | FEATURES_OK | DRIVER_OK), 1, 0, 1];
    std::thread::scope(|scope| {
        bench.function.with_queue_locked(0, || {
            let reader = scope.spawn(read);
            let deadline = Instant::now() + Duration::from_secs(20);
            while !reader.is_finished() {
                assert!(Instant::now() < deadline, "the registers wait for the queue");
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(reader.join().unwrap(), expected);
        });
    });
}
