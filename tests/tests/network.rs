//! A stock Linux guest with a network interface moves between two hosts' bridges, with a switch between them
//! and a client behind it, and the client notices little. In the lab: `ci/net` builds the guest and runs
//! this.

use migration::Code;
use migration::report::{Report, Verdict};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use whimbrel::api::model::{MigrationRequest, TransportChoice};
use whimbrel::node::Node;
use whimbrel_tests::bridges::{Bridges, Capture, Captured, MAC, MAC_BYTES, PORTS, TAPS};
use whimbrel_tests::client::{Browser, Distribution, echo, session, transfer, wait_echo};
use whimbrel_tests::command::{must, run};
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::sides::{PATIENCE, request, wait_until};
use whimbrel_tests::tshark::Recording;
use whimbrel_tests::{lab, say};

/// The guest, and on which of the two hosts it is.
struct Guest {
    folder: tempfile::TempDir,
    node: Node,
    moves: u32,
}

fn serial_file(folder: &Path, side: u32) -> PathBuf {
    folder.join(format!("serial-{side}"))
}

impl Guest {
    /// One with so many vCPUs and pairs of queues.
    fn start(vcpus: u32) -> Self {
        let built = PathBuf::from(std::env::var("GUEST").expect("ci/net says where the guest is"));
        let folder = tempfile::tempdir().unwrap();
        let vcpus = vcpus.to_string();
        let net = format!("tap={},mac={MAC},queues={vcpus}", TAPS[0]);
        let words = ["run", "--memory", "128M", "--vcpus", &vcpus, "--net", &net];
        let words =
            words.into_iter().chain(["--on-reboot", "exit", "--cmdline", "console=ttyS0 quiet panic=-1"]);
        let arguments = words.map(PathBuf::from);
        let arguments = arguments.chain(["--kernel".into(), built.join("vmlinux")]);
        let arguments = arguments.chain(["--initramfs".into(), built.join("initramfs")]);
        let arguments = arguments.chain(["--serial".into(), serial_file(folder.path(), 0)]);
        let mut node = Node::start(whimbrel(), folder.path(), "side-0", arguments).unwrap();
        node.expect("running").unwrap();
        let guest = Guest { folder, node, moves: 0 };
        wait_until("the guest's echo", || guest.said(0).contains("echo 1500"));
        guest
    }

