//! The API of the host service, on a socket of its own.

use super::history;
use super::inventory::{self, Listed};
use super::metrics::{FORMAT, Now};
use super::page;
use super::processes;
use super::run_dir::RunDir;
use super::service::{Host, HostStatus};
use crate::api::Error;
use crate::api::server::{Refusal, Server, blocking, router_of, serve_router};
use crate::instance::SOFTWARE;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path as Segment, Query, State};
use axum::http::header::{CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, StatusCode};
use axum::middleware::from_fn;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use migration::{Code, Failure};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// How long a machine may take until it serves its API.
const START: Duration = Duration::from_secs(20);

/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(20);

/// How many entries of the history one answer has at most.
const MOST_ENTRIES: usize = 1000;

/// How much is told of what a process has said that has ended, in bytes.
const LAST_WORDS: u64 = 1000;

/// `GET /v1/version`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Of the program.
    pub version: String,
    /// Its name and version, as peers are told.
    pub software: String,
    /// Of the API: the first part of each path.
    pub api: String,
}

/// The answer to `POST /v1/machines/NAME/start`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Started {
    /// The machine's name.
    pub name: String,
    /// Its process.
    pub pid: u32,
}

pub(super) fn serve(path: &Path, host: Arc<Host>) -> Result<Server, Error> {
    let router = reading()
        .route("/v1/host/drain", put(drain).delete(undrain))
        .route("/v1/machines/{name}/start", post(start))
        .route("/metrics", get(metrics));
    serve_router(path, router_of(router, host).layer(from_fn(page::no_foreign_change)))
}

/// The page, and what it asks for: nothing that changes anything.
fn reading() -> Router<Arc<Host>> {
    page::files()
        .route("/v1/version", get(version))
        .route("/v1/host", get(status))
        .route("/v1/machines", get(machines))
        .route("/v1/history", get(past))
}

/// Serves the page at an address of the loopback interface, as long as the program runs.
pub(super) fn serve_page(listener: TcpListener, host: Arc<Host>) -> io::Result<()> {
    page::port::serve(listener, router_of(reading(), host))
}

/// Answers `GET /metrics` at an address, and nothing else, as long as the program runs.
pub(super) fn serve_metrics(address: SocketAddr, host: Arc<Host>) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let router = router_of(Router::new().route("/metrics", get(metrics)), host);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _entered = runtime.enter();
        tokio::net::TcpListener::from_std(listener)?
    };
    thread::Builder::new().name("metrics".into()).spawn(move || {
        // It ends with the program only.
        let _ = runtime.block_on(axum::serve(listener, router).into_future());
    })?;
    Ok(())
}

async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION").into(), software: SOFTWARE.into(), api: "v1".into() })
}

async fn status(State(host): State<Arc<Host>>) -> Json<HostStatus> {
    Json(HostStatus {
        name: host.name.clone(),
        software: SOFTWARE.into(),
        pid: std::process::id(),
        listen: host.listen.clone(),
        page: host.page,
        drained: host.run_dir.is_drained(),
        processes: host.desk.count(),
    })
}

async fn machines(State(host): State<Arc<Host>>) -> Result<Json<Vec<Listed>>, Refusal> {
    let take = move || inventory::take(&host.run_dir, inventory::PATIENCE);
    blocking(move || take().map_err(|error| Failure::new(Code::HOST, error))).await
}

/// `GET /v1/history`: which entries.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Past {
    /// How many at most: the last ones.
    #[serde(default = "usual_limit")]
    limit: usize,
    /// Of which machine; of all if none is named.
    name: Option<String>,
}

fn usual_limit() -> usize {
    100
}

/// What became of the moves from and to this host, from the oldest on. Who says which state is known already
/// is told nothing again.
async fn past(
    State(host): State<Arc<Host>>,
    query: Result<Query<Past>, QueryRejection>,
    headers: HeaderMap,
) -> Result<Response, Refusal> {
    let Query(past) = query?;
    if past.limit > MOST_ENTRIES {
        let text = format!("limit={} is too much: {MOST_ENTRIES} entries at most are told", past.limit);
        return Err(Refusal::new(StatusCode::BAD_REQUEST, &text));
    }
    let known = headers.get(IF_NONE_MATCH).cloned();
    let read = move || {
        let folder = host.history();
        let failed =
            |error| Failure::new(Code::HOST, format_args!("cannot read {}: {error}", folder.display()));
        // Before the entries: what is added meanwhile is told once more, rather than not at all.
        let version = format!("\"{}\"", history::version(&folder).map_err(failed)?);
        if known.is_some_and(|known| known.as_bytes() == version.as_bytes()) {
            return Ok((version, None));
        }
        let entries = history::last(&folder, past.name.as_deref(), past.limit).map_err(failed)?;
        Ok((version, Some([b"[".as_slice(), &entries.join(&b','), b"]"].concat())))
    };
    let Json((version, entries)) = blocking(read).await?;
    let version = [(ETAG, version)];
    Ok(match entries {
        Some(entries) => (version, [(CONTENT_TYPE, "application/json")], entries).into_response(),
        None => (StatusCode::NOT_MODIFIED, version).into_response(),
    })
}

