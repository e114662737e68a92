//! Guests move while hundreds of hostile callers a second call the receivers that they move to.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;
use transport_tcp::Connector;
use transport_tcp::tls::{Files, Renewed};
use whimbrel::node::Node;
use whimbrel::pki::{Authority, days_from_now};
use whimbrel_tests::flood::{Flood, greeting, holds};
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, assert_runs, hop_as, request, wait_until};

/// Hostile connections in a second, as far as this machine can make them.
const PER_SECOND: u64 = 500;

/// Of them, how many a receiver has had before a guest is sent to it: it has no place left.
const BEFORE_A_MOVE: u64 = 300;

/// What a receiver may use beyond its guest.
const MOST_MEMORY: u64 = 64 << 20;

/// The most memory beside its guest's that a process has been seen with.
#[derive(Default)]
struct Watch {
    pid: AtomicU32,
    peak: AtomicU64,
    ended: AtomicBool,
}

impl Watch {
    fn run(&self) {
        while !self.ended.load(Ordering::Relaxed) {
            let (memory, _) = holds(self.pid.load(Ordering::Relaxed));
            self.peak.fetch_max(memory, Ordering::Relaxed);
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Ends the watch when it is dropped.
struct Watching<'a>(&'a Watch);

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.ended.store(true, Ordering::Relaxed);
    }
}

fn receiver(folder: &Path, tls: &str, name: &str) -> (Node, SocketAddr) {
    Node::receiver(whimbrel(), folder, name, ["--tls", tls]).unwrap()
}

fn connector(host: &Path) -> Connector {
    Connector::new(Renewed::new(Files::in_folder(host), Vec::new()).protection().unwrap())
}

fn median(mut times: Vec<u64>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2] as f64 / 1e3
}

/// Moves a guest from process to process, `moves` times in peace and as often in a flood of `connections`
/// and more.
fn flooded(moves: usize, connections: u64) {
    let folder = tempfile::tempdir().unwrap();
    let authority = |name: &str| {
        let authority = Authority::create(&folder.path().join(name)).unwrap();
        authority.issue("localhost", &["127.0.0.1".into()], days_from_now(1)).unwrap()
    };
    let (host, stranger) = (authority("pki"), authority("other"));
    // It trusts the receivers, and they do not trust it.
    std::fs::copy(host.join("ca.pem"), stranger.join("ca.pem")).unwrap();
    std::fs::copy(host.join("crl.pem"), stranger.join("crl.pem")).unwrap();
    let tls = host.to_str().unwrap();
    let mut here = Guest::SMALL.start_by(whimbrel(), &["--tls", tls], folder.path(), "guest");
    let asked = |to| whimbrel::api::model::MigrationRequest { insecure: false, ..request(to) };

    let mut quiet = Vec::new();
    let mut descriptors_with_guest = 0;
    for number in 0..moves {
        let (mut next, address) = receiver(folder.path(), tls, &format!("quiet{number}"));
        quiet.push(hop_as(&here, &mut next, &asked(address)).total_us);
        assert_runs(&next);
        descriptors_with_guest = holds(next.pid()).1;
        here = next;
    }

    // One more than there are moves, to be looked at in the end.
    let names = (0..=moves).map(|number| format!("flooded{number}"));
    let mut receivers: Vec<_> = names.map(|name| receiver(folder.path(), tls, &name)).collect();
    let (last, last_address) = receivers.pop().unwrap();
    let (memory_before, descriptors_before) = holds(last.pid());
    assert!(memory_before > 0 && descriptors_before > 0);
    let first = receivers[0].1;
    let (greeted, address) = receiver(folder.path(), tls, "greeted");
    let greeting = greeting(&connector(&host), address);
    drop(greeted);
    let flood = Flood::start(first, PER_SECOND, greeting, connector(&stranger));
    let watch = Watch::default();
    let mut stormy = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| watch.run());
        // However this ends.
        let _watching = Watching(&watch);
        let targets: Vec<_> = receivers.iter().map(|(_, address)| *address).chain([last_address]).collect();
        for (number, (mut next, address)) in receivers.into_iter().enumerate() {
            watch.pid.store(next.pid(), Ordering::Relaxed);
            wait_until("the receiver is flooded", || flood.at_target() >= BEFORE_A_MOVE);
            stormy.push(hop_as(&here, &mut next, &asked(address)).total_us);
            // It has taken its guest, and is called no more.
            flood.aim(targets[number + 1]);
            assert_runs(&next);
            let closed = || holds(next.pid()).1 <= descriptors_with_guest;
            wait_until("the callers' descriptors are closed", closed);
            here = next;
        }
        watch.pid.store(last.pid(), Ordering::Relaxed);
        wait_until("all calls", || flood.at_target() >= BEFORE_A_MOVE && flood.made() >= connections);
        let made = flood.made();
        say::figures("hostile connections", format_args!("{made}, {:.0} a second", flood.end()));
    });
    // It gives up those who say nothing.
    wait_until("the last receiver closes what is left", || holds(last.pid()).1 <= descriptors_before);
    let peak = watch.peak.load(Ordering::Relaxed);
    say::figures(
        "a flood",
        format_args!(
            "{moves} of {moves} guests moved; median {:.0} ms in peace, {:.0} ms in it; a receiver had {} MiB beside \
             its guest's, {} MiB at rest; {descriptors_before} descriptors before and after",
            median(quiet),
            median(stormy),
            peak >> 20,
            memory_before >> 20
        ),
    );
    assert!(peak < MOST_MEMORY, "{peak} bytes");
    // And it still takes a guest.
    let mut last = last;
    hop_as(&here, &mut last, &asked(last_address));
    assert_runs(&last);
}

#[test]
fn guests_move_in_a_flood() {
    flooded(3, 1000);
}

#[test]
#[ignore = "takes a minute: cargo test --release -p whimbrel-tests --test flood -- --ignored --nocapture"]
fn twenty_guests_move_in_a_flood_of_ten_thousand() {
    flooded(20, 10_000);
}
