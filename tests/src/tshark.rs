//! What other programs make of the RARP frames that come to the switch: `tcpdump` records,
//! `tshark` reads.

use crate::bridges::PORTS;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

/// The fields that are read of each frame, beside when and where it came.
const FIELDS: [&str; 9] = [
    "frame.len",
    "eth.src",
    "eth.dst",
    "arp.opcode",
    "arp.src.hw_mac",
    "arp.dst.hw_mac",
    "arp.src.proto_ipv4",
    "arp.dst.proto_ipv4",
    "_ws.malformed",
];

/// A frame that came to the switch.
#[derive(Clone, Debug, PartialEq)]
pub struct Told {
    /// When it came, since 1970.
    pub at: Duration,
    /// The host it came from: 0 or 1.
    pub host: usize,
    /// Its length, addresses of its header, operation, then hardware and protocol addresses of sender and
    /// target, and what is malformed: as `tshark` writes them, separated by commas.
    pub fields: String,
}

/// RARP frames that come to the switch from either host, from beginning to end.
pub struct Recording {
    folder: tempfile::TempDir,
    recorders: Vec<Child>,
}

impl Recording {
    /// Begins; returns when it listens.
    ///
    /// # Panics
    /// When there is no tcpdump.
    pub fn begin() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let recorders = PORTS.iter().map(|port| record(folder.path(), port)).collect();
        Recording { folder, recorders }
    }

    /// Ends; the frames, in their order.
    ///
    /// # Panics
    /// When tshark cannot read them.
    pub fn end(mut self) -> Vec<Told> {
        for recorder in &mut self.recorders {
            // SAFETY: a signal to a child that has not been waited for.
            unsafe { libc::kill(recorder.id() as libc::pid_t, libc::SIGINT) };
            recorder.wait().expect("a child can be waited for");
        }
        let read = |host: usize| read(self.folder.path(), host);
        let mut all: Vec<Told> = (0..PORTS.len()).flat_map(read).collect();
        all.sort_by_key(|told| told.at);
        all
    }
}

/// Records what comes in by a port into a file of its name. (`dumpcap` has no such direction, and a filter
/// for it loses the first frames.)
fn record(folder: &Path, port: &str) -> Child {
    let mut command = Command::new("tcpdump");
    command.args(["-i", port, "-Q", "in", "-n", "-U", "-w"]).arg(folder.join(port)).arg("rarp");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut recorder = command.spawn().expect("tcpdump, which ci/setup installs");
    let mut stderr = BufReader::new(recorder.stderr.take().expect("a pipe"));
    let mut said = String::new();
    while !said.contains("listening") {
        let count = stderr.read_line(&mut said).expect("a pipe");
        assert!(count > 0, "tcpdump does not listen: {said}");
    }
    // It says more at the end.
    thread::spawn(move || stderr.lines().map_while(Result::ok).for_each(drop));
    recorder
}

fn read(folder: &Path, host: usize) -> Vec<Told> {
    let mut command = Command::new("tshark");
    command.arg("-r").arg(folder.join(PORTS[host])).args(["-T", "fields", "-E", "separator=,"]);
    for field in ["frame.time_epoch"].iter().chain(&FIELDS) {
        command.args(["-e", field]);
    }
    let output = command.output().expect("tshark, which ci/setup installs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told = |line: &str| {
        let (at, fields) = line.split_once(',').unwrap_or_else(|| panic!("no frame: {line}"));
        Told { at: Duration::from_secs_f64(at.parse().expect("a time")), host, fields: fields.into() }
    };
    String::from_utf8_lossy(&output.stdout).lines().map(told).collect()
}

impl Drop for Recording {
    fn drop(&mut self) {
        for recorder in &mut self.recorders {
            // It may have ended by itself.
            let _ = recorder.kill();
            let _ = recorder.wait();
        }
    }
}
