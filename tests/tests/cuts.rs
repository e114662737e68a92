//! The line is cut at any byte of a migration, in any connection and either way: the guest runs at exactly
//! one side or is held, the receiver takes the next guest, and nothing is lost.

use migration::report::Verdict;
use migration::transport::Secret;
use migration::{Code, preamble};
use whimbrel::api::model::VmState;
use whimbrel::node::Node;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::proxy::{Break, Cut, OPENING, Plane, Proxy, Rules, Way};
use whimbrel_tests::say;
use whimbrel_tests::sides::{
    Guest, assert_runs, assert_stands_still, hop, is_empty, migrate, receiver, request,
};

/// Cuts for each plane and way.
const SPREAD: u64 = 12;

/// Places at which to cut connections of one plane in one way: at the ends, in and after the preamble, around
/// the end of each message, and evenly between.
fn places(proxy: &Proxy, plane: Plane, way: Way) -> Vec<u64> {
    let (preamble, whole) = (preamble::LEN as u64, proxy.passed(plane, way));
    let mut places = vec![0, 1, preamble - 1, preamble, preamble + 3, preamble + 4, whole.saturating_sub(1)];
    places.extend((1..SPREAD).map(|n| whole * n / SPREAD));
    if plane == Plane::Control {
        // A message that tells times is some bytes longer or shorter in the next run.
        places.extend(proxy.ends(way).into_iter().flat_map(|end| [end - 2, end, end + 2, end + 5]));
    }
    places.retain(|place| *place < whole);
    places.sort_unstable();
    places.dedup();
    places
}

struct Pair {
    _folder: tempfile::TempDir,
    source: Node,
    destination: Node,
    address: std::net::SocketAddr,
}

impl Pair {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = Guest::SMALL.start(folder.path(), "source");
        let (destination, address) = receiver(folder.path(), "destination");
        Pair { _folder: folder, source, destination, address }
    }
}

fn cut_everywhere(plane: Plane, way: Way) {
    let whole = Pair::new();
    let proxy = Proxy::start(whole.address, Rules::default());
    assert_eq!(migrate(&whole.source, &request(proxy.address())).verdict, Verdict::Moved);
    let places = places(&proxy, plane, way);
    let mut counts = [0; 3];
    let mut pair = Pair::new();
    for after in &places {
        counts[cut(&mut pair, Cut { how: Break::Close, plane, way, after: *after }) as usize] += 1;
    }
    // The guest has been through all cuts since the last one that took it away.
    hop(&pair.source, &mut pair.destination, pair.address);
    settle(&pair.destination, &Guest::SMALL);
    let [moved, stayed, held] = counts;
    say::figures(
        &format!("{plane:?} cut, {way:?}").to_lowercase(),
        format_args!(
            "{} places in {} bytes: {stayed} stayed, {held} held, {moved} moved",
            places.len(),
            proxy.passed(plane, way)
        ),
    );
    assert!(stayed > 0, "no cut came before the end");
}

#[test]
fn control_messages_cut_on_their_way_to_the_destination() {
    cut_everywhere(Plane::Control, Way::Up);
}

#[test]
fn control_messages_cut_on_their_way_to_the_source() {
    cut_everywhere(Plane::Control, Way::Down);
}

#[test]
fn guest_memory_cut() {
    cut_everywhere(Plane::Data, Way::Up);
}

#[test]
fn confirmations_cut() {
    cut_everywhere(Plane::Data, Way::Down);
}

