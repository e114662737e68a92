//! Hosts: one port for all guests that come, and a process for each.

use hyper::Method;
use migration::Code;
use migration::preamble::{Kind, LEN, Preamble, Status};
use migration::report::{Report, Verdict};
use migration::transport::Token;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::thread;
use std::time::Duration;
use whimbrel::api::client::Client;
use whimbrel::api::model::{Migration, MigrationChange, MigrationRequest, Version, VmState};
use whimbrel::host::server::Started;
use whimbrel::pki::{Authority, days_from_now};
use whimbrel::security::TlsFiles;
use whimbrel_tests::service::Service;
use whimbrel_tests::sides::{PATIENCE, assert_runs, request, wait_until};

/// Two hosts with certificates.
struct Pair {
    authority: Authority,
    hosts: [Service; 2],
}

const NAMES: [&str; 2] = ["a.hosts.example", "b.hosts.example"];

impl Pair {
    /// What `more` adds is for both.
    fn start(folder: &Path, more: &str) -> Self {
        let authority = Authority::create(&folder.join("pki")).unwrap();
        let hosts = NAMES.map(|name| {
            authority.issue(name, &["127.0.0.1".into()], days_from_now(1)).unwrap();
            let tls = authority.host(name);
            let config = format!("tls = {tls:?}\nallow = ['*.hosts.example']\n{more}");
            Service::start(&folder.join(name), &config)
        });
        Pair { authority, hosts }
    }

    /// The certificates of one of them, as an argument of a machine.
    fn tls(&self, host: usize) -> String {
        format!("--tls={}", self.authority.host(NAMES[host]).display())
    }

    /// A move to one of them.
    fn request(&self, to: usize) -> MigrationRequest {
        let tls = TlsFiles { folder: Some(self.authority.host(NAMES[1 - to])), ..TlsFiles::default() };
        MigrationRequest { tls: Some(tls), insecure: false, ..request(self.hosts[to].address()) }
    }
}

fn report(migration: &Migration) -> &Report {
    migration.report.as_ref().unwrap()
}

fn assert_moved(migration: &Migration) {
    assert_eq!(report(migration).verdict, Verdict::Moved, "{migration:?}");
}

/// It stays, because of `why`.
fn assert_stays(migration: &Migration, code: Code, why: &str) {
    assert_eq!(report(migration).verdict, Verdict::Stayed, "{migration:?}");
    let failure = report(migration).failure.as_ref().unwrap();
    assert!(failure.code == code && failure.message.contains(why), "{failure:?}");
    assert_eq!(report(migration).rounds.len(), 0, "nothing has moved");
}

/// The guest runs on, and finds nothing wrong.
fn assert_is_well(host: &Service, name: &str) {
    let guest = || host.vm(name).unwrap();
    let before = guest();
    assert_eq!(before.state, VmState::Running, "{before:?}");
    let pages = before.guest.unwrap().pages;
    wait_until("the guest goes on", || guest().guest.is_some_and(|guest| guest.pages > pages));
    let after = guest().guest.unwrap();
    assert!(after.clean, "{name}: {:?}", after.problems);
}

#[test]
fn five_guests_move_through_one_port_at_once_and_back() {
    const GUESTS: [&str; 5] = ["web1", "web2", "web3", "db1", "db 2"];
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::start(folder.path(), "");
    let _started = GUESTS.map(|name| pair.hosts[0].machine(name, &[&pair.tls(0)]));
    for (from, to) in [(0, 1), (1, 0)] {
        thread::scope(|scope| {
            for name in GUESTS {
                let (pair, request) = (&pair, pair.request(to));
                scope.spawn(move || {
                    let migration = pair.hosts[from].migrate(name, &request);
                    assert_moved(&migration);
                    assert_eq!(migration.secured.unwrap().peer, NAMES[to]);
                });
            }
        });
        let [mut here, mut expected] = [pair.hosts[to].names(), GUESTS.map(String::from).to_vec()];
        here.sort();
        expected.sort();
        assert_eq!(here, expected);
        GUESTS.iter().for_each(|name| assert_is_well(&pair.hosts[to], name));
        assert!(pair.hosts[from].names().is_empty(), "{:?}", pair.hosts[from].names());
    }
    // Another one waits.
    wait_until("there is a standby", || pair.hosts[0].status().processes.standbys > 0);
    assert_eq!(pair.hosts[0].status().processes.settled, GUESTS.len());
}

