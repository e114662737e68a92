//! The service of a host: one port for all guests that come, and a process for each.
//!
//! It accepts, and looks at what a connection is for, of which it takes nothing
//! ([`transport_tcp::Dispatcher`]). Whoever opens a session is handed to a standby, and its lanes to the
//! process that has the session ([`gate`](super::gate)). No byte of a guest goes through the service, and it
//! knows no secret: who may come is found out by the process, which has given up its rights.

use super::claim::lock_within;
use super::config::{Api, HostConfig, PORT};
use super::gate::{Count, Desk, Door, Rules, hand_over};
use super::metrics::Metrics;
use super::processes::{self, Processes, tell};
use super::run_dir::RunDir;
use super::units::Units;
use crate::api::events::Events;
use crate::api::port;
use crate::api::server::Server;
use crate::security::{Encryption, Security, is_near};
use listenfd::ListenFd;
use migration::preamble::{Kind, Status};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use transport_tcp::tls::Renewed;
use transport_tcp::{Caller, Dispatcher};
use utoipa::ToSchema;

/// How long a caller waits for a process that takes it: as long as a source waits for an answer, or less.
const STANDBY_PATIENCE: Duration = Duration::from_secs(8);

/// How long a lane waits until the process says that it has its session. It may call a new service meanwhile.
const LANE_PATIENCE: Duration = Duration::from_secs(3);

/// How long the service before this one may take to end, and processes to bring its listening sockets.
const SUCCESSION: Duration = Duration::from_secs(5);

/// How long processes may take to end that have waited for guests in vain.
const DISMISSAL: Duration = Duration::from_secs(5);

/// Why there is no service.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another one runs.
    #[error("a host service runs for {} already; use another run directory, or end it", .0.display())]
    Running(PathBuf),
    /// Something cannot be had.
    #[error("cannot use {}: {source}", path.display())]
    Path {
        /// What.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// An address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// An address can be reached by anybody.
    #[error(
        "whoever reaches {0} could send a guest: name a folder of certificates by `tls` (`whimbrel pki` makes them), or \
         say `insecure = true` if nobody can reach it whom you do not trust"
    )]
    Exposed(SocketAddr),
    /// Anybody could look.
    #[error(
        "whoever reaches {0} could see this host's machines: let `metrics` be an address such as 127.0.0.1:9464, or say \
         `insecure = true`"
    )]
    Watched(SocketAddr),
    /// Anybody could look at the page.
    #[error(
        "whoever reaches {0} could look at this host's page: let `page` be an address of the loopback interface such as \
         127.0.0.1:8080, and reach it from elsewhere by `ssh -L 8080:127.0.0.1:8080 HOST`"
    )]
    Shown(SocketAddr),
    /// There is nothing by which callers of the API could know each other.
    #[error("the API at {0} is for whoever shows a certificate: name the folder of this host's by `tls`")]
    Unknown(SocketAddr),
    /// Certificates are of no use.
    #[error(transparent)]
    Certificates(transport_tcp::Error),
    /// Encryption is wanted, and there are no certificates.
    #[error("encryption is required, and there are no certificates: name their folder by `tls`")]
    NoCertificates,
    /// The API cannot be served.
    #[error(transparent)]
    Api(#[from] crate::api::Error),
    /// The system has no room for another thread or descriptor.
    #[error("cannot start the service: {0}")]
    System(#[source] io::Error),
}

/// A running service. Dropping it ends only what it serves itself: its processes go on, and callers wait for
/// the next one.
pub struct Service {
    listen: Vec<SocketAddr>,
    page: Option<SocketAddr>,
    api: Option<SocketAddr>,
    /// If systemd keeps the sockets.
    desk: Option<Arc<Desk>>,
    dispatchers: Vec<Dispatcher>,
    _server: Server,
    _lock: File,
}

/// What the API's server has to know.
pub(super) struct Host {
    pub name: String,
    pub run_dir: RunDir,
    pub desk: Arc<Desk>,
    pub processes: Arc<Processes>,
    pub listen: Vec<SocketAddr>,
    pub page: Option<SocketAddr>,
    pub api: Option<SocketAddr>,
    pub config: HostConfig,
    pub metrics: Arc<Metrics>,
    pub events: Arc<Events>,
}

impl Host {
    /// The folder of the host's history.
    pub fn history(&self) -> PathBuf {
        self.config.state.clone().unwrap_or_else(|| self.run_dir.state_folder())
    }
}

/// `GET /v1/host`: the service and its gate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostStatus {
    /// What the host is called.
    #[serde(default)]
    pub name: String,
    /// Name and version of the program.
    pub software: String,
    /// The service's process.
    pub pid: u32,
    /// Where guests are taken in.
    #[schema(value_type = Vec<String>)]
    pub listen: Vec<SocketAddr>,
    /// Where the page is served, beside the service's own socket.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub page: Option<SocketAddr>,
    /// Where this API is served over mutual TLS, beside the service's own socket.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub api: Option<SocketAddr>,
    /// The time by this host's clock, in UTC.
    #[serde(default)]
    pub time: String,
    /// Whether nobody is taken in at present.
    pub drained: bool,
    /// Processes that take guests in or have done so.
    pub processes: Count,
}

