//! What each migration from this host may send, where all together may send so much.
//!
//! The service divides the host's bandwidth by the number of machines that are being moved away, and tells
//! each of them its share, by a connection that lasts as long as the move. It looks every so often whether
//! they are others: a migration that begins is not capped until then. What the operator of a migration has
//! asked for stands if it is less.

use super::run_dir::RunDir;
use crate::api::Error;
use crate::api::client::Caller;
use crate::api::events::Events;
use crate::api::model::{Migration, MigrationChange};
use hyper::Method;
use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// How long a machine may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Divides so many bits a second among the migrations of this run directory, as long as the program runs.
///
/// # Errors
/// When there can be no further thread or descriptor.
pub fn divide(bits: u64, run: RunDir, events: Arc<Events>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let divide = move || runtime.block_on(share_out(bits, &run, &events));
    thread::Builder::new().name("bandwidth".into()).spawn(divide)?;
    Ok(())
}

async fn share_out(bits: u64, run: &RunDir, events: &Events) {
    let (share, _) = watch::channel(bits);
    let mut told: BTreeMap<String, JoinHandle<()>> = BTreeMap::new();
    loop {
        let moving = events.migrating();
        share.send_replace((bits / moving.len().max(1) as u64).max(1));
        told.retain(|name, task| {
            let goes_on = moving.contains(name);
            if !goes_on {
                task.abort();
            }
            goes_on
        });
        for name in moving {
            let socket = run.machine_socket(&name);
            told.entry(name).or_insert_with(|| tokio::spawn(keep_telling(socket, share.subscribe())));
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Tells a machine its share. None waits for another that is slow.
async fn keep_telling(socket: PathBuf, share: watch::Receiver<u64>) {
    loop {
        if let Ok(mut caller) = Caller::connect(&socket).await {
            loop {
                let now = *share.borrow();
                if !tell(&mut caller, now).await {
                    break;
                }
                // It is said again and again: the machine may have begun another migration meanwhile.
                tokio::time::sleep(LOOK).await;
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether it still listens.
async fn tell(caller: &mut Caller, share: u64) -> bool {
    let change = MigrationChange { share_bps: Some(share), ..MigrationChange::default() };
    let answer = caller.call::<Migration>(Method::PATCH, "/v1/migration", &change);
    // A migration that is over needs none, and one of an older program takes none.
    matches!(tokio::time::timeout(PATIENCE, answer).await, Ok(Ok(_) | Err(Error::Refused(_))))
}