#[test]
fn a_service_that_is_killed_disturbs_no_move_and_its_successor_knows_all() {
    const GUESTS: [&str; 3] = ["web1", "web2", "web3"];
    let folder = tempfile::tempdir().unwrap();
    let mut pair = Pair::start(folder.path(), "");
    let _started = GUESTS.map(|name| {
        let tls = pair.tls(0);
        // It takes a while to move.
        pair.hosts[0].machine(name, &[&tls, "--memory=32M", "--fill=8M", "--working-set=4M"])
    });
    for turn in 0..4 {
        let (from, to) = (turn % 2, 1 - turn % 2);
        let request = pair.request(to);
        let [first, second] = &mut pair.hosts;
        let (source, destination) = if from == 0 { (&*first, second) } else { (&*second, first) };
        thread::scope(|scope| {
            let moves: Vec<_> = GUESTS
                .map(|name| (name, request.clone()))
                .into_iter()
                .map(|(name, request)| scope.spawn(move || source.migrate(name, &request)))
                .collect();
            // Somewhere between their calls and their ends, whichever it is on this machine. A source
            // calls for a second and a half: each service is there long enough to be reached.
            let mut wait = 0..300;
            while !moves.iter().all(|moving| moving.is_finished()) {
                thread::sleep(Duration::from_millis(fastrand::u64(wait)));
                destination.replace();
                wait = 700..1000;
            }
            moves.into_iter().for_each(|moving| assert_moved(&moving.join().unwrap()));
        });
        let status = || pair.hosts[to].status().processes;
        wait_until("the service knows them", || status().settled == GUESTS.len());
        GUESTS.iter().for_each(|name| assert_is_well(&pair.hosts[to], name));
    }
}

#[test]
fn who_is_refused_is_refused_before_anything_moves() {
    let folder = tempfile::tempdir().unwrap();
    let limits = "[admission]\nmax-guests = 2\ntotal-memory = '40M'\nnames = ['web*']";
    let mut pair = Pair::start(folder.path(), limits);
    let tls = pair.tls(0);
    let web1 = pair.hosts[0].machine("web1", &[&tls]);
    let _large = pair.hosts[0].machine("web2", &[&tls, "--memory=32M"]);
    let _db = pair.hosts[0].machine("db1", &[&tls]);
    let there = pair.hosts[1].machine("web1", &[]);
    let request = pair.request(1);
    let stays = |pair: &Pair, name: &str, code, why: &str| {
        assert_stays(&pair.hosts[0].migrate(name, &request), code, why);
    };

    stays(&pair, "web1", Code::LIMITS, "a machine called web1 is on this host already");
    assert_eq!(pair.hosts[1].vm("web1").unwrap().pid, there.pid(), "the name is that of the one that had it");
    assert_runs(&web1);
    stays(&pair, "db1", Code::LIMITS, "only web* may come");
    stays(&pair, "web2", Code::LIMITS, "have 16 of the 40 MiB");
    // It has given its name back.
    assert_eq!(pair.hosts[1].names(), ["web1"]);

    pair.hosts[1].change(Method::PUT, "/v1/host/drain").unwrap();
    stays(&pair, "web2", Code::LIMITS, "takes no guests");
    pair.hosts[1].replace();
    assert!(pair.hosts[1].status().drained, "the next service drains as well");
    stays(&pair, "web2", Code::LIMITS, "takes no guests");
    pair.hosts[1].change(Method::DELETE, "/v1/host/drain").unwrap();

    // Nobody without a certificate comes, and none with one of a stranger.
    let insecure = MigrationRequest { tls: None, ..request.clone() };
    let bare = pair.hosts[0].machine("web3", &[]);
    assert_stays(&pair.hosts[0].migrate("web3", &insecure), Code::AUTHENTICATION, "certificate");
    let stranger = Authority::create(&folder.path().join("other")).unwrap();
    stranger.issue(NAMES[0], &[], days_from_now(1)).unwrap();
    let files = TlsFiles { folder: Some(stranger.host(NAMES[0])), ..TlsFiles::default() };
    let strange = MigrationRequest { tls: Some(files), ..request.clone() };
    let refused = pair.hosts[0].migrate("web1", &strange);
    assert_eq!(report(&refused).verdict, Verdict::Stayed, "{refused:?}");
    assert_eq!(pair.hosts[1].names(), ["web1"]);
    drop(bare);

    // A place is free once the machine that had it is gone.
    drop(there);
    assert_moved(&pair.hosts[0].migrate("web1", &request));
    assert_is_well(&pair.hosts[1], "web1");
}

