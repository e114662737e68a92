//! The API of the host service, on a socket of its own, and where it is wanted on a port over mutual TLS.

use super::config::Api;
use super::gate::Guest;
use super::history;
use super::inventory::{self, Listed};
use super::metrics::{FORMAT, Now};
use super::page;
use super::processes::{self, tell};
use super::run_dir::RunDir;
use super::service::{Host, HostStatus};
use crate::api::Error;
use crate::api::client::Client;
use crate::api::events::{Asked, Listen};
use crate::api::model::{ErrorBody, Event, Vm};
use crate::api::openapi::{self, Table};
use crate::api::port::{self, Port, Rights};
use crate::api::server::{__path_version, Refusal, Server, blocking, serve_router, version};
use crate::instance::SOFTWARE;
use axum::Json;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path as Segment, Query, State};
use axum::http::header::{CONTENT_TYPE, ETAG, IF_NONE_MATCH};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::{from_fn, map_response};
use axum::response::{IntoResponse, Response};
use migration::{Code, Failure};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use transport_tcp::Refusals;
use transport_tcp::tls::{Pattern, Renewed};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;
use vmm::limits::Limits;

/// How long a machine may take until it serves its API.
const START: Duration = Duration::from_secs(20);
/// How long it may take until it is built, from then on: much memory may have to be made.
const BUILD: Duration = Duration::from_secs(300);

/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(20);

/// How many entries of the history one answer has at most.
pub const MOST_ENTRIES: usize = 1000;

/// How much is told of what a process has said that has ended, in bytes.
const LAST_WORDS: u64 = 1000;

/// The answer to `POST /v1/machines/NAME/start`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Started {
    /// The machine's name.
    pub name: String,
    /// Its process.
    pub pid: u32,
}

pub(super) fn serve(path: &Path, host: Arc<Host>) -> Result<Server, Error> {
    let router = table().router(host).merge(page::files());
    serve_router(path, router.layer(from_fn(page::no_foreign_change)))
}

/// All that a host's API has.
fn table() -> Table<Arc<Host>> {
    let description = "The service of a host of Whimbrel machines, over HTTP on a Unix socket, and on a port by mutual \
                        TLS if its operator has said so: the host, its machines, and its metrics.";
    reading(Table::new("A Whimbrel host", description).on_a_port_as_well(port::PORT))
        .with(routes!(openapi))
        .with(routes!(drain, undrain))
        .with(routes!(start))
        .with(routes!(events))
        .with(routes!(metrics))
}

/// What the page asks for: nothing that changes anything.
fn reading(table: Table<Arc<Host>>) -> Table<Arc<Host>> {
    table.with(routes!(version)).with(routes!(status)).with(routes!(machines)).with(routes!(past))
}

/// Serves the page at an address of the loopback interface, as long as the program runs.
pub(super) fn serve_page(listener: TcpListener, host: Arc<Host>) -> io::Result<()> {
    let table = reading(Table::new("The page of a Whimbrel host", ""));
    page::port::serve(listener, table.router(host).merge(page::files()))
}

/// Serves all of it, and the page, over mutual TLS, as long as the program runs.
pub(super) fn serve_port(listener: TcpListener, certificates: Renewed, host: Arc<Host>) -> io::Result<()> {
    let named = |patterns: fn(&Api) -> &Vec<Pattern>| host.config.api.as_ref().map(patterns).cloned();
    let rights = Rights {
        readers: named(|api| &api.allow).unwrap_or_default(),
        operators: named(|api| &api.operators).unwrap_or_default(),
    };
    let refusals = Refusals::default();
    let metrics = Arc::clone(&host.metrics);
    refusals.tell_to(move |refused| {
        metrics.refused(refused.untold + 1);
        tell(format_args!("the API: {refused}"));
    });
    let router = table().router(host).merge(page::files());
    // A browser shows its user's certificate to whatever page has it ask.
    let router = router.layer(from_fn(page::no_foreign_change)).layer(map_response(page::with_headers));
    port::serve(listener, Port { certificates, rights, router, refusals, on_change: tell })
}

