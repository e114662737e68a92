//! A guest of Cloud Hypervisor, moved over TCP between two of its processes.
//!
//! It runs our own bare-metal guest, which boots like any PVH kernel, with the same command line. The content
//! of the guest's memory is written from outside, through the memfds of the source's process. Times come from
//! Cloud Hypervisor's own events (`--event-monitor`) and are on the source's clock, as ours are. They run
//! from the start of the migration or from the pause until the destination reports that the guest runs.
//!
//! The destination allocates memory when the source's configuration arrives, so with `prefault` that is part
//! of the migration. The time until all memory exists is observed from outside and reported separately.

use super::{certificates, free_port};
use crate::figures::{self, Figures};
use crate::guest::{Content, Guest};
use crate::usage;
use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use vmm::guest::{ELF, Workload};

/// How long a process may take to serve its API, to allocate memory and to start a guest.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// How long the guest runs before it is filled and moved; it starts within a few hundredths of a second.
const SETTLE_TIME: Duration = Duration::from_secs(1);

/// How long a migration may take.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(600);

/// Time between two checks.
const POLL_INTERVAL: Duration = Duration::from_millis(2);

/// Bytes at the start of each memory file that are not filled, because the guest's image and its boot data
/// lie there.
const LOW: u64 = 8 << 20;

/// Bytes of each write.
const BLOCK: usize = 1 << 20;

/// A process of Cloud Hypervisor. Dropping it kills the process.
struct Process {
    child: Child,
    api: PathBuf,
    events: PathBuf,
    log: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Processor seconds of a process.
#[derive(Clone, Copy)]
struct CpuTime {
    all: f64,
    /// Those of the vCPU threads.
    guest: f64,
}

impl CpuTime {
    /// Those that our reports count as well: all but the vCPU threads.
    fn of_the_vmm(self) -> f64 {
        self.all - self.guest
    }
}

/// Moves a guest like `guest` and returns its times.
///
/// # Errors
/// When the binary does not run, or the migration fails.
pub fn run(
    binary: &Path,
    guest: &Guest,
    connections: u16,
    populate: bool,
    tls: bool,
) -> anyhow::Result<Value> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let kernel = folder.path().join("guest.elf");
    fs::write(&kernel, ELF).context("cannot write the guest's image")?;
    let mut source = Process::start(binary, folder.path(), "source", &options(guest, &kernel, populate))?;
    let target = Process::start(binary, folder.path(), "target", &[])?;
    // Memory that is populated beforehand exists from then on.
    source.wait_event("booted")?;
    thread::sleep(SETTLE_TIME);
    fill(source.child.id(), guest)?;
    let address = format!("tcp:127.0.0.1:{}", free_port()?);
    let mut receiving = json!({ "receiver_url": address });
    let mut sending = json!({ "destination_url": address, "connections": connections });
    if tls {
        certificates::make(folder.path())?;
        for request in [&mut receiving, &mut sending] {
            request["tls_dir"] = json!(folder.path());
        }
    }
    let _receiving = target.ask("vm.receive-migration", &receiving)?;
    target.wait_event("migration-receive-ready")?;
    let before = (source.cpu_time()?, target.cpu_time()?);
    // A process that ends may be read without its threads; their time is in the total all the same.
    let mut used = before.0;
    let began = Instant::now();
    let _sending = source.ask("vm.send-migration", &sending)?;
    let mut built = None;
    loop {
        used =
            source.cpu_time().map_or(used, |now| CpuTime { all: now.all, guest: now.guest.max(used.guest) });
        if populate && built.is_none() && target.resident() >= guest.memory {
            built = Some(began.elapsed());
        }
        // Checked before the events, because a process writes its last event before it ends.
        let gone = source.child.try_wait()?.is_some();
        if source.event("migration-finished")?.is_some() {
            break;
        }
        if gone || source.event("migration-failed")?.is_some() {
            bail!("the migration failed: {}{}", source.errors(), target.errors());
        }
        ensure!(
            began.elapsed() < MIGRATION_TIMEOUT,
            "the migration did not end within {MIGRATION_TIMEOUT:?}"
        );
        thread::sleep(POLL_INTERVAL);
    }
    target.wait_event("resumed")?;
    let after = (used, target.cpu_time()?);
    let at = |name| source.event(name)?.with_context(|| format!("it did not say when {name} was"));
    let (started, paused, finished) = (at("migration-started")?, at("pausing")?, at("migration-finished")?);
    let version = Command::new(binary).arg("--version").output().map(|it| it.stdout).unwrap_or_default();
    Ok(json!({
        "version": String::from_utf8_lossy(&version).trim(),
        "mib": guest.memory >> 20,
        "tls": tls,
        "total_s": finished - started,
        "blackout_s": finished - paused,
        "build_s": built.map(|built| built.as_secs_f64()),
        "cpu_source_s": after.0.of_the_vmm() - before.0.of_the_vmm(),
        "cpu_target_s": after.1.of_the_vmm() - before.1.of_the_vmm(),
    }))
}