#[test]
fn callers_that_say_nothing_or_nonsense_keep_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::start(folder.path(), "");
    let address = pair.hosts[1].address();
    let call = |bytes: &[u8]| {
        let mut caller = TcpStream::connect(address).unwrap();
        caller.set_read_timeout(Some(PATIENCE)).unwrap();
        caller.write_all(bytes).unwrap();
        caller
    };
    let control = |number: u8| Preamble::control(Token([number; 16])).encrypted(true).encode();
    let silent: Vec<_> = (0..40).map(|_| call(&[])).collect();
    let nonsense: Vec<_> = (0..40).map(|_| call(&[0xff; LEN])).collect();
    // These are handed to standbys, and begin no session.
    let nobodies: Vec<_> = (0..20).map(|number| call(&control(number))).collect();
    // A lane of a session that nobody has is told so.
    let mut lane = call(&Preamble::data(Token([7; 16]), 0, 1).encrypted(true).encode());
    let mut answer = [0; LEN];
    lane.read_exact(&mut answer).unwrap();
    let answer = Preamble::decode(&answer).unwrap();
    assert_eq!((answer.kind, answer.status), (Kind::Data, Status::Session));
    let _guest = pair.hosts[0].machine("web1", &[&pair.tls(0)]);
    assert_moved(&pair.hosts[0].migrate("web1", &pair.request(1)));
    assert_is_well(&pair.hosts[1], "web1");
    assert_eq!(pair.hosts[1].names(), ["web1"]);
    drop((silent, nonsense, nobodies));
}

#[test]
fn a_host_starts_the_machines_that_it_knows_by_files() {
    let folder = tempfile::tempdir().unwrap();
    let machines = folder.path().join("machines");
    std::fs::create_dir(&machines).unwrap();
    std::fs::write(machines.join("web1.toml"), "memory = '16M'\nworking-set = '1M'\nserial = 'none'\n")
        .unwrap();
    std::fs::write(machines.join("bad.toml"), "memory = 'much'\n").unwrap();
    let mut host = Service::start(&folder.path().join("host"), &format!("machines = {machines:?}\n"));
    let version: Version = host.ask("/v1/version").unwrap();
    assert_eq!((version.version.as_str(), version.api.as_str()), (env!("CARGO_PKG_VERSION"), "v1"));
    let start = |host: &Service, name: &str| host.change(Method::POST, &format!("/v1/machines/{name}/start"));
    let started: Started = serde_json::from_value(start(&host, "web1").unwrap()).unwrap();
    wait_until("the guest runs", || host.vm("web1").is_ok_and(|vm| vm.state == VmState::Running));
    assert_eq!(host.vm("web1").unwrap().pid, started.pid);
    let refused = |name: &str, why: &str| {
        let error = start(&host, name).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    };
    refused("web1", "is here already");
    refused("web2", "there is no web2.toml");
    refused("..%2Fhost", "there is no");
    refused("bad", "bad.toml:1");
    // It is no part of the service.
    host.replace();
    let all: serde_json::Value = host.ask("/v1/machines").unwrap();
    assert_eq!((&all[0]["name"], &all[0]["vm"]["pid"]), (&"web1".into(), &started.pid.into()), "{all}");
    assert_is_well(&host, "web1");
}

#[test]
fn migrations_share_what_their_host_may_send() {
    const BITS: u64 = 80_000_000;
    let folder = tempfile::tempdir().unwrap();
    let pair = Pair::start(folder.path(), &format!("bandwidth = '{BITS}'\n"));
    let _started = ["web1", "web2"]
        .map(|name| pair.hosts[0].machine(name, &[&pair.tls(0), "--memory=80M", "--fill=60M"]));
    let client = |name: &str| Client::new(&pair.hosts[0].run().machine_socket(name)).unwrap();
    let cap = |name: &str| -> Option<u64> {
        client(name).get::<Migration>("/v1/migration").ok().and_then(|migration| migration.bandwidth_bps)
    };
    for name in ["web1", "web2"] {
        let _: Migration = client(name).call(Method::POST, "/v1/migration", &pair.request(1)).unwrap();
    }
    wait_until("each has its half", || ["web1", "web2"].iter().all(|name| cap(name) == Some(BITS / 2)));
    // What an operator asks for stands if it is less.
    let change = |bits| MigrationChange { bandwidth_bps: Some(bits), ..MigrationChange::default() };
    let less: Migration = client("web1").call(Method::PATCH, "/v1/migration", &change(8_000_000)).unwrap();
    assert_eq!(less.bandwidth_bps, Some(8_000_000));
    let more: Migration = client("web1").call(Method::PATCH, "/v1/migration", &change(0)).unwrap();
    assert_eq!(more.bandwidth_bps, Some(BITS / 2));
    let _: Migration = client("web1").call(Method::DELETE, "/v1/migration", &()).unwrap();
    wait_until("the other has all", || cap("web2") == Some(BITS));
    client("web2").call::<Migration>(Method::DELETE, "/v1/migration", &()).unwrap();
    for name in ["web1", "web2"] {
        wait_until("it stays", || pair.hosts[0].vm(name).unwrap().state == VmState::Running);
        assert_is_well(&pair.hosts[0], name);
    }
}

