//! A host's API over mutual TLS: who is answered, and who is kept out.

use hyper::Method;
use migration::Code;
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use whimbrel::api::Error;
use whimbrel::api::client::Client;
use whimbrel::api::reach::Reach;
use whimbrel::host::service::HostStatus;
use whimbrel::pki::{Authority, days_from_now};
use whimbrel::security::TlsFiles;
use whimbrel_tests::command::{Ran, run, run_command};
use whimbrel_tests::described::Described;
use whimbrel_tests::service::Service;
use whimbrel_tests::sides::{PATIENCE, wait_until};

const HOST: &str = "a.hosts.example";
const READER: &str = "b.hosts.example";
const OPERATOR: &str = "ops.example";
const STRANGER: &str = "c.elsewhere.example";

/// A host that other hosts may look at, and one operator may act on.
struct Place {
    authority: Authority,
    host: Service,
    api: SocketAddr,
}

impl Place {
    fn new(folder: &Path) -> Self {
        let authority = Authority::create(&folder.join("pki")).unwrap();
        for name in [HOST, READER, OPERATOR, STRANGER] {
            authority.issue(name, &["127.0.0.1".into()], days_from_now(1)).unwrap();
        }
        let config = format!(
            "tls = {:?}\n[api]\nlisten = '127.0.0.1:0'\nallow = ['*.hosts.example']\noperators = ['{OPERATOR}']\n",
            authority.host(HOST)
        );
        let host = Service::start(&folder.join("host"), &config);
        let api = host.status().api.unwrap();
        Place { authority, host, api }
    }

    fn url(&self) -> String {
        format!("https://{}", self.api)
    }

    /// A client that shows the certificate of this name.
    fn client(&self, name: &str) -> Client {
        client(&self.url(), &self.authority.host(name))
    }

    fn ask(&self, name: &str) -> Result<HostStatus, Error> {
        self.client(name).get("/v1/host")
    }

    /// A command of the program, with the certificate of this name.
    fn command(&self, name: &str, words: &[&str]) -> Ran {
        run(words.iter().map(PathBuf::from).chain([
            "--at".into(),
            self.url().into(),
            "--tls".into(),
            self.authority.host(name),
        ]))
    }
}

fn client(url: &str, folder: &Path) -> Client {
    let files = TlsFiles { folder: Some(folder.into()), ..TlsFiles::default() };
    Client::of(Reach::host(url, &files).unwrap()).unwrap()
}

fn untrusted<T: std::fmt::Debug>(answer: Result<T, Error>) -> String {
    match answer {
        Err(Error::Untrusted(why)) => why,
        other => panic!("{other:?}"),
    }
}

