//! What the APIs say of themselves by OpenAPI, held against the servers.

use serde_json::json;
use std::collections::BTreeSet;
use std::path::Path;
use whimbrel_tests::command;
use whimbrel_tests::described::Described;
use whimbrel_tests::http::{answer, call, request};
use whimbrel_tests::service::Service;
use whimbrel_tests::sides::wait_until;

/// The program prints the same description, and the server has its paths with their methods, and no other
/// methods.
fn assert_serves(socket: &Path, api: &str) -> Described {
    let described = Described::by(socket);
    assert!(described.0["openapi"].as_str().unwrap().starts_with("3.1."), "{}", described.0["openapi"]);
    let printed = command::run(["openapi", api]);
    assert_eq!((printed.code, &printed.json()), (Some(0), &described.0));
    for (path, mut methods) in described.paths() {
        if methods.contains("GET") {
            methods.insert("HEAD".into());
        }
        // A path that exists tells what can be done there. Nothing else comes of such a request.
        let request = request("BREW", &path.replace("{name}", "nobody"), "", "");
        let (status, head, _) = answer(socket, &request);
        let allow = head.lines().find_map(|line| line.strip_prefix("allow: ")).unwrap_or_default();
        let allow: BTreeSet<_> = allow.split(',').map(String::from).collect();
        assert_eq!((status, &allow), (405, &methods), "{path}: {head}");
    }
    described
}

#[test]
fn the_servers_have_and_answer_what_is_described() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b] = ["a", "b"].map(|name| Service::start(&folder.path().join(name), ""));
    let host = assert_serves(&a.run().host_socket(), "host");
    let guest = a.machine("web1", &[]);
    let socket = a.run().machine_socket("web1");
    let machine = assert_serves(&socket, "machine");
    let has = |described: &Described, path: &str| described.0["paths"][path].is_object();
    assert!(has(&host, "/metrics") && has(&machine, "/v1/vm/quit") && !has(&machine, "/v1/host"));

    let asked = |described: &Described, socket: &Path, method: &str, path: &str, body: &str| {
        let (status, answer) = call(socket, method, path, body);
        let plain = path.split('?').next().unwrap().replace("nobody", "{name}");
        described.assert_describes(method, &plain, status, &answer);
        (status, answer)
    };
    let hosts = |method: &str, path: &str| asked(&host, &a.run().host_socket(), method, path, "");
    let machines = |method: &str, path: &str, body: &str| asked(&machine, &socket, method, path, body);
    for path in ["/v1/version", "/v1/host", "/v1/machines"] {
        assert_eq!(hosts("GET", path).0, 200);
    }
    assert_eq!(hosts("POST", "/v1/machines/nobody/start").0, 404);
    assert_eq!(machines("GET", "/v1/version", "").0, 200);
    assert_eq!(machines("GET", "/v1/vm", "").0, 200);
    assert_eq!(machines("GET", "/v1/arrival", "").0, 404);
    assert_eq!(machines("GET", "/v1/migration?wait=perhaps", "").0, 400);
    assert_eq!(machines("POST", "/v1/migration", "{}").0, 422);
    // It stays at first, because nobody is there.
    let (_, stayed) = machines("POST", "/v1/migration?wait=true", r#"{"to": "127.0.0.1:1"}"#);
    assert_eq!(stayed["report"]["verdict"], "stayed", "{stayed}");
    let wanted = json!({ "to": b.address().to_string(), "insecure": true }).to_string();
    let (status, moved) = machines("POST", "/v1/migration?wait=true", &wanted);
    assert_eq!((status, &moved["report"]["verdict"]), (200, &"moved".into()), "{moved}");
    let there = b.run().machine_socket("web1");
    let (_, arrival) = asked(&machine, &there, "GET", "/v1/arrival", "");
    assert!(arrival["ended"].is_string() && arrival["failure"].is_null(), "{arrival}");
    let guests = || b.vm("web1").unwrap().guest.unwrap().pages;
    let before = guests();
    wait_until("the guest goes on", || guests() > before);
    assert_eq!(asked(&machine, &there, "GET", "/v1/vm", "").0, 200);
    assert_eq!(asked(&host, &b.run().host_socket(), "GET", "/v1/machines", "").0, 200);
    drop(guest);
}

#[test]
fn what_is_not_described_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let host = Service::start(folder.path(), "");
    let described = Described::by(&host.run().host_socket());
    let told = json!({ "version": "1", "software": "it", "api": "v1" });
    described.assert_describes("GET", "/v1/version", 200, &told);
    for wrong in
        [json!({ "version": "1" }), json!({ "version": "1", "software": "it", "api": "v1", "more": 1 })]
    {
        let checked =
            std::panic::catch_unwind(|| described.assert_describes("GET", "/v1/version", 200, &wrong));
        assert!(checked.is_err(), "{wrong}");
    }
}