    fn said(&self, side: u32) -> String {
        let bytes = std::fs::read(serial_file(self.folder.path(), side)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Which host it is on: 0 or 1.
    fn host(&self) -> usize {
        self.moves as usize % 2
    }

    /// A receiver on the other host, with these taps.
    fn receiver(&self, number: u32, taps: &[&str]) -> (Node, MigrationRequest) {
        let serial = serial_file(self.folder.path(), number);
        let listen = format!("{}:0", lab::peer());
        let fixed = ["receive", "--insecure", "--listen", &listen, "--serial", serial.to_str().unwrap()];
        let nets = taps.iter().flat_map(|tap| ["--net", tap]);
        let arguments: Vec<_> = fixed.into_iter().chain(nets).collect();
        let name = format!("side-{number}");
        let mut node = Node::start(whimbrel(), self.folder.path(), &name, arguments).unwrap();
        let event = node.expect("listening").unwrap();
        (node, request(event["address"].as_str().unwrap().parse().unwrap()))
    }

    /// Tries to move it.
    fn migrate(&mut self, request: &MigrationRequest) -> Report {
        let started = self.node.migrate(request);
        match started.and_then(|_| self.node.wait_migration(PATIENCE)) {
            Ok(migration) => migration.report.unwrap(),
            Err(error) => {
                let (event, said) = (self.node.next_event(), self.said(self.moves));
                panic!("{error}; {event:?}; {}; the guest said: {said}", self.node.stderr());
            }
        }
    }

    /// Moves it to the other host.
    fn hop(&mut self, transport: TransportChoice) -> Report {
        let tap = format!("tap={}", TAPS[1 - self.host()]);
        let (mut next, mut request) = self.receiver(self.moves + 1, &[&tap]);
        request.transport = transport;
        let report = self.migrate(&request);
        assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
        next.expect("arrived").unwrap();
        // Its tap is needed for the way back.
        self.node.wait_exit(PATIENCE).unwrap();
        self.node = next;
        self.moves += 1;
        report
    }

    /// Nothing went wrong in it.
    fn assert_well(&self) {
        let said: String = (0..=self.moves).map(|side| self.said(side)).collect();
        assert!(!said.contains("BAD"), "{said}");
    }
}

/// How often the network is told where the guest is.
const ROUNDS: usize = 5;

/// RARP, and ARP.
const RARP: u16 = 0x8035;
const ARP: u16 = 0x0806;

/// The frame that is to tell switches where the guest is.
fn expected_rarp() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(MAC_BYTES);
    frame.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame.extend(MAC_BYTES);
    frame.extend([0; 4]);
    frame.extend(MAC_BYTES);
    frame.extend([0; 4]);
    frame.resize(60, 0);
    frame
}

/// The RARP frames that came out of a host's tap: each as it should be; when they came.
fn rarps(captured: &[Captured], host: usize) -> Vec<Duration> {
    let rarps: Vec<_> = captured.iter().filter(|c| c.host == host && c.protocol() == RARP).collect();
    assert!(rarps.iter().all(|captured| captured.frame == expected_rarp()), "{rarps:02x?}");
    rarps.iter().map(|captured| captured.at).collect()
}

/// What is captured until all rounds have come from `host`, and a little longer, for what should not come.
/// How fast they come on a busy machine decides nothing.
fn all_rounds(capture: &Capture, host: usize) -> Vec<Captured> {
    let mut captured = Vec::new();
    wait_until("five rounds of RARP", || {
        captured.extend(capture.take());
        rarps(&captured, host).len() >= ROUNDS
    });
    thread::sleep(Duration::from_secs(1));
    captured.extend(capture.take());
    captured.sort_by_key(|captured| captured.at);
    captured
}

/// Each of five rounds, from the one before.
fn waits(times: &[Duration]) -> Vec<u128> {
    times.windows(2).map(|pair| (pair[1] - pair[0]).as_millis()).collect()
}

#[test]
#[ignore = "needs a Linux guest: ci/net runs it in the lab"]
fn a_silent_guest_is_found_where_it_went() {
    let bridges = Bridges::build();
    let mut guest = Guest::start(2);
    wait_echo(&bridges);
    for _ in 0..2 {
        let (from, to) = (guest.host(), 1 - guest.host());
        // What it does by itself for some time after it has been configured.
        thread::sleep(Duration::from_secs(3));
        assert_eq!(bridges.way().as_deref(), Some(PORTS[from]));
        let capture = Capture::all();
        let recording = Recording::begin();
        let began = SystemTime::UNIX_EPOCH.elapsed().unwrap();
        guest.hop(TransportChoice::Tcp);
        let captured = all_rounds(&capture, to);
        assert_eq!(bridges.way().as_deref(), Some(PORTS[to]));
        assert_eq!(rarps(&captured, to).len(), ROUNDS, "{captured:02x?}");
        assert_eq!(rarps(&captured, from).len(), 0, "from where it is not");
        let first = captured.iter().find(|captured| captured.host == to).unwrap();
        assert_eq!(first.protocol(), RARP, "the switch learned by something else: {first:02x?}");
        // What its driver says when it is asked to: who has my own address?
        let own = |c: &&Captured| c.host == to && c.protocol() == ARP && c.frame[28..32] == c.frame[38..42];
        let announced = captured.iter().filter(own).count();
        assert!(announced >= 1, "{captured:02x?}");
        // What tshark says: five from the new host's port and none from the old one's, of 60 bytes, broadcast
        // by the guest's address, reverse requests (3) of that address for itself, and nothing malformed.
        let told = recording.end();
        let fields = format!("60,{MAC},ff:ff:ff:ff:ff:ff,3,{MAC},{MAC},0.0.0.0,0.0.0.0,");
        assert!(
            told.len() == ROUNDS
                && told.iter().all(|told| told.host == to && told.fields == fields && told.at > began),
            "{told:?}"
        );
        let waits = waits(&told.iter().map(|told| told.at).collect::<Vec<_>>());
        say::figures(
            "a silent guest",
            format_args!("5 RARPs, {waits:?} ms apart, and {announced} ARPs of its own"),
        );
    }
    wait_echo(&bridges);
    guest.assert_well();
}

/// Ends clients when it is dropped, also by a failure.
struct Finish<'a>(&'a AtomicBool);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
#[ignore = "needs a Linux guest: ci/net runs it in the lab"]
fn connections_stay_open_over_ten_moves() {
    let bridges = Bridges::build();
    let mut guest = Guest::start(1);
    wait_echo(&bridges);
    let done = AtomicBool::new(false);
    let mut spans = Vec::new();
    let browser = Browser::begin();
    let (echoes, received, trips) = thread::scope(|scope| {
        let finish = Finish(&done);
        let echoing = scope.spawn(|| echo(&bridges, &done));
        let receiving = scope.spawn(|| transfer(&bridges, 256 << 10, &done));
        let typing = scope.spawn(|| session(&bridges, &done));
        thread::sleep(Duration::from_secs(2));
        for number in 1..=10 {
            let choice = if number % 2 == 1 { TransportChoice::Auto } else { TransportChoice::Tcp };
            let capture = Capture::of(RARP);
            let began = Instant::now();
            let report = guest.hop(choice);
            spans.push((began, Instant::now()));
            assert_eq!(
                report.transport,
                if number % 2 == 1 { "rdma" } else { "tcp" },
                "{:?}",
                report.declined
            );
            say::moved(number, &report);
            let captured = all_rounds(&capture, guest.host());
            assert_eq!(bridges.way().as_deref(), Some(PORTS[guest.host()]));
            let rounds = [guest.host(), 1 - guest.host()].map(|host| rarps(&captured, host).len());
            assert_eq!(rounds, [ROUNDS, 0]);
        }
        drop(finish);
        (echoing.join().unwrap(), receiving.join().unwrap(), typing.join().unwrap())
    });
    let pages = browser.end();
    let gaps: Vec<_> = spans.iter().map(|(from, to)| echoes.longest_gap(*from, *to)).collect();
    let lost = echoes.sent - echoes.trips.len() as u64;
    say::figures("the longest gap of each move", Distribution::of(gaps.iter().copied()));
    say::figures("all gaps between echoes", Distribution::of(echoes.gaps.iter().map(|(_, gap)| *gap)));
    say::figures("round trips of echoes", Distribution::of(echoes.trips.iter().copied()));
    say::figures("echoes", format_args!("{} sent, {lost} lost over 10 moves", echoes.sent));
    say::figures(
        "lines of a session",
        format_args!("{}: {}", trips.len(), Distribution::of(trips.iter().copied())),
    );
    say::figures(
        "pages of an HTTP session over one connection",
        format_args!("{}: {}", pages.len(), Distribution::of(pages.iter().copied())),
    );
    say::figures("an open transfer", format_args!("{} KiB there and back, every byte right", received >> 10));
    assert!(received > 1 << 20 && trips.len() > 50 && echoes.trips.len() > 100 && pages.len() > 50);
    guest.assert_well();
}

