//! A source that does not get on is given up, and one that waits is not.

use crate::PATIENCE;
use crate::guest::Host;
use migration::conformance::bed;
use migration::destination::{self, Timeouts};
use migration::link::ControlLink;
use migration::memory::PAGE_SIZE;
use migration::message::{ChunkDigests, FEATURES, Hello, Message, Prepare, StatePart};
use migration::preamble::{self, Preamble};
use migration::transport::{COVERAGE_UNIT, Token};
use migration::{Code, Failure};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};
use whimbrel_transport_tcp::{Connection, Listener, NAME, TcpDestination, connect_control};

/// Between two deeds of a source.
const PACE: Duration = Duration::from_millis(20);

/// A source that has got as far as the transfer of memory.
struct Source {
    link: Connection,
    data: TcpStream,
    turn: u64,
}

impl Source {
    fn say(&mut self, message: &Message) -> bool {
        self.link.send(&message.encode()).is_ok()
    }

    /// Sends one page of memory, or with `zero` only its name.
    fn page(&mut self, page: u64, zero: bool) -> bool {
        let words = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        let mut frame = words(&[if zero { 2 } else { 1 }, 1, 0, 0, 0, 1, page as u32, 0]);
        if !zero {
            frame.resize(frame.len() + PAGE_SIZE as usize, 7);
        }
        self.data.write_all(&frame).is_ok()
    }
}

/// What becomes of a session in which the source goes on with `deed` until it is given up, or until it calls
/// the migration off after `until`.
fn session(
    features: u64,
    silence: Duration,
    whole: Duration,
    until: Duration,
    deed: fn(&mut Source) -> bool,
) -> Failure {
    let listener = Listener::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    let address = listener.local_addr();
    thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            let mut link = listener.next_control(PATIENCE).unwrap().expect("a caller");
            let mut timeouts = Timeouts::default();
            (timeouts.silence, timeouts.whole) = (silence, whole);
            let (mut host, transport) = (Host::default(), TcpDestination::new(&listener));
            let migration = destination::Migration::new(&mut host, &mut link).transport(transport);
            migration.timeouts(timeouts).run().map(drop).expect_err("a guest that was never sent")
        });
        let token = Token::random().unwrap();
        let mut link = connect_control(&address.to_string(), token, PATIENCE).unwrap();
        let hello = Message::Hello(Hello { software: "a test".into(), features });
        let transports = vec![NAME.into()];
        let prepare = Prepare { description: vec![], layout: bed::ram().layout(), transports };
        for (message, answer) in [(hello, "Welcome"), (Message::Prepare(prepare), "Prepared")] {
            link.send(&message.encode()).unwrap();
            let mut next = || Message::decode(&link.receive(PATIENCE).unwrap().unwrap()).unwrap().name();
            while next() != answer {}
        }
        let mut data = TcpStream::connect(address).unwrap();
        let preamble = Preamble::data(token, 0, 1).encode();
        for said in [&preamble[..], &link.secret().proof(&preamble)] {
            data.write_all(said).unwrap();
            data.read_exact(&mut [0; preamble::LEN]).unwrap();
        }
        let mut source = Source { link, data, turn: 0 };
        let began = Instant::now();
        while !arriving.is_finished() && began.elapsed() < until && deed(&mut source) {
            source.turn += 1;
            thread::sleep(PACE);
        }
        if began.elapsed() >= until {
            source.say(&Message::Abort(Failure::new(Code::CANCELLED, "that will do")));
        }
        arriving.join().unwrap()
    })
}

/// No limit.
const FOR_EVER: Duration = Duration::from_secs(3600);

#[test]
fn who_repeats_one_page_or_sends_nothing_is_given_up() {
    let silence = Duration::from_millis(400);
    let deeds: [fn(&mut Source) -> bool; 3] = [
        |source| source.page(3, false),
        |source| source.page(3, true),
        // Two pages, next to each other.
        |source| source.page(source.turn % 2, false),
    ];
    for deed in deeds {
        let why = session(FEATURES, silence, FOR_EVER, PATIENCE, deed);
        // On a busy host it may have been silent for as long.
        assert_eq!(why.code, Code::TIMEOUT, "{why}");
    }
    let why = session(FEATURES, silence, FOR_EVER, PATIENCE, |_| true);
    assert!(why.code == Code::TIMEOUT && why.message.contains("fell silent"), "{why}");
    // One that knows no word for waiting gets more time, but not all.
    let why = session(0, silence / 2, FOR_EVER, PATIENCE, |source| source.page(3, false));
    assert_eq!(why.code, Code::TIMEOUT, "{why}");
}

#[test]
fn who_waits_and_says_so_is_waited_for_but_not_for_ever() {
    let silence = Duration::from_millis(1200);
    let wait: fn(&mut Source) -> bool = |source| source.say(&Message::Waiting);
    let why = session(FEATURES, silence, FOR_EVER, 3 * silence, wait);
    assert!(why.message.contains("that will do"), "{why}");
    let why = session(FEATURES, silence, 2 * silence, PATIENCE, wait);
    assert!(why.code == Code::TIMEOUT && why.message.contains("not come to the switchover within"), "{why}");
}

/// As a capped source, or one with a slow line, does: a page here and a page there.
#[test]
fn who_gets_on_slowly_is_waited_for() {
    let silence = Duration::from_millis(1200);
    let why = session(FEATURES, silence, FOR_EVER, 3 * silence, |source| {
        source.page(source.turn % 4 * (COVERAGE_UNIT / PAGE_SIZE), false)
    });
    assert!(why.message.contains("that will do"), "{why}");
}

#[test]
fn messages_that_change_nothing_do_not_keep_a_session() {
    let silence = Duration::from_millis(1200);
    let why = session(FEATURES, silence, FOR_EVER, PATIENCE, |source| {
        source.say(&Message::ChunkDigests(ChunkDigests(vec![1])))
    });
    assert!(why.code == Code::PROTOCOL && why.message.contains("ChunkDigests"), "{why}");
    let why = session(FEATURES, silence, FOR_EVER, PATIENCE, |source| {
        source.say(&Message::StatePart(StatePart(vec![1])))
    });
    assert!(why.code == Code::PROTOCOL && why.message.contains("too short"), "{why}");
    let why =
        session(FEATURES, silence, FOR_EVER, PATIENCE, |source| source.say(&Message::Retire("none".into())));
    assert!(why.code == Code::PROTOCOL && why.message.contains("too often"), "{why}");
}
