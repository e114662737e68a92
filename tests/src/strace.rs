//! What a program asks the kernel to move: every system call that carries bytes, counted by `strace`.

use crate::program::whimbrel;
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// Calls whose result is how many bytes were read, written, sent or received.
const CARRIERS: [&str; 20] = [
    "read",
    "readv",
    "pread64",
    "preadv",
    "preadv2",
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "pwritev2",
    "sendto",
    "sendmsg",
    "recvfrom",
    "recvmsg",
    "sendfile",
    "splice",
    "tee",
    "vmsplice",
    "copy_file_range",
    "process_vm_readv",
];

/// Calls that move bytes, or have them moved, and do not say how many.
const UNCOUNTED: [&str; 5] = ["sendmmsg", "recvmmsg", "process_vm_writev", "io_submit", "io_uring_setup"];

/// How long `strace` may take to write down the end of what it follows.
const PATIENCE: Duration = Duration::from_secs(20);

/// A `whimbrel` that is followed from its start to its end.
pub struct Followed {
    /// To be started in its place, with the same arguments.
    pub program: PathBuf,
    log: PathBuf,
}

impl Followed {
    /// One that leaves its script and its log, named `name`, in `folder`.
    ///
    /// # Panics
    /// When they cannot be written.
    pub fn new(folder: &Path, name: &str) -> Followed {
        let (program, log) = (folder.join(format!("{name}.sh")), folder.join(format!("{name}.strace")));
        let calls = CARRIERS.iter().chain(&UNCOUNTED).copied().collect::<Vec<_>>().join(",");
        // With -D the program itself is the child of whoever starts it. By seccomp only these calls stop it.
        let script = format!(
            "#!/bin/sh\nexec strace -D -f -q --seccomp-bpf -s 0 -e signal=kill -e trace={calls} -o '{}' '{}' \"$@\"\n",
            log.display(),
            whimbrel().display()
        );
        fs::write(&program, script).expect("a script");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("a script that can be run");
        Followed { program, log }
    }

    /// Bytes that the program `pid`, which has ended, had moved by each call.
    ///
    /// # Panics
    /// When there is no whole log, or it has calls that cannot be counted.
    pub fn bytes(&self, pid: u32) -> BTreeMap<String, u64> {
        let deadline = Instant::now() + PATIENCE;
        let ended = |line: &str| {
            line.split_once(' ')
                .is_some_and(|(who, what)| who == pid.to_string() && what.trim_start().starts_with("+++"))
        };
        loop {
            let log = fs::read_to_string(&self.log).expect("strace, of Debian's package of that name");
            if log.lines().any(ended) {
                return count(&log);
            }
            assert!(Instant::now() < deadline, "strace does not end");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Sums a log up. Calls of several threads overlap. A call that ends later has two lines, and the second one,
/// `<... read resumed>`, has the result.
fn count(log: &str) -> BTreeMap<String, u64> {
    let mut bytes = BTreeMap::new();
    for line in log.lines() {
        let call = line.split_once(' ').map_or("", |(_pid, call)| call.trim_start());
        let resumed = call.strip_prefix("<... ").and_then(|rest| rest.split_once(" resumed>"));
        let name = resumed.map_or_else(|| call.split('(').next(), |(name, _)| Some(name)).unwrap_or("");
        assert!(!UNCOUNTED.contains(&name), "{line}");
        let result = call.rsplit_once(" = ").map(|(_, result)| result.split(' ').next().unwrap_or(""));
        // Errors are negative, and "?" is a call that never ended.
        if let Some(Ok(moved)) = result.map(str::parse::<u64>) {
            *bytes.entry(name.to_string()).or_default() += moved;
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_summed_by_call() {
        let log = "7  read(3, \"\"..., 8) = 8\n\
                   8  sendfile(5, 4, [0] => [65536], 65536 <unfinished ...>\n\
                   7  read(3, 0x1, 8)    = -1 EAGAIN (Resource temporarily unavailable)\n\
                   8  <... sendfile resumed>) = 65536\n\
                   7  read(3,  <unfinished ...>\n\
                   7  <... read resumed>\"\"..., 100) = 100\n\
                   7  recvmsg(9, {msg_name=NULL}, 0) = ?\n\
                   7  +++ exited with 0 +++\n";
        let expected = [("read".to_string(), 108), ("sendfile".to_string(), 65536)];
        assert_eq!(count(log), expected.into());
    }
}