/// Prometheus asks for this path.
async fn metrics(State(host): State<Arc<Host>>) -> Result<Response, Refusal> {
    let text = move || {
        let machines = inventory::take(&host.run_dir, inventory::PATIENCE)
            .map_err(|error| Failure::new(Code::HOST, error))?;
        let now =
            Now { machines: &machines, processes: host.desk.count(), drained: host.run_dir.is_drained() };
        host.metrics.text(&now, &host.history()).map_err(|why| Failure::new(Code::HOST, why))
    };
    let Json(text) = blocking(text).await?;
    Ok(([(CONTENT_TYPE, FORMAT)], text).into_response())
}

async fn drain(State(host): State<Arc<Host>>) -> Result<StatusCode, Refusal> {
    change_drain(&host.run_dir, true)
}

async fn undrain(State(host): State<Arc<Host>>) -> Result<StatusCode, Refusal> {
    change_drain(&host.run_dir, false)
}

fn change_drain(run_dir: &RunDir, drained: bool) -> Result<StatusCode, Refusal> {
    let changed = run_dir.drain(drained);
    changed
        .map_err(|error| Failure::new(Code::HOST, format_args!("{}: {error}", run_dir.path().display())))?;
    Ok(StatusCode::NO_CONTENT)
}

async fn start(
    State(host): State<Arc<Host>>,
    Segment(name): Segment<String>,
) -> Result<Json<Started>, Refusal> {
    let known = |folder: &std::path::PathBuf| {
        RunDir::check(&name).ok()?;
        Some(folder.join(format!("{name}.toml"))).filter(|path| path.is_file())
    };
    let Some(path) = host.config.machines.as_ref().and_then(known) else {
        let text = match &host.config.machines {
            Some(folder) => format!("there is no {}.toml in {}", name, folder.display()),
            None => "this host's configuration names no folder of `machines`".into(),
        };
        return Err(Refusal::new(StatusCode::NOT_FOUND, &text));
    };
    blocking(move || start_machine(&host, name, &path)).await
}

/// Starts a machine, and waits until it serves its API.
fn start_machine(host: &Host, name: String, path: &Path) -> Result<Started, Failure> {
    let socket = host.run_dir.machine_socket(&name);
    if UnixStream::connect(&socket).is_ok() {
        return Err(Failure::new(Code::BUSY, format_args!("the machine {name} is here already")));
    }
    let log = host.run_dir.log_file();
    let said = std::fs::metadata(&log).map_or(0, |log| log.len());
    let failed = |what: std::fmt::Arguments<'_>| Failure::new(Code::HOST, what);
    let mut child = host
        .processes
        .start_machine(&host.config, &name, path)
        .map_err(|error| failed(format_args!("cannot start a process: {error}")))?;
    let pid = child.id();
    let deadline = Instant::now() + START;
    loop {
        match child.try_wait() {
            Ok(None) => {}
            ended => {
                let how = ended.ok().flatten().map_or_else(|| "ended".into(), |status| status.to_string());
                let words = last_words(&log, said)
                    .unwrap_or_else(|| format!("{} may say why", processes::said_in(&host.run_dir)));
                return Err(failed(format_args!("the process of {name} has ended ({how}): {words}")));
            }
        }
        if UnixStream::connect(&socket).is_ok() {
            host.processes.adopt(child);
            return Ok(Started { name, pid });
        }
        if Instant::now() > deadline {
            host.processes.adopt(child);
            let text =
                format_args!("{name} does not answer within {} s; its process is {pid}", START.as_secs());
            return Err(Failure::new(Code::TIMEOUT, text));
        }
        thread::sleep(LOOK);
    }
}

/// The end of what has been written to the log since.
fn last_words(log: &Path, since: u64) -> Option<String> {
    let read = || {
        let mut file = File::open(log)?;
        let end = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(since.max(end.saturating_sub(LAST_WORDS))))?;
        let mut words = Vec::new();
        file.take(LAST_WORDS).read_to_end(&mut words)?;
        std::io::Result::Ok(String::from_utf8_lossy(&words).trim().to_owned())
    };
    read().ok().filter(|words| !words.is_empty())
}
