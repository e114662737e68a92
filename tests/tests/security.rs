//! Who may speak to whom: certificates that are right and wrong, and what somebody on the network can do.

use migration::link::ControlLink;
use migration::message::{Hello, Message};
use migration::preamble::{Preamble, Status};
use migration::report::{Report, Verdict};
use migration::transport::{Secret, Session, SourceTransport, Token};
use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime};
use transport_tcp::Connector;
use transport_tcp::tls::{Files, Renewed};
use whimbrel::api::model::{Migration, MigrationRequest, VmState};
use whimbrel::node::Node;
use whimbrel::pki::{Authority, days_from_now};
use whimbrel::security::TlsFiles;
use whimbrel_tests::command::run;
use whimbrel_tests::mitm::Mitm;
use whimbrel_tests::program::whimbrel;
use whimbrel_tests::rogue::{Rogue, honest_machine, honest_prepare};
use whimbrel_tests::say;
use whimbrel_tests::sides::{
    Guest, PATIENCE, assert_runs, hop_as, is_empty, migrate, receiver, request, wait_until,
};

const SOURCE: &str = "a.hosts.example";
const DESTINATION: &str = "b.hosts.example";

/// More than the time in which a receiver tells of one refusal only.
const TOLD_AGAIN: Duration = Duration::from_millis(1100);

/// An authority, and the folders of two hosts.
struct Fleet {
    folder: PathBuf,
    authority: Authority,
    source: PathBuf,
    destination: PathBuf,
    /// Whether the hosts use their certificates.
    protected: bool,
}

impl Fleet {
    fn new(folder: &Path, protected: bool) -> Self {
        let authority = Authority::create(&folder.join("pki")).unwrap();
        let (source, destination) = (authority.host(SOURCE), authority.host(DESTINATION));
        let fleet = Fleet { folder: folder.to_path_buf(), authority, source, destination, protected };
        fleet.renew();
        fleet
    }

    /// Good certificates for both.
    fn renew(&self) {
        self.authority.issue(SOURCE, &[], days_from_now(1)).unwrap();
        self.authority.issue(DESTINATION, &["127.0.0.1".into()], days_from_now(1)).unwrap();
    }

    fn receiver(&self, name: &str) -> (Node, SocketAddr) {
        if !self.protected {
            return receiver(&self.folder, name);
        }
        let tls = self.destination.to_str().unwrap();
        Node::receiver(whimbrel(), &self.folder, name, ["--tls", tls, "--allow", "*.hosts.example"]).unwrap()
    }

    /// A guest whose process may read all that the authority has made, since the authority's own certificate
    /// is in the same folder. Each request says what of it is used.
    fn guest(&self, name: &str) -> Node {
        let authority = self.folder.join("pki/ca.pem");
        let tls = ["--tls", self.source.to_str().unwrap(), "--tls-ca", authority.to_str().unwrap()];
        let more: &[&str] = if self.protected { &tls } else { &[] };
        Guest::SMALL.start_by(whimbrel(), more, &self.folder, name)
    }

    fn request(&self, to: SocketAddr) -> MigrationRequest {
        if !self.protected {
            return request(to);
        }
        let tls = TlsFiles { folder: Some(self.source.clone()), ..TlsFiles::default() };
        MigrationRequest { tls: Some(tls), insecure: false, ..request(to) }
    }
}

/// Moves the guest, and tells of it: the process that it has left may end at once.
fn moved(guest: &Node, receiver: &mut Node, request: &MigrationRequest) -> Migration {
    guest.migrate(request).unwrap();
    let migration = guest.wait_migration(PATIENCE).unwrap();
    assert_eq!(migration.report.as_ref().map(|report| report.verdict), Some(Verdict::Moved), "{migration:?}");
    let peer = receiver.expect("arrived").unwrap()["secured"]["peer"].as_str().unwrap().to_string();
    assert!([SOURCE, "localhost"].contains(&peer.as_str()), "{peer}");
    migration
}

/// The guest stays, and both sides say why.
fn stays(guest: &Node, receiver: &Node, request: &MigrationRequest, here: &str, there: &str) {
    thread::sleep(TOLD_AGAIN);
    let report = migrate(guest, request);
    assert_eq!(report.verdict, Verdict::Stayed, "{here}");
    let why = report.failure.unwrap();
    assert!(why.message.contains(here) && why.message.lines().count() == 1, "{here}: {why}");
    assert_eq!(why.code, migration::Code::AUTHENTICATION, "{here}: {why}");
    if !there.is_empty() {
        wait_until(there, || receiver.stderr().lines().last().is_some_and(|line| line.contains(there)));
    }
    assert!(is_empty(receiver), "{here}");
    assert_runs(guest);
}

