//! The API's server: one thread, one socket, one [`Slot`], whose instance may arrive later.

use super::Error;
use super::events::{Asked, Listen};
use super::model::{Arrival, ErrorBody, Event, Migration, MigrationChange, MigrationRequest, Version, Vm};
use super::openapi::{self, Table};
use crate::instance::{Instance, Waiting};
use crate::slot::Slot;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Query, Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json, Router};
use migration::{Code, Failure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::net::{UnixListener, UnixSocket};
use tokio::sync::{oneshot, watch};
use utoipa::IntoParams;
use utoipa_axum::routes;

/// Largest request body in bytes.
pub(crate) const MAX_BODY: usize = 64 << 10;

/// How long requests under way may take to be answered when the process ends.
const FAREWELL: Duration = Duration::from_secs(1);

/// A served API. Dropping it removes the socket and answers the requests under way (one of them may be what
/// ends the process).
pub struct Server {
    path: PathBuf,
    close: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// The socket has another path now.
    pub fn has_moved(&mut self, path: PathBuf) {
        self.path = path;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // As long as it is served, nobody puts another socket in its place. Nobody is left to tell of an
        // error; a stale socket is replaced at the next start.
        let _ = std::fs::remove_file(&self.path);
        // Either fails only if the serving thread has ended already.
        let _ = self.close.take().map(|close| close.send(()));
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Serves what is, or will be, in `slot` on a new socket at `path`, which only this user may open.
///
/// # Errors
/// [`Error::InUse`] when a live process serves there, [`Error::NotASocket`], [`Error::Bind`]. A socket
/// that nobody serves any more is replaced.
pub fn serve(path: &Path, slot: Arc<Slot>) -> Result<Server, Error> {
    serve_router(path, table().router(slot))
}

/// The same of another API.
pub(crate) fn serve_router(path: &Path, router: Router) -> Result<Server, Error> {
    let bind = |source| Error::Bind { path: path.into(), source };
    clear_stale(path)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(bind)?;
    let listener = {
        let _entered = runtime.enter();
        listen(path).map_err(bind)?
    };
    let (close, closed) = oneshot::channel();
    let (closes, closing) = watch::channel(false);
    let router = router.layer(Extension(Closing(Some(closing))));
    let thread = thread::Builder::new()
        .name("api".into())
        .spawn(move || {
            if let Err(error) = runtime.block_on(answer(listener, router, closed, closes)) {
                eprintln!("whimbrel: the API has stopped: {error}");
            }
            // A request that hangs in a blocking call must not keep the process.
            runtime.shutdown_background();
        })
        .map_err(bind)?;
    Ok(Server { path: path.into(), close: Some(close), thread: Some(thread) })
}

/// Tells answers that would go on for ever that the API ends.
#[derive(Clone, Default)]
pub(crate) struct Closing(Option<watch::Receiver<bool>>);

impl Closing {
    /// Whether it ends.
    pub fn has_begun(&self) -> bool {
        self.0.as_ref().is_some_and(|closing| *closing.borrow())
    }

    /// Waits until it does.
    pub async fn begin(&mut self) {
        match &mut self.0 {
            // An error means that it has ended.
            Some(closing) => drop(closing.wait_for(|begun| *begun).await),
            None => std::future::pending().await,
        }
    }
}

/// Listens on a new socket at `path`. It has its mode before it has a name, so that nobody else can open it
/// in between.
fn listen(path: &Path) -> io::Result<UnixListener> {
    /// As many as the C library's usual limit: callers that wait to be accepted.
    const BACKLOG: u32 = 128;
    let socket = UnixSocket::new_stream()?;
    let itself = File::from(socket.as_fd().try_clone_to_owned()?);
    itself.set_permissions(Permissions::from_mode(0o600))?;
    socket.bind(path)?;
    socket.listen(BACKLOG)
}

/// Serves until `closed`, then at most [`FAREWELL`] longer.
async fn answer(
    listener: UnixListener,
    router: Router,
    closed: oneshot::Receiver<()>,
    closes: watch::Sender<bool>,
) -> io::Result<()> {
    let (closing, last_call) = oneshot::channel();
    let graceful = axum::serve(listener, router).with_graceful_shutdown(async move {
        // An error means that the server was dropped, which is the same.
        let _ = closed.await;
        let _ = closing.send(());
        closes.send_replace(true);
    });
    let too_late = async {
        let _ = last_call.await;
        tokio::time::sleep(FAREWELL).await;
    };
    tokio::select! {
        result = graceful.into_future() => result,
        () = too_late => Ok(()),
    }
}

fn clear_stale(path: &Path) -> Result<(), Error> {
    let kind = match std::fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(Error::Bind { path: path.into(), source }),
    };
    if !kind.is_socket() {
        return Err(Error::NotASocket(path.into()));
    }
    if UnixStream::connect(path).is_ok() {
        return Err(Error::InUse(path.into()));
    }
    std::fs::remove_file(path).map_err(|source| Error::Bind { path: path.into(), source })
}

/// All that a machine's API has.
fn table() -> Table<Arc<Slot>> {
    let description =
        "One virtual machine of Whimbrel, over HTTP on a Unix socket: what it is doing, and its migrations.";
    Table::new("A Whimbrel machine", description)
        .with(routes!(version))
        .with(routes!(openapi))
        .with(routes!(vm))
        .with(routes!(pause))
        .with(routes!(resume))
        .with(routes!(shutdown))
        .with(routes!(quit))
        .with(routes!(migration, migrate, change, cancel))
        .with(routes!(arrival))
        .with(routes!(events))
}

/// The description of a machine's API by OpenAPI, as JSON.
pub fn document() -> &'static str {
    static DOCUMENT: LazyLock<String> = LazyLock::new(|| table().document());
    &DOCUMENT
}

/// The instance of a request; refuses as long as no guest is here.
struct Present(Arc<Instance>);

impl FromRequestParts<Arc<Slot>> for Present {
    type Rejection = Refusal;

    async fn from_request_parts(_: &mut Parts, slot: &Arc<Slot>) -> Result<Self, Refusal> {
        slot.get().cloned().map(Present).ok_or_else(nobody)
    }
}

fn nobody() -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "no virtual machine is here yet")
}

