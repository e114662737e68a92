//! Peers that are no Whimbrel, or none that keeps to the protocol: the guest stays and can be moved at once,
//! a receiver waits for the next caller.

use migration::Code;
use migration::message::{
    FEATURES, Hello, MIN_STATE_PART, Message, Offer, Prepare, Prepared, State, StatePart,
};
use migration::preamble::{Preamble, Status};
use migration::transport::Token;
use std::net::SocketAddr;
use std::thread::{self, JoinHandle};
use std::time::Duration;
use whimbrel::node::Node;
use whimbrel_tests::command::run;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::rogue::{Rogue, honest_machine, honest_prepare, pretend, pretend_receiver};
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, assert_runs, hop, is_empty, receiver, wait_until};

/// A string, or a list of bytes, that claims a length of 2^63 in postcard's encoding.
const TWO_TO_THE_63: [u8; 10] = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01];

fn welcome() -> Message {
    Message::Welcome(Hello { software: "rogue".into(), features: FEATURES })
}

/// Greets like a receiver and takes what is to be prepared.
fn greet(rogue: &mut Rogue) {
    assert_eq!(rogue.receive().unwrap().name(), "Hello");
    rogue.send(&welcome());
    assert_eq!(rogue.receive().unwrap().name(), "Prepare");
}

fn prepared(transport: &str, details: &[u8]) -> Message {
    let offers = vec![Offer { transport: transport.into(), details: Ok(details.to_vec()) }];
    Message::Prepared(Prepared { offers, build_us: 1 })
}

type Peer = (SocketAddr, JoinHandle<()>);

/// Receivers that are none, each with the code and a part of the message that a source must give.
fn receivers() -> Vec<(&'static str, Peer, &'static str, &'static str)> {
    vec![
        (
            "a web server",
            pretend(|mut rogue, _| {
                rogue.raw(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n");
                rogue.rest();
            }),
            "protocol",
            "does not speak Whimbrel's protocol",
        ),
        (
            "a short answer",
            pretend(|mut rogue, _| rogue.raw(b"220 ftp\r\n")),
            "protocol",
            "without an answer",
        ),
        (
            "version 1",
            pretend(|mut rogue, mut first| {
                first[8] = 1;
                rogue.raw(&first);
                rogue.rest();
            }),
            "version",
            "the peer speaks protocol version 1, this program speaks version 2: update the other side",
        ),
        (
            "a newer version",
            pretend(|mut rogue, mut first| {
                first[8] = 3;
                rogue.raw(&first);
                rogue.rest();
            }),
            "version",
            "the peer speaks protocol version 3, this program speaks version 2: update this side",
        ),
        ("silence", pretend(|mut rogue, _| drop(rogue.rest())), "timeout", "says nothing"),
        ("silence after the preamble", pretend_receiver(|mut rogue| drop(rogue.rest())), "timeout", ""),
        (
            "a hang-up after the greeting",
            // With the greeting unread it would be a reset.
            pretend_receiver(|mut rogue| drop(rogue.receive())),
            "link",
            "closed the control connection",
        ),
        (
            "a frame of 4 GiB",
            pretend_receiver(|mut rogue| {
                rogue.raw(&u32::MAX.to_le_bytes());
                rogue.rest();
            }),
            "protocol",
            "over the limit",
        ),
        (
            "a frame of 64 MiB that never comes",
            pretend_receiver(|mut rogue| {
                rogue.raw(&(64u32 << 20).to_le_bytes());
                rogue.raw(&[0; 5000]);
                rogue.rest();
            }),
            "timeout",
            "",
        ),
        (
            "a name of 2^63 bytes",
            pretend_receiver(|mut rogue| {
                rogue.frame(&[&[1], &TWO_TO_THE_63[..]].concat());
                rogue.rest();
            }),
            "protocol",
            "malformed message",
        ),
        (
            "an empty frame",
            pretend_receiver(|mut rogue| {
                rogue.frame(&[]);
                rogue.rest();
            }),
            "protocol",
            "malformed message",
        ),
        (
            "Running before its turn",
            pretend_receiver(|mut rogue| {
                rogue.receive();
                rogue.send(&Message::Running(migration::message::Running { spans: vec![] }));
                rogue.rest();
            }),
            "protocol",
            "not its turn",
        ),
        (
            "Commit from a destination",
            pretend_receiver(|mut rogue| {
                greet(&mut rogue);
                rogue.send(&Message::Commit);
                rogue.rest();
            }),
            "protocol",
            "not its turn",
        ),
        (
            "an offer that is none",
            pretend_receiver(|mut rogue| {
                greet(&mut rogue);
                rogue.send(&prepared("tcp", &[0xff; 100]));
                rogue.rest();
            }),
            "",
            "",
        ),
        (
            "an offer of something else",
            pretend_receiver(|mut rogue| {
                greet(&mut rogue);
                rogue.send(&prepared("pigeon", b""));
                rogue.rest();
            }),
            "",
            "",
        ),
    ]
}

#[test]
fn receivers_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::SMALL.start(folder.path(), "guest");
    let api = guest.api_path().to_str().unwrap();
    let migrate = |to: &str| run(["migrate", "--api", api, "--silence", "1s", "--json", "--to", to]);
    let refused = |what: &str, to: &str, code: &str, message: &str| {
        let ran = migrate(to);
        assert_eq!(ran.code, Some(3), "{what}: {ran:?}");
        let report = &ran.json()["report"];
        assert_eq!(report["verdict"], "stayed", "{what}: {report}");
        let failure = &report["failure"];
        assert!(code.is_empty() || failure["code"] == code, "{what}: {failure}");
        let told = failure["message"].as_str().unwrap();
        assert!(told.contains(message) && !told.is_empty(), "{what}: {failure}");
        assert!(ran.stderr.is_empty(), "{what}: {ran:?}");
        assert_runs(&guest);
    };
    let all = receivers();
    let count = all.len();
    for (what, (address, peer), code, message) in all {
        refused(what, &address.to_string(), code, message);
        peer.join().unwrap();
    }
    let closed = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    refused("nobody", &closed.to_string(), "link", "is `whimbrel receive` running there");
    refused("no such port", "localhost:77777", "link", "write the destination as host:port");
    // To people it is one line.
    let ran = run(["migrate", "--api", api, "--to", &closed.to_string()]);
    assert_eq!((ran.code, ran.stdout.lines().count()), (Some(3), 1), "{ran:?}");
    let (mut next, address) = receiver(folder.path(), "next");
    hop(&guest, &mut next, address);
    settle(&next, &Guest::SMALL);
    say::figures("receivers that are none", format_args!("{}, the guest stayed and then moved", count + 3));
}