/// The description of a host's API by OpenAPI, as JSON.
pub fn document() -> &'static str {
    static DOCUMENT: LazyLock<String> = LazyLock::new(|| table().document());
    &DOCUMENT
}

/// Answers `GET /metrics` at an address, and nothing else, as long as the program runs.
pub(super) fn serve_metrics(address: SocketAddr, host: Arc<Host>) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let router = Table::new("Metrics", "").with(routes!(metrics)).router(host);
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

/// Tell what this API has, by OpenAPI
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = OK, description = "This document", body = Object)))]
async fn openapi() -> Response {
    openapi::told(document())
}

/// Tell what the service is doing
#[utoipa::path(get, path = "/v1/host", responses((status = OK, body = HostStatus)))]
async fn status(State(host): State<Arc<Host>>) -> Json<HostStatus> {
    Json(HostStatus {
        name: host.name.clone(),
        software: SOFTWARE.into(),
        pid: std::process::id(),
        listen: host.listen.clone(),
        page: host.page,
        api: host.api,
        time: humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
        drained: host.run_dir.is_drained(),
        processes: host.desk.count(),
    })
}

/// Tell of all machines of this host
#[utoipa::path(get, path = "/v1/machines", responses((status = OK, body = Vec<Listed>)))]
async fn machines(State(host): State<Arc<Host>>) -> Result<Json<Vec<Listed>>, Refusal> {
    let take = move || inventory::take(&host.run_dir, inventory::PATIENCE);
    blocking(move || take().map_err(|error| Failure::new(Code::HOST, error))).await
}

/// `GET /v1/history`: which entries.
#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
struct Past {
    /// How many at most: the last ones.
    #[serde(default = "usual_limit")]
    #[param(default = 100, minimum = 0, maximum = 1000)]
    limit: usize,
    /// Of which machine; of all if none is named.
    name: Option<String>,
}

fn usual_limit() -> usize {
    100
}

/// Tell what became of the moves from and to this host
///
/// From the oldest on. Who says which state is known already is told nothing again.
#[utoipa::path(get, path = "/v1/history", params(Past), responses(
    (status = OK, description = "The entries", body = Vec<Object>, headers(("ETag" = String, description = "The state"))),
    (status = NOT_MODIFIED, description = "The state that If-None-Match names"),
))]
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

/// Tell what monitoring wants to know, as Prometheus asks for it
#[utoipa::path(get, path = "/metrics", responses(
    (status = OK, description = "All metrics", body = String, content_type = "text/plain"),
))]
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

/// Tell what happens on this host, as it happens: server-sent events
///
/// The `data` of each is an `Event`. The last 4096 are kept as long as the service runs. Of earlier times
/// there is what the history has: how migrations and arrivals ended.
#[utoipa::path(get, path = "/v1/events",
    params(Listen, ("Last-Event-ID" = Option<u64>, Header, description = "The number of the last event that is known")),
    responses((status = OK, description = "Events", body = Event, content_type = "text/event-stream")),
)]
async fn events(State(host): State<Arc<Host>>, asked: Asked) -> Result<Response, Refusal> {
    let floor = host.events.floor();
    let Some(since) = asked.since.filter(|since| *since < floor) else {
        return Ok(Arc::clone(&host.events).answer(&asked, Vec::new()));
    };
    let folder = host.history();
    let failed = |error| Failure::new(Code::HOST, format_args!("cannot read the history: {error}"));
    let Json(earlier) =
        blocking(move || super::events::earlier(&folder, since, floor).map_err(failed)).await?;
    Ok(Arc::clone(&host.events).answer(&asked, earlier))
}

/// Let the host take nobody in
#[utoipa::path(put, path = "/v1/host/drain", responses((status = 204, description = "Nobody is taken in")))]
async fn drain(State(host): State<Arc<Host>>) -> Result<StatusCode, Refusal> {
    change_drain(&host.run_dir, true)
}

/// Let the host take guests in again
#[utoipa::path(delete, path = "/v1/host/drain", responses((status = 204, description = "Guests are taken in")))]
async fn undrain(State(host): State<Arc<Host>>) -> Result<StatusCode, Refusal> {
    change_drain(&host.run_dir, false)
}

