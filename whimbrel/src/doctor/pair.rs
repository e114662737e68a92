//! Whether guests of this host can move to another one.
//!
//! Nothing is asked that a migration does not ask: machines of our own, which are small, are offered to the
//! other host, which builds them and is then told that they do not come. So the findings are what a migration
//! would find, and hosts of any version that can take guests in can be examined. How far the two clocks
//! differ no message tells before a guest has moved: that is asked of the other host's API.

use super::clock::{self, Difference};
use super::{Finding, Level, good, limited};
use crate::api::model::{Migration, MigrationRequest};
use crate::api::reach::Reach;
use crate::host::config::HostConfig;
use crate::node::{Error, Node};
use crate::security::TlsFiles;
use migration::monitor::Phase;
use migration::report::Report;
use migration::{Code, Failure};
use serde_json::json;
use socket2::Socket;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

/// How long the guest may take to start, and an attempt to end: emulated hosts are slow.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often it is looked whether all memory is there.
const LOOK: Duration = Duration::from_millis(5);

/// How long a guest waits at most to be called back.
const CALLED_BACK_S: u64 = 60;

/// Memory that travels to measure the speed: random, so that nothing of it can be left out.
const SPEED: u64 = 64 << 20;

/// Size of the file that is made in a storage.
const IMAGE: u64 = 4 << 20;

/// Which pair, and what of it.
#[derive(Clone, Debug)]
pub struct Pair<'a> {
    /// This program.
    pub program: PathBuf,
    /// The other host, with its port.
    pub to: String,
    /// Where it serves its API, as a URL; at its usual port if nothing is said.
    pub at: Option<String>,
    /// The certificates that this one shows.
    pub tls: Option<TlsFiles>,
    /// Whether none are needed.
    pub insecure: bool,
    /// What this host is, whose networks and storages are tried.
    pub host: Option<&'a HostConfig>,
}

/// What was found about a pair.
#[derive(Clone, Debug)]
pub struct Examined {
    /// Each thing that was looked at.
    pub findings: Vec<Finding>,
    /// How far the other host's clock is ahead, if that is known.
    pub clock: Option<Difference>,
}

/// Examines the pair.
///
/// # Errors
/// When there can be no temporary folder.
pub fn examine(pair: &Pair<'_>) -> io::Result<Examined> {
    let stream = match connect(&pair.to) {
        Ok((stream, took)) => (stream, took),
        Err(error) => {
            let mend = "start `whimbrel host` there, with `listen` at an address that this host reaches";
            let findings = vec![broken("connection", format!("{}: {error}", pair.to), mend)];
            return Ok(Examined { findings, clock: None });
        }
    };
    let mut findings = vec![connection(&pair.to, stream.1), path_mtu(&stream.0)];
    let clock = clocks(pair);
    findings.push(clock::finding(&clock));
    drop(stream);
    let folder = tempfile::tempdir()?;
    let (mut more, goes_on) = machine(pair, folder.path());
    findings.append(&mut more);
    if let Some(host) = pair.host.filter(|_| goes_on) {
        findings.extend(host.networks.keys().map(|name| network(pair, folder.path(), host, name)));
        let storages = host.storage.iter();
        findings.extend(storages.map(|(name, it)| storage(pair, folder.path(), host, name, &it.path)));
    }
    Ok(Examined { findings, clock: clock.ok() })
}

/// How far the clocks are apart, or why that is not known.
fn clocks(pair: &Pair<'_>) -> Result<Difference, String> {
    let tls = pair.tls.as_ref().ok_or("without certificates its API cannot be asked for its time")?;
    let usual = || format!("https://{}", pair.to.rsplit_once(':').map_or(pair.to.as_str(), |(host, _)| host));
    let reach = Reach::host(&pair.at.clone().unwrap_or_else(usual), tls);
    reach.and_then(|reach| clock::compare(&reach)).map_err(|error| error.to_string())
}

fn broken(what: &'static str, found: String, mend: &str) -> Finding {
    Finding { what, level: Level::Broken, found, mend: Some(mend.into()) }
}

