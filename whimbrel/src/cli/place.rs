//! Where a machine's process serves its API: on a socket that is named, or in a host's run directory.

use super::args::ProcessArgs;
use anyhow::Context;
use migration::report::Verdict;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use whimbrel::api::model::Migration;
use whimbrel::api::server::{self, Server};
use whimbrel::host::claim::Names;
use whimbrel::host::run_dir::{self, RunDir};
use whimbrel::slot::Slot;

impl ProcessArgs {
    /// The folder in which the history of this process's moves is kept, if it belongs to a host.
    pub fn state_folder(&self) -> Option<PathBuf> {
        let run = self.run_dir()?;
        Some(self.state_dir.as_ref().map_or_else(
            || run.state_folder(),
            |named| std::path::absolute(named).unwrap_or_else(|_| named.clone()),
        ))
    }

    /// The run directory that this process belongs to, if it belongs to one.
    fn run_dir(&self) -> Option<RunDir> {
        let by_variable = || std::env::var_os(run_dir::VARIABLE).filter(|_| self.api.is_none());
        let named = self.run_dir.clone().or_else(|| by_variable().map(PathBuf::from))?;
        // The process may change its folder, and others look from elsewhere.
        Some(RunDir::new(Some(&std::path::absolute(&named).unwrap_or(named))))
    }
}

/// A process's place, which several threads have.
pub type SharedPlace = Arc<Mutex<Place>>;

pub fn lock(place: &SharedPlace) -> MutexGuard<'_, Place> {
    // Nothing that holds it can leave it half changed.
    place.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What `keep` does with a migration that is over, once the name of a machine that is elsewhere is free.
pub fn without_name(
    place: &SharedPlace,
    keep: impl Fn(&Migration) + Send + Sync + 'static,
) -> impl Fn(&Migration) + Send + Sync + 'static {
    // What is served there has this in turn.
    let place = Arc::downgrade(place);
    move |over| {
        if over.report.as_ref().is_some_and(|report| report.verdict == Verdict::Moved)
            && let Some(place) = place.upgrade()
        {
            lock(&place).give_name_back();
        }
        keep(over);
    }
}

/// The place, before it is served and from then on.
pub struct Place {
    /// The host's machines, if this is one of them.
    names: Option<Names>,
    api: Option<PathBuf>,
    server: Option<Server>,
    /// The socket of a process whose machine has no name.
    nameless: Option<PathBuf>,
    /// That of one whose machine has one.
    named: Option<PathBuf>,
}

impl Place {
    /// Makes the run directory, if there is to be one.
    pub fn new(process: &ProcessArgs) -> anyhow::Result<Self> {
        let open = |run: &RunDir| {
            Names::open(run).with_context(|| format!("cannot use {}", run.machines_folder().display()))
        };
        let names = process.run_dir().as_ref().map(open).transpose()?;
        Ok(Place { names, api: process.api.clone(), server: None, nameless: None, named: None })
    }

    /// The folder in which it makes a socket.
    pub fn folder(&self) -> Option<PathBuf> {
        let machines = self.names.as_ref().map(|names| names.run_dir().machines_folder());
        machines.or_else(|| {
            let parent = self.api.as_ref()?.parent().filter(|folder| !folder.as_os_str().is_empty());
            Some(parent.map_or_else(|| PathBuf::from("."), PathBuf::from))
        })
    }

    /// Serves what is, or will be, in `slot`: a machine that is called `name`, or that has no name yet.
    pub fn serve(&mut self, slot: &Arc<Slot>, name: Option<&str>) -> anyhow::Result<()> {
        let nameless = self.names.as_ref().map(|names| names.run_dir().nameless_socket(std::process::id()));
        let Some(path) = nameless.clone().or_else(|| self.api.clone()) else { return Ok(()) };
        self.server = Some(server::serve(&path, Arc::clone(slot))?);
        self.nameless = nameless;
        name.map_or(Ok(()), |name| self.name(name))
    }

    /// The machine is called so from now on, unless it has had a name before.
    pub fn name(&mut self, name: &str) -> anyhow::Result<()> {
        let (Some(names), Some(nameless)) = (&self.names, &self.nameless) else { return Ok(()) };
        let path = names.claim(nameless, name)?;
        self.nameless = None;
        self.named = Some(path.clone());
        if let Some(server) = &mut self.server {
            server.has_moved(path);
        }
        Ok(())
    }

    /// The machine comes to nothing, or is here no more: others may have its name.
    pub fn give_name_back(&mut self) {
        let (Some(names), Some(path), None) = (&self.names, &self.named, &self.nameless) else { return };
        let nameless = names.run_dir().nameless_socket(std::process::id());
        match names.give_back(path, &nameless) {
            Ok(()) => {
                if let Some(server) = &mut self.server {
                    server.has_moved(nameless.clone());
                }
                self.named = None;
                self.nameless = Some(nameless);
            }
            Err(error) => eprintln!("whimbrel: {error}"),
        }
    }
}
