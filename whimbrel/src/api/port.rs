//! An API on a port, for whoever shows a certificate: mutual TLS.
//!
//! A caller has a few seconds to show who it is. Callers who have not done so are few for each address and in
//! all, and the oldest of them gives way to the next, so that they keep nobody out. Whoever has shown it has
//! a number of connections of its own. When the certificates are renewed, or one is revoked, connections that
//! are open end, and who still may calls again.

use super::server::Refusal;
use crate::security::TlsFiles;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use migration::{Code, Failure};
use socket2::SockRef;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use transport_tcp::Refusals;
use transport_tcp::tls::{Https, Pattern, Renewed, fault, name_of};

/// The port, unless another one is named.
pub const PORT: u16 = 8443;

/// How long a caller may take to show who it is.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// Callers who have not done so yet: in all, and of one address.
const MOST_PENDING: usize = 64;
const MOST_PENDING_OF_ONE: usize = 16;

/// Connections of those who have: in all, and of one certificate.
const MOST_OPEN: usize = 128;
const MOST_OPEN_OF_ONE: usize = 32;

/// How long a connection may be silent between two requests, and the head of a request take.
const IDLE: Duration = Duration::from_secs(30);

/// How often it is looked whether the certificates have been renewed.
const LOOK: Duration = Duration::from_secs(1);

/// How long requests under way may take when connections end.
const FAREWELL: Duration = Duration::from_secs(5);

/// How long a caller who was refused may take to read why.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Whom an API answers, of those who have a certificate.
#[derive(Clone, Debug, Default)]
pub struct Rights {
    /// Who may look; everybody if there is no pattern.
    pub readers: Vec<Pattern>,
    /// Who may look, and change something; nobody if there is no pattern.
    pub operators: Vec<Pattern>,
}

impl Rights {
    fn of(&self, certificate: &[u8]) -> Caller {
        let among = |patterns: &[Pattern]| patterns.iter().any(|pattern| pattern.admits(certificate));
        let acts = among(&self.operators);
        let reads = acts || self.readers.is_empty() || among(&self.readers);
        Caller { name: name_of(certificate), reads, acts }
    }
}

/// Who is at the other end.
#[derive(Clone, Debug)]
struct Caller {
    name: String,
    reads: bool,
    acts: bool,
}

/// An API that is served on a port.
pub(crate) struct Port {
    /// The certificates.
    pub certificates: Renewed,
    pub rights: Rights,
    pub router: Router,
    /// Tells who is turned away before it is known who that is.
    pub refusals: Refusals,
    /// Is told what is changed, and by whom.
    pub on_change: fn(std::fmt::Arguments<'_>),
}

/// What reads these certificates, whenever they are renewed.
///
/// # Errors
/// What is wrong with them.
pub(crate) fn certificates(files: &TlsFiles) -> Result<Renewed, transport_tcp::Error> {
    let renewed = files.renewed(Vec::new())?;
    renewed.https()?;
    Ok(renewed)
}

/// Serves an API as long as the program runs.
///
/// # Errors
/// When there can be no further thread or descriptor.
pub(crate) fn serve(listener: std::net::TcpListener, port: Port) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _entered = runtime.enter();
        TcpListener::from_std(listener)?
    };
    thread::Builder::new().name("api-port".into()).spawn(move || {
        runtime.block_on(accept(&listener, Arc::new(Shared::new(port))));
    })?;
    Ok(())
}

struct Shared {
    port: Port,
    open: Mutex<HashMap<Vec<u8>, usize>>,
    /// Which certificates are in use.
    renewed: watch::Sender<Option<Https>>,
}

impl Shared {
    fn new(port: Port) -> Self {
        let (now, _) = watch::channel(port.certificates.https().ok());
        Shared { port, open: Mutex::default(), renewed: now }
    }

    /// Takes notice of files that have been renewed. Some may not fit together yet: what was read before is
    /// in use until they do, for connections that are open.
    fn look(&self) {
        let Ok(now) = self.port.certificates.https() else { return };
        self.renewed.send_if_modified(|known| {
            let other = known.as_ref().is_none_or(|known| !known.is(&now));
            *known = Some(now);
            other
        });
    }
}