/// A connection to the first address that answers, and how long that took.
fn connect(to: &str) -> io::Result<(TcpStream, Duration)> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in to.to_socket_addrs()? {
        let began = Instant::now();
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => return Ok((stream, began.elapsed())),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn connection(to: &str, took: Duration) -> Finding {
    good("connection", format!("{to} answers in {:.2} ms", took.as_secs_f64() * 1e3))
}

/// By what a segment holds, beside which a packet has the headers of IP and TCP with its time stamps.
fn path_mtu(stream: &TcpStream) -> Finding {
    const USUAL: u32 = 1500;
    let what = "packets";
    let headers = if stream.peer_addr().is_ok_and(|peer| peer.is_ipv6()) { 72 } else { 52 };
    let segment = Socket::from(match stream.try_clone() {
        Ok(stream) => stream,
        Err(error) => return limited(what, error.to_string(), None),
    })
    .tcp_mss();
    match segment.map(|bytes| bytes + headers) {
        Ok(bytes) if bytes < USUAL => {
            let mend = "look for a tunnel, or an interface with a small MTU, between the hosts";
            limited(what, format!("the path takes packets of {bytes} bytes only"), Some(mend.into()))
        }
        Ok(bytes) => good(what, format!("the path takes packets of {bytes} bytes")),
        Err(error) => limited(what, error.to_string(), None),
    }
}

/// Offers a machine and sends its memory, to see what is refused, how memory travels, and how fast. Whether
/// the other host takes such machines at all.
fn machine(pair: &Pair<'_>, folder: &Path) -> (Vec<Finding>, bool) {
    let fill = SPEED.to_string();
    let node = match start(pair, folder, "", &["--memory=96M", "--fill", &fill]) {
        Ok(node) => node,
        Err(why) => {
            let mend = "see what `whimbrel doctor` says of this host by itself";
            return (vec![broken("probe", format!("no machine can be started here: {why}"), mend)], false);
        }
    };
    match offer(pair, &node) {
        Ok(Migration { secured, report: Some(report), .. }) => match &report.failure {
            None => {
                let mut findings = vec![
                    good("versions", "both hosts speak the same protocol".into()),
                    good("processor", "a guest with this host's processor can go there".into()),
                ];
                findings.push(certificates(secured.as_ref().map(|secured| secured.told(&report.lanes))));
                match send(pair, &node) {
                    Ok(report) => findings.extend(travel(&report)),
                    Err(why) => {
                        findings.push(broken("memory", why, "see its log, and `whimbrel history` there"))
                    }
                }
                (findings, true)
            }
            Some(why) => (vec![refused(why)], false),
        },
        Ok(_) => (vec![broken("probe", "the machine sent no report".into(), "try again")], false),
        Err(why) => (vec![broken("probe", why.to_string(), "try again")], false),
    }
}

fn certificates(told: Option<String>) -> Finding {
    let what = "certificates";
    match told {
        Some(told) => good(what, told),
        None => limited(
            what,
            "none: whoever is on the network can read and change guests".into(),
            Some("make them with `whimbrel pki`, and name their folder with --tls".into()),
        ),
    }
}

/// Why no machine is taken.
fn refused(why: &Failure) -> Finding {
    let (what, mend) = match why.code {
        Code::VERSION => ("versions", "install versions of Whimbrel that are one release apart at most"),
        Code::AUTHENTICATION => {
            ("certificates", "give both hosts certificates of the same authority, or --insecure")
        }
        Code::CPU => {
            ("processor", "start guests on the host with the older processor, from where they can go to both")
        }
        // Nothing is wrong with the pair.
        Code::LIMITS | Code::BUSY => {
            let mend = "let it take in guests called doctor-*, and end its draining, or wait, and try again";
            return limited("admission", why.message.clone(), Some(mend.into()));
        }
        _ => ("session", "see what `whimbrel doctor` says there, and the log of its host service"),
    };
    broken(what, why.message.clone(), mend)
}

/// By what, and how fast.
fn travel(report: &Report) -> Vec<Finding> {
    let declined = report.declined.iter().find(|declined| declined.transport == "rdma");
    let mut findings = vec![match declined {
        Some(declined) => limited("RDMA", format!("not used: {}", declined.why.message), None),
        None => good("RDMA", format!("memory travels over {}", report.transport)),
    }];
    if let Some(round) = report.rounds.first().filter(|round| round.sent > 0 && round.elapsed_us > 0) {
        let (mib, seconds) = (round.sent as f64 / f64::from(1 << 20), round.elapsed_us as f64 / 1e6);
        let found = format!("{:.0} MiB/s over {}, of {mib:.0} MiB", mib / seconds, report.transport);
        findings.push(good("speed", found));
    }
    findings
}

fn network(pair: &Pair<'_>, folder: &Path, host: &HostConfig, name: &str) -> Finding {
    let option = format!("network={name}");
    named(pair, folder, host, ("network", name, "both hosts know it"), &["--net", &option])
}

/// The other host finds out by locks whether its file is this host's.
fn storage(pair: &Pair<'_>, folder: &Path, host: &HostConfig, name: &str, path: &Path) -> Finding {
    let file = format!(".whimbrel-doctor-{}.raw", std::process::id());
    let image = Removed(path.join(&file));
    if let Err(error) = File::create_new(&image.0).and_then(|image| image.set_len(IMAGE)) {
        let found = format!("{name} was not tried: no file can be made in {}: {error}", path.display());
        return limited("storage", found, Some("run this as the user of the host service".into()));
    }
    let option = format!("storage={name},file={file}");
    let whats = ("storage", name, "it is the same at both hosts");
    named(pair, folder, host, whats, &["--disk", &option, "--journal=1"])
}

/// A file that goes when this does.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        // It may never have come about.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Offers a machine that has something which the host's configuration names.
fn named(
    pair: &Pair<'_>,
    folder: &Path,
    host: &HostConfig,
    (what, name, good_if): (&'static str, &str, &str),
    options: &[&str],
) -> Finding {
    let config = host.file.as_deref().and_then(Path::to_str).unwrap_or_default();
    let options: Vec<_> =
        ["--memory=32M", "--host-config", config].into_iter().chain(options.iter().copied()).collect();
    let mend = "let both hosts' configurations name it, for the same thing";
    let offered = start(pair, folder, &format!("-{what}-{name}"), &options)
        .map_err(|why| {
            limited(what, format!("{name} was not tried, for want of a machine here: {why}"), None)
        })
        .and_then(|node| offer(pair, &node).map_err(|why| broken(what, format!("{name}: {why}"), mend)));
    match offered.map(|migration| migration.report.and_then(|report| report.failure)) {
        Ok(None) => good(what, format!("{name}: {good_if}")),
        Ok(Some(why)) => broken(what, format!("{name}: {}", why.message), mend),
        Err(finding) => finding,
    }
}

/// Starts a machine of our own.
fn start(pair: &Pair<'_>, folder: &Path, suffix: &str, options: &[&str]) -> Result<Node, Error> {
    let name = format!("doctor-{}{suffix}", std::process::id());
    let usual = ["run", "--working-set=1M", "--serial=none"];
    let words = usual.iter().chain(options).map(OsString::from).chain(security(pair));
    let mut node = Node::start(&pair.program, folder, &name, words)?;
    node.expect("running")?;
    node.wait_guest("the guest's start", PATIENCE, |guest| guest.state == "running")?;
    Ok(node)
}

/// What its process shows to others. It can open only the files that it is told of when it starts.
fn security(pair: &Pair<'_>) -> Vec<OsString> {
    let mut words: Vec<OsString> = Vec::new();
    match &pair.tls {
        Some(TlsFiles { folder, ca, cert, key, crl, ktls: _ }) => {
            let named = [folder, ca, cert, key, crl];
            for (option, path) in
                ["--tls", "--tls-ca", "--tls-cert", "--tls-key", "--tls-crl"].iter().zip(named)
            {
                words.extend(path.iter().flat_map(|path| [OsString::from(option), path.into()]));
            }
        }
        None if pair.insecure => words.push("--insecure".into()),
        None => {}
    }
    words
}

fn request(pair: &Pair<'_>) -> MigrationRequest {
    // All else is as usual.
    serde_json::from_value(json!({ "to": pair.to })).expect("nothing else is needed")
}

/// Asks whether it could come.
fn offer(pair: &Pair<'_>, node: &Node) -> Result<Migration, Error> {
    node.migrate(&MigrationRequest { dry_run: true, ..request(pair) })?;
    node.wait_migration(PATIENCE)
}

/// Sends its memory, and calls the guest back before it is handed over.
fn send(pair: &Pair<'_>, node: &Node) -> Result<Report, String> {
    let told = |error: Error| error.to_string();
    let request = MigrationRequest { pause_before_switchover_s: Some(CALLED_BACK_S), ..request(pair) };
    node.migrate(&request).map_err(told)?;
    loop {
        let migration = node.migration().map_err(told)?;
        if migration.report.is_some() {
            break;
        }
        if migration.progress.phase == Phase::ReadyToSwitch {
            // It may have failed by now, and says so.
            let _ = node.cancel();
            break;
        }
        thread::sleep(LOOK);
    }
    let report = node.wait_migration(PATIENCE).map_err(told)?.report.ok_or("the machine sent no report")?;
    match &report.failure {
        Some(why) if why.code != Code::CANCELLED => Err(why.message.clone()),
        _ => Ok(report),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_by_what_it_is_about() {
        let level = |code| {
            let finding = refused(&Failure::new(code, "why"));
            (finding.what, finding.level)
        };
        assert_eq!(level(Code::CPU), ("processor", Level::Broken));
        assert_eq!(level(Code::VERSION), ("versions", Level::Broken));
        assert_eq!(level(Code::AUTHENTICATION), ("certificates", Level::Broken));
        assert_eq!(level(Code::LIMITS), ("admission", Level::Limited));
        assert_eq!(level(Code::LINK), ("session", Level::Broken));
    }

    #[test]
    fn nobody_who_listens_is_one_finding() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let to = listener.local_addr().unwrap().to_string();
        let stream = connect(&to).unwrap().0;
        assert_eq!(path_mtu(&stream).level, Level::Good, "of the loopback interface");
        drop(stream);
        drop(listener);
        let pair = Pair { program: "none".into(), to, at: None, tls: None, insecure: true, host: None };
        let findings = examine(&pair).unwrap().findings;
        assert_eq!((findings.len(), findings[0].level), (1, Level::Broken), "{findings:?}");
    }
}
