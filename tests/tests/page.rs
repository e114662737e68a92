//! The page of a host: what it is served with, and what it shows in a browser while guests move.

use hyper::Method;
use migration::Code;
use migration::report::Verdict;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;
use whimbrel::api::client::Client;
use whimbrel::api::model::{Migration, MigrationRequest};
use whimbrel::pki::{Authority, days_from_now};
use whimbrel::security::TlsFiles;
use whimbrel_tests::chromium::Chromium;
use whimbrel_tests::command::run;
use whimbrel_tests::service::Service;
use whimbrel_tests::sides::{PATIENCE, request};

const NAMES: [&str; 2] = ["a.hosts.example", "b.hosts.example"];

/// A name that a machine may have, and that must stay a name.
const MARKUP: &str = "<img src=x onerror=alert(1)>";

/// Two hosts with certificates, and pages.
struct Pair {
    authority: Authority,
    hosts: [Service; 2],
}

impl Pair {
    fn start(folder: &Path) -> Self {
        let authority = Authority::create(&folder.join("pki")).unwrap();
        let hosts = NAMES.map(|name| {
            authority.issue(name, &["127.0.0.1".into()], days_from_now(1)).unwrap();
            let config = format!(
                "tls = {:?}\npage = '127.0.0.1:0'\n[admission]\nnames = ['web*', 'db*']\n",
                authority.host(name)
            );
            call_this_host(name);
            Service::start(&folder.join(name), &config)
        });
        Pair { authority, hosts }
    }

    fn page(&self, host: usize) -> SocketAddr {
        self.hosts[host].status().page.unwrap()
    }

    fn machine(&self, name: &str, more: &[&str]) -> whimbrel::node::Node {
        let tls = format!("--tls={}", self.authority.host(NAMES[0]).display());
        self.hosts[0].machine(name, &[&[tls.as_str()], more].concat())
    }

    fn request(&self) -> MigrationRequest {
        let tls = TlsFiles { folder: Some(self.authority.host(NAMES[0])), ..TlsFiles::default() };
        MigrationRequest { tls: Some(tls), insecure: false, ..request(self.hosts[1].address()) }
    }
}

/// What is started from this thread finds itself on a host of this name, if this user may say so.
fn call_this_host(name: &str) {
    // SAFETY: the calls take integers, and bytes of the length that is given.
    unsafe {
        if libc::unshare(libc::CLONE_NEWUTS) == 0 {
            libc::sethostname(name.as_ptr().cast(), name.len());
        }
    }
}

/// An answer: status, headers in lower case, body.
fn exchange(mut stream: impl Read + Write, head: &str) -> (u16, String, String) {
    let mut asked = head.replace('\n', "\r\n");
    let _ = write!(asked, "\r\nConnection: close\r\n\r\n");
    stream.write_all(asked.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), head.to_lowercase(), body.into())
}

fn ask(address: SocketAddr, head: &str) -> (u16, String, String) {
    exchange(TcpStream::connect(address).unwrap(), head)
}

fn get(address: SocketAddr, path: &str) -> (u16, String, String) {
    ask(address, &format!("GET {path} HTTP/1.1\nHost: {address}"))
}

