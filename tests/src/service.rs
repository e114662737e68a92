//! A host of its own: the service, and the processes that it starts.

use crate::program::whimbrel;
use crate::sides::{PATIENCE, wait_until};
use hyper::Method;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use whimbrel::api::client::Client;
use whimbrel::api::model::{Migration, MigrationRequest, Vm};
use whimbrel::api::{self};
use whimbrel::host::run_dir::RunDir;
use whimbrel::host::service::HostStatus;
use whimbrel::node::Node;

/// A host. Dropping it ends its service and all processes that belong to its run directory.
pub struct Service {
    folder: PathBuf,
    run: RunDir,
    address: SocketAddr,
    program: PathBuf,
    child: Child,
}

impl Service {
    /// Starts a host in `folder`, with this configuration, at a free port of the loopback interface.
    pub fn start(folder: &Path, config: &str) -> Self {
        Service::start_at(folder, config, SocketAddr::from(([127, 0, 0, 1], 0)))
    }

    /// The same at an address.
    pub fn start_at(folder: &Path, config: &str, any: SocketAddr) -> Self {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("host.toml"), config).unwrap();
        let run = RunDir::new(Some(&folder.join("run")));
        let program = whimbrel();
        let child = spawn(program, folder, &run, any);
        let mut service =
            Service { folder: folder.into(), run, address: any, program: program.into(), child };
        service.address = service.wait().listen[0];
        service
    }

    /// Waits until this service answers.
    fn wait(&self) -> HostStatus {
        let mut status = None;
        wait_until("the host's service answers", || {
            status = self.ask("/v1/host").ok().filter(|status: &HostStatus| status.pid == self.child.id());
            status.is_some()
        });
        status.unwrap()
    }

    /// Kills it, as a crash does, and starts another at the same port, which answers.
    pub fn replace(&mut self) {
        self.kill();
        self.begin_anew();
    }

    /// Ends it, as an upgrade does, and starts this program in its place.
    pub fn upgrade(&mut self, program: &Path) {
        let pid = libc::pid_t::try_from(self.child.id()).unwrap();
        // SAFETY: the call takes integers. The process is a child of this one that was not waited for, so
        // that no other can have its number.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        self.child.wait().unwrap();
        self.program = program.into();
        self.begin_anew();
    }

    fn begin_anew(&mut self) {
        self.child = spawn(&self.program, &self.folder, &self.run, self.address);
        self.wait();
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Where guests are taken in.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The run directory.
    pub fn run(&self) -> &RunDir {
        &self.run
    }

    /// What the service says.
    pub fn ask<A: serde::de::DeserializeOwned>(&self, path: &str) -> Result<A, api::Error> {
        Client::new(&self.run.host_socket())?.get(path)
    }

    /// What it says of itself.
    pub fn status(&self) -> HostStatus {
        self.ask("/v1/host").unwrap()
    }

    /// Changes something.
    pub fn change(&self, method: Method, path: &str) -> Result<serde_json::Value, api::Error> {
        Client::new(&self.run.host_socket())?.call_within(PATIENCE, method, path, &())
    }

    /// A machine that runs on this host, with these further arguments; it is at work.
    pub fn machine(&self, name: &str, more: &[&str]) -> Node {
        let usual = ["--memory=16M", "--working-set=1M", "--serial=none"].into_iter().filter(|word| {
            let option = word.split_once('=').map_or(*word, |(option, _)| option);
            !more.iter().any(|more| more.starts_with(option))
        });
        let arguments = std::iter::once("run").chain(usual).chain(more.iter().copied());
        let mut node = Node::of_host(whimbrel(), &self.folder, &self.run, Some(name), arguments).unwrap();
        node.expect("running").unwrap();
        node.wait_guest("the guest's start", PATIENCE, |guest| guest.state == "running").unwrap();
        node
    }

    /// What this machine says of itself.
    pub fn vm(&self, name: &str) -> Result<Vm, api::Error> {
        Client::new(&self.run.machine_socket(name))?.get("/v1/vm")
    }

    /// The names of its machines.
    pub fn names(&self) -> Vec<String> {
        self.run.machines().unwrap()
    }

    /// Moves a machine away, to the end.
    pub fn migrate(&self, name: &str, request: &MigrationRequest) -> Migration {
        let client = Client::new(&self.run.machine_socket(name)).unwrap();
        client.call_within(PATIENCE, Method::POST, "/v1/migration?wait=true", request).unwrap()
    }

    /// What its processes have said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.run.log_file()).unwrap_or_default()
    }

    /// The processes whose arguments name the run directory.
    fn processes(&self) -> Vec<i32> {
        let folder = self.run.path().as_os_str().as_encoded_bytes();
        let ours = |pid: &i32| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.windows(folder.len()).any(|part| part == folder)
        };
        let numbers = std::fs::read_dir("/proc").unwrap().flatten();
        numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(ours).collect()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the log of {}:\n{}", self.run.path().display(), self.log());
        }
        // It starts no more processes then.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for pid in self.processes() {
            // SAFETY: the call takes integers.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
    }
}

fn spawn(program: &Path, folder: &Path, run: &RunDir, listen: SocketAddr) -> Child {
    let log = std::fs::File::options().append(true).create(true).open(folder.join("service.log")).unwrap();
    Command::new(program)
        .arg("host")
        .arg("--config")
        .arg(folder.join("host.toml"))
        .arg("--run-dir")
        .arg(run.path())
        .args(["--listen", &listen.to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap()
}
