//! The API as any HTTP client sees it, byte by byte.

use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use whimbrel::node::Node;
use whimbrel_tests::inspect::settle;
use whimbrel_tests::proxy::{Proxy, Rules};
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, assert_runs, hop, receiver};

/// Sends a request as it is; returns the status and the body.
fn exchange(socket: &Path, request: &[u8]) -> (u16, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // The server may refuse, and hang up, before it has read all.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no HTTP: {answer:?}")), body.to_string())
}

fn call(socket: &Path, method: &str, path: &str, body: &str) -> (u16, Value) {
    let length = body.len();
    let kind = if body.is_empty() { "" } else { "Content-Type: application/json\r\n" };
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: vm\r\nConnection: close\r\n{kind}Content-Length: {length}\r\n\r\n{body}"
    );
    let (status, body) = exchange(socket, request.as_bytes());
    (status, serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body:?}")))
}

/// The request must be refused with this status and a body that says why.
fn refused(node: &Node, method: &str, path: &str, body: &str, status: u16) -> Value {
    let (found, answer) = call(node.api_path(), method, path, body);
    assert_eq!(found, status, "{method} {path} {body}: {answer}");
    let message = answer["error"]["message"].as_str().unwrap_or_default();
    assert!(!message.is_empty(), "{method} {path}: {answer}");
    answer["error"]["code"].clone()
}

#[test]
fn what_is_asked_wrongly_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::SMALL.start(folder.path(), "guest");
    let wrong = [
        ("GET", "/", "", 404),
        ("GET", "/v1/nothing", "", 404),
        ("GET", "/v1/migration", "", 404),
        ("POST", "/v1/vm", "{}", 405),
        ("DELETE", "/v1/vm/pause", "", 405),
        ("GET", "/v1/vm/quit", "", 405),
        ("POST", "/v1/migration", "{", 400),
        ("POST", "/v1/migration", "[]", 422),
        ("POST", "/v1/migration", "{}", 422),
        ("POST", "/v1/migration", r#"{"to": 7}"#, 422),
        ("POST", "/v1/migration", r#"{"to": "x:1", "speed": 1}"#, 422),
        ("POST", "/v1/migration", r#"{"to": "x:1", "on_stall": "panic"}"#, 422),
        ("POST", "/v1/migration", r#"{"to": "x:1", "max_rounds": -1}"#, 422),
        ("POST", "/v1/migration", "", 415),
        ("DELETE", "/v1/migration", "", 409),
        ("GET", "/v1/migration?wait=true", "", 404),
        ("GET", "/v1/migration?wait=long", "", 400),
        ("GET", "/v1/arrival", "", 404),
    ];
    for (method, path, body, status) in wrong {
        refused(&guest, method, path, body, status);
    }
    let large = format!(r#"{{"to": "{}"}}"#, "x".repeat(1 << 20));
    let (status, _) = exchange(
        guest.api_path(),
        format!(
            "POST /v1/migration HTTP/1.1\r\nHost: vm\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{large}",
            large.len()
        )
        .as_bytes(),
    );
    assert_eq!(status, 413);
    let (status, _) = exchange(guest.api_path(), b"not HTTP at all\r\n\r\n");
    assert_eq!(status, 400);
    // One that says nothing keeps nobody from being answered.
    let _silent = UnixStream::connect(guest.api_path()).unwrap();
    assert_runs(&guest);
    say::figures("wrong requests", format_args!("{} refused", wrong.len() + 2));
}

#[test]
fn a_migration_over_plain_http() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::SMALL.start(folder.path(), "guest");
    let (mut next, address) = receiver(folder.path(), "next");
    assert_eq!(refused(&next, "PUT", "/v1/vm/pause", "", 503), "other");
    assert_eq!(refused(&next, "GET", "/v1/migration", "", 404), "other");
    assert_eq!(refused(&next, "GET", "/v1/arrival", "", 404), "other");
    assert_eq!(call(next.api_path(), "GET", "/v1/vm", "").1["state"], "waiting");
    let (status, vm) = call(guest.api_path(), "GET", "/v1/vm", "");
    assert_eq!((status, &vm["state"]), (200, &Value::from("running")));
    let slow = Rules { data_delay: Duration::from_millis(20), ..Rules::default() };
    let proxy = Proxy::start(address, slow);
    let body = format!(r#"{{"to": "{}"}}"#, proxy.address());
    let (status, started) = call(guest.api_path(), "POST", "/v1/migration", &body);
    assert_eq!((status, started["number"].as_u64()), (202, Some(1)), "{started}");
    assert_eq!(refused(&guest, "POST", "/v1/migration", &body, 409), "busy");
    assert_eq!(refused(&guest, "PUT", "/v1/vm/pause", "", 409), "busy");
    let (status, migration) = call(guest.api_path(), "DELETE", "/v1/migration", "");
    assert_eq!(status, 200, "{migration}");
    next.expect("refused").unwrap();
    guest.wait_migration(Duration::from_secs(60)).unwrap();
    assert_runs(&guest);
    for (path, state) in [("/v1/vm/pause", "paused"), ("/v1/vm/resume", "running")] {
        assert_eq!(call(guest.api_path(), "PUT", path, "").0, 200);
        assert_eq!(call(guest.api_path(), "GET", "/v1/vm", "").1["state"], state);
    }
    assert_eq!(refused(&guest, "PUT", "/v1/vm/resume?force=perhaps", "", 400), "other");
    hop(&guest, &mut next, address);
    settle(&next, &Guest::SMALL);
    say::figures("a migration over plain HTTP", "started, called off, started again");
}