#[test]
fn wrong_certificates_are_told_by_both_sides_and_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let fleet = Fleet::new(folder.path(), true);
    let stranger = Authority::create(&folder.path().join("pki/other")).unwrap();
    let (mut node, address) = fleet.receiver("receiver");
    let guest = fleet.guest("guest");
    let asked = fleet.request(address);
    let stays =
        |request: &MigrationRequest, here: &str, there: &str| stays(&guest, &node, request, here, there);
    let now = SystemTime::now();
    let day = Duration::from_secs(86_400);
    let (past, future) = (now - 9 * day..now - 3 * day, now + 3 * day..now + 9 * day);
    let address_of = ["127.0.0.1".to_string()];
    let issue = |name: &str, valid: &std::ops::Range<SystemTime>| {
        let others: &[String] = if name == DESTINATION { &address_of } else { &[] };
        fleet.authority.issue(name, others, valid.clone()).unwrap()
    };

    issue(DESTINATION, &past);
    stays(
        &asked,
        "has a certificate that expired 3 days ago",
        "refuses this side's certificate: it has expired",
    );
    issue(DESTINATION, &future);
    stays(&asked, "is not valid yet", "refuses this side's certificate");
    fleet.authority.issue(DESTINATION, &[], days_from_now(1)).unwrap();
    let wrong_name = "is not for 127.0.0.1, but for b.hosts.example";
    stays(&asked, wrong_name, "it is not for the host that it was expected from");
    fleet.renew();
    issue(SOURCE, &past);
    stays(
        &asked,
        "refuses this side's certificate: it has expired",
        "has a certificate that expired 3 days ago",
    );
    issue(SOURCE, &future);
    stays(&asked, "refuses this side's certificate", "is not valid yet");
    fleet.renew();
    let files = |folder: PathBuf| Some(TlsFiles { folder: Some(folder), ..TlsFiles::default() });
    let foreign = stranger.issue(SOURCE, &[], days_from_now(1)).unwrap();
    let from_foreign = MigrationRequest { tls: files(foreign.clone()), ..asked.clone() };
    stays(&from_foreign, "comes from another CA", "it comes from another CA");
    // One that the source trusts, and the destination does not.
    std::fs::copy(fleet.source.join("ca.pem"), foreign.join("ca.pem")).unwrap();
    std::fs::remove_file(foreign.join("crl.pem")).unwrap();
    stays(&from_foreign, "it comes from another CA", "comes from another CA");
    let uninvited = fleet.authority.issue("c.elsewhere.example", &[], days_from_now(1)).unwrap();
    let from_uninvited = MigrationRequest { tls: files(uninvited), ..asked.clone() };
    stays(&from_uninvited, "does not admit the host", "c.elsewhere.example is not among those");
    let keyless = TlsFiles { key: Some(fleet.destination.join("key.pem")), ..asked.tls.clone().unwrap() };
    stays(&MigrationRequest { tls: Some(keyless), ..asked.clone() }, "is not the key of", "");
    let missing = MigrationRequest { tls: files("/nonexistent".into()), ..asked.clone() };
    stays(&missing, "cannot read /nonexistent/ca.pem", "");
    let without = Guest::SMALL.start(folder.path(), "without");
    let plain = MigrationRequest { tls: None, insecure: true, ..asked.clone() };
    self::stays(&without, &node, &plain, "takes encrypted connections only", "it does not encrypt");
    if vmm::sandbox::landlock().is_ok() {
        // Its process was not told of them when it started.
        self::stays(&without, &node, &asked, "may have to be told of its folder", "");
    }
    fleet.authority.revoke(SOURCE).unwrap();
    stays(
        &asked,
        "refuses this side's certificate: it has been revoked",
        "has a certificate that has been revoked",
    );
    fleet.renew();
    fleet.authority.revoke(DESTINATION).unwrap();
    stays(
        &asked,
        "has a certificate that has been revoked",
        "refuses this side's certificate: it has been revoked",
    );

    let (unprotected, clear) = receiver(folder.path(), "unprotected");
    self::stays(
        &guest,
        &unprotected,
        &fleet.request(clear),
        "has no certificate",
        "this side has no certificate",
    );
    let rdma = MigrationRequest {
        encryption: whimbrel::security::Encryption::Required,
        transport: whimbrel::api::model::TransportChoice::Rdma,
        ..asked.clone()
    };
    stays(&rdma, "RDMA has none", "");

    // Renewed on disk, and nobody was started anew.
    fleet.renew();
    let request = MigrationRequest { compare_memory: true, ..asked };
    let migration = moved(&guest, &mut node, &request);
    assert_eq!(
        migration.secured.map(|s| (s.peer, s.cipher.contains("TLS 1.3"))),
        Some((DESTINATION.into(), true))
    );
    assert_runs(&node);
    say::figures("wrong certificates", "16 kinds; the guest stayed each time, and then moved");
}

