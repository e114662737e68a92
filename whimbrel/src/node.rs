//! Another `whimbrel` process, started and driven from this one: for the demo, the tests and the
//! benchmarks, which all need two sides on one machine.

use crate::api::client::Client;
use crate::api::model::{Migration, MigrationRequest, Vm};
use crate::host::run_dir::RunDir;
use crate::security::is_near;
use hyper::Method;
use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};
use vmm::guest::Testimony;

/// How long an event is waited for: longer than any step of a migration may take on a slow host.
const PATIENCE: Duration = Duration::from_secs(120);

/// Why a node did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The process could not be started, or its output not be read.
    #[error("cannot run {}: {source}", program.display())]
    Process {
        /// The program.
        program: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It ended, or said something else than was expected.
    #[error("the process said {said:?} instead of \"{expected}\"; its error output: {stderr}")]
    Unexpected {
        /// The event that was waited for.
        expected: &'static str,
        /// What came.
        said: String,
        /// The end of its error output.
        stderr: String,
    },
    /// Its API refused, or the process is gone: what it said last tells why.
    #[error("{source}; events: {events:?}; error output: {stderr}")]
    Api {
        /// What the API said.
        source: crate::api::Error,
        /// The events that nobody has read yet.
        events: Vec<String>,
        /// Its error output.
        stderr: String,
    },
    /// Something did not happen in time.
    #[error("{what} did not happen within {patience:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// For how long.
        patience: Duration,
    },
}

/// Numbers the logs of receivers that have no name.
static NUMBER: AtomicUsize = AtomicUsize::new(1);

/// How often a process is asked whether something has happened.
const POLL: Duration = Duration::from_millis(10);

/// Asks again and again until there is an answer.
fn poll<T>(
    what: &'static str,
    patience: Duration,
    mut answer: impl FnMut() -> Result<Option<T>, Error>,
) -> Result<T, Error> {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(answer) = answer()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            return Err(Error::Timeout { what, patience });
        }
        thread::sleep(POLL);
    }
}

/// A child process that holds, or will hold, a virtual machine. Dropping it kills the process.
pub struct Node {
    program: PathBuf,
    child: Child,
    events: Receiver<String>,
    stderr: PathBuf,
    api_path: PathBuf,
    api: Client,
}