fn kept_out<T: std::fmt::Debug>(answer: Result<T, Error>) -> String {
    match answer {
        Err(Error::Refused(failure)) if failure.code == Code::AUTHENTICATION => failure.message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn who_may_look_looks_and_who_may_act_acts() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path());
    let _machine = place.host.machine("web1", &[]);
    let status = place.ask(READER).unwrap();
    assert_eq!((status.pid, status.api), (place.host.status().pid, Some(place.api)));
    // Those who may only look change nothing, and others do not look.
    let drain = |name: &str| place.client(name).call::<Value>(Method::PUT, "/v1/host/drain", &());
    let told = kept_out(drain(READER));
    assert!(told.contains(READER) && told.contains("`operators`"), "{told}");
    let told = kept_out(place.ask(STRANGER));
    assert!(told.contains(STRANGER) && told.contains("`allow`"), "{told}");
    kept_out(drain(STRANGER));
    assert!(!place.host.status().drained);
    drain(OPERATOR).unwrap();
    assert!(place.ask(OPERATOR).unwrap().drained && place.host.status().drained);

    // The refusals are described.
    let described = Described::by(&place.host.run().host_socket());
    let refusal = |name: &str, method: &str, path: &str| {
        let ran = curl(&place, &place.authority.host(name), &["--request", method], path);
        let (body, status) = ran.stdout.rsplit_once('\n').unwrap();
        assert_eq!(status, "403", "{ran:?}");
        described.assert_describes(method, path, 403, &serde_json::from_str(body).unwrap());
    };
    refusal(READER, "DELETE", "/v1/host/drain");
    refusal(STRANGER, "GET", "/v1/machines");
    let servers: Vec<_> =
        described.0["servers"].as_array().unwrap().iter().map(|server| server["url"].clone()).collect();
    assert_eq!(servers[1], "https://{host}:{port}");
    assert_eq!(described.0["components"]["securitySchemes"]["mutualTLS"]["type"], "mutualTLS");

    // The commands do the same.
    let ran = place.command(OPERATOR, &["drain", "--off"]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    place.command(READER, &["drain"]).refused(1, "may not change anything");
    let machines = place.command(READER, &["list", "--json"]).json();
    assert_eq!((&machines[0]["name"], &machines[0]["state"]), (&"web1".into(), &"running".into()));
    let entry = r#"{"at": "2026-11-28T13:08:31.000Z", "name": "web1", "migration": {"to": "x:1"}}"#;
    fs::create_dir_all(place.host.run().state_folder()).unwrap();
    fs::write(place.host.run().state_folder().join("history"), format!("{entry}\n")).unwrap();
    assert_eq!(place.command(READER, &["history", "--json"]).json()[0]["migration"]["to"], "x:1");
    assert_eq!(place.command(READER, &["history", "web2", "--json"]).json(), serde_json::json!([]));
    let told = place.command(READER, &["events", "--json"]).stdout;
    assert!(told.lines().any(|line| line.contains(r#""drained":"#)), "{told}");
    let log = fs::read_to_string(folder.path().join("host/service.log")).unwrap();
    assert!(log.contains(&format!("{OPERATOR} asks for PUT /v1/host/drain")), "{log}");
    place.command(OPERATOR, &["start", "none"]).refused(1, "names no folder of `machines`");
    // Nobody is there.
    let tls = place.authority.host(READER);
    let nobody = run(["list", "--at", "https://127.0.0.1:1", "--tls", tls.to_str().unwrap()]);
    nobody.refused(8, "no host answers at 127.0.0.1:1");

    // A pair is examined by it as well: the clocks of one host are the same.
    let ran = run([
        "doctor",
        "--json",
        "--memory",
        "64M",
        "--with",
        &place.host.address().to_string(),
        "--at",
        &place.url(),
        "--tls",
        tls.to_str().unwrap(),
    ]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let clock = &ran.json()["with"]["clock"];
    let [ahead, within] = ["ahead_us", "within_us"].map(|part| clock[part].as_i64().unwrap());
    assert!(ahead.abs() <= within, "{clock}");
    let all = ran.json()["with"]["findings"].clone();
    let found = all.as_array().unwrap().iter().find(|finding| finding["what"] == "clocks").unwrap();
    assert!(found["level"] == "good" && found["found"].as_str().unwrap().contains("give or take"), "{found}");
}

#[test]
fn whom_nobody_vouches_for_is_told_why() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path());
    let other = Authority::create(&folder.path().join("other")).unwrap();
    other.issue(OPERATOR, &["127.0.0.1".into()], days_from_now(1)).unwrap();
    // Each side by itself: this one does not trust the host.
    let told = untrusted(client(&place.url(), &other.host(OPERATOR)).get::<Value>("/v1/host"));
    assert!(told.contains("comes from another CA"), "{told}");
    // The host does not trust this one.
    let mixed = folder.path().join("mixed");
    fs::create_dir(&mixed).unwrap();
    fs::copy(place.authority.host(OPERATOR).join("ca.pem"), mixed.join("ca.pem")).unwrap();
    for file in ["cert.pem", "key.pem"] {
        fs::copy(other.host(OPERATOR).join(file), mixed.join(file)).unwrap();
    }
    let told = untrusted(client(&place.url(), &mixed).get::<Value>("/v1/host"));
    assert!(told.contains("refuses this side's certificate: it comes from another CA"), "{told}");
    // It is another host that was meant.
    let url = format!("https://localhost:{}", place.api.port());
    let told = untrusted(client(&url, &place.authority.host(OPERATOR)).get::<Value>("/v1/host"));
    assert!(told.contains("is not for localhost"), "{told}");
    // No certificate, and no TLS at all.
    let mut curl = Command::new("curl");
    let ca = place.authority.host(OPERATOR).join("ca.pem");
    let ran = run_command(
        curl.args(["--silent", "--show-error", "--cacert"]).arg(&ca).arg(place.url() + "/v1/host"),
    );
    assert!(ran.code != Some(0) && ran.stdout.is_empty(), "{ran:?}");
    let mut plain = TcpStream::connect(place.api).unwrap();
    plain.write_all(b"GET /v1/host HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    let _ = plain.read_to_end(&mut answer);
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP"), "{answer:?}");
    // The host's log says who called in vain.
    let log = fs::read_to_string(folder.path().join("host/service.log")).unwrap();
    assert!(log.contains("the API: the caller from 127.0.0.1"), "{log}");
    // A host without certificates serves no such port.
    let config = folder.path().join("open.toml");
    fs::write(&config, "insecure = true\n[api]\nlisten = '127.0.0.1:0'\n").unwrap();
    let run_dir = folder.path().join("open");
    let ran = run([Path::new("host"), Path::new("--config"), &config, Path::new("--run-dir"), &run_dir]);
    ran.refused(1, "name the folder of this host's by `tls`");
}

/// Runs curl with the certificate in this folder. The status is the last line.
fn curl(place: &Place, folder: &Path, more: &[&str], path: &str) -> Ran {
    let mut curl = Command::new("curl");
    curl.args(["--silent", "--show-error", "--write-out", "\n%{http_code}"]);
    for (option, file) in [("--cacert", "ca.pem"), ("--cert", "cert.pem"), ("--key", "key.pem")] {
        curl.arg(option).arg(folder.join(file));
    }
    run_command(curl.args(more).arg(place.url() + path))
}

/// Asks by the ssl module of Python, of which the standard library is all that is used.
const PYTHON: &str = r#"
import http.client, json, ssl, sys
port, folder = int(sys.argv[1]), sys.argv[2]
context = ssl.create_default_context(cafile=f"{folder}/ca.pem")
context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
connection = http.client.HTTPSConnection("127.0.0.1", port, context=context, timeout=60)
for method, path in (("GET", "/v1/host"), ("PUT", "/v1/host/drain")):
    connection.request(method, path)
    answer = connection.getresponse()
    answer.read()
    print(answer.status, end=" ")
"#;

#[test]
fn other_peoples_programs_are_answered_and_a_browser_sees_the_page() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path());
    let reader = place.authority.host(READER);
    let ran = curl(&place, &reader, &["--include"], "/");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stdout.contains("<title>Whimbrel</title>") && ran.stdout.ends_with("200"), "{ran:?}");
    for header in ["content-security-policy: default-src 'none'", "x-content-type-options: nosniff"] {
        assert!(ran.stdout.to_lowercase().contains(header), "no {header}: {ran:?}");
    }
    assert!(curl(&place, &reader, &[], "/metrics").stdout.contains("whimbrel_machines"));
    // A page of another site may have an operator's browser ask, with the operator's certificate.
    let operator = place.authority.host(OPERATOR);
    let foreign = ["--request", "PUT", "--header", "Origin: https://evil.example"];
    assert!(curl(&place, &operator, &foreign, "/v1/host/drain").stdout.ends_with("403"));
    assert!(!place.host.status().drained);
    let asked = |folder: &Path| {
        let port = place.api.port().to_string();
        run_command(Command::new("python3").args(["-c", PYTHON, &port]).arg(folder)).stdout
    };
    assert_eq!(asked(&reader), "200 403 ");
    assert_eq!(asked(&operator), "200 204 ");
    assert!(place.host.status().drained);
}

/// `whimbrel events --follow`, as it goes on.
struct Following(Child, BufReader<std::process::ChildStdout>);

impl Following {
    fn start(place: &Place, name: &str) -> Self {
        let mut command = Command::new(whimbrel_tests::program::whimbrel());
        command.args(["events", "--follow", "--json", "--at", &place.url(), "--tls"]);
        command.arg(place.authority.host(name)).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        Following(child, lines)
    }

    fn until(&mut self, part: &str) {
        let mut line = String::new();
        while !line.contains(part) {
            line.clear();
            assert!(self.1.read_line(&mut line).unwrap() > 0, "no {part}");
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn certificates_are_renewed_and_revoked_without_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path());
    let pid = place.ask(READER).unwrap().pid;
    let mut reader = Following::start(&place, READER);
    reader.until(r#""drained":false"#);
    // The host's own certificate is another: who follows is let in anew by it, and misses nothing.
    let before = fs::read(place.authority.host(HOST).join("cert.pem")).unwrap();
    place.authority.issue(HOST, &["127.0.0.1".into()], days_from_now(2)).unwrap();
    assert_ne!(before, fs::read(place.authority.host(HOST).join("cert.pem")).unwrap());
    assert_eq!(place.ask(READER).unwrap().pid, pid);
    place.host.change(Method::PUT, "/v1/host/drain").unwrap();
    reader.until(r#""drained":true"#);
    // Who is revoked is out, also with a connection that is open.
    place.authority.revoke(READER).unwrap();
    let why = || match place.ask(READER) {
        Err(Error::Untrusted(why)) => why,
        other => panic!("{other:?}"),
    };
    let told = why();
    assert!(told.contains("it has been revoked"), "{told}");
    let mut rest = String::new();
    reader.1.read_to_string(&mut rest).unwrap();
    let mut said = String::new();
    reader.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("it has been revoked"), "{said}");
    assert_eq!(reader.0.wait().unwrap().code(), Some(1));
    assert_eq!(place.ask(OPERATOR).unwrap().pid, pid);
}

#[test]
fn those_who_do_not_show_who_they_are_keep_nobody_out() {
    let folder = tempfile::tempdir().unwrap();
    let place = Place::new(folder.path());
    // Some say nothing, and some begin. There are more of them than may be there.
    let mut idle: Vec<TcpStream> = Vec::new();
    for number in 0..200 {
        let mut stream = TcpStream::connect(place.api).unwrap();
        if number % 2 == 0 {
            // The head of a record that never comes. It may have been closed by now.
            let _ = stream.write_all(&[22, 3, 1, 1, 0]);
        }
        idle.push(stream);
        if number % 20 == 0 {
            place.ask(READER).unwrap();
        }
    }
    place.ask(READER).unwrap();
    // All are hung up on after a while.
    for stream in &mut idle {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        assert!(
            ended.is_ok() || ended.is_err_and(|e| e.kind() != std::io::ErrorKind::WouldBlock),
            "{answer:?}"
        );
    }
    // Whoever has a certificate fills its own places, and not those of others.
    let mut followers: Vec<_> = (0..32).map(|_| Following::start(&place, READER)).collect();
    followers.iter_mut().for_each(|follower| follower.until("drained"));
    assert!(place.ask(READER).is_err(), "it has more connections than it may");
    place.ask(OPERATOR).unwrap();
    followers.pop();
    wait_until("there is a place again", || {
        std::thread::sleep(Duration::from_millis(20));
        place.ask(READER).is_ok()
    });
}