/// An error answer.
pub(crate) struct Refusal(StatusCode, Failure);

impl Refusal {
    pub(crate) fn of(status: StatusCode, failure: Failure) -> Self {
        Refusal(status, failure)
    }

    pub(crate) fn new(status: StatusCode, message: &str) -> Self {
        Refusal(status, Failure::new(Code::OTHER, message))
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        let status = match failure.code {
            Code::BUSY | Code::GUEST_ENDED | Code::LIMITS => StatusCode::CONFLICT,
            Code::PROTOCOL => StatusCode::BAD_REQUEST,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Refusal(status, failure)
    }
}

/// What cannot be taken from a request is told as everything else that is wrong.
macro_rules! refusal_from {
    ($($rejection:ty),*) => {$(
        impl From<$rejection> for Refusal {
            fn from(rejection: $rejection) -> Self {
                Refusal::new(rejection.status(), &rejection.body_text())
            }
        }
    )*};
}

refusal_from!(BytesRejection, PathRejection, QueryRejection);

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(ErrorBody { error: self.1 })).into_response()
    }
}

/// What a request says in its body, as JSON. Its type need not be said: what `curl -d` calls a form is taken
/// for JSON as well.
pub(crate) struct Said<T>(pub T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Said<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        if !may_be_json(request.headers()) {
            let text = "the body has to be JSON; leave its Content-Type out, or let it be application/json";
            return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text));
        }
        let bytes = Bytes::from_request(request, state).await?;
        let no_json = |error| Refusal::new(StatusCode::BAD_REQUEST, &format!("the body is no JSON: {error}"));
        let value = serde_json::from_slice(&bytes).map_err(no_json)?;
        let wrong = |text: &str| Refusal::new(StatusCode::UNPROCESSABLE_ENTITY, text);
        // A list would be taken for the values of the fields in their order.
        if !matches!(value, Value::Object(_)) {
            return Err(wrong("the body has to be a JSON object"));
        }
        serde_path_to_error::deserialize(with_whole_numbers(value))
            .map(Said)
            .map_err(|error| wrong(&format!("the body says what cannot be said: {error}")))
    }
}

/// To JSON, 3.0 is the same number as 3.
fn with_whole_numbers(value: Value) -> Value {
    /// From here on, not every whole number has a floating-point number of its own.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match value {
        Value::Number(number) => match number.as_f64() {
            Some(float) if number.is_f64() && float.fract() == 0.0 && float.abs() < EXACT => {
                (float as i64).into()
            }
            _ => number.into(),
        },
        Value::Object(fields) => {
            fields.into_iter().map(|(name, value)| (name, with_whole_numbers(value))).collect()
        }
        other => other,
    }
}

