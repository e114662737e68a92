//! All machines of a host, as they say themselves, asked at the same time.

use super::claim::Names;
use super::run_dir::RunDir;
use crate::api::Error;
use crate::api::client::Caller;
use crate::api::model::{Arrival, Migration, Vm, VmState, word};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use utoipa::ToSchema;

/// How long a machine may take to answer before it counts as silent.
pub const PATIENCE: Duration = Duration::from_secs(1);

/// How long after a machine has hung up it is asked again.
const AGAIN: Duration = Duration::from_millis(10);

/// A machine of the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Listed {
    /// What its socket is called.
    pub name: String,
    /// Its socket; empty if it is another host's.
    #[serde(skip)]
    pub socket: PathBuf,
    /// What it says of itself; `None` if it does not answer.
    pub vm: Option<Vm>,
    /// The migration that is under way.
    pub migration: Option<Migration>,
    /// How it came here, or how it comes; `None` for a machine that was started here.
    pub arrival: Option<Arrival>,
}

impl Listed {
    /// What it is doing; `None` if it does not answer.
    pub fn state(&self) -> Option<VmState> {
        self.vm.as_ref().map(|vm| vm.state)
    }

    /// The same in a word; `silent` if it does not answer.
    pub fn doing(&self) -> String {
        self.state().map_or_else(|| "silent".into(), |state| word(&state))
    }
}

/// What there is under one name.
enum Found {
    Machine(Box<Listed>),
    /// A socket that nobody serves.
    Stale,
}

/// Asks all machines of the run directory, none of them for longer than `patience`. In the order of their
/// names. Sockets that nobody serves are removed.
///
/// # Errors
/// Those of reading the run directory, and of having no more descriptors.
pub fn take(run: &RunDir, patience: Duration) -> io::Result<Vec<Listed>> {
    let names = run.machines()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let found = runtime.block_on(async {
        let asked: Vec<_> = names
            .into_iter()
            .map(|name| {
                let socket = run.machine_socket(&name);
                tokio::spawn(async move {
                    let told = tokio::time::timeout(patience, ask(&socket)).await;
                    (found(&name, &socket, told.unwrap_or(Err(Error::Silent(patience)))), socket)
                })
            })
            .collect();
        let mut found = Vec::with_capacity(asked.len());
        for answer in asked {
            found.push(answer.await.map_err(io::Error::other)?);
        }
        io::Result::Ok(found)
    })?;
    let (mut machines, mut stale) = (Vec::new(), Vec::new());
    for (found, socket) in found {
        match found {
            Found::Machine(machine) => machines.push(*machine),
            Found::Stale => stale.push(socket),
        }
    }
    if !stale.is_empty() {
        // Whoever may only look leaves them where they are.
        let _ = Names::open(run).and_then(|names| names.clear(&stale));
    }
    Ok(machines)
}

type Told = (Vm, Option<Migration>, Option<Arrival>);

fn found(name: &str, socket: &Path, told: Result<Told, Error>) -> Found {
    let (vm, migration, arrival) = match told {
        Ok((vm, migration, arrival)) => (Some(vm), migration, arrival),
        Err(Error::Connect { source, .. })
            if matches!(source.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) =>
        {
            return Found::Stale;
        }
        Err(_) => (None, None, None),
    };
    Found::Machine(Box::new(Listed { name: name.into(), socket: socket.into(), vm, migration, arrival }))
}

/// Asks again if it hangs up: it ends then, and its socket is gone soon.
async fn ask(socket: &Path) -> Result<Told, Error> {
    loop {
        match ask_once(socket).await {
            Err(Error::Http(_)) => tokio::time::sleep(AGAIN).await,
            answer => return answer,
        }
    }
}

async fn ask_once(socket: &Path) -> Result<Told, Error> {
    let mut caller = Caller::connect(socket).await?;
    let vm: Vm = caller.get("/v1/vm").await?;
    let migration: Option<Migration> = match vm.state {
        VmState::Migrating | VmState::Held => if_any(caller.get("/v1/migration").await)?,
        _ => None,
    };
    let arrival = if_any(caller.get("/v1/arrival").await)?;
    Ok((vm, migration, arrival))
}

fn if_any<A: DeserializeOwned>(answer: Result<A, Error>) -> Result<Option<A>, Error> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(Error::Refused(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::server;
    use crate::slot::Slot;
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;

    #[test]
    fn one_that_hangs_does_not_hold_up_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::new(Some(folder.path()));
        assert_eq!(take(&run, PATIENCE).unwrap(), []);
        run.make().unwrap();
        let serve = |name: &str| {
            let slot = Arc::new(Slot::receiver(Some(name.into())));
            server::serve(&run.machine_socket(name), slot).unwrap()
        };
        let _served = ["web1", "web3"].map(serve);
        // It accepts nobody; its process may have been stopped.
        let _hangs = UnixListener::bind(run.machine_socket("web2")).unwrap();
        // Its process has died.
        drop(UnixListener::bind(run.machine_socket("web4")).unwrap());
        let listed = take(&run, Duration::from_millis(500)).unwrap();
        let told: Vec<_> = listed.iter().map(|machine| (machine.name.as_str(), machine.state())).collect();
        let waiting = Some(VmState::Waiting);
        assert_eq!(told, [("web1", waiting), ("web2", None), ("web3", waiting)]);
        assert_eq!(run.machines().unwrap(), ["web1", "web2", "web3"], "the socket of the dead one stays");
    }
}
