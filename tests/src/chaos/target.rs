//! A side of a move, as those see it who interfere with it: a process and its API, from any thread.

use hyper::Method;
use migration::monitor::Phase;
use std::path::PathBuf;
use std::time::Duration;
use std::{fs, io, mem};
use whimbrel::api;
use whimbrel::api::client::Client;
use whimbrel::api::model::{Migration, Vm};
use whimbrel::node::Node;

/// How long an answer may take: a process that stands still gives none.
const PATIENCE: Duration = Duration::from_millis(300);

/// One side.
pub struct Target {
    pid: libc::pid_t,
    api: PathBuf,
}

impl Target {
    /// This one. Its process is not waited for as long as this exists.
    pub fn of(node: &Node) -> Self {
        Target { pid: node.pid() as libc::pid_t, api: node.api_path().into() }
    }

    fn ask<T>(&self, question: impl FnOnce(&Client) -> Result<T, api::Error>) -> Option<T> {
        question(&Client::new(&self.api).ok()?).ok()
    }

    /// Where its migration is, if it says so.
    pub fn phase(&self) -> Option<Phase> {
        let answer: Option<Migration> =
            self.ask(|api| api.call_within(PATIENCE, Method::GET, "/v1/migration", &()));
        answer.map(|migration| migration.progress.phase)
    }

    /// Entries of the journal that the guest has written for certain, as far as it says so.
    pub fn confirmed(&self) -> u64 {
        let answer: Option<Vm> = self.ask(|api| api.call_within(PATIENCE, Method::GET, "/v1/vm", &()));
        answer.and_then(|vm| vm.guest).map_or(0, |guest| guest.journal)
    }

    /// Whether its guest waits until its disk has room.
    pub fn waits_for_disk(&self) -> bool {
        let answer: Option<Vm> = self.ask(|api| api.call_within(PATIENCE, Method::GET, "/v1/vm", &()));
        answer.is_some_and(|vm| vm.trouble.is_some())
    }

    /// Calls the migration off, unless it is too early or too late.
    pub fn cancel(&self) {
        let _: Option<Migration> =
            self.ask(|api| api.call_within(PATIENCE, Method::DELETE, "/v1/migration", &()));
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When there is no such process.
    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: takes numbers only; the process is a child that has not been waited for.
        let sent = unsafe { libc::kill(self.pid, signal) };
        assert_eq!(sent, 0, "{}", io::Error::last_os_error());
    }

    /// Bytes of its address space; none once it has ended.
    pub fn address_space(&self) -> u64 {
        let text = fs::read_to_string(format!("/proc/{}/statm", self.pid)).unwrap_or_default();
        text.split(' ').next().and_then(|pages| pages.parse().ok()).map_or(0, |pages: u64| pages * 4096)
    }

    /// Limits it until what is returned is called.
    pub fn limit(&self, what: libc::__rlimit_resource_t, most: u64) -> Box<dyn FnOnce() + '_> {
        let before = self.exchange_limit(what, most);
        Box::new(move || {
            self.exchange_limit(what, before);
        })
    }

    fn exchange_limit(&self, what: libc::__rlimit_resource_t, most: u64) -> u64 {
        // SAFETY: numbers of which zero is one.
        let mut before: libc::rlimit = unsafe { mem::zeroed() };
        // SAFETY: the structures live across the calls.
        let set = unsafe {
            libc::prlimit(self.pid, what, std::ptr::null(), &mut before);
            let limit = libc::rlimit { rlim_cur: most.min(before.rlim_max), ..before };
            libc::prlimit(self.pid, what, &limit, std::ptr::null_mut())
        };
        // A process that has ended has no limits.
        assert!(
            set == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH),
            "{}",
            io::Error::last_os_error()
        );
        before.rlim_cur
    }
}
