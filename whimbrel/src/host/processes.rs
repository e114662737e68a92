//! The processes that the host service starts: standbys, which take guests in, and machines from files.
//!
//! They are no part of the service: they have a process group of their own, and as machines a unit of their
//! own where systemd runs ([`units`](super::units)). What they say goes to a file of the run directory, which
//! is kept within bounds, or to the journal. Whoever ends the service ends none of them.

use super::config::HostConfig;
use super::gate::Desk;
use super::log_file;
use super::run_dir::RunDir;
use super::units::Units;
use crate::api::model::word;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// This program as it is running, also if its file has been replaced.
const ITSELF: &str = "/proc/self/exe";

/// Is set by systemd if standard error is the journal.
const JOURNAL: &str = "JOURNAL_STREAM";

/// How often processes are looked at.
const LOOK: Duration = Duration::from_millis(200);

/// How long no further standby is started after one that has ended at once.
const RESPITE: Duration = Duration::from_secs(1);

/// Starts processes, and knows those that it has started.
pub struct Processes {
    run_dir: RunDir,
    units: Units,
    children: Mutex<Vec<Child>>,
}

impl Processes {
    /// None yet.
    pub fn new(run_dir: RunDir, units: Units) -> Self {
        Processes { run_dir, units, children: Mutex::default() }
    }

    /// Starts this program with these arguments.
    ///
    /// # Errors
    /// Those of starting a process.
    pub fn start<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> io::Result<Child> {
        let mut command = Command::new(program());
        command.arg0("whimbrel").args(arguments).stdin(Stdio::null()).process_group(0);
        if std::env::var_os(JOURNAL).is_none() {
            let log = File::options().append(true).create(true).open(self.run_dir.log_file())?;
            command.stdout(log.try_clone()?).stderr(log);
        }
        command.spawn()
    }

    /// Starts the machine that the file at `path` describes. What its process touches before it has a unit of
    /// its own, which is a few milliseconds later, is counted as the service's.
    ///
    /// # Errors
    /// Those of starting a process.
    pub fn start_machine(&self, config: &HostConfig, name: &str, path: &Path) -> io::Result<Child> {
        let child = self.start(machine(&self.run_dir, config, name, path))?;
        if let Err(error) = self.units.enter(child.id(), name) {
            tell(format_args!("{name} has no unit of its own: {error}"));
        }
        Ok(child)
    }

    /// Waits for a process's end in the background.
    pub fn adopt(&self, child: Child) {
        self.children.lock().unwrap_or_else(PoisonError::into_inner).push(child);
    }

    /// Those that have ended meanwhile.
    fn ended(&self) -> Vec<u32> {
        let mut children = self.children.lock().unwrap_or_else(PoisonError::into_inner);
        children
            .extract_if(.., |child| !matches!(child.try_wait(), Ok(None)))
            .map(|child| child.id())
            .collect()
    }

    /// Sees to it that there are standbys, as long as the program runs.
    ///
    /// # Errors
    /// When there can be no further thread.
    pub fn keep_standbys(self: Arc<Self>, desk: Arc<Desk>, words: Vec<OsString>) -> io::Result<()> {
        let mut not_before = Instant::now();
        let keep = move || {
            let mut looked = Instant::now();
            loop {
                if looked.elapsed() >= LOOK {
                    looked = Instant::now();
                    // What cannot be done now may be done later, and what they say matters more than where.
                    let _ = log_file::keep_within_bounds(&self.run_dir.log_file());
                }
                if self.ended().into_iter().filter(|pid| desk.is_lost(*pid)).count() > 0 {
                    let log = said_in(&self.run_dir);
                    tell(format_args!(
                        "a process that is to take guests in has ended at once; {log} says why"
                    ));
                    not_before = Instant::now() + RESPITE;
                }
                let wanted = if Instant::now() < not_before { 0 } else { desk.wanted() };
                for _ in 0..wanted {
                    match self.start(&words) {
                        Ok(child) => {
                            desk.expect(child.id());
                            self.adopt(child);
                        }
                        Err(error) => {
                            tell(format_args!("cannot start a process that is to take guests in: {error}"));
                            not_before = Instant::now() + RESPITE;
                        }
                    }
                }
                desk.wait_for_change(LOOK);
            }
        };
        thread::Builder::new().name("standbys".into()).spawn(keep)?;
        Ok(())
    }
}

/// Where it is to be read what the processes say.
pub fn said_in(run_dir: &RunDir) -> String {
    match std::env::var_os(JOURNAL) {
        Some(_) => "`journalctl --unit whimbrel-host` or `--unit 'whimbrel-*'`".into(),
        None => run_dir.log_file().display().to_string(),
    }
}

/// The file of this program. Processes are called as it is, as long as it is there.
fn program() -> PathBuf {
    use std::os::unix::fs::MetadataExt;
    let named = std::env::current_exe().unwrap_or_else(|_| ITSELF.into());
    let number = |path: &Path| path.metadata().map(|file| (file.dev(), file.ino())).ok();
    if number(&named) == number(ITSELF.as_ref()) { named } else { ITSELF.into() }
}