#[test]
fn the_port_answers_what_is_read_and_this_computer_alone() {
    let folder = tempfile::tempdir().unwrap();
    let host = Service::start(&folder.path().join("host"), "page = '127.0.0.1:0'");
    let page = host.status().page.unwrap();
    for path in
        ["/", "/style.css", "/main.js", "/v1/host", "/v1/machines", "/v1/history", "/v1/version", "/none"]
    {
        let (status, head, _) = get(page, path);
        assert_eq!(status, if path == "/none" { 404 } else { 200 }, "{path}");
        for header in [
            "content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; ",
            "frame-ancestors 'none'",
            "x-content-type-options: nosniff",
            "referrer-policy: no-referrer",
            "cache-control: no-store",
        ] {
            assert!(head.contains(header), "{path} without {header}: {head}");
        }
    }
    // Nothing can be changed.
    for (method, path) in [
        ("PUT", "/v1/host/drain"),
        ("DELETE", "/v1/host/drain"),
        ("POST", "/v1/machines/web1/start"),
        ("GET", "/metrics"),
    ] {
        let (status, ..) =
            ask(page, &format!("{method} {path} HTTP/1.1\nHost: localhost\nContent-Length: 0"));
        assert_eq!(status, 404, "{method} {path}");
    }
    let (status, head, _) = ask(page, "POST /v1/machines HTTP/1.1\nHost: localhost\nContent-Length: 0");
    assert!(status == 405 && head.contains("allow: get,head"), "{head}");
    assert!(!host.status().drained);
    // A name of another site that leads here is not this computer's.
    for name in ["evil.example", "10.1.0.2", ""] {
        let (status, ..) = ask(page, &format!("GET /v1/host HTTP/1.1\nHost: {name}"));
        assert_eq!(status, 403, "{name}");
    }
    assert_eq!(ask(page, "GET /v1/host HTTP/1.1\nHost: localhost:8080").0, 200);

    // On the socket it is the same page, and a browser changes nothing through a tunnel to it.
    let socket = || UnixStream::connect(host.run().host_socket()).unwrap();
    assert!(exchange(socket(), "GET / HTTP/1.1\nHost: host").2.contains("<title>Whimbrel</title>"));
    let foreign =
        "PUT /v1/host/drain HTTP/1.1\nHost: localhost\nOrigin: http://evil.example\nContent-Length: 0";
    assert_eq!(exchange(socket(), foreign).0, 403);
    assert!(!host.status().drained);
    host.change(Method::PUT, "/v1/host/drain").unwrap();
    assert!(host.status().drained);
}

#[test]
fn idle_browsers_take_so_many_connections_and_no_more() {
    let folder = tempfile::tempdir().unwrap();
    let host = Service::start(&folder.path().join("host"), "page = '127.0.0.1:0'");
    let page = host.status().page.unwrap();
    let mut idle: Vec<_> = (0..64).map(|_| TcpStream::connect(page).unwrap()).collect();
    let mut late = TcpStream::connect(page).unwrap();
    late.write_all(b"GET /v1/version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").unwrap();
    late.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(late.read(&mut [0]).is_err(), "it is answered beside 64 others");
    assert_eq!(host.status().page, Some(page), "the socket is free of them");
    idle.pop();
    late.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    late.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn a_page_for_everybody_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("host.toml");
    std::fs::write(&config, "page = '0.0.0.0:0'\ninsecure = true\n").unwrap();
    let run_dir = folder.path().join("run");
    let ran = run([Path::new("host"), Path::new("--config"), &config, Path::new("--run-dir"), &run_dir]);
    ran.refused(1, "let `page` be an address of the loopback interface");
}

#[test]
fn the_history_is_told_as_far_as_it_is_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let host = Service::start(&folder.path().join("host"), "page = '127.0.0.1:0'");
    let page = host.status().page.unwrap();
    assert_eq!(get(page, "/v1/history").2, "[]");
    std::fs::create_dir_all(host.run().state_folder()).unwrap();
    let entry = |number: u32| json!({ "name": format!("web{}", number % 2), "number": number }).to_string();
    let lines: String = (0..150).map(|number| entry(number) + "\n").collect();
    std::fs::write(host.run().state_folder().join("history"), lines).unwrap();
    let numbers = |query: &str| -> Vec<u64> {
        let (status, _, body) = get(page, &format!("/v1/history{query}"));
        assert_eq!(status, 200, "{body}");
        let entries: Vec<Value> = serde_json::from_str(&body).unwrap();
        entries.iter().map(|entry| entry["number"].as_u64().unwrap()).collect()
    };
    assert_eq!(numbers(""), (50..150).collect::<Vec<_>>());
    assert_eq!(numbers("?limit=2"), [148, 149]);
    assert_eq!(numbers("?limit=2&name=web1"), [147, 149]);
    assert_eq!(numbers("?limit=0"), [0; 0]);
    for wrong in ["?limit=1001", "?limit=-1", "?limit=many", "?last=1"] {
        let (status, _, body) = get(page, &format!("/v1/history{wrong}"));
        assert!(status == 400 && body.contains("error"), "{wrong}: {body}");
    }
    // Who knows it already is not told again.
    let (_, head, _) = get(page, "/v1/history");
    let version = head.lines().find_map(|line| line.strip_prefix("etag: ")).unwrap();
    let (status, _, body) =
        ask(page, &format!("GET /v1/history HTTP/1.1\nHost: localhost\nIf-None-Match: {version}"));
    assert_eq!((status, body.as_str()), (304, ""));
    // As the command shows it.
    let all = whimbrel_tests::named::at(host.run(), &["history", "--json"]).json();
    assert_eq!(all.as_array().unwrap().len(), 150);
}

