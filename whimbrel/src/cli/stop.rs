//! `whimbrel stop`: shuts a guest down, and ends its process if it does not.

use super::args::StopArgs;
use super::{Exit, say};
use hyper::Method;
use serde_json::{Value, json};
use std::thread;
use std::time::{Duration, Instant};
use whimbrel::api;
use whimbrel::api::client::Client;
use whimbrel::api::model::{Vm, VmState};

/// How often the machine is looked at.
const POLL: Duration = Duration::from_millis(50);

/// How long a process may take to end that has been told to.
const QUITTING: Duration = Duration::from_secs(15);

pub fn stop(args: &StopArgs) -> anyhow::Result<Exit> {
    let client = Client::new(&args.target.socket()?)?;
    let mut shut_down = false;
    if !args.force {
        client.call::<Value>(Method::PUT, "/v1/vm/shutdown", &())?;
        shut_down = ends(&client, args.patience)?;
    }
    if !shut_down {
        match client.call::<Value>(Method::PUT, "/v1/vm/quit", &()) {
            // It has ended just now, perhaps before it could answer.
            Ok(_) | Err(api::Error::Connect { .. } | api::Error::Http(_)) => {}
            Err(error) => return Err(error.into()),
        }
        anyhow::ensure!(ends(&client, QUITTING)?, "the machine does not end");
    }
    if args.target.json {
        say(json!({ "shut_down": shut_down }))?;
    } else if !shut_down && !args.force {
        eprintln!("whimbrel: the guest has not shut down within {:?}, and was ended", args.patience);
    }
    Ok(Exit::Done)
}

/// Waits until the machine has ended, for a time. Whether it has.
fn ends(client: &Client, patience: Duration) -> anyhow::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        match client.get::<Vm>("/v1/vm") {
            Ok(Vm { state: VmState::Ended, .. }) => return Ok(true),
            Ok(_) => {}
            Err(api::Error::Connect { .. } | api::Error::Http(_)) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(POLL);
    }
}
