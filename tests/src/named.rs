//! Machines of a host, which are known by their names.

use crate::command::{Ran, run_command};
use crate::program::whimbrel;
use crate::sides::{Guest, PATIENCE};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use whimbrel::host::run_dir::RunDir;
use whimbrel::node::Node;

/// A machine of the host, at work.
pub fn machine(folder: &Path, host: &RunDir, name: &str, guest: &Guest) -> Node {
    let arguments: Vec<_> = std::iter::once("run".to_string()).chain(guest.arguments()).collect();
    let mut node = Node::of_host(whimbrel(), folder, host, Some(name), arguments).unwrap();
    node.expect("running").unwrap();
    node.wait_guest("the guest's start", PATIENCE, |guest| guest.state == "running").unwrap();
    node
}

/// A process of the host that waits for a guest, and where.
pub fn receiver(folder: &Path, host: &RunDir, more: &[&str]) -> (Node, SocketAddr) {
    let arguments = ["receive", "--listen", "127.0.0.1:0", "--serial", "none"];
    let mut node = Node::of_host(whimbrel(), folder, host, None, arguments.iter().chain(more)).unwrap();
    let listening = node.expect("listening").unwrap();
    (node, listening["address"].as_str().unwrap().parse().unwrap())
}

/// A guest has come to this process of the host: what it is called.
pub fn arrived(node: &mut Node, host: &RunDir) -> String {
    let name = node.expect("arrived").unwrap()["name"].as_str().unwrap().to_string();
    node.is_at(host.find(&name).unwrap()).unwrap();
    name
}

/// A command of this host.
pub fn command(host: &RunDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(whimbrel());
    command.args(arguments).env("WHIMBREL_RUN_DIR", host.path());
    command
}

/// Runs a command of this host.
pub fn at(host: &RunDir, arguments: &[&str]) -> Ran {
    run_command(&mut command(host, arguments))
}

/// What `whimbrel list` says of a machine.
pub fn listed(host: &RunDir, name: &str) -> Option<Value> {
    let all = at(host, &["list", "--json"]).json();
    all.as_array().unwrap().iter().find(|machine| machine["name"] == name).cloned()
}

/// What it is doing, by that.
pub fn state(host: &RunDir, name: &str) -> Option<String> {
    listed(host, name).map(|machine| machine["state"].as_str().unwrap().into())
}