/// Texts whose colour differs too little from what is behind them, and what is wider than the window.
const HARD_TO_READ: &str = r#"(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const parts = (colour) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return canvas.getImageData(0, 0, 1, 1).data;
  };
  const light = (colour) => {
    const [r, g, b] = [...parts(colour)].map((part) => part / 255)
      .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor;
      if (parts(colour)[3] === 255) return colour;
    }
    return "white";
  };
  const hard = [];
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || !element.checkVisibility?.()) continue;
    const style = getComputedStyle(element);
    const colour = element instanceof SVGElement ? style.fill : style.color;
    const [one, other] = [light(colour), light(behind(element))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) hard.push(`${texts.currentNode.data}: ${contrast.toFixed(2)}`);
  }
  if (document.documentElement.scrollWidth > innerWidth) hard.push(`${document.documentElement.scrollWidth} wide`);
  return hard;
})()"#;

/// Looks at the page by day and by night, on a desk and on a phone, and keeps a picture of each.
fn look(browser: &mut Chromium, folder: &Path, what: &str) {
    for (size, device) in [((1280, 800), "desk"), ((390, 844), "phone")] {
        for scheme in ["light", "dark"] {
            browser.look_like(size, scheme);
            assert_eq!(browser.eval(HARD_TO_READ), json!([]), "{what}, {device}, {scheme}");
            browser.screenshot(&folder.join(format!("{what}-{device}-{scheme}.png")));
        }
    }
    browser.look_like((1280, 800), "light");
}

fn in_row(what: &str, name: &str, rest: &str) -> String {
    format!("document.querySelector({:?}){rest}", format!("{what}[data-machine={name:?}]"))
}