fn may_be_json(headers: &HeaderMap) -> bool {
    let Some(kind) = headers.get(CONTENT_TYPE) else { return true };
    let kind = kind.to_str().unwrap_or_default().split(';').next().unwrap_or_default().trim();
    let kind = kind.to_ascii_lowercase();
    let json = |kind: &str| kind == "application/json" || kind.ends_with("+json");
    json(&kind) || kind == "application/x-www-form-urlencoded"
}

/// Runs blocking work in another thread, so that a status query is always answered.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<Json<T>, Refusal> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(Json(result?)),
        Err(error) => Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string())),
    }
}

/// The same for work that has nothing to tell but that it is done.
pub(crate) async fn done(
    work: impl FnOnce() -> Result<(), Failure> + Send + 'static,
) -> Result<StatusCode, Refusal> {
    blocking(work).await.map(|_| StatusCode::NO_CONTENT)
}

/// Tell the program's and the API's version
#[utoipa::path(get, path = "/v1/version", responses((status = OK, body = Version)))]
pub(crate) async fn version() -> Json<Version> {
    Json(Version::this())
}

/// Tell what this API has, by OpenAPI
#[utoipa::path(get, path = "/v1/openapi.json", responses((status = OK, description = "This document", body = Object)))]
async fn openapi() -> Response {
    openapi::told(document())
}

/// Tell what the machine is doing
#[utoipa::path(get, path = "/v1/vm", responses((status = OK, body = Vm), (status = 503, description = "No guest is here yet", body = ErrorBody)))]
async fn vm(State(slot): State<Arc<Slot>>) -> Result<Json<Vm>, Refusal> {
    slot.status().map(Json).ok_or_else(nobody)
}

/// Tell of the guest that is being taken in, or of the last one that was, or was not
#[utoipa::path(get, path = "/v1/arrival", responses(
    (status = OK, body = Arrival),
    (status = 404, description = "No guest has come here", body = ErrorBody),
))]
async fn arrival(State(slot): State<Arc<Slot>>) -> Result<Json<Arrival>, Refusal> {
    let none = || Refusal::new(StatusCode::NOT_FOUND, "no guest has come here from another host");
    slot.arrival().map(Json).ok_or_else(none)
}

/// Tell what happens to this machine, as it happens: server-sent events
///
/// The `data` of each is an `Event`. The last 4096 are kept.
#[utoipa::path(get, path = "/v1/events",
    params(Listen, ("Last-Event-ID" = Option<u64>, Header, description = "The number of the last event that is known")),
    responses((status = OK, description = "Events", body = Event, content_type = "text/event-stream")),
)]
async fn events(State(slot): State<Arc<Slot>>, asked: Asked) -> Response {
    Arc::clone(slot.events()).answer(&asked, Vec::new())
}

/// Pause the guest
#[utoipa::path(put, path = "/v1/vm/pause", responses(
    (status = 204, description = "The guest is paused"),
    (status = 409, description = "Not possible in the present state", body = ErrorBody),
    (status = 503, description = "No guest is here yet", body = ErrorBody),
))]
async fn pause(Present(instance): Present) -> Result<StatusCode, Refusal> {
    done(move || instance.pause()).await
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Resume {
    /// Resume a held guest: the operator vouches that it does not run at the destination.
    #[serde(default)]
    force: bool,
}

/// Let the guest run again
#[utoipa::path(put, path = "/v1/vm/resume", params(Resume), responses(
    (status = 204, description = "The guest runs"),
    (status = 409, description = "Not possible in the present state", body = ErrorBody),
    (status = 503, description = "No guest is here yet", body = ErrorBody),
))]
async fn resume(
    Present(instance): Present,
    query: Result<Query<Resume>, QueryRejection>,
) -> Result<StatusCode, Refusal> {
    let Query(query) = query?;
    done(move || instance.resume(query.force)).await
}

/// Press the guest's power button
#[utoipa::path(put, path = "/v1/vm/shutdown", responses(
    (status = 204, description = "It is pressed; when the guest shuts down is its own business"),
    (status = 409, description = "The guest does not listen to it, or does not run", body = ErrorBody),
    (status = 503, description = "No guest is here yet", body = ErrorBody),
))]
async fn shutdown(Present(instance): Present) -> Result<StatusCode, Refusal> {
    done(move || instance.shutdown()).await
}