/// Says something on standard error, if anybody listens.
pub(super) fn tell(what: std::fmt::Arguments<'_>) {
    use std::io::Write;
    let _ = writeln!(io::stderr(), "whimbrel: {what}");
}

/// The arguments of a standby.
pub fn standby(run_dir: &RunDir, config: &HostConfig) -> Vec<OsString> {
    let mut words: Vec<OsString> = ["receive", "--serial=none"].map(OsString::from).into();
    let mut say = |option: &str, value: &OsStr| {
        let mut word = OsString::from(option);
        word.push("=");
        word.push(value);
        words.push(word);
    };
    say("--gate", run_dir.gate_socket().as_os_str());
    say("--run-dir", run_dir.path().as_os_str());
    say("--encryption", word(&config.encryption).as_ref());
    if let Some(folder) = &config.tls {
        say("--tls", folder.as_os_str());
    }
    for peer in &config.allow {
        say("--allow", peer.to_string().as_ref());
    }
    let admission = &config.admission;
    if let Some(most) = admission.max_memory {
        say("--max-memory", most.to_string().as_ref());
    }
    if let Some(most) = admission.max_vcpus {
        say("--max-vcpus", most.to_string().as_ref());
    }
    for name in &admission.names {
        say("--names", name.to_string().as_ref());
    }
    for storage in config.storage.values() {
        say("--disks", storage.path.as_os_str());
    }
    say_host(config, &mut say);
    if config.insecure {
        words.push("--insecure".into());
    }
    words
}

/// Has a process find out itself what networks and storages are on this host, and keep the host's history.
fn say_host(config: &HostConfig, say: &mut impl FnMut(&str, &OsStr)) {
    // Without them it needs no process that makes taps.
    let any = !config.networks.is_empty() || !config.storage.is_empty();
    if let Some(file) = config.file.as_ref().filter(|_| any) {
        say("--host-config", file.as_os_str());
    }
    if let Some(folder) = &config.state {
        say("--state-dir", folder.as_os_str());
    }
}

/// The arguments of a machine that the file at `path` describes. It shows this host's certificates when it
/// moves, unless its file says something else of that.
fn machine(run_dir: &RunDir, config: &HostConfig, name: &str, path: &Path) -> Vec<OsString> {
    let mut words: Vec<OsString> = ["run", "--name", name].map(OsString::from).into();
    let mut say = |option: &str, value: &OsStr| words.extend([OsString::from(option), value.into()]);
    say("--config", path.as_os_str());
    say("--run-dir", run_dir.path().as_os_str());
    say_host(config, &mut say);
    if let Some(folder) = config.tls.as_ref().filter(|_| !says_who_it_is(path)) {
        say("--tls", folder.as_os_str());
    }
    words
}

/// Memory of a machine of which nothing else is said.
pub const USUAL_MEMORY: &str = "1G";
/// Its vCPUs.
pub const USUAL_VCPUS: u32 = 1;

/// Bytes of memory and vCPUs of the machine that the file at `path` describes. What is wrong with the file
/// its process finds, and says: as much as that it does not have.
pub fn plan(path: &Path) -> (u64, u32) {
    let table = std::fs::read_to_string(path).ok().and_then(|text| text.parse::<toml::Table>().ok());
    let table = table.unwrap_or_default();
    let bytes = |text: &str| parse_size::Config::new().with_binary().parse_size(text).unwrap_or(0);
    let memory = match table.get("memory") {
        Some(toml::Value::String(text)) => bytes(text),
        Some(toml::Value::Integer(number)) => u64::try_from(*number).unwrap_or(0),
        Some(_) => 0,
        None => bytes(USUAL_MEMORY),
    };
    let vcpus = match table.get("vcpus") {
        Some(toml::Value::String(text)) => text.parse().unwrap_or(0),
        Some(toml::Value::Integer(number)) => u32::try_from(*number).unwrap_or(0),
        Some(_) => 0,
        None => USUAL_VCPUS,
    };
    (memory, vcpus)
}

/// Whether the file of a machine has entries about certificates. What is wrong with the file its process
/// finds, and says.
fn says_who_it_is(path: &Path) -> bool {
    let table = std::fs::read_to_string(path).ok().and_then(|text| text.parse::<toml::Table>().ok());
    table.is_some_and(|table| table.keys().any(|key| key.starts_with("tls") || key == "insecure"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machines_size_is_what_its_file_says() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (content, expected) in [
            ("", (1 << 30, 1)),
            ("memory = '64M'\nvcpus = 4\n", (64 << 20, 4)),
            ("memory = 1048576\n", (1 << 20, 1)),
            ("memory = 'much'\n", (0, 1)),
            ("memory = [", (1 << 30, 1)),
        ] {
            std::fs::write(file.path(), content).unwrap();
            assert_eq!(plan(file.path()), expected, "{content:?}");
        }
    }
}