#[test]
#[ignore = "needs Chromium: ci/page"]
fn a_browser_shows_a_move_and_what_became_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let pictures = std::env::var_os("PICTURES").map_or_else(|| folder.path().into(), PathBuf::from);
    let pair = Pair::start(folder.path());
    let web = ["--memory=192M", "--fill=64M", "--working-set=16M", "--rate=2000"];
    let _web = pair.machine("web1", &web);
    let _db = [pair.machine("db1", &["--memory=64M"]), pair.machine("db2", &["--memory=64M", "--vcpus=2"])];
    let _mail = pair.machine("mail", &["--memory=32M"]);
    let markup = pair.machine(MARKUP, &["--memory=32M"]);

    // One was refused before, and one has moved.
    let refused = pair.hosts[0].migrate(MARKUP, &pair.request()).report.unwrap();
    assert_eq!(refused.failure.unwrap().code, Code::LIMITS);
    let before = pair.hosts[0].migrate("db1", &pair.request());
    assert_eq!(before.report.unwrap().verdict, Verdict::Moved);

    let mut browser = Chromium::start();
    browser.look_like((1280, 800), "light");
    browser.open(&format!("http://{}/", pair.page(0)));
    for name in ["web1", "db2", MARKUP] {
        browser.until(&in_row("#machines tr", name, "?.innerText.includes('running')"));
    }
    assert_eq!(browser.eval(&in_row("#machines tr", MARKUP, ".querySelector('th').textContent")), MARKUP);
    assert_eq!(browser.eval("document.querySelectorAll('main img, main script').length"), 0);
    browser.until(&in_row(
        "#history li",
        MARKUP,
        "?.querySelector('.why').textContent.startsWith('limits ')",
    ));
    browser.until(&in_row("#history li", "db1", "?.querySelector('.waterfall') != null"));

    // It goes, and is not shown any more.
    drop(markup);
    browser.until(&format!("!{}", in_row("#machines tr", MARKUP, "")));

    // It takes as long as it is looked at: the guest waits for the word.
    let slow = MigrationRequest {
        bandwidth_bps: Some(160_000_000),
        downtime_limit_ms: 250,
        pause_before_switchover_s: Some(3600),
        ..pair.request()
    };
    let client = Client::new(&pair.hosts[0].run().machine_socket("web1")).unwrap();
    let _: Migration = client.call(Method::POST, "/v1/migration", &slow).unwrap();
    let round = |number: u32| {
        format!(
            "?.innerText.includes('Blackout predicted after each round') && \
        document.querySelectorAll('.move figure:last-child rect').length >= {number}"
        )
    };
    browser.until(&in_row(".move", "web1", &round(2)));
    browser.until(&format!(
        "{} || {}",
        in_row(".move", "web1", &round(3)),
        in_row(".move", "web1", "?.innerText.includes('ready-to-switch')")
    ));
    browser.screenshot(&pictures.join("move.png"));
    assert_eq!(browser.eval(&in_row("#machines tr", "web1", ".innerText.includes('migrating')")), true);
    let text = browser.eval(&in_row(".move", "web1", ".innerText"));
    for word in ["Dirty rate", "Left in this round", "Predicted blackout", "250 ms", NAMES[1]] {
        assert!(text.as_str().unwrap().contains(word), "no {word} in {text}");
    }
    browser.until(&in_row(".move", "web1", "?.innerText.includes('ready-to-switch')"));
    look(&mut browser, &pictures, "ready");
    assert_eq!(browser.complaints(), [""; 0]);

    // The other host sees it come.
    let mut other = Chromium::start();
    other.open(&format!("http://{}/", pair.page(1)));
    other.until(&in_row(".move", "web1", "?.innerText.includes('from a.hosts.example')"));

    let _: Migration = client.call(Method::PATCH, "/v1/migration", &json!({ "proceed": true })).unwrap();
    let done: Migration = client.call_within(PATIENCE, Method::GET, "/v1/migration?wait=true", &()).unwrap();
    let report = done.report.unwrap();
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    browser.until(&in_row("#history li", "web1", "?.querySelector('.waterfall')?.checkVisibility()"));
    let steps = browser.eval(&in_row(
        "#history li",
        "web1",
        " && [...document.querySelectorAll('#history li[data-machine=web1] tbody tr')].map((row) => \
            [row.cells[0].textContent, Number(row.dataset.us), row.cells[2].textContent])",
    ));
    let told: Vec<(String, u64, String)> = serde_json::from_value(steps).unwrap();
    let mut expected: Vec<_> = report.spans.iter().map(|span| (span.name.clone(), span.us)).collect();
    let between = report.blackout_us - expected.iter().map(|(_, us)| us).sum::<u64>();
    if between > 0 {
        expected.push(("between these steps".into(), between));
    }
    assert_eq!(told.iter().map(|step| (step.0.clone(), step.1)).collect::<Vec<_>>(), expected);
    // What is read adds up as well.
    let microseconds = |text: &str| -> u64 { text.trim_end_matches(" ms").replace('.', "").parse().unwrap() };
    let sum: u64 = told.iter().map(|step| microseconds(&step.2)).sum();
    let foot = browser.eval(&in_row("#history li", "web1", ".querySelector('tfoot td.figure').textContent"));
    assert_eq!((sum, sum), (report.blackout_us, microseconds(foot.as_str().unwrap())));
    browser.until(&format!("!{}", in_row(".move", "web1", "")));
    look(&mut browser, &pictures, "moved");

    other.until(&in_row("#history li[data-what=arrived]", "web1", " != null"));
    other.until(&in_row("#machines tr", "web1", "?.innerText.includes('a.hosts.example')"));
    look(&mut other, &pictures, "arrived");
    assert_eq!(other.complaints(), [""; 0]);
    assert_eq!(browser.complaints(), [""; 0]);
    drop(other);

    // A host that is silent for a while takes nothing of what is shown.
    let pid = i32::try_from(pair.hosts[0].status().pid).unwrap();
    // SAFETY: the calls take integers.
    unsafe { libc::kill(pid, libc::SIGSTOP) };
    browser.until("!document.getElementById('lost').hidden && document.getElementById('link').textContent === 'no answer'");
    assert_eq!(browser.eval(&in_row("#machines tr", "db2", ".innerText.includes('running')")), true);
    browser.screenshot(&pictures.join("silent.png"));
    // SAFETY: as above.
    unsafe { libc::kill(pid, libc::SIGCONT) };
    browser.until(
        "document.getElementById('lost').hidden && document.getElementById('link').textContent === 'live'",
    );
}
