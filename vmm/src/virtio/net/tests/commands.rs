//! What a driver negotiates, and asks for on the control queue.

use super::*;

#[test]
fn what_is_left_to_do_is_left_to_whoever_agreed_to_it() {
    with_taps(&["tap0"], || {
        let wire = Wire::of("tap0");
        let (header, long) = unsegmented(9_000);
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
fn several_queues_are_used_only_as_far_as_the_driver_asks() {
    with_taps(&[], || {
        add_tap("tap0", "multi_queue");
        let wire = Wire::of("tap0");
        let mut bench = Bench::with(net("tap0", 2)).running();
        let place = |queue: u64, number: u64| BUFFERS + (queue * 4 + number) * 0x2_0000;
        let all_arrive = |bench: &mut Bench, ports: std::ops::Range<u8>| {
            let before = bench.used(0) + bench.used(2);
            ports.clone().for_each(|port| {
                let (header, mut flow) = unsegmented(100);
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