/// Cloud Hypervisor's options for a guest like ours.
fn options(guest: &Guest, kernel: &Path, populate: bool) -> Vec<String> {
    let workload = Workload {
        vcpus: guest.vcpus,
        working_set: guest.working_set,
        rate: guest.rate,
        hz: guest.timer_hz,
        fill: 0,
        content: vmm::guest::Content::Random,
        journal: 0,
    };
    // The configuration moves with the guest, so options for memory hold for the destination too.
    let prefault = if populate { "on" } else { "off" };
    let options = [
        ("--kernel", kernel.display().to_string()),
        ("--cmdline", workload.command_line()),
        ("--cpus", format!("boot={}", guest.vcpus)),
        ("--memory", format!("size={},shared=on,prefault={prefault}", guest.memory)),
        ("--serial", "null".into()),
        ("--console", "off".into()),
    ];
    options.into_iter().flat_map(|(name, value)| [name.into(), value]).collect()
}

impl Process {
    fn start(binary: &Path, folder: &Path, name: &str, options: &[String]) -> anyhow::Result<Self> {
        let [api, events, log] = ["api", "events", "log"].map(|it| folder.join(format!("{name}.{it}")));
        let child = Command::new(binary)
            .arg("--api-socket")
            .arg(&api)
            .arg("--event-monitor")
            .arg(format!("path={}", events.display()))
            .arg("--log-file")
            .arg(&log)
            // Its seccomp filter allows the system calls of one C library and kills processes that use
            // another.
            .args(["--seccomp", "false"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .with_context(|| format!("cannot run {}", binary.display()))?;
        let mut process = Process { child, api, events, log };
        let deadline = Instant::now() + START_TIMEOUT;
        while UnixStream::connect(&process.api).is_err() {
            ensure!(
                process.child.try_wait()?.is_none(),
                "the {name}'s Cloud Hypervisor ended at once: {}",
                process.errors()
            );
            ensure!(Instant::now() < deadline, "the {name}'s Cloud Hypervisor does not answer");
            thread::sleep(POLL_INTERVAL);
        }
        Ok(process)
    }

    /// The errors in its log.
    fn errors(&self) -> String {
        let log = fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        log.lines().filter(|line| line.contains("ERROR")).map(|line| format!("{line}\n")).collect()
    }

    /// Sends a request. Events tell the result, but the connection must stay open until the request is done.
    fn ask(&self, what: &str, body: &Value) -> anyhow::Result<UnixStream> {
        let mut stream = UnixStream::connect(&self.api).context("Cloud Hypervisor does not answer")?;
        let body = body.to_string();
        write!(
            stream,
            "PUT /api/v1/{what} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        Ok(stream)
    }

    /// The time of the last event of this name, in seconds on the process's clock; `None` if there was none.
    fn event(&self, name: &str) -> anyhow::Result<Option<f64>> {
        Ok(event_in(&fs::read_to_string(&self.events).context("cannot read its events")?, name))
    }

    fn wait_event(&self, name: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        while self.event(name)?.is_none() {
            ensure!(Instant::now() < deadline, "Cloud Hypervisor has not said {name}");
            thread::sleep(POLL_INTERVAL);
        }
        Ok(())
    }

    /// Processor seconds so far.
    fn cpu_time(&self) -> anyhow::Result<CpuTime> {
        let id = self.child.id();
        let stat = fs::read_to_string(format!("/proc/{id}/stat")).context("Cloud Hypervisor is gone")?;
        let all = usage::cpu_seconds_in(&stat).context("cannot read its processor time")?;
        let threads = fs::read_dir(format!("/proc/{id}/task"))?.flatten();
        let stats = threads.filter_map(|thread| fs::read_to_string(thread.path().join("stat")).ok());
        let guest =
            stats.filter(|stat| stat.contains("(vcpu")).filter_map(|stat| usage::cpu_seconds_in(&stat)).sum();
        Ok(CpuTime { all, guest })
    }

    /// Bytes of resident shared memory.
    fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap_or_default();
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("RssShmem:")?.split_whitespace().next()?.parse::<u64>().ok());
        kib.unwrap_or(0) << 10
    }
}

/// The time of the last event of this name in the event monitor's output, whose last event may be incomplete.
fn event_in(text: &str, name: &str) -> Option<f64> {
    let events = serde_json::Deserializer::from_str(text).into_iter::<Value>().map_while(Result::ok);
    let event = events.filter(|event| event["event"] == name).last()?;
    let stamp = &event["timestamp"];
    Some(stamp["secs"].as_f64()? + stamp["nanos"].as_f64()? / 1e9)
}

/// Fills the guest's memory through the files of its process.
fn fill(process: u32, guest: &Guest) -> anyhow::Result<()> {
    let mut block = vec![0u8; BLOCK];
    let mut random = fastrand::Rng::with_seed(guest.memory);
    if guest.content == Content::Untouched {
        return Ok(());
    }
    let files = memory_files(process)?;
    let all: u64 = files.iter().map(|(_, len)| len).sum();
    ensure!(all == guest.memory, "{all} bytes of guest memory are in files instead of {}", guest.memory);
    for (file, len) in files {
        for at in (LOW..len).step_by(BLOCK) {
            if guest.content == Content::Random {
                random.fill(&mut block);
            }
            let part = BLOCK.min((len - at) as usize);
            file.write_all_at(&block[..part], at).context("cannot fill the guest's memory")?;
        }
    }
    Ok(())
}

/// The memfds of a process that hold guest memory, each once, with their sizes.
fn memory_files(process: u32) -> anyhow::Result<Vec<(File, u64)>> {
    use std::os::unix::fs::MetadataExt;
    let mut files: Vec<(File, u64)> = Vec::new();
    let mut seen = Vec::new();
    for link in fs::read_dir(format!("/proc/{process}/fd"))?.flatten() {
        let name = fs::read_link(link.path()).unwrap_or_default();
        if !name.to_string_lossy().starts_with("/memfd:") {
            continue;
        }
        let file = OpenOptions::new().read(true).write(true).open(link.path())?;
        let facts = file.metadata()?;
        if facts.len() > LOW && !seen.contains(&facts.ino()) {
            seen.push(facts.ino());
            files.push((file, facts.len()));
        }
    }
    Ok(files)
}

/// The rate in MiB a second, without the time in which a populated destination got its memory; the blackout
/// by the source's clock; and CPU seconds of both sides per GiB.
pub fn figures(said: &Value) -> Figures {
    let number = |name: &str| said[name].as_f64();
    let moving = number("total_s").map(|total| total - number("build_s").unwrap_or(0.0)).filter(|s| *s > 0.0);
    let mib = number("mib");
    let per_gib = |name: &str| Some(number(name)? / (mib? / 1024.0));
    figures::named([
        ("migration_mib_s", mib.zip(moving).map(|(mib, s)| mib / s)),
        ("moving_ms", moving.map(|s| s * 1e3)),
        ("total_ms", number("total_s").map(|s| s * 1e3)),
        ("blackout_ms", number("blackout_s").map(|s| s * 1e3)),
        ("source_cpu_s_per_gib", per_gib("cpu_source_s")),
        ("target_cpu_s_per_gib", per_gib("cpu_target_s")),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_its_events() {
        let event = |name: &str, secs: u64, nanos: u64| {
            json!({ "timestamp": { "secs": secs, "nanos": nanos }, "source": "vm", "event": name })
                .to_string()
        };
        let text =
            [event("pausing", 1, 0), event("pausing", 2, 500_000_000), event("paused", 3, 0)].join("\n\n");
        assert_eq!(event_in(&text, "pausing"), Some(2.5));
        assert_eq!(event_in(&text[..text.len() - 1], "paused"), None, "half an event");
        assert_eq!(event_in("", "pausing"), None);
    }

    #[test]
    fn making_memory_first_is_no_part_of_moving_it() {
        let said =
            json!({ "mib": 2048, "total_s": 3.0, "build_s": 1.0, "blackout_s": 0.1, "cpu_source_s": 1.0 });
        let figures = figures(&said);
        assert_eq!((figures["migration_mib_s"], figures["total_ms"]), (1024.0, 3000.0));
        assert_eq!((figures["blackout_ms"], figures["source_cpu_s_per_gib"]), (100.0, 0.5));
        let cold = json!({ "mib": 2048, "total_s": 4.0, "build_s": null });
        assert_eq!(super::figures(&cold)["migration_mib_s"], 512.0);
    }
}