/// Tries to move the guest over a line that is cut; afterwards the pair is ready for the next try.
fn cut(pair: &mut Pair, cut: Cut) -> Verdict {
    let proxy = Proxy::start(pair.address, Rules { cut: Some(cut), ..Rules::default() });
    let mut request = request(proxy.address());
    request.silence_s = 5;
    let report = migrate(&pair.source, &request);
    let committed = proxy.delivered(Way::Up, "Commit");
    let confirmed = proxy.delivered(Way::Down, "Running");
    match report.verdict {
        Verdict::Stayed => {
            assert!(!committed, "{cut:?}: the destination was told to run the guest: {report:?}");
            // With Ready the source tries to say Commit, and from then on it cannot know.
            assert!(!proxy.delivered(Way::Down, "Ready"), "{cut:?}: {report:?}");
            assert!(report.failure.is_some_and(|f| !f.message.is_empty()), "{cut:?}");
            assert_runs(&pair.source);
            if opened(&cut) {
                pair.destination.expect("refused").unwrap();
            }
            assert!(is_empty(&pair.destination), "{cut:?}: a guest is there");
            return Verdict::Stayed;
        }
        Verdict::Held => {
            assert!(!confirmed && proxy.delivered(Way::Down, "Ready"), "{cut:?}: {report:?}");
            assert_eq!(pair.source.status().unwrap().state, VmState::Held, "{cut:?}");
            assert_stands_still(&pair.source);
            if committed {
                // The destination has it, and the source's copy must end.
                pair.destination.expect("arrived").unwrap();
                assert_runs(&pair.destination);
                settle(&pair.destination, &Guest::SMALL);
            } else {
                // The destination has not: the operator sees that it went back to listening, and forces.
                pair.destination.expect("refused").unwrap();
                pair.source.resume(true).unwrap();
                settle(&pair.source, &Guest::SMALL);
            }
        }
        Verdict::Moved => {
            assert!(confirmed, "{cut:?}: moved without a word");
            pair.destination.expect("arrived").unwrap();
            assert_runs(&pair.destination);
            settle(&pair.destination, &Guest::SMALL);
        }
        other => panic!("{cut:?}: {other:?}"),
    }
    *pair = Pair::new();
    report.verdict
}

/// Bytes with which the receiver opens a control link: what it says before the source's proof, and after.
const DOWN_BEFORE: u64 = (preamble::LEN + Secret::LEN) as u64;
const DOWN: u64 = DOWN_BEFORE + preamble::LEN as u64;

/// Whether the receiver gets the whole proof of a session, and so takes the caller for a source.
fn opened(cut: &Cut) -> bool {
    match (cut.plane, cut.way) {
        (Plane::Control, Way::Up) => cut.after >= OPENING,
        (Plane::Control, Way::Down) => cut.after >= DOWN_BEFORE,
        (Plane::Data, _) => true,
    }
}

/// A line that goes dead without a word is noticed in the time that was given.
#[test]
fn a_line_that_goes_dead() {
    let mut pair = Pair::new();
    let places = [
        (Plane::Control, Way::Up, preamble::LEN as u64),
        (Plane::Control, Way::Up, OPENING),
        (Plane::Control, Way::Down, 0),
        (Plane::Control, Way::Down, DOWN_BEFORE),
        (Plane::Control, Way::Down, DOWN),
        (Plane::Data, Way::Up, 10),
        (Plane::Data, Way::Up, 300_000),
        (Plane::Data, Way::Down, 0),
        (Plane::Data, Way::Down, 8 * preamble::LEN as u64),
    ];
    for (plane, way, after) in places {
        let cut = Cut { how: Break::Silence, plane, way, after };
        let proxy = Proxy::start(pair.address, Rules { cut: Some(cut), ..Rules::default() });
        let mut request = request(proxy.address());
        (request.silence_s, request.streams) = (1, 4);
        let report = migrate(&pair.source, &request);
        assert_eq!(report.verdict, Verdict::Stayed, "{cut:?}");
        let code = report.failure.unwrap().code;
        assert!([Code::TIMEOUT, Code::TRANSPORT].contains(&code), "{cut:?}: {code:?}");
        assert_runs(&pair.source);
        drop(proxy);
        if opened(&cut) {
            pair.destination.expect("refused").unwrap();
        }
    }
    hop(&pair.source, &mut pair.destination, pair.address);
    settle(&pair.destination, &Guest::SMALL);
    say::figures("a dead line", format_args!("{} places; the guest stayed and then moved", places.len()));
}