#[test]
fn a_receiver_that_never_gets_ready_can_be_called_off() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::SMALL.start(folder.path(), "guest");
    let (asked, asking) = std::sync::mpsc::channel();
    let (address, peer) = pretend_receiver(move |mut rogue| {
        greet(&mut rogue);
        asked.send(()).unwrap();
        assert_eq!(rogue.receive().map(|m| m.name()), Some("Abort"));
    });
    let api = guest.api_path().to_str().unwrap().to_string();
    let target = address.to_string();
    let migrating = {
        let api = api.clone();
        thread::spawn(move || run(["migrate", "--api", &api, "--json", "--to", &target]))
    };
    asking.recv().unwrap();
    assert_eq!(run(["cancel", "--api", &api]).code, Some(0));
    let ran = migrating.join().unwrap();
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert_eq!(ran.json()["report"]["failure"]["code"], "cancelled");
    peer.join().unwrap();
    assert_runs(&guest);
    settle(&guest, &Guest::SMALL);
    say::figures("a receiver that never gets ready", "called off; the guest stayed and then moved");
}

/// What the receiver says of a caller that it did not take in.
fn refusal(node: &mut Node) -> (String, String) {
    let event = node.expect("refused").unwrap();
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_string();
    (text(&event["why"]["code"]), text(&event["why"]["message"]))
}

fn token(number: u8) -> Token {
    Token([number; 16])
}

