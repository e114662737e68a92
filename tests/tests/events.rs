//! What happens on hosts, as `GET /v1/events` and `whimbrel events` tell it.

use hyper::Method;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Instant;
use whimbrel_tests::described::Described;
use whimbrel_tests::http::{answer, call, request};
use whimbrel_tests::named::{at, command};
use whimbrel_tests::proxy::{Proxy, Rules};
use whimbrel_tests::service::Service;
use whimbrel_tests::sides::PATIENCE;

/// `whimbrel events --follow` of a host.
struct Follower {
    child: Child,
    told: Receiver<Value>,
    /// What has been told so far.
    all: Vec<Value>,
}

impl Follower {
    fn of(host: &Service) -> Self {
        let mut command: Command = command(host.run(), &["events", "--follow", "--json"]);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let (tell, told) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = tell.send(serde_json::from_str(&line).unwrap());
            }
        });
        Follower { child, told, all: Vec::new() }
    }

    /// Waits for an event for which all of this is so.
    fn wait(&mut self, wanted: &[(&str, Value)]) -> Value {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = self.told.recv_timeout(left);
            let event = event.unwrap_or_else(|_| panic!("nothing with {wanted:?} in {:#?}", self.names()));
            self.all.push(event.clone());
            if wanted.iter().all(|(path, value)| event.pointer(path) == Some(value)) {
                return event;
            }
        }
    }

    fn names(&self) -> Vec<String> {
        self.all
            .iter()
            .map(|event| format!("{} {} {}", event["event"], event["name"], event["state"]))
            .collect()
    }

    /// How many there were of this kind about this machine.
    fn count(&self, kind: &str, name: &str) -> usize {
        self.all.iter().filter(|event| event["event"] == kind && event["name"] == name).count()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What is told of the events after this one, to whoever does not wait for more.
fn since(socket: &Path, last: u64) -> Vec<Value> {
    let head = format!("GET /v1/events?follow=false HTTP/1.0\r\nLast-Event-ID: {last}\r\n\r\n");
    let (status, head, body) = answer(socket, head.as_bytes());
    assert!(status == 200 && head.contains("text/event-stream"), "{head}");
    let told: Vec<Value> = body
        .lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .map(|data| serde_json::from_str(data).unwrap())
        .collect();
    for event in &told {
        let (id, kind) = (&event["id"], event["event"].as_str().unwrap());
        assert!(body.contains(&format!("id: {id}\nevent: {kind}\ndata: ")), "{body}");
    }
    told
}

fn id(event: &Value) -> u64 {
    event["id"].as_u64().unwrap()
}

fn is(kind: &str) -> (&'static str, Value) {
    ("/event", kind.into())
}

fn of(name: &str) -> (&'static str, Value) {
    ("/name", name.into())
}

#[test]
fn a_move_is_told_as_it_happens_and_told_again() {
    let folder = tempfile::tempdir().unwrap();
    let [a, mut b] = ["a", "b"].map(|name| Service::start(&folder.path().join(name), ""));
    let [mut source, mut destination] = [&a, &b].map(Follower::of);
    source.wait(&[is("drain"), ("/drained", false.into())]);
    let _guest = a.machine("web1", &["--memory=32M", "--fill=8M", "--working-set=4M"]);
    let began = source.wait(&[is("machine"), of("web1"), ("/state", "running".into())]);

    // Slow enough for a round that is not the last.
    let slow = Rules { data_delay: std::time::Duration::from_millis(2), ..Rules::default() };
    let proxy = Proxy::start(b.address(), slow);
    let to = proxy.address().to_string();
    let wanted =
        json!({ "to": to, "streams": 1, "transport": "tcp", "on_stall": "switch", "insecure": true });
    let socket = a.run().machine_socket("web1");
    let (status, moved) = call(&socket, "POST", "/v1/migration?wait=true", &wanted.to_string());
    assert_eq!((status, &moved["report"]["verdict"]), (200, &"moved".into()), "{moved}");

    let phase = |phase: &str| ("/migration/progress/phase", Value::from(phase));
    source.wait(&[is("machine"), of("web1"), ("/state", "migrating".into())]);
    source.wait(&[is("migration-phase"), of("web1"), phase("precopy"), ("/migration/to", to.clone().into())]);
    source.wait(&[is("migration-round"), of("web1"), phase("precopy")]);
    source.wait(&[is("migration-phase"), phase("switchover")]);
    source.wait(&[is("migration-phase"), phase("committed")]);
    let ended = source.wait(&[is("migration-ended"), of("web1")]);
    assert_eq!(ended["migration"]["report"], moved["report"]);
    source.wait(&[is("gone"), of("web1")]);
    let rounds = moved["report"]["rounds"].as_array().unwrap().len();
    assert_eq!(source.count("migration-begun", "web1"), 1);
    // The last one is made in the blackout.
    assert_eq!(source.count("migration-round", "web1"), rounds - 1, "{:#?}", source.names());

    destination.wait(&[is("arrival-begun"), of("web1")]);
    destination.wait(&[is("machine"), of("web1"), ("/state", "running".into())]);
    let arrived = destination.wait(&[is("arrival-ended"), of("web1"), ("/arrival/failure", Value::Null)]);
    b.change(Method::PUT, "/v1/host/drain").unwrap();
    let drained = destination.wait(&[is("drain"), ("/drained", true.into())]);

    // Each is as it is described, and the order is that of the numbers.
    let described = Described::by(&a.run().host_socket());
    for event in source.all.iter().chain(&destination.all) {
        described.assert_is("Event", event);
    }
    assert!(source.all.is_sorted_by_key(id) && destination.all.is_sorted_by_key(id));

    // Whoever has missed some is told them again, and no others.
    let after = |follower: &Follower, event: &Value| -> Vec<Value> {
        follower.all.iter().filter(|other| id(other) > id(event)).cloned().collect()
    };
    assert_eq!(since(&a.run().host_socket(), id(&began)), after(&source, &began));
    assert_eq!(since(&b.run().host_socket(), id(&arrived)), std::slice::from_ref(&drained));
    // The machine's own events are the same ones, by other numbers.
    let own = since(&b.run().machine_socket("web1"), 0);
    assert!(own.iter().any(|event| event["arrival"] == arrived["arrival"]), "{own:#?}");

    // Another service goes on from there. It knows no more of what was before it than the history does.
    b.replace();
    b.change(Method::DELETE, "/v1/host/drain").unwrap();
    destination.wait(&[is("drain"), ("/drained", false.into())]);
    let known = since(&b.run().host_socket(), id(&began));
    assert_eq!(
        (&known[0]["event"], &known[0]["name"]),
        (&"arrival-ended".into(), &"web1".into()),
        "{known:#?}"
    );
    assert!(known.iter().any(|event| event["event"] == "machine" && event["state"] == "running"));
    assert_eq!(
        since(&b.run().host_socket(), id(&drained)).iter().filter(|e| e["arrival"].is_object()).count(),
        0
    );

    let told = at(a.run(), &["events"]);
    assert!(told.code == Some(0) && told.stdout.contains("web1: the migration to"), "{told:?}");
}

#[test]
fn whoever_is_killed_pauses_or_asks_wrongly() {
    let folder = tempfile::tempdir().unwrap();
    let host = Service::start(folder.path(), "");
    let mut follower = Follower::of(&host);
    let guest = host.machine("web1", &[]);
    let socket = host.run().machine_socket("web1");
    follower.wait(&[is("machine"), of("web1"), ("/state", "running".into())]);
    for (path, state) in [("/v1/vm/pause", "paused"), ("/v1/vm/resume", "running")] {
        assert_eq!(call(&socket, "PUT", path, "").0, 204);
        follower.wait(&[is("machine"), of("web1"), ("/state", state.into())]);
    }
    for path in ["/v1/events?since=-1", "/v1/events?follow=perhaps", "/v1/events?until=1"] {
        assert_eq!(call(&host.run().host_socket(), "GET", path, "").0, 400, "{path}");
    }
    let (status, ..) = answer(&socket, b"GET /v1/events HTTP/1.0\r\nLast-Event-ID: x\r\n\r\n");
    assert_eq!(status, 400);
    // Whoever listens does not keep a process.
    let (status, ..) = answer(&socket, &request("GET", "/v1/events?follow=false", "", ""));
    assert_eq!(status, 200);
    drop(guest);
    follower.wait(&[is("gone"), of("web1")]);
    // A second one of this name is another one.
    let _next = host.machine("web1", &[]);
    follower.wait(&[is("machine"), of("web1"), ("/state", "running".into())]);
    assert_eq!(follower.count("gone", "web1"), 1);
}
