//! corosync.conf: how the hosts hear of each other.

use super::file::{Fleet, plain};
use std::fmt::Write;

/// The file's content.
pub fn conf(fleet: &Fleet) -> String {
    let mut sections = vec![
        ("totem", pairs(&[("version", "2"), ("cluster_name", &fleet.name), ("transport", "knet")])),
        ("quorum", pairs(&[("provider", "corosync_votequorum")])),
        ("logging", pairs(&[("to_logfile", "no"), ("to_syslog", "yes")])),
    ];
    sections[0].1.extend(pairs(&[("crypto_cipher", "aes256"), ("crypto_hash", "sha256")]));
    if fleet.hosts.len() == 2 {
        sections[1].1.extend(pairs(&[("two_node", "1")]));
    }
    for (name, entries) in &fleet.corosync {
        let place = sections.iter().position(|(section, _)| section == name).unwrap_or_else(|| {
            sections.push((name, Vec::new()));
            sections.len() - 1
        });
        for (key, value) in entries {
            sections[place].1.retain(|(known, _)| known != key);
            sections[place].1.push((key.clone(), plain(value)));
        }
    }
    let mut text = String::from("# Made by `whimbrel fleet init`.\n");
    for (name, entries) in &sections {
        let _ = writeln!(text, "{name} {{");
        for (key, value) in entries {
            let _ = writeln!(text, "    {key}: {value}");
        }
        text.push_str("}\n");
    }
    text.push_str("nodelist {\n");
    for (place, host) in fleet.hosts.iter().enumerate() {
        let _ = writeln!(text, "    node {{\n        nodeid: {}\n        name: {}", place + 1, host.name);
        for (link, address) in host.addresses.iter().enumerate() {
            let _ = writeln!(text, "        ring{link}_addr: {address}");
        }
        text.push_str("    }\n");
    }
    text.push_str("}\n");
    text
}

fn pairs(entries: &[(&str, &str)]) -> Vec<(String, String)> {
    entries.iter().map(|(key, value)| (key.to_string(), value.to_string())).collect()
}