#[test]
fn sources_that_are_none() {
    let folder = tempfile::tempdir().unwrap();
    let (mut node, address) = receiver(folder.path(), "receiver");
    let machine = honest_machine();
    let honest = honest_prepare(&machine);

    // These get no session, and nothing is said of them.
    let mut rogue = Rogue::call(address);
    rogue.raw(b"GET / HTTP/1.1\r\nHost: receiver.example\r\n\r\n");
    assert!(rogue.rest().is_empty());
    drop(Rogue::call(address));
    for version in [1, 3] {
        let mut other = Preamble::control(token(1)).encode();
        other[8] = version;
        let mut rogue = Rogue::call(address);
        rogue.raw(&other);
        assert_eq!(
            rogue.rest(),
            Preamble::version_mismatch().encode(),
            "the receiver says which version it has"
        );
    }
    let stray = Rogue::call(address).preamble(Preamble::data(token(9), 0, 1)).unwrap();
    assert_eq!(stray.status, Status::Session);

    type Misdeed<'a> = Box<dyn FnOnce(Rogue) -> Rogue + 'a>;
    let say_then_wait = |bytes: Vec<u8>| -> Misdeed<'_> {
        Box::new(move |mut rogue| {
            rogue.raw(&bytes);
            rogue
        })
    };
    let framed = |content: &[u8]| [&(content.len() as u32).to_le_bytes(), content].concat();
    let ask_for = |prepare: Prepare| -> Misdeed<'_> {
        Box::new(move |rogue| {
            let mut rogue = rogue.greet();
            rogue.send(&Message::Prepare(prepare));
            rogue
        })
    };
    let layout_of = |len: u64| vec![migration::memory::RegionLayout { guest_address: 0, len }];
    let misdeeds: Vec<(&str, Misdeed<'_>, Code)> = vec![
        ("hangs up at once", Box::new(|_| Rogue::call(address)), Code::LINK),
        ("4 GiB frame", say_then_wait(u32::MAX.to_le_bytes().to_vec()), Code::PROTOCOL),
        ("2^63 bytes of name", say_then_wait(framed(&[&[0], &TWO_TO_THE_63[..]].concat())), Code::PROTOCOL),
        ("no message", say_then_wait(framed(&[0xff; 40])), Code::PROTOCOL),
        ("Commit first", say_then_wait(framed(&Message::Commit.encode())), Code::PROTOCOL),
        ("Prepare first", say_then_wait(framed(&Message::Prepare(honest.clone()).encode())), Code::PROTOCOL),
        (
            "2^63 bytes of description",
            Box::new(|rogue| {
                let mut rogue = rogue.greet();
                rogue.frame(&[&[2], &TWO_TO_THE_63[..]].concat());
                rogue
            }),
            Code::PROTOCOL,
        ),
        (
            "a region beyond all addresses",
            ask_for(Prepare { layout: layout_of(1 << 60), ..honest.clone() }),
            Code::PROTOCOL,
        ),
        (
            "another layout than the machine's",
            ask_for(Prepare { layout: layout_of(1 << 40), ..honest.clone() }),
            Code::MEMORY,
        ),
        (
            "a description that is none",
            ask_for(Prepare { description: vec![0xff; 100], ..honest.clone() }),
            Code::STATE,
        ),
        (
            "a description of a newer version",
            ask_for(Prepare { description: [&[99], &honest.description[1..]].concat(), ..honest.clone() }),
            Code::STATE,
        ),
        ("a machine of 1 PiB", ask_for(larger(&honest)), Code::MEMORY),
        (
            "Commit without state",
            Box::new(|rogue| {
                let mut rogue = rogue.greet();
                rogue.send(&Message::Prepare(honest.clone()));
                assert_eq!(rogue.receive().map(|m| m.name()), Some("Prepared"));
                rogue.send(&Message::Commit);
                rogue
            }),
            Code::PROTOCOL,
        ),
        (
            "a part of a state before there is a machine",
            Box::new(|rogue| {
                let mut rogue = rogue.greet();
                rogue.send(&Message::StatePart(StatePart(vec![0x5a; MIN_STATE_PART])));
                rogue
            }),
            Code::PROTOCOL,
        ),
        (
            "a state that is none",
            Box::new(|rogue| {
                let mut rogue = rogue.greet();
                rogue.send(&Message::Prepare(honest.clone()));
                assert_eq!(rogue.receive().map(|m| m.name()), Some("Prepared"));
                rogue.send(&Message::State(State { state: vec![0x5a; 1000], digest: None }));
                rogue
            }),
            Code::STATE,
        ),
    ];
    let count = misdeeds.len();
    for (number, (what, misdeed, code)) in (10..).zip(misdeeds) {
        let rogue = misdeed(Rogue::session(address, token(number)).0);
        let (found, message) = refusal(&mut node);
        assert_eq!(found, code.name(), "{what}: {message}");
        assert!(!message.is_empty() && is_empty(&node), "{what}");
        drop(rogue);
    }
    for (what, bytes) in lanes() {
        wild_lane(address, &honest, what, &bytes);
        refusal(&mut node);
    }
    let guest = Guest::SMALL.start(folder.path(), "guest");
    hop(&guest, &mut node, address);
    settle(&node, &Guest::SMALL);
    say::figures(
        "sources that are none",
        format_args!("{} refused, then a guest taken in", count + 4 + lanes().len()),
    );
}

