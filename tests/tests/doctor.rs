//! `whimbrel doctor --with`: whether guests can go to another host.

use serde_json::Value;
use std::path::{Path, PathBuf};
use whimbrel::pki::{Authority, days_from_now};
use whimbrel_tests::command::{Ran, run};
use whimbrel_tests::say;
use whimbrel_tests::service::Service;

/// What was found about the pair: what, how bad, and what is said of it.
fn findings(ran: &Ran) -> Vec<[String; 3]> {
    let json = ran.json();
    let text = |finding: &Value, entry: &str| finding[entry].as_str().unwrap().to_string();
    let findings = json["with"]["findings"].as_array().unwrap();
    findings.iter().map(|finding| ["what", "level", "found"].map(|entry| text(finding, entry))).collect()
}

/// The one that is about this, and says so.
fn assert_found(ran: &Ran, what: &str, level: &str, found: &str) {
    let all = findings(ran);
    let is = |finding: &&[String; 3]| finding[0] == what && finding[2].contains(found);
    let finding = all.iter().find(is).unwrap_or_else(|| panic!("nothing on {what}: {all:#?}"));
    assert_eq!(finding[1], level, "{finding:?}");
}

fn doctor(to: &str, more: &[&str]) -> Ran {
    run(["doctor", "--json", "--memory", "64M", "--with", to].iter().chain(more))
}

/// The configuration of the host that asks.
fn here(folder: &Path, content: &str) -> PathBuf {
    let path = folder.join("here.toml");
    std::fs::write(&path, content).unwrap();
    path
}

#[test]
fn a_pair_is_examined() {
    let folder = tempfile::tempdir().unwrap();
    let (shared, other) = (folder.path().join("shared"), folder.path().join("other"));
    for storage in [&shared, &other] {
        std::fs::create_dir(storage).unwrap();
    }
    let fast = format!("[storage.fast]\npath = {shared:?}\n");
    let there = Service::start(&folder.path().join("there"), &fast);
    let to = there.address().to_string();
    let config = here(folder.path(), &fast);
    let ran = doctor(&to, &["--host-config", config.to_str().unwrap()]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_eq!(ran.json()["healthy"], true);
    for (what, found) in [
        ("connection", "answers in"),
        ("packets", "bytes"),
        ("versions", "same protocol"),
        ("processor", "can go there"),
        ("speed", "MiB/s"),
        ("storage", "fast: it is the same"),
    ] {
        assert_found(&ran, what, "good", found);
    }
    assert_found(&ran, "certificates", "limited", "none");
    // What is not known there is broken, and so is a folder of the same name that is another.
    let more = format!("{fast}[storage.slow]\npath = {other:?}\n[networks.blue]\nbridge = 'no-bridge'\n");
    let config = here(folder.path(), &more);
    let ran = doctor(&to, &["--host-config", config.to_str().unwrap()]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_found(&ran, "storage", "good", "fast");
    assert_found(&ran, "storage", "broken", "slow");
    assert_found(&ran, "network", "limited", "blue was not tried");
    let elsewhere = here(folder.path(), &format!("[storage.fast]\npath = {other:?}\n"));
    let ran = doctor(&to, &["--host-config", elsewhere.to_str().unwrap()]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_found(&ran, "storage", "broken", "fast");
    // Nothing is left of it on either side, and no guest has run there.
    for storage in [&shared, &other] {
        assert_eq!(std::fs::read_dir(storage).unwrap().count(), 0);
    }
    assert_eq!(there.run().machines().unwrap(), [""; 0]);
    say::figures("a pair of hosts", format_args!("{} findings", findings(&ran).len()));
}

#[test]
fn what_keeps_guests_away_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::create(&folder.path().join("pki")).unwrap();
    for name in ["a.hosts.example", "b.hosts.example"] {
        authority.issue(name, &["127.0.0.1".into()], days_from_now(1)).unwrap();
    }
    let config = format!("tls = {:?}\n", authority.host("b.hosts.example"));
    let there = Service::start(&folder.path().join("tls"), &config);
    let to = there.address().to_string();
    let ran = doctor(&to, &[]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_found(&ran, "certificates", "broken", "");
    let tls = authority.host("a.hosts.example");
    let ran = doctor(&to, &["--tls", tls.to_str().unwrap()]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_found(&ran, "certificates", "good", "b.hosts.example by its certificate");
    drop(there);
    // One that takes only guests of certain names says nothing of the rest.
    let there = Service::start(&folder.path().join("names"), "[admission]\nnames = ['web*']\n");
    let ran = doctor(&there.address().to_string(), &[]);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert_found(&ran, "admission", "limited", "");
    drop(there);
    let ran = doctor("127.0.0.1:1", &[]);
    assert_eq!((ran.code, findings(&ran).len()), (Some(1), 1), "{ran:?}");
    assert_found(&ran, "connection", "broken", "127.0.0.1:1");
}