#[test]
fn without_certificates_only_this_host_is_reached() {
    let folder = tempfile::tempdir().unwrap();
    run(["receive", "--listen", "0.0.0.0:0"]).refused(1, "use --tls FOLDER");
    run(["receive", "--listen", "[::]:0"]).refused(1, "or --insecure");
    let guest = Guest::SMALL.start(folder.path(), "guest");
    let request = MigrationRequest { insecure: false, ..request("192.0.2.1:4444".parse().unwrap()) };
    let why = migrate(&guest, &request).failure.unwrap();
    assert!(
        why.message.contains("192.0.2.1:4444 is another host") && why.message.contains("--insecure"),
        "{why}"
    );
    assert_runs(&guest);
}

/// Moves a guest through somebody who says `GaveUp` for the destination after `Commit`; what each side does
/// then.
fn forged(name: &str, protected: bool) -> (Report, VmState, VmState) {
    let folder = tempfile::tempdir().unwrap();
    let fleet = Fleet::new(folder.path(), protected);
    let (node, address) = fleet.receiver(name);
    let mitm = Mitm::start(address, true);
    let guest = fleet.guest("guest");
    let report = migrate(&guest, &fleet.request(mitm.address()));
    wait_until("the guest runs at the destination", || node.status().unwrap().state == VmState::Running);
    (report, guest.status().unwrap().state, node.status().unwrap().state)
}

#[test]
fn nobody_can_give_up_for_the_destination() {
    let (report, here, there) = forged("protected", true);
    assert_eq!((report.verdict, here, there), (Verdict::Held, VmState::Held, VmState::Running), "{report:?}");
    // This is what it is for: without certificates the lie is believed, and the guest runs twice.
    let (report, here, there) = forged("unprotected", false);
    assert_eq!((report.verdict, here, there), (Verdict::Stayed, VmState::Running, VmState::Running));
    say::figures("a forged GaveUp", "believed without certificates, not believed with them");
}

#[test]
fn a_session_that_was_recorded_cannot_be_played_again() {
    for protected in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let fleet = Fleet::new(folder.path(), protected);
        let (mut node, address) = fleet.receiver("first");
        let mitm = Mitm::start(address, false);
        let guest = fleet.guest("guest");
        hop_as(&guest, &mut node, &fleet.request(mitm.address()));
        let recorded = mitm.recorded();
        assert!(recorded.len() > 1 && recorded.iter().all(|bytes| bytes.len() > 32));

        let (mut again, address) = fleet.receiver("again");
        let play = |bytes: &[u8]| {
            let mut stream = TcpStream::connect(address).unwrap();
            // It may be closed by then.
            let _ = stream.write_all(bytes);
            stream
        };
        let (control, lanes) = recorded.split_first().unwrap();
        let mut played = vec![play(control)];
        let refused = if protected { "was refused" } else { "repeating what it has recorded" };
        wait_until("the receiver refuses it", || again.stderr().contains(refused));
        played.extend(lanes.iter().map(|lane| play(lane)));
        assert!(is_empty(&again));
        drop(played);
        let other = fleet.guest("other");
        hop_as(&other, &mut again, &fleet.request(address));
        assert_runs(&again);
    }
}

