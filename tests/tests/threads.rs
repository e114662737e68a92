//! A destination that can start no more threads by the time its guest arrives.

use migration::report::Verdict;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use whimbrel_tests::inspect::settle;
use whimbrel_tests::say;
use whimbrel_tests::sides::{Guest, PATIENCE, is_empty, receiver, request, wait_until};

/// Lets a process start no thread, for as long as this exists.
struct NoThreads {
    strace: Child,
    log: PathBuf,
}

impl NoThreads {
    fn of(pid: u32, folder: &Path) -> NoThreads {
        let (log, told) = (folder.join("threads.strace"), folder.join("threads.stderr"));
        let strace = Command::new("strace")
            .args(["-f", "-e", "trace=clone,clone3", "-e", "inject=clone,clone3:error=EAGAIN", "-p"])
            .arg(pid.to_string())
            .arg("-o")
            .arg(&log)
            .stdin(Stdio::null())
            .stderr(File::create(&told).unwrap())
            .spawn()
            .expect("strace, of Debian's package of that name");
        wait_until("strace attaches", || fs::read_to_string(&told).unwrap().contains(" attached"));
        NoThreads { strace, log }
    }

    /// How many were refused.
    fn refused(&self) -> usize {
        fs::read_to_string(&self.log).unwrap().matches("(INJECTED)").count()
    }
}

impl Drop for NoThreads {
    fn drop(&mut self) {
        // By this signal it detaches from what it follows.
        signal(self.strace.id(), libc::SIGTERM);
        let _ = self.strace.wait();
    }
}

fn signal(pid: u32, signal: libc::c_int) {
    // SAFETY: the process is a child of this one that has not been waited for.
    assert_eq!(unsafe { libc::kill(pid as libc::pid_t, signal) }, 0);
}

#[test]
fn a_guest_that_arrives_runs_where_no_thread_can_be_started() {
    let guest = Guest { memory: 512 << 20, fill: 256 << 20, ..Guest::SMALL };
    let folder = tempfile::tempdir().unwrap();
    let source = guest.start(folder.path(), "source");
    let (mut destination, address) = receiver(folder.path(), "destination");
    source.migrate(&request(address)).unwrap();
    wait_until("memory travels", || source.migration().unwrap().progress.sent > 0);
    // All threads that a destination needs are there. Nothing happens while the next ones are forbidden.
    signal(source.pid(), libc::SIGSTOP);
    let no_threads = NoThreads::of(destination.pid(), folder.path());
    assert!(is_empty(&destination), "the guest has not arrived yet");
    signal(source.pid(), libc::SIGCONT);
    destination.expect("arrived").unwrap();
    let report = source.wait_migration(PATIENCE).unwrap().report.unwrap();
    assert_eq!(report.verdict, Verdict::Moved, "{:?}", report.failure);
    let refused = no_threads.refused();
    assert!(refused > 0, "the network is told by a thread");
    drop(no_threads);
    settle(&destination, &guest);
    say::figures("a destination without threads", format_args!("{refused} refused, and the guest runs"));
}
