//! The API's client, for the program's own commands.

use super::Error;
use super::model::ErrorBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use migration::{Code, Failure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// Largest answer that is read, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Talks to one machine. Every call opens its own connection: calls are rare, and a machine that
/// ended in between is noticed at once.
pub struct Client {
    path: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// A client of the machine that serves on `path`.
    ///
    /// # Errors
    /// When the process can have no more threads or descriptors.
    pub fn new(path: &Path) -> Result<Self, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|source| Error::Connect { path: path.into(), source })?;
        Ok(Client { path: path.into(), runtime })
    }

    /// `GET path`.
    ///
    /// # Errors
    /// [`Error::Connect`] when nobody is there, [`Error::Refused`] with the machine's own reason.
    pub fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, Error> {
        self.call(Method::GET, path, &())
    }

    /// `method path` with a JSON body.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    pub fn call<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, Error> {
        self.call_within(TIMEOUT, method, path, body)
    }

    /// The same for a request whose answer may take up to `patience`.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    pub fn call_within<A: DeserializeOwned>(
        &self,
        patience: Duration,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, Error> {
        let body = serde_json::to_vec(body).map_err(http)?;
        self.runtime.block_on(async {
            tokio::time::timeout(patience, self.exchange(method, path, body))
                .await
                .unwrap_or(Err(Error::Silent(patience)))
        })
    }

    async fn exchange<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<A, Error> {
        Caller::connect(&self.path).await?.call(method, path, body).await
    }
}

/// A connection to one machine's API, by which one question follows the other.
pub struct Caller {
    sender: SendRequest<Full<Bytes>>,
}

impl Caller {
    /// Calls the machine that serves on `path`.
    ///
    /// # Errors
    /// [`Error::Connect`] when nobody is there.
    pub async fn connect(path: &Path) -> Result<Self, Error> {
        let stream =
            UnixStream::connect(path).await.map_err(|source| Error::Connect { path: path.into(), source })?;
        let (sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(http)?;
        tokio::spawn(connection);
        Ok(Caller { sender })
    }

    /// `GET path`.
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub async fn get<A: DeserializeOwned>(&mut self, path: &str) -> Result<A, Error> {
        self.call(Method::GET, path, b"null".to_vec()).await
    }

    async fn call<A: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<A, Error> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "vm")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(http)?;
        let response = self.sender.send_request(request).await.map_err(http)?;
        let status = response.status();
        let bytes = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(http)?.to_bytes();
        if status.is_success() {
            // Some answers have no body.
            let body: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
            return serde_json::from_slice(body).map_err(http);
        }
        Err(Error::Refused(match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => body.error,
            Err(_) => {
                Failure::new(Code::OTHER, format_args!("{status}: {}", String::from_utf8_lossy(&bytes)))
            }
        }))
    }
}

fn http(error: impl std::fmt::Display) -> Error {
    Error::Http(error.to_string())
}