#[test]
fn a_lane_needs_more_than_the_token() {
    let folder = tempfile::tempdir().unwrap();
    let (node, address) = receiver(folder.path(), "receiver");
    let token = Token([77; 16]);
    let (control, secret) = Rogue::session(address, token);
    let mut control = control.greet();
    let machine = honest_machine();
    control.send(&Message::Prepare(honest_prepare(&machine)));
    assert_eq!(control.receive().map(|m| m.name()), Some("Prepared"));
    let lane = |lane, lanes, secret: &Secret| {
        let mut rogue = Rogue::call(address);
        let status = rogue.lane(Preamble::data(token, lane, lanes), secret);
        (rogue, status)
    };
    // Whoever has seen the token.
    assert_eq!(lane(0, 2, &Secret::NONE).1, Some(Status::Session));
    let first = lane(0, 2, &secret);
    assert_eq!(first.1, Some(Status::Ok));
    // Even the source gets no more lanes than it has announced, and each once.
    for (number, lanes) in [(0, 2), (2, 2), (6, 7), (1, 7), (2, 3)] {
        assert_eq!(lane(number, lanes, &secret).1, Some(Status::Session), "lane {number} of {lanes}");
    }
    assert_eq!(lane(1, 2, &secret).1, Some(Status::Ok));
    assert!(is_empty(&node));
}

#[test]
fn a_lane_of_another_host_is_refused_whatever_it_knows() {
    let folder = tempfile::tempdir().unwrap();
    let fleet = Fleet::new(folder.path(), true);
    let (node, address) = fleet.receiver("receiver");
    // Admitted by the receiver as much as the source is.
    let other = fleet.authority.issue("c.hosts.example", &[], days_from_now(1)).unwrap();
    let connector =
        |host: &Path| Connector::new(Renewed::new(Files::in_folder(host), Vec::new()).protection().unwrap());
    let token = Token([78; 16]);
    let mut control = connector(&fleet.source).connect(&address.to_string(), token, PATIENCE).unwrap();
    let machine = honest_machine();
    for message in [
        Message::Hello(Hello { software: "rogue".into(), features: 0 }),
        Message::Prepare(honest_prepare(&machine)),
    ] {
        control.send(&message.encode()).unwrap();
        assert!(control.receive(PATIENCE).unwrap().is_some());
    }
    let session = Session::new(token, machine.memory().ram().clone(), PATIENCE).with_secret(control.secret());
    // It has the session's token and its secret, but not its host's key.
    let lane = |host: &Path| connector(host).lanes(address, "127.0.0.1", 1).connect(&session, &[]);
    thread::sleep(TOLD_AGAIN);
    let refused = lane(&other).err().unwrap().to_string();
    assert!(refused.contains("does not know this migration"), "{refused}");
    let told = "it has not proved to belong to a session of this side";
    wait_until("the receiver says so", || node.stderr().contains(told));
    // Its own host's is taken.
    assert!(lane(&fleet.source).is_ok());
    assert!(is_empty(&node));
}

#[test]
fn callers_who_do_not_show_who_they_are_keep_nobody_out() {
    for protected in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let fleet = Fleet::new(folder.path(), protected);
        let (mut node, address) = fleet.receiver("receiver");
        let guest = fleet.guest("guest");
        // Some say nothing, some begin a session and go no further.
        let callers: Vec<_> = (0..300u32)
            .map(|number| {
                let mut rogue = Rogue::call(address);
                if number % 2 == 0 {
                    let preamble = Preamble::control(Token([number as u8; 16])).encrypted(protected);
                    rogue.raw(&preamble.encode());
                }
                rogue
            })
            .collect();
        hop_as(&guest, &mut node, &fleet.request(address));
        assert_runs(&node);
        drop(callers);
    }
    say::figures("callers who say nothing", "300 of them stay, and a guest moves meanwhile");
}

#[test]
fn a_receiver_with_certificates_takes_a_guest_from_any_of_its_names() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::create(&folder.path().join("pki")).unwrap();
    let host = authority.issue("localhost", &["127.0.0.1".into()], days_from_now(1)).unwrap();
    let tls = host.to_str().unwrap();
    let (mut node, address) = Node::receiver(whimbrel(), folder.path(), "receiver", ["--tls", tls]).unwrap();
    let guest = Guest::SMALL.start_by(whimbrel(), &["--tls", tls], folder.path(), "guest");
    let to = format!("localhost:{}", address.port());
    let request = MigrationRequest { to, insecure: false, ..request(address) };
    hop_as(&guest, &mut node, &request);
    // The next move is protected by what the receiver was given.
    let (mut next, address) = Node::receiver(whimbrel(), folder.path(), "next", ["--tls", tls]).unwrap();
    let migration = moved(&node, &mut next, &self::request(address));
    assert_eq!(migration.secured.map(|s| s.peer), Some("localhost".into()));
    assert_runs(&next);
}
