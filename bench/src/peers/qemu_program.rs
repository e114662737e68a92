//! A QEMU guest, moved between two of its processes by QMP, through multifd.
//!
//! It is paused, and its memory is a shared file that is filled from outside, so that it needs no program.
//! The figures are those of the module [`qemu`](super::qemu).

use super::{certificates, free_port};
use crate::guest::{Content, Guest};
use crate::usage;
use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long a process may take to allocate memory and to answer.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// How long a migration may take.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(600);

/// Time between two checks.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Bytes of random content, which repeat.
const BLOCK: usize = 16 << 20;

/// A process of QEMU. Dropping it kills the process.
struct Process {
    child: Child,
    qmp: BufReader<UnixStream>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Moves a guest like `guest` and returns what it cost.
///
/// # Errors
/// When the program does not run, or the migration fails.
pub fn run(program: &Path, guest: &Guest, multifd: u16, prefault: bool, tls: bool) -> anyhow::Result<Value> {
    // Memory that is shared with QEMU, and as good as its own.
    let folder = tempfile::tempdir_in("/dev/shm").context("cannot make a temporary folder")?;
    if tls {
        certificates::make(folder.path())?;
    }
    let [near, far] = ["source", "target"].map(|name| folder.path().join(format!("{name}.ram")));
    fill(&near, guest)?;
    File::create(&far)?.set_len(guest.memory)?;
    let credentials = |endpoint: &str| {
        let folder = folder.path().display();
        tls.then(|| format!("tls-creds-x509,id=tls,dir={folder},endpoint={endpoint},verify-peer=on"))
    };
    let start = |name, ram: &Path, prealloc, endpoint, more| {
        Process::start(program, folder.path(), name, ram, guest, prealloc, credentials(endpoint), more)
    };
    let mut source = start("source", &near, false, "client", &[])?;
    let mut target = start("target", &far, prefault, "server", &["-incoming", "defer"])?;
    for process in [&mut source, &mut target] {
        let on = json!([{ "capability": "multifd", "state": true }]);
        process.ask("migrate-set-capabilities", &json!({ "capabilities": on }))?;
        process.ask("migrate-set-parameters", &json!({ "multifd-channels": multifd }))?;
        if tls {
            process.ask("migrate-set-parameters", &json!({ "tls-creds": "tls" }))?;
        }
    }
    let unlimited = json!({ "max-bandwidth": 100u64 << 30, "downtime-limit": 300 });
    source.ask("migrate-set-parameters", &unlimited)?;
    let to = format!("tcp:127.0.0.1:{}", free_port()?);
    target.ask("migrate-incoming", &json!({ "uri": to }))?;
    let before = (source.cpu_seconds()?, target.cpu_seconds()?);
    source.ask("migrate", &json!({ "uri": to }))?;
    let began = Instant::now();
    let info = loop {
        let info = source.ask("query-migrate", &json!({}))?;
        match info["status"].as_str() {
            Some("completed") => break info,
            Some("failed" | "cancelled") => bail!("QEMU's migration did not succeed: {info}"),
            _ => ensure!(
                began.elapsed() < MIGRATION_TIMEOUT,
                "the migration did not end within {MIGRATION_TIMEOUT:?}"
            ),
        }
        thread::sleep(POLL_INTERVAL);
    };
    Ok(json!({
        "status": "completed",
        "mib": guest.memory >> 20,
        "multifd": multifd,
        "tls": tls,
        "total_s": info["total-time"].as_f64().map(|ms| ms / 1e3),
        "setup_s": info["setup-time"].as_f64().map(|ms| ms / 1e3),
        "downtime_ms": info["downtime"],
        "cpu_source_s": source.cpu_seconds()? - before.0,
        "cpu_target_s": target.cpu_seconds()? - before.1,
    }))
}

/// Makes the source's memory.
fn fill(path: &Path, guest: &Guest) -> anyhow::Result<()> {
    let mut file = File::create(path).context("cannot make the guest's memory")?;
    file.set_len(guest.memory)?;
    if guest.content == Content::Zero {
        return Ok(());
    }
    let mut block = vec![0; BLOCK];
    fastrand::fill(&mut block);
    let mut left = guest.memory;
    while left > 0 {
        let now = left.min(BLOCK as u64);
        file.write_all(&block[..now as usize])?;
        left -= now;
    }
    Ok(())
}

impl Process {
    #[allow(clippy::too_many_arguments)] // the options of one command line
    fn start(
        program: &Path,
        folder: &Path,
        name: &str,
        ram: &Path,
        guest: &Guest,
        prealloc: bool,
        credentials: Option<String>,
        more: &[&str],
    ) -> anyhow::Result<Self> {
        let path: PathBuf = folder.join(format!("{name}.qmp"));
        let log = folder.join(format!("{name}.log"));
        let mut memory =
            format!("memory-backend-file,id=ram,size={},mem-path={},share=on", guest.memory, ram.display());
        if prealloc {
            memory.push_str(",prealloc=on");
        }
        let mut command = Command::new(program);
        command
            .args(["-M", "q35,memory-backend=ram", "-accel", "kvm", "-cpu", "host,-arch-capabilities"])
            .args(["-m", &(guest.memory >> 20).to_string(), "-object", &memory])
            .args(["-S", "-nographic", "-nic", "none", "-vga", "none", "-serial", "null", "-monitor", "none"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", path.display())])
            .args(more);
        if let Some(credentials) = credentials {
            command.args(["-object", &credentials]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .with_context(|| format!("cannot run {}", program.display()))?;
        let deadline = Instant::now() + START_TIMEOUT;
        let stream = loop {
            if let Ok(stream) = UnixStream::connect(&path) {
                break stream;
            }
            let ended = child.try_wait()?.is_some();
            if ended || Instant::now() >= deadline {
                let _ = (child.kill(), child.wait());
                bail!("the {name}'s QEMU does not answer: {}", fs::read_to_string(&log).unwrap_or_default());
            }
            thread::sleep(POLL_INTERVAL);
        };
        let mut process = Process { child, qmp: BufReader::new(stream) };
        process.qmp.get_ref().set_read_timeout(Some(START_TIMEOUT))?;
        process.qmp.read_line(&mut String::new()).context("QEMU has not said hello")?;
        process.ask("qmp_capabilities", &json!({}))?;
        Ok(process)
    }

    /// Executes a command and returns its result. Events are passed over.
    fn ask(&mut self, command: &str, arguments: &Value) -> anyhow::Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.qmp.get_mut(), "{request}").context("QEMU is gone")?;
        loop {
            let mut line = String::new();
            ensure!(self.qmp.read_line(&mut line).context("QEMU does not answer")? > 0, "QEMU is gone");
            let mut said: Value = serde_json::from_str(&line).context("QEMU's answer is no JSON")?;
            if said.get("return").is_some() {
                return Ok(said["return"].take());
            }
            if let Some(error) = said.get("error") {
                bail!("QEMU refuses {command}: {}", error["desc"].as_str().unwrap_or_default());
            }
        }
    }

    fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).context("QEMU is gone")?;
        usage::cpu_seconds_in(&stat).context("cannot read its processor time")
    }
}