/// A caller who has not shown who it is.
struct Pending {
    peer: SocketAddr,
    task: JoinHandle<()>,
}

async fn accept(listener: &TcpListener, shared: Arc<Shared>) {
    let looking = Arc::clone(&shared);
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(LOOK).await;
            looking.look();
        }
    });
    let mut pending: VecDeque<Pending> = VecDeque::new();
    loop {
        let Ok((stream, peer)) = listener.accept().await else {
            // Out of descriptors: others will be closed.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        pending.retain(|caller| !caller.task.is_finished());
        if let Some(oldest) = gives_way(pending.iter().map(|caller| caller.peer.ip()), peer.ip())
            && let Some(caller) = pending.remove(oldest)
        {
            caller.task.abort();
            let why = "others have called since, and it has not shown who it is";
            shared.port.refusals.tell(caller.peer, why);
        }
        let task = tokio::spawn(welcome(Arc::clone(&shared), stream, peer));
        pending.push_back(Pending { peer, task });
    }
}

/// Which of those who have called from these addresses, the oldest first, gives way to one from `next`.
fn gives_way(pending: impl ExactSizeIterator<Item = IpAddr> + Clone, next: IpAddr) -> Option<usize> {
    let mut same = pending.clone().enumerate().filter(|(_, address)| *address == next).map(|(at, _)| at);
    let oldest = same.next();
    if oldest.is_some() && same.count() + 1 >= MOST_PENDING_OF_ONE {
        return oldest;
    }
    (pending.len() >= MOST_PENDING).then_some(0)
}

/// Lets a caller show who it is, and serves it from then on.
async fn welcome(shared: Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    let refuse = |why: &str| shared.port.refusals.tell(peer, why);
    shared.look();
    let https = match shared.port.certificates.https() {
        Ok(https) => https,
        Err(error) => return refuse(&error.to_string()),
    };
    let handshake = TlsAcceptor::from(Arc::clone(&https.server)).accept(stream).into_fallible();
    match tokio::time::timeout(HANDSHAKE, handshake).await {
        Err(_) => refuse(&format!("it has not shown who it is within {} s", HANDSHAKE.as_secs())),
        Ok(Err((error, stream))) => {
            refuse(&match tls_error(&error) {
                Some(error) => format!("it {}", fault(error)),
                None => error.to_string(),
            });
            say_farewell(stream).await;
        }
        Ok(Ok(stream)) => {
            let certificate = stream.get_ref().1.peer_certificates().and_then(|all| all.first());
            let Some(certificate) = certificate.map(|certificate| certificate.to_vec()) else { return };
            let caller = shared.port.rights.of(&certificate);
            match Place::take(&shared, certificate) {
                Some(place) => drop(tokio::spawn(attend(place, https, stream, caller))),
                None => refuse(&format!("{} has as many connections as it may", caller.name)),
            }
        }
    }
}

/// What TLS has against a connection, if it was TLS.
pub(super) fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// Lets the other end read why it is refused: a socket that is closed with something unread takes back what
/// it has sent.
async fn say_farewell(stream: TcpStream) {
    const SOME: usize = 4096;
    const MOST: usize = 16;
    let read = async {
        let mut rest = [0; SOME];
        for _ in 0..MOST {
            stream.readable().await?;
            match stream.try_read(&mut rest) {
                Ok(0) => break,
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => break,
                _ => {}
            }
        }
        io::Result::Ok(())
    };
    if SockRef::from(&stream).shutdown(Shutdown::Write).is_ok() {
        let _ = tokio::time::timeout(LAST_WORD, read).await;
    }
}

/// A connection's place among those that are open.
struct Place {
    shared: Arc<Shared>,
    certificate: Vec<u8>,
}

