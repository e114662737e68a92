//! Where an API is served, for those who call it.

use super::Error;
use super::port::{PORT, tls_error};
use crate::security::TlsFiles;
use http_body_util::Full;
use hyper::Uri;
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use std::error::Error as _;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use transport_tcp::tls::fault;

/// How long a connection over a network may take to come about.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where an API is.
#[derive(Clone, Debug)]
pub enum Reach {
    /// On a Unix socket of this host.
    Socket(PathBuf),
    /// On a port of another one.
    Port(Arc<Port>),
}

/// A port where an API is served, to whoever shows a certificate.
#[derive(Debug)]
pub struct Port {
    host: String,
    port: u16,
    name: ServerName<'static>,
    config: Arc<ClientConfig>,
}

impl Reach {
    /// A host by its URL, such as `https://b.hosts.example:8443`; the port is 8443 unless one is named. These
    /// certificates are shown, and say whom to trust; they are read now.
    ///
    /// # Errors
    /// [`Error::Url`], and [`Error::Untrusted`] when the certificates are of no use.
    pub fn host(url: &str, files: &TlsFiles) -> Result<Self, Error> {
        let wrong = || Error::Url(url.into());
        let uri: Uri = url.parse().map_err(|_| wrong())?;
        let plain = uri.scheme_str() == Some("https") && uri.path() == "/" && uri.query().is_none();
        let authority = uri.authority().filter(|it| plain && !it.as_str().contains('@')).ok_or_else(wrong)?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_string();
        let name = ServerName::try_from(host.clone()).map_err(|_| wrong())?;
        let certificates = files.renewed(Vec::new()).and_then(|renewed| renewed.https());
        let config = certificates.map_err(|error| Error::Untrusted(error.to_string()))?.client;
        Ok(Reach::Port(Arc::new(Port { host, port: authority.port_u16().unwrap_or(PORT), name, config })))
    }

    /// As it is written in a request.
    pub(super) fn authority(&self) -> String {
        match self {
            Reach::Socket(_) => "vm".into(),
            Reach::Port(port) => port.to_string(),
        }
    }

    pub(super) async fn connect(&self) -> Result<Connection, Error> {
        match self {
            Reach::Socket(path) => {
                let stream = UnixStream::connect(path).await;
                Connection::over(
                    self,
                    stream.map_err(|source| Error::Connect { path: path.clone(), source })?,
                )
                .await
            }
            Reach::Port(port) => {
                let unreachable = |source| Error::Unreachable { to: port.to_string(), source };
                let late = |_| unreachable(io::ErrorKind::TimedOut.into());
                let stream = async {
                    let stream =
                        TcpStream::connect((port.host.as_str(), port.port)).await.map_err(unreachable)?;
                    let connector = TlsConnector::from(Arc::clone(&port.config));
                    let connected = connector.connect(port.name.clone(), stream).await;
                    connected.map_err(|error| self.explain(&error, Some(&error)))
                };
                Connection::over(self, tokio::time::timeout(PATIENCE, stream).await.map_err(late)??).await
            }
        }
    }

    /// What was wrong with a connection, of which this is the cause if it is known.
    fn explain(&self, error: &dyn std::error::Error, cause: Option<&io::Error>) -> Error {
        match (cause.and_then(tls_error), self) {
            (Some(why), Reach::Port(port)) => Error::Untrusted(format!("{port} {}", fault(why))),
            _ => Error::Http(error.to_string()),
        }
    }

    fn explain_http(&self, error: &hyper::Error) -> Error {
        self.explain(error, error.source().and_then(|source| source.downcast_ref()))
    }
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// A connection to an API.
pub(super) struct Connection {
    reach: Reach,
    pub sender: SendRequest<Full<Bytes>>,
    /// What moves its bytes.
    task: JoinHandle<hyper::Result<()>>,
}

impl Connection {
    async fn over(
        reach: &Reach,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<Self, Error> {
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| reach.explain_http(&error))?;
        Ok(Connection { reach: reach.clone(), sender, task: tokio::spawn(connection) })
    }

    /// What an error of a request means. With TLS 1.3 this end has shown its certificate, and goes on, before
    /// the other says what it has against it; so that may be what the first request meets.
    pub async fn explain(&mut self, error: hyper::Error) -> Error {
        let told = self.reach.explain_http(&error);
        if matches!(told, Error::Untrusted(_)) || !(error.is_canceled() || error.is_closed()) {
            return told;
        }
        match (&mut self.task).await {
            Ok(Err(cause)) => self.reach.explain_http(&cause),
            _ => told,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::{Authority, days_from_now};

    #[test]
    fn a_host_is_an_https_url_without_a_path() {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::create(&folder.path().join("pki")).unwrap();
        authority.issue("a.example", &[], days_from_now(1)).unwrap();
        let files = TlsFiles { folder: Some(authority.host("a.example")), ..TlsFiles::default() };
        for (url, expected) in [
            ("https://b.example", "b.example:8443"),
            ("https://b.example/", "b.example:8443"),
            ("https://b.example:7", "b.example:7"),
            ("https://10.0.0.1", "10.0.0.1:8443"),
            ("https://[fe80::1]:7", "[fe80::1]:7"),
        ] {
            assert_eq!(Reach::host(url, &files).unwrap().authority(), expected);
        }
        for wrong in
            ["", "b.example", "http://b.example", "https://", "https://b.example/v1", "https://a@b.example"]
        {
            assert!(matches!(Reach::host(wrong, &files), Err(Error::Url(_))), "{wrong}");
        }
        let none = TlsFiles { folder: Some("/nonexistent".into()), ..TlsFiles::default() };
        let told = Reach::host("https://b.example", &none).unwrap_err().to_string();
        assert!(told.contains("/nonexistent"), "{told}");
    }
}
