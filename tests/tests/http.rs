//! The API as any HTTP client sees it, byte by byte.

use serde_json::Value;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use whimbrel::node::Node;
use whimbrel_tests::http::{answer, call, exchange, request};
use whimbrel_tests::inspect::settle;
use whimbrel_tests::proxy::{Proxy, Rules};
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, assert_runs, hop, receiver};

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
        ("POST", "/v1/migration", r#"{"to": "x:1", "silence_s": 18446744073709551615}"#, 422),
        ("POST", "/v1/migration", r#"["x:1"]"#, 422),
        ("POST", "/v1/migration", r#"{"to": "x:1", "tls": ["/tmp"]}"#, 422),
        ("POST", "/v1/migration", r#"{"to": "x:1", "streams": 1.5}"#, 422),
        ("POST", "/v1/migration", "", 400),
        ("PATCH", "/v1/migration", "null", 422),
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
    // The type of a body may be anything that JSON is sent as, `curl -d` included.
    for (kind, expected) in [
        ("", 422),
        ("application/json; charset=utf-8", 422),
        ("application/merge-patch+json", 422),
        ("application/x-www-form-urlencoded", 422),
        ("text/plain", 415),
        ("application/xml", 415),
    ] {
        let (status, body) = exchange(guest.api_path(), &request("POST", "/v1/migration", kind, "{}"));
        assert!(status == expected && body.contains("\"code\":\"other\""), "{kind}: {status}, {body}");
    }
    // A verb that is wrong is told which are right.
    for (method, path, allowed) in
        [("POST", "/v1/vm", "GET,HEAD"), ("GET", "/v1/vm/quit", "PUT"), ("BREW", "/v1/vm/pause", "PUT")]
    {
        let (status, head, _) = answer(guest.api_path(), &request(method, path, "", ""));
        let allow = head.lines().find_map(|line| line.strip_prefix("allow: "));
        assert_eq!((status, allow), (405, Some(allowed)), "{method} {path}: {head}");
    }
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
    for node in [&guest, &next] {
        let (status, version) = call(node.api_path(), "GET", "/v1/version", "");
        let expected = (200, &Value::from(env!("CARGO_PKG_VERSION")));
        assert_eq!((status, &version["version"]), expected, "{version}");
    }
    let slow = Rules { data_delay: Duration::from_millis(20), ..Rules::default() };
    let proxy = Proxy::start(address, slow);
    let body = format!(r#"{{"to": "{}", "streams": 0.0}}"#, proxy.address());
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
        assert_eq!(call(guest.api_path(), "PUT", path, "").0, 204);
        assert_eq!(call(guest.api_path(), "GET", "/v1/vm", "").1["state"], state);
    }
    assert_eq!(refused(&guest, "PUT", "/v1/vm/resume?force=perhaps", "", 400), "other");
    hop(&guest, &mut next, address);
    settle(&next, &Guest::SMALL);
    say::figures("a migration over plain HTTP", "started, called off, started again");
}