impl Place {
    fn take(shared: &Arc<Shared>, certificate: Vec<u8>) -> Option<Self> {
        let mut open = shared.open.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = open.values().sum();
        let own = open.get(&certificate).copied().unwrap_or(0);
        if all >= MOST_OPEN || own >= MOST_OPEN_OF_ONE {
            return None;
        }
        open.insert(certificate.clone(), own + 1);
        Some(Place { shared: Arc::clone(shared), certificate })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.shared.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = open.get_mut(&self.certificate) {
            *own -= 1;
            if *own == 0 {
                open.remove(&self.certificate);
            }
        }
    }
}

/// Answers a caller until it hangs up, or the certificates are others than those by which it came in.
async fn attend(place: Place, https: Https, stream: TlsStream<TcpStream>, caller: Caller) {
    let port = &place.shared.port;
    let permit = Arc::new((caller, port.on_change));
    let router = port.router.clone().layer(from_fn_with_state(permit, permit_request));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let mut renewed = place.shared.renewed.subscribe();
    let others = renewed.wait_for(|now| now.as_ref().is_some_and(|now| !now.is(&https)));
    tokio::select! {
        // Whatever was wrong, it is over.
        _ = &mut connection => return,
        _ = others => {}
    }
    connection.as_mut().graceful_shutdown();
    let _ = tokio::time::timeout(FAREWELL, connection).await;
}

type Permit = (Caller, fn(std::fmt::Arguments<'_>));

/// Answers who may ask for this.
async fn permit_request(State(permit): State<Arc<Permit>>, request: Request, next: Next) -> Response {
    let (caller, on_change) = &*permit;
    let reads = matches!(*request.method(), Method::GET | Method::HEAD);
    if reads && caller.reads {
        return next.run(request).await;
    }
    if caller.acts {
        on_change(format_args!("{} asks for {} {}", caller.name, request.method(), request.uri().path()));
        return next.run(request).await;
    }
    let (what, key) = if reads { ("look at", "allow") } else { ("change anything on", "operators") };
    let text = format!("{} may not {what} this host: `{key}` in its configuration says who may", caller.name);
    Refusal::of(StatusCode::FORBIDDEN, Failure::new(Code::AUTHENTICATION, text)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    #[test]
    fn the_oldest_gives_way_and_first_the_callers_own() {
        let address = |last: u8| IpAddr::from(Ipv4Addr::new(10, 0, 0, last));
        let way = |pending: &[u8], next: u8| {
            let pending: Vec<_> = pending.iter().map(|last| address(*last)).collect();
            gives_way(pending.iter().copied(), address(next))
        };
        assert_eq!(way(&[], 1), None);
        assert_eq!(way(&[1; MOST_PENDING_OF_ONE - 1], 1), None);
        assert_eq!(way(&[&[9][..], &[1; MOST_PENDING_OF_ONE]].concat(), 1), Some(1));
        let many: Vec<u8> = (0..MOST_PENDING as u8).collect();
        assert_eq!(way(&many, 200), Some(0));
        assert_eq!(way(&many[1..], 200), None);
    }

    #[test]
    fn who_may_act_may_look_and_nobody_acts_unless_it_is_said() {
        use rcgen::{CertificateParams, KeyPair};
        let certificate = |name: &str| {
            let key = KeyPair::generate().unwrap();
            CertificateParams::new([name.to_string()]).unwrap().self_signed(&key).unwrap().der().to_vec()
        };
        let (host, operator) = (certificate("a.hosts.example"), certificate("ops.example"));
        let may = |rights: &Rights, certificate: &[u8]| {
            let caller = rights.of(certificate);
            (caller.reads, caller.acts)
        };
        let pattern = |text: &str| vec![text.parse::<Pattern>().unwrap()];
        assert_eq!(may(&Rights::default(), &host), (true, false));
        let rights = Rights { readers: pattern("*.hosts.example"), operators: Vec::new() };
        assert_eq!((may(&rights, &host), may(&rights, &operator)), ((true, false), (false, false)));
        let rights = Rights { operators: pattern("ops.example"), ..rights };
        assert_eq!((may(&rights, &host), may(&rights, &operator)), ((true, false), (true, true)));
    }
}