impl Service {
    /// Starts the service of this run directory. It listens at `listen`, or else where the configuration
    /// says. Sockets by which systemd has activated it come before both.
    ///
    /// # Errors
    /// [`Error`].
    pub fn start(run_dir: &RunDir, config: &HostConfig, listen: &[SocketAddr]) -> Result<Self, Error> {
        let at = |path: &Path| {
            let path = path.to_path_buf();
            move |source| Error::Path { path, source }
        };
        run_dir.make().map_err(at(run_dir.path()))?;
        let lock = lock(run_dir)?;
        let usual = || config.listen.unwrap_or((Ipv4Addr::LOCALHOST, PORT).into());
        let wanted = if listen.is_empty() { vec![usual()] } else { listen.to_vec() };
        let activated = activated()?;
        let addresses = if activated.is_empty() { wanted.clone() } else { addresses_of(&activated)? };
        check_security(config, &addresses)?;
        if let Some(metrics) = config.metrics.filter(|metrics| !config.insecure && !is_near(metrics.ip())) {
            return Err(Error::Watched(metrics));
        }
        if let Some(page) = config.page.filter(|page| !is_near(page.ip())) {
            return Err(Error::Shown(page));
        }
        let page = config.page.map(bound).transpose()?;
        let shown = page.as_ref().map(TcpListener::local_addr).transpose().map_err(Error::System)?;
        let api = config.api.as_ref().map(|api| api_port(config, api)).transpose()?;
        let api_at = api.as_ref().map(|(listener, _)| listener.local_addr());
        let api_at = api_at.transpose().map_err(Error::System)?;

        let admission = &config.admission;
        let rules = Rules {
            total_memory: admission.total_memory,
            max_guests: admission.max_guests,
            max_arrivals: admission.max_arrivals,
        };
        let units = Units::from_environment();
        let desk = Desk::new(run_dir.clone(), rules, units.clone());
        let gate = run_dir.gate_socket();
        desk.open(Door::open(&gate).map_err(at(&gate))?).map_err(Error::System)?;
        let keeps_sockets = !activated.is_empty();
        let listeners = if keeps_sockets { activated } else { listeners(&wanted, &desk)? };
        let listen = addresses_of(&listeners)?;
        let metrics = Metrics::new().map_err(|error| Error::System(io::Error::other(error)))?;
        let metrics = Arc::new(metrics);
        let mut dispatchers = Vec::new();
        for listener in &listeners {
            dispatchers.push(dispatch(listener.try_clone().map_err(Error::System)?, &desk, &metrics)?);
        }
        desk.use_listeners(listeners);

        let processes = Arc::new(Processes::new(run_dir.clone(), units));
        let words = processes::standby(run_dir, config);
        Arc::clone(&processes).keep_standbys(Arc::clone(&desk), words).map_err(Error::System)?;
        let host = Host {
            name: hostname(),
            run_dir: run_dir.clone(),
            desk: Arc::clone(&desk),
            processes,
            listen: listen.clone(),
            page: shown,
            api: api_at,
            config: config.clone(),
            metrics,
            events: Arc::default(),
        };
        super::events::watch(run_dir.clone(), Arc::clone(&host.events)).map_err(Error::System)?;
        if let Some(bits) = config.bandwidth {
            let events = Arc::clone(&host.events);
            super::bandwidth::divide(bits, run_dir.clone(), events).map_err(Error::System)?;
        }
        let host = Arc::new(host);
        if let Some(address) = config.metrics {
            let served = super::server::serve_metrics(address, Arc::clone(&host));
            served.map_err(|source| Error::Listen { address, source })?;
        }
        if let Some(listener) = page {
            super::server::serve_page(listener, Arc::clone(&host)).map_err(Error::System)?;
        }
        if let Some((listener, certificates)) = api {
            super::server::serve_port(listener, certificates, Arc::clone(&host)).map_err(Error::System)?;
        }
        let server = super::server::serve(&run_dir.host_socket(), host)?;
        let desk = keeps_sockets.then_some(desk);
        Ok(Service { listen, page: shown, api: api_at, desk, dispatchers, _server: server, _lock: lock })
    }

    /// Ends in good order. If systemd keeps the sockets, callers wait in them, and no process has to be there
    /// for them any more.
    pub fn end(mut self) {
        self.dispatchers.clear();
        if let Some(desk) = &self.desk {
            desk.dismiss(DISMISSAL);
        }
    }

    /// Where guests are taken in.
    pub fn listen(&self) -> &[SocketAddr] {
        &self.listen
    }