fn change_drain(run_dir: &RunDir, drained: bool) -> Result<StatusCode, Refusal> {
    let changed = run_dir.drain(drained);
    changed
        .map_err(|error| Failure::new(Code::HOST, format_args!("{}: {error}", run_dir.path().display())))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Start a machine that this host knows by a file, and answer when its API does
#[utoipa::path(post, path = "/v1/machines/{name}/start",
    params(("name" = String, Path, description = "The machine's name: its file is called so")),
    responses(
        (status = OK, body = Started),
        (status = 404, description = "There is no such file", body = ErrorBody),
        (status = 409, description = "The machine is here already, or a guest like it could not come: the host drains, or \
            it is too large, or not called as guests may be", body = ErrorBody),
    ),
)]
async fn start(
    State(host): State<Arc<Host>>,
    name: Result<Segment<String>, PathRejection>,
) -> Result<Json<Started>, Refusal> {
    let Segment(name) = name?;
    let known = |folder: &PathBuf| {
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

/// Starts a machine, and waits until it is there.
fn start_machine(host: &Host, name: String, path: &Path) -> Result<Started, Failure> {
    let socket = host.run_dir.machine_socket(&name);
    if UnixStream::connect(&socket).is_ok() {
        return Err(Failure::new(Code::BUSY, format_args!("the machine {name} is here already")));
    }
    let (memory, vcpus) = processes::plan(path);
    let admission = &host.config.admission;
    // Here the host's operator has said so many vCPUs, unless there is a limit.
    let most_vcpus = Some(admission.max_vcpus.unwrap_or(u32::MAX));
    let (most, names) = (admission.max_memory, admission.names.clone());
    let limits = Limits { memory: most, vcpus: most_vcpus, names, ..Limits::default() };
    limits.check_plan(&name, memory, vcpus)?;
    let _counts = host.desk.admit_start(Guest { name: name.clone(), memory })?;
    let log = host.run_dir.log_file();
    let said = std::fs::metadata(&log).map_or(0, |log| log.len());
    let failed = |what: std::fmt::Arguments<'_>| Failure::new(Code::HOST, what);
    let mut child = host
        .processes
        .start_machine(&host.config, &name, path)
        .map_err(|error| failed(format_args!("cannot start a process: {error}")))?;
    let pid = child.id();
    let mut deadline = Instant::now() + START;
    let mut serves = false;
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
        if !serves && UnixStream::connect(&socket).is_ok() {
            serves = true;
            deadline = Instant::now() + BUILD;
        }
        // Before it is built, nobody can say how large it is, or do anything with it.
        if serves && is_built(&socket) {
            host.processes.adopt(child);
            return Ok(Started { name, pid });
        }
        if Instant::now() > deadline {
            host.processes.adopt(child);
            let (what, limit) = if serves { ("is not built", BUILD) } else { ("does not answer", START) };
            let text = format_args!("{name} {what} within {} s; its process is {pid}", limit.as_secs());
            return Err(Failure::new(Code::TIMEOUT, text));
        }
        thread::sleep(LOOK);
    }
}

/// Whether there is a machine behind the API that is served there.
fn is_built(socket: &Path) -> bool {
    let ask = |client: Client| client.call_within::<Vm>(inventory::PATIENCE, Method::GET, "/v1/vm", &());
    Client::new(socket).and_then(ask).is_ok()
}

/// The end of what has been written to the log since.
fn last_words(log: &Path, since: u64) -> Option<String> {
    let read = || {
        let mut file = File::open(log)?;
        let end = file.seek(SeekFrom::End(0))?;
        // It may have been cut since.
        let since = if since > end { 0 } else { since };
        file.seek(SeekFrom::Start(since.max(end.saturating_sub(LAST_WORDS))))?;
        let mut words = Vec::new();
        file.take(LAST_WORDS).read_to_end(&mut words)?;
        std::io::Result::Ok(String::from_utf8_lossy(&words).trim().to_owned())
    };
    read().ok().filter(|words| !words.is_empty())
}
