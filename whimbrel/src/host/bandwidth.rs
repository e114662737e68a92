//! What each migration from this host may send, where all together may send so much.
//!
//! The service divides the host's bandwidth by the number of machines that are being moved away, and tells
//! each of them its share. It looks every so often whether they are others: a migration that begins is not
//! capped until then. What the operator of a migration has asked for stands if it is less.

use super::run_dir::RunDir;
use crate::api::client::Client;
use crate::api::events::Events;
use crate::api::model::{Migration, MigrationChange};
use hyper::Method;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// How long a machine may take to answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// Divides so many bits a second among the migrations of this run directory, as long as the program runs.
///
/// # Errors
/// When there can be no further thread.
pub fn divide(bits: u64, run: RunDir, events: Arc<Events>) -> io::Result<()> {
    let divide = move || {
        loop {
            let moving = events.migrating();
            let share = bits / moving.len().max(1) as u64;
            for name in moving {
                // A migration that is over needs none, and one of an older program takes none.
                let _ = tell(&run, &name, share);
            }
            thread::sleep(LOOK);
        }
    };
    thread::Builder::new().name("bandwidth".into()).spawn(divide)?;
    Ok(())
}

/// Says it again and again: the machine may have begun another migration meanwhile.
fn tell(run: &RunDir, name: &str, share: u64) -> Result<Migration, crate::api::Error> {
    let change = MigrationChange { share_bps: Some(share.max(1)), ..MigrationChange::default() };
    let client = Client::new(&run.machine_socket(name))?;
    client.call_within(PATIENCE, Method::PATCH, "/v1/migration", &change)
}