impl Node {
    /// Starts `program` with `args` and a socket and log named `name` in `folder`; it tells events on
    /// standard output.
    ///
    /// # Errors
    /// [`Error::Process`].
    pub fn start<A: AsRef<OsStr>>(
        program: &Path,
        folder: &Path,
        name: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Self, Error> {
        let api_path = folder.join(format!("{name}.sock"));
        let args = args.into_iter().map(|arg| arg.as_ref().to_os_string());
        let more = ["--name".into(), name.into(), "--api".into(), api_path.clone().into_os_string()];
        Node::start_at(program, folder, name, args.chain(more), |_| api_path)
    }

    /// Starts one that belongs to the host of this run directory. A receiver without a name is called as its
    /// guest is, and its API is here only until then.
    ///
    /// # Errors
    /// [`Error::Process`].
    pub fn of_host<A: AsRef<OsStr>>(
        program: &Path,
        folder: &Path,
        run: &RunDir,
        name: Option<&str>,
        args: impl IntoIterator<Item = A>,
    ) -> Result<Self, Error> {
        let args = args.into_iter().map(|arg| arg.as_ref().to_os_string());
        let named = name.iter().flat_map(|name| ["--name".into(), OsString::from(*name)]);
        let more = ["--run-dir".into(), run.path().into()].into_iter().chain(named);
        let log =
            name.map_or_else(|| format!("receiver-{}", NUMBER.fetch_add(1, Ordering::Relaxed)), Into::into);
        Node::start_at(program, folder, &log, args.chain(more), |pid| {
            name.map_or_else(|| run.nameless_socket(pid), |name| run.machine_socket(name))
        })
    }

    /// Starts one whose log is called `name` and whose API is where `api` says for its process.
    fn start_at(
        program: &Path,
        folder: &Path,
        name: &str,
        args: impl IntoIterator<Item = OsString>,
        api: impl FnOnce(u32) -> PathBuf,
    ) -> Result<Self, Error> {
        let failed = |source| Error::Process { program: program.into(), source };
        let stderr = folder.join(format!("{name}.stderr"));
        let log = std::fs::File::create(&stderr).map_err(failed)?;
        let mut child = Command::new(program)
            .args(args)
            .arg("--json")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(failed)?;
        let api_path = api(child.id());
        let stdout = child.stdout.take().ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
        // A thread reads the events, so that waiting for one can end; it ends with the process.
        let (sender, events) = mpsc::channel();
        thread::spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            lines.map(|line| sender.send(line)).take_while(Result::is_ok).for_each(drop);
        });
        let api = Client::new(&api_path).map_err(|source| Error::Api {
            source,
            events: Vec::new(),
            stderr: String::new(),
        })?;
        Ok(Node { program: program.into(), child, events, stderr, api_path, api })
    }

    /// Starts a receiver on a free loopback port; returns it with its address.
    ///
    /// # Errors
    /// [`Error::Unexpected`] when it does not come to listen.
    pub fn receiver<A: AsRef<OsStr>>(
        program: &Path,
        folder: &Path,
        name: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Result<(Self, SocketAddr), Error> {
        Node::receiver_on(program, folder, name, (Ipv4Addr::LOCALHOST, 0).into(), args)
    }

    /// Starts a receiver on `listen` (port 0 for a free one); returns it with its address. Without
    /// certificates it is insecure.
    ///
    /// # Errors
    /// As for [`receiver`](Self::receiver).
    pub fn receiver_on<A: AsRef<OsStr>>(
        program: &Path,
        folder: &Path,
        name: &str,
        listen: SocketAddr,
        args: impl IntoIterator<Item = A>,
    ) -> Result<(Self, SocketAddr), Error> {
        let args: Vec<_> = args.into_iter().collect();
        let protected = args.iter().any(|arg| arg.as_ref().as_encoded_bytes().starts_with(b"--tls"));
        // These nodes are for networks of tests and measurements.
        let insecure = !protected && !is_near(listen.ip());
        let insecure = insecure.then_some("--insecure").map(OsStr::new);
        let listen = listen.to_string();
        let fixed = ["receive", "--listen", &listen, "--serial", "none"].map(OsStr::new);
        let all = fixed.into_iter().chain(insecure).chain(args.iter().map(AsRef::as_ref));
        let mut node = Node::start(program, folder, name, all)?;
        let event = node.expect("listening")?;
        let address = event["address"].as_str().and_then(|a| a.parse().ok());
        match address {
            Some(address) => Ok((node, address)),
            None => Err(node.unexpected("listening", event.to_string())),
        }
    }

    /// The next event, whatever it is.
    ///
    /// # Errors
    /// [`Error::Unexpected`] when the process ended or said no event, [`Error::Timeout`] when it said
    /// nothing.
    pub fn next_event(&mut self) -> Result<Value, Error> {
        const ANY: &str = "an event";
        let line = match self.events.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(mpsc::RecvTimeoutError::Disconnected) => String::new(),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                return Err(Error::Timeout { what: ANY, patience: PATIENCE });
            }
        };
        serde_json::from_str(&line).map_err(|_| self.unexpected(ANY, line))
    }

    /// The next event, which must be of this kind.
    ///
    /// # Errors
    /// As for [`next_event`](Self::next_event); [`Error::Unexpected`] for any other.
    pub fn expect(&mut self, expected: &'static str) -> Result<Value, Error> {
        let event = self.next_event()?;
        if event["event"] == expected { Ok(event) } else { Err(self.unexpected(expected, event.to_string())) }
    }

    fn unexpected(&self, expected: &'static str, said: String) -> Error {
        Error::Unexpected { expected, said, stderr: self.stderr() }
    }

    /// What the API answered; a refusal with all that the process can say about it.
    fn told<T>(&self, answer: Result<T, crate::api::Error>) -> Result<T, Error> {
        answer.map_err(|source| Error::Api {
            source,
            events: self.events.try_iter().collect(),
            stderr: self.stderr(),
        })
    }

    /// What it has written to its error output.
    pub fn stderr(&self) -> String {
        std::fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its API.
    pub fn api(&self) -> &Client {
        &self.api
    }

    /// Its API's socket.
    pub fn api_path(&self) -> &Path {
        &self.api_path
    }

    /// Its API is on another socket now: its machine has a name.
    ///
    /// # Errors
    /// [`Error::Api`] when the process can have no more descriptors.
    pub fn is_at(&mut self, api: PathBuf) -> Result<(), Error> {
        self.api = self.told(Client::new(&api))?;
        self.api_path = api;
        Ok(())
    }

    /// Its status.
    ///
    /// # Errors
    /// [`Error::Api`].
    pub fn status(&self) -> Result<Vm, Error> {
        self.told(self.api.get("/v1/vm"))
    }

    /// Waits until the guest's own record satisfies `wanted`.
    ///
    /// # Errors
    /// [`Error::Timeout`], or when the API is gone.
    pub fn wait_guest(
        &self,
        what: &'static str,
        patience: Duration,
        wanted: impl Fn(&Testimony) -> bool,
    ) -> Result<Testimony, Error> {
        poll(what, patience, || Ok(self.status()?.guest.filter(&wanted)))
    }

    /// Starts a migration.
    ///
    /// # Errors
    /// [`Error::Api`] when it is refused.
    pub fn migrate(&self, request: &MigrationRequest) -> Result<Migration, Error> {
        self.told(self.api.call(Method::POST, "/v1/migration", request))
    }

    /// The migration under way, or the last one.
    ///
    /// # Errors
    /// [`Error::Api`], also when there was none yet.
    pub fn migration(&self) -> Result<Migration, Error> {
        self.told(self.api.get("/v1/migration"))
    }

    /// Calls the migration off.
    ///
    /// # Errors
    /// [`Error::Api`] when none is under way, or it is too late.
    pub fn cancel(&self) -> Result<Migration, Error> {
        self.told(self.api.call(Method::DELETE, "/v1/migration", &()))
    }

    /// Lets a paused guest run on; a held one only by `force`.
    ///
    /// # Errors
    /// [`Error::Api`] when it is refused.
    pub fn resume(&self, force: bool) -> Result<(), Error> {
        self.told(self.api.call(Method::PUT, &format!("/v1/vm/resume?force={force}"), &()))
    }

    /// Waits for the migration's end; its report is then present.
    ///
    /// # Errors
    /// [`Error::Timeout`], or when the API is gone.
    pub fn wait_migration(&self, patience: Duration) -> Result<Migration, Error> {
        match self.api.call_within(patience, Method::GET, "/v1/migration?wait=true", &()) {
            Err(crate::api::Error::Silent(patience)) => {
                Err(Error::Timeout { what: "the migration's end", patience })
            }
            answer => self.told(answer),
        }
    }

    /// Ends the machine and its process.
    ///
    /// # Errors
    /// When it does not listen, or does not end in ten seconds.
    pub fn quit(&mut self) -> Result<ExitStatus, Error> {
        let _: Value = self.told(self.api.call(Method::PUT, "/v1/vm/quit", &()))?;
        self.wait_exit(Duration::from_secs(10))
    }

    /// Waits for the process to end.
    ///
    /// # Errors
    /// [`Error::Timeout`].
    pub fn wait_exit(&mut self, patience: Duration) -> Result<ExitStatus, Error> {
        let failed = |source| Error::Process { program: self.program.clone(), source };
        poll("the process's end", patience, || self.child.try_wait().map_err(failed))
    }

    /// `kill -9`.
    ///
    /// # Errors
    /// When the process cannot be waited for.
    pub fn kill(&mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait().map(drop)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