    /// Where the page is served, beside the service's own socket.
    pub fn page(&self) -> Option<SocketAddr> {
        self.page
    }

    /// Where the API is served over mutual TLS, beside the service's own socket.
    pub fn api(&self) -> Option<SocketAddr> {
        self.api
    }
}

/// What this host is called; nothing if the kernel does not say it.
fn hostname() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname");
    name.map(|name| name.trim().into()).unwrap_or_default()
}

/// Keeps other services away, and waits for one that is about to end.
fn lock(run_dir: &RunDir) -> Result<File, Error> {
    let path = run_dir.lock_file();
    let failed = |source| Error::Path { path: path.clone(), source };
    let file = File::options().write(true).create(true).truncate(false).open(&path).map_err(failed)?;
    if lock_within(&file, SUCCESSION).map_err(failed)? {
        Ok(file)
    } else {
        Err(Error::Running(run_dir.path().into()))
    }
}

/// The sockets by which systemd has activated this process.
fn activated() -> Result<Vec<TcpListener>, Error> {
    let mut inherited = ListenFd::from_env();
    (0..inherited.len())
        .filter_map(|at| inherited.take_tcp_listener(at).transpose())
        .collect::<Result<_, _>>()
        .map_err(Error::System)
}

fn addresses_of(listeners: &[TcpListener]) -> Result<Vec<SocketAddr>, Error> {
    listeners.iter().map(TcpListener::local_addr).collect::<Result<_, _>>().map_err(Error::System)
}

/// Listens on these addresses. Processes may have brought the sockets of the service before this one.
fn listeners(wanted: &[SocketAddr], desk: &Desk) -> Result<Vec<TcpListener>, Error> {
    let listen = |address: &SocketAddr| match TcpListener::bind(address) {
        Err(source) if source.kind() == io::ErrorKind::AddrInUse => {
            desk.inherited(*address, SUCCESSION).ok_or(Error::Listen { address: *address, source })
        }
        listener => listener.map_err(|source| Error::Listen { address: *address, source }),
    };
    wanted.iter().map(listen).collect()
}

fn bound(address: SocketAddr) -> Result<TcpListener, Error> {
    TcpListener::bind(address).map_err(|source| Error::Listen { address, source })
}

/// What is needed to serve the API over mutual TLS.
fn api_port(config: &HostConfig, api: &Api) -> Result<(TcpListener, Renewed), Error> {
    let files = config.certificates().ok_or(Error::Unknown(api.listen))?;
    let certificates = port::certificates(&files).map_err(Error::Certificates)?;
    Ok((bound(api.listen)?, certificates))
}

fn check_security(config: &HostConfig, addresses: &[SocketAddr]) -> Result<(), Error> {
    let security = Security::new(config.certificates(), config.insecure);
    if let Some(exposed) = addresses.iter().find(|address| !security.may_listen(**address)) {
        return Err(Error::Exposed(*exposed));
    }
    if config.encryption == Encryption::Required && !matches!(security, Security::Tls(_)) {
        return Err(Error::NoCertificates);
    }
    // They are read by the processes that use them: here only to say what is wrong with them.
    drop(security.protecting(config.allow.clone(), config.encryption).map_err(Error::Certificates)?);
    Ok(())
}

/// Hands the callers of a port to those who take them.
fn dispatch(listener: TcpListener, desk: &Arc<Desk>, metrics: &Arc<Metrics>) -> Result<Dispatcher, Error> {
    let address = listener.local_addr().map_err(Error::System)?;
    let desk = Arc::clone(desk);
    let dispatcher = Dispatcher::start(listener, move |caller| hand(&desk, caller))
        .map_err(|error| Error::Listen { address, source: io::Error::other(error) })?;
    let metrics = Arc::clone(metrics);
    dispatcher.on_refused(move |refused| {
        metrics.refused(refused.untold + 1);
        tell(format_args!("{refused}"));
    });
    Ok(dispatcher)
}

fn hand(desk: &Desk, caller: Caller) {
    if caller.preamble().kind == Kind::Data {
        match desk.session(caller.preamble().token, LANE_PATIENCE) {
            // A process that is gone answers nothing, as one that hangs up.
            Some(line) => {
                let _ = caller.leave() && hand_over(&line, caller.as_fd()).is_ok();
            }
            None => {
                caller.refuse(Status::Session, "it asks for a lane of a migration that is not under way here")
            }
        }
        return;
    }
    let deadline = Instant::now() + STANDBY_PATIENCE;
    let mut there = None;
    while let Some(line) = desk.standby(deadline.saturating_duration_since(Instant::now())) {
        // Whoever has lost its place is gone. If the process is gone, another takes its place.
        if !*there.get_or_insert_with(|| caller.leave()) || hand_over(&line, caller.as_fd()).is_ok() {
            return;
        }
    }
    tell(format_args!(
        "nobody took the caller from {} in: is there no process that waits for guests?",
        caller.peer()
    ));
}