/// Cancel a migration, and end the machine and its process
#[utoipa::path(put, path = "/v1/vm/quit", responses(
    (status = 204, description = "It ends"),
    (status = 409, description = "A guest is being handed over to this process", body = ErrorBody),
))]
async fn quit(State(slot): State<Arc<Slot>>) -> Result<StatusCode, Refusal> {
    done(move || slot.quit()).await
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Wait {
    /// Answer when the migration is over. The process stays for those who wait.
    #[serde(default)]
    wait: bool,
}

/// Start to move the guest away
#[utoipa::path(post, path = "/v1/migration", params(Wait), request_body = MigrationRequest, responses(
    (status = 200, description = "The migration is over", body = Migration),
    (status = 202, description = "The migration has begun", body = Migration),
    (status = 409, description = "Not possible in the present state", body = ErrorBody),
    (status = 503, description = "No guest is here yet", body = ErrorBody),
))]
async fn migrate(
    Present(instance): Present,
    query: Result<Query<Wait>, QueryRejection>,
    Said(request): Said<MigrationRequest>,
) -> Result<Response, Refusal> {
    let Query(query) = query?;
    let mover = Arc::clone(&instance);
    let started = blocking(move || mover.migrate(request)).await?;
    if query.wait {
        return Ok(report(instance.await_report()).await?.into_response());
    }
    Ok((StatusCode::ACCEPTED, started).into_response())
}

/// Tell of the migration that is under way, or of the last one
#[utoipa::path(get, path = "/v1/migration", params(Wait), responses((status = OK, body = Migration), (status = 404, description = "No guest has been moved away from here", body = ErrorBody)))]
async fn migration(
    State(slot): State<Arc<Slot>>,
    query: Result<Query<Wait>, QueryRejection>,
) -> Result<Json<Migration>, Refusal> {
    let Query(query) = query?;
    let instance = slot.get().ok_or_else(unmoved)?;
    if query.wait {
        return report(instance.await_report()).await;
    }
    instance.migration().map(Json).ok_or_else(unmoved)
}

/// The migration, once it is over.
async fn report(waiting: Option<Waiting>) -> Result<Json<Migration>, Refusal> {
    let waiting = waiting.ok_or_else(unmoved)?;
    waiting.report().await.map(Json).ok_or_else(unmoved)
}

fn unmoved() -> Refusal {
    Refusal::new(StatusCode::NOT_FOUND, "no guest has been moved away from here")
}

/// Change the migration that is under way
#[utoipa::path(patch, path = "/v1/migration", request_body = MigrationChange, responses(
    (status = OK, body = Migration),
    (status = 409, description = "None is under way, or it can no longer be changed", body = ErrorBody),
    (status = 503, description = "No guest is here yet", body = ErrorBody),
))]
async fn change(
    Present(instance): Present,
    Said(change): Said<MigrationChange>,
) -> Result<Json<Migration>, Refusal> {
    blocking(move || instance.change(&change)).await
}

/// Cancel the migration that is under way
#[utoipa::path(delete, path = "/v1/migration", responses(
    (status = OK, body = Migration),
    (status = 409, description = "None is under way, or it can no longer be cancelled", body = ErrorBody),
    (status = 503, description = "No guest is here yet", body = ErrorBody),
))]
async fn cancel(Present(instance): Present) -> Result<Json<Migration>, Refusal> {
    blocking(move || instance.cancel()).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn nobody_else_can_open_the_socket_at_any_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let (stop, seen) = (AtomicBool::new(false), AtomicBool::new(false));
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let Ok(metadata) = std::fs::symlink_metadata(&path) else { continue };
                    seen.store(true, Ordering::Relaxed);
                    if metadata.permissions().mode() & 0o777 != 0o600 {
                        stop.store(true, Ordering::Relaxed);
                    }
                }
            });
            for _ in 0..300 {
                let server = serve(&path, Arc::default()).unwrap();
                assert!(UnixStream::connect(&path).is_ok());
                drop(server);
                assert!(!stop.load(Ordering::Relaxed), "others could open it for a moment");
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(seen.load(Ordering::Relaxed), "nobody looked: this proves nothing");
    }
}