#[test]
#[ignore = "needs a Linux guest: ci/net runs it in the lab"]
fn hosts_without_a_suitable_tap_refuse_at_once() {
    let bridges = Bridges::build();
    must("ip tuntap add dev tap-single mode tap");
    must("ip link set tap-single up");
    let mut guest = Guest::start(2);
    wait_echo(&bridges);
    // One that is missing keeps a receiver from starting.
    let listen = format!("{}:0", lab::peer());
    let missing = ["receive", "--insecure", "--listen", &listen, "--serial", "none", "--net", "tap=tap-none"];
    run(missing).refused(1, "there is no tap tap-none");
    wait_echo(&bridges);
    // The others are seen when a guest comes.
    let cases: [(&[&str], &str); 4] = [
        (&[], "interface 1 has no tap here"),
        (&["tap=tap-a"], "the tap tap-a is in use"),
        (&["tap=tap-b,offloads=off"], "does not offer what the guest uses: CSUM"),
        (&["tap=tap-single"], "tap-single is not a tap with 2 queue"),
    ];
    for (number, (taps, message)) in (100..).zip(cases) {
        let (mut receiver, request) = guest.receiver(number, taps);
        let report = guest.migrate(&request);
        assert_eq!(report.verdict, Verdict::Stayed);
        let failure = report.failure.unwrap();
        assert_eq!(failure.code, Code::DEVICE, "{failure}");
        assert!(failure.message.contains(message) && failure.message.lines().count() == 1, "{failure}");
        assert!(report.rounds.is_empty(), "a page has moved");
        assert_eq!(receiver.expect("refused").unwrap()["why"]["code"], "device");
        say::figures("refused", &failure.message);
        wait_echo(&bridges);
    }
    must("ip link delete tap-single");
    guest.hop(TransportChoice::Tcp);
    wait_echo(&bridges);
    guest.assert_well();
}