/// The same machine with a memory of 1 PiB: the size is the first number after the version.
fn larger(honest: &Prepare) -> Prepare {
    let rest = honest.description[1..].iter().position(|byte| byte & 0x80 == 0).unwrap() + 2;
    let size = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x02]; // 2 << 49
    let description = [&honest.description[..1], &size, &honest.description[rest..]].concat();
    let layout = vec![migration::memory::RegionLayout { guest_address: 0, len: 1 << 50 }];
    Prepare { description, layout, ..honest.clone() }
}

/// Data lanes that try to write where they may not.
fn lanes() -> Vec<(&'static str, Vec<u8>)> {
    let header = |kind: u32, extents: u32| [kind, extents, 0, 0].map(u32::to_le_bytes).concat();
    let extent = |region: u32, pages: u32, page: u64| {
        [&region.to_le_bytes()[..], &pages.to_le_bytes(), &page.to_le_bytes()].concat()
    };
    vec![
        ("garbage", vec![0xff; 64]),
        ("4 billion extents", header(1, u32::MAX)),
        ("a region that is not there", [header(1, 1), extent(7, 1, 0), vec![1; 4096]].concat()),
        ("a page beyond the end", [header(1, 1), extent(0, 1, 4096), vec![1; 4096]].concat()),
        ("2^63 pages on", [header(1, 1), extent(0, 1, 1 << 63), vec![1; 4096]].concat()),
        ("an end that overflows", [header(2, 1), extent(0, u32::MAX, u64::MAX - 1)].concat()),
    ]
}

/// Opens a session and a lane in it, sends the bytes; the receiver must close the lane.
fn wild_lane(address: SocketAddr, honest: &Prepare, what: &str, bytes: &[u8]) {
    let token = token(200);
    let (control, secret) = Rogue::session(address, token);
    let mut control = control.greet();
    control.send(&Message::Prepare(honest.clone()));
    let Some(Message::Prepared(prepared)) = control.receive() else { panic!("{what}: not prepared") };
    assert!(prepared.offers[0].details.is_ok(), "{what}");
    let mut lane = Rogue::call(address);
    assert_eq!(lane.lane(Preamble::data(token, 0, 1), &secret), Some(Status::Ok), "{what}");
    lane.raw(bytes);
    assert!(lane.rest().is_empty(), "{what}");
}

#[test]
fn a_silent_caller_delays_the_next_one_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let (mut node, address) = receiver(folder.path(), "receiver");
    let guest = Guest::SMALL.start(folder.path(), "guest");
    // A caller that has not even sent its preamble delays nobody.
    let mute = Rogue::call(address);
    let silent = Rogue::session(address, token(3));
    let api = guest.api_path().to_str().unwrap();
    let ran = run(["migrate", "--api", api, "--json", "--to", &address.to_string()]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert_eq!(ran.json()["report"]["failure"]["code"], "busy");
    assert_runs(&guest);
    // It is not waited for for ever.
    let (code, _) = refusal(&mut node);
    assert_eq!(code, "timeout");
    hop(&guest, &mut node, address);
    settle(&node, &Guest::SMALL);
    drop((mute, silent));
    say::figures("a silent caller", "given up, then a guest taken in");
}

#[test]
fn a_flood_of_callers_is_survived() {
    let folder = tempfile::tempdir().unwrap();
    let (mut node, address) = receiver(folder.path(), "receiver");
    let mutes: Vec<_> = (0..200).map(|_| Rogue::call(address)).collect();
    thread::sleep(Duration::from_millis(50));
    drop(mutes);
    let guest = Guest::SMALL.start(folder.path(), "guest");
    // The receiver notices one after the other that they are gone.
    wait_until("the receiver has room", || {
        Rogue::call(address).preamble(Preamble::data(token(9), 0, 1)).is_some()
    });
    hop(&guest, &mut node, address);
    settle(&node, &Guest::SMALL);
    say::figures("a flood of callers", "200 of them, then a guest taken in");
}