#[test]
fn monitoring_sees_the_host() {
    let folder = tempfile::tempdir().unwrap();
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let pair = Pair::start(folder.path(), "");
    let watched = Service::start(&folder.path().join("watched"), &format!("metrics = '{free}'\n"));
    let get = |path: &str| {
        let mut stream = TcpStream::connect(free).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nHost: it\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let scrape = || {
        let answer = get("/metrics");
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("text/plain"), "{answer}");
        answer
    };
    let has = |line: &str| scrape().lines().any(|told| told == line);
    let _machine = watched.machine("web1", &[]);
    assert!(has("whimbrel_machines{state=\"running\"} 1") && has("whimbrel_memory_bytes 16777216"));
    // Nobody takes it in without a certificate.
    let refused = watched.migrate("web1", &request(pair.hosts[0].address()));
    assert_eq!(report(&refused).verdict, Verdict::Stayed, "{refused:?}");
    wait_until("the failure is counted", || {
        has("whimbrel_migrations_total{direction=\"out\",outcome=\"stayed\"} 1")
    });
    // Nothing else is answered there, and not to everybody.
    let answer = get("/v1/machines");
    assert!(answer.starts_with("HTTP/1.1 404"), "{answer}");
    let open = folder.path().join("open");
    std::fs::create_dir(&open).unwrap();
    let config = open.join("host.toml");
    std::fs::write(&config, "metrics = '0.0.0.0:0'\n").unwrap();
    let [config, run] = [config.to_str().unwrap(), open.to_str().unwrap()];
    let ran = whimbrel_tests::command::run_command(
        std::process::Command::new(whimbrel_tests::program::whimbrel()).args([
            "host",
            "--config",
            config,
            "--run-dir",
            run,
            "--listen",
            "127.0.0.1:0",
        ]),
    );
    assert!(ran.code == Some(1) && ran.stderr.contains("could see this host's machines"), "{ran:?}");
}

#[test]
fn a_machine_that_could_not_come_is_not_started() {
    let folder = tempfile::tempdir().unwrap();
    let machines = folder.path().join("machines");
    std::fs::create_dir(&machines).unwrap();
    for (name, memory) in [("web1", "16M"), ("web2", "16M"), ("web3", "40M"), ("db1", "16M"), ("web4", "16M")]
    {
        let file = format!("memory = '{memory}'\nworking-set = '1M'\nserial = 'none'\n");
        std::fs::write(machines.join(format!("{name}.toml")), file).unwrap();
    }
    let config = format!(
        "machines = {machines:?}\n[admission]\nmax-memory = '32M'\ntotal-memory = '40M'\nmax-guests = 3\nnames = ['web*']\n"
    );
    let host = Service::start(&folder.path().join("host"), &config);
    let start = |name: &str| host.change(Method::POST, &format!("/v1/machines/{name}/start"));
    let refused = |name: &str, why: &str| match start(name) {
        Err(whimbrel::api::Error::Refused(failure)) => {
            assert!(failure.code == Code::LIMITS && failure.message.contains(why), "{name}: {failure}");
        }
        other => panic!("{name}: {other:?}"),
    };
    host.change(Method::PUT, "/v1/host/drain").unwrap();
    refused("web1", "this host takes no guests");
    host.change(Method::DELETE, "/v1/host/drain").unwrap();
    refused("web3", "40 MiB of memory, of which at most 32 MiB");
    refused("db1", "its name is db1");
    start("web1").unwrap();
    start("web2").unwrap();
    refused("web4", "those of this host have 32 of the 40 MiB");
    assert_eq!(host.names(), ["web1", "web2"]);
}
