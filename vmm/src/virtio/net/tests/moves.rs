//! What happens to an interface when its guest pauses or moves.

use super::*;

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
        let (header, long) = unsegmented(9_000);
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
fn a_host_that_lacks_what_the_guest_uses_refuses_and_says_what() {
    with_taps(&["tap0", "tap1"], || {
        let running = bench("tap0");
        let refusal = |name: &str| twin(&running, name).err().map(|error| error.to_string()).unwrap();
        assert!(refusal("tap7").contains("no tap tap7"), "{}", refusal("tap7"));
        for name in ["", "tap%d", "a-name-that-is-too-long", "a\0b"] {
            assert!(matches!(twin(&running, name), Err(Error::Missing(_))), "{name:?}");
        }
        assert!(refusal("tap0").contains("in use"), "{}", refusal("tap0"));
        assert!(refusal("lo").contains("is not a tap"), "{}", refusal("lo"));
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
        let bare = [TapConfig { offloads: false, ..TapConfig::named("tap1") }];
        let lacking = Net::open(&config, &bare).err().unwrap().to_string();
        assert!(lacking.contains("GUEST_TSO4") && lacking.contains("HOST_TSO6"), "{lacking}");
        // What the guest was only offered it can do without.
        let modest = Negotiated { accepted: COMMON_FEATURES | MERGEABLE, ..config.negotiated.unwrap() };
        let modest = NetConfig { negotiated: Some(modest), ..config.clone() };
        assert_eq!(Net::open(&modest, &bare).unwrap().features() & OFFLOADS, 0);
        let strange = Negotiated { accepted: 1 << 57, ..config.negotiated.unwrap() };
        let strange =
            Net::open(&NetConfig { negotiated: Some(strange), ..config.clone() }, &bare).err().unwrap();
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
fn a_tap_that_was_opened_before_goes_with_whoever_has_it() {
    with_taps(&[], || {
        let exists = |name: &str| find_tap(name).is_ok();
        let wait_gone = |name: &str| {
            let deadline = Instant::now() + PATIENCE;
            // A process that another test is just starting has a copy of each descriptor for a moment.
            while exists(name) {
                assert!(Instant::now() < deadline, "{name} is still there");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        for pairs in [1, 2] {
            let (files, name) = OpenTap::make(c"opened%d", pairs).unwrap();
            assert_eq!((files.len(), name.as_str()), (usize::from(pairs), "opened0"));
            ip(&format!("link set {name} up"));
            let tap = TapConfig::opened(&name, OpenTap::new(files, 1400));
            let other = pairs % 2 + 1;
            let refused = Net::open(&config(other), std::slice::from_ref(&tap)).err().unwrap();
            assert!(matches!(refused, Error::Kind { .. }), "{refused}");
            wait_gone(&name);

            let (files, name) = OpenTap::make(c"opened%d", pairs).unwrap();
            ip(&format!("link set {name} up"));
            let tap = TapConfig::opened(&name, OpenTap::new(files, 1400));
            let net = Net::open(&config(pairs), std::slice::from_ref(&tap)).unwrap();
            let DeviceConfig::Net(described) = net.config() else { panic!() };
            assert_eq!(described.negotiated.unwrap().mtu, 1400);
            let again = Net::open(&config(pairs), std::slice::from_ref(&tap)).err().unwrap();
            assert!(matches!(again, Error::InUse(_)), "{again}");
            assert!(exists(&name));
            drop(net);
            wait_gone(&name);
        }
        assert!(OpenTap::make(c"much-longer-than-it-may-be%d", 1).is_err());
    });
}
