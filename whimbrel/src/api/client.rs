//! The API's client, for the program's own commands.

use super::Error;
use super::events::LAST;
use super::model::{ErrorBody, Event};
use super::reach::{Connection, Reach};
use futures_util::StreamExt;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Method, Request, Response};
use migration::{Code, Failure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sse_stream::SseStream;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

/// Largest answer that is read, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// How long one answer may take.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Talks to one machine, or to one host. Every call opens its own connection: calls are rare, and a machine
/// that ended in between is noticed at once.
pub struct Client {
    reach: Reach,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// A client of the machine that serves on `path`.
    ///
    /// # Errors
    /// When the process can have no more threads or descriptors.
    pub fn new(path: &Path) -> Result<Self, Error> {
        Client::of(Reach::Socket(path.into()))
    }

    /// A client of what is served there.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn of(reach: Reach) -> Result<Self, Error> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(http)?;
        Ok(Client { reach, runtime })
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

    /// Is told of the events after `since`, or first of what is now, until there are no more: those that have
    /// happened, or with `follow` those that happen.
    ///
    /// # Errors
    /// As for [`get`](Self::get).
    pub fn listen(
        &self,
        since: Option<u64>,
        follow: bool,
        mut tell: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        self.runtime.block_on(async {
            let mut listening = Caller::of(&self.reach).await?.listen(since, follow).await?;
            while let Some(event) = listening.next().await? {
                if tell(event).is_break() {
                    break;
                }
            }
            Ok(())
        })
    }

    async fn exchange<A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<A, Error> {
        Caller::of(&self.reach).await?.send_body(method, path, body).await
    }
}

/// A connection to one API, by which one question follows the other.
pub struct Caller {
    authority: String,
    connection: Connection,
}

impl Caller {
    /// Calls the machine that serves on `path`.
    ///
    /// # Errors
    /// [`Error::Connect`] when nobody is there.
    pub async fn connect(path: &Path) -> Result<Self, Error> {
        Caller::of(&Reach::Socket(path.into())).await
    }

    /// Calls what is served there.
    ///
    /// # Errors
    /// As for [`connect`](Self::connect), and [`Error::Unreachable`] and [`Error::Untrusted`].
    pub async fn of(reach: &Reach) -> Result<Self, Error> {
        Ok(Caller { authority: reach.authority(), connection: reach.connect().await? })
    }

    /// `GET path`.
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub async fn get<A: DeserializeOwned>(&mut self, path: &str) -> Result<A, Error> {
        self.call(Method::GET, path, &()).await
    }

    /// `method path` with a JSON body.
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub async fn call<A: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<A, Error> {
        self.send_body(method, path, serde_json::to_vec(body).map_err(http)?).await
    }

    async fn send_body<A: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<A, Error> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", &self.authority)
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(http)?;
        let response = self.send(request).await?;
        let bytes = whole(response).await?;
        // Some answers have no body.
        let body: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
        serde_json::from_slice(body).map_err(http)
    }

    /// `GET /v1/events`, as [`Client::listen`].
    ///
    /// # Errors
    /// As for [`Client::get`].
    pub async fn listen(mut self, since: Option<u64>, follow: bool) -> Result<Listening, Error> {
        let path = format!("/v1/events?follow={follow}");
        let mut request = Request::builder().uri(path).header("host", &self.authority);
        if let Some(since) = since {
            request = request.header(LAST, since);
        }
        let request = request.body(Full::default()).map_err(http)?;
        let response = self.send(request).await?;
        if response.status().is_success() {
            let events = SseStream::new(response.into_body());
            return Ok(Listening { events, _connection: self.connection });
        }
        whole(response).await?;
        Err(http("a refusal that is none"))
    }

    async fn send(&mut self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, Error> {
        match self.connection.sender.send_request(request).await {
            Ok(response) => Ok(response),
            Err(error) => Err(self.connection.explain(error).await),
        }
    }
}

/// The events that a server tells.
pub struct Listening {
    events: SseStream<Incoming>,
    /// The connection lives as long as it.
    _connection: Connection,
}

impl Listening {
    /// The next one, which is waited for; `None` after the last one.
    ///
    /// # Errors
    /// When the server is gone.
    pub async fn next(&mut self) -> Result<Option<Event>, Error> {
        while let Some(told) = self.events.next().await {
            // Lines without meaning show that the server is there.
            if let Some(data) = told.map_err(http)?.data {
                return serde_json::from_str(&data).map(Some).map_err(http);
            }
        }
        Ok(None)
    }
}

/// The body of an answer, unless it is a refusal.
async fn whole(response: Response<Incoming>) -> Result<Bytes, Error> {
    let status = response.status();
    let bytes = Limited::new(response.into_body(), MAX_ANSWER).collect().await.map_err(http)?.to_bytes();
    if status.is_success() {
        return Ok(bytes);
    }
    Err(Error::Refused(match serde_json::from_slice::<ErrorBody>(&bytes) {
        Ok(body) => body.error,
        Err(_) => Failure::new(Code::OTHER, format_args!("{status}: {}", String::from_utf8_lossy(&bytes))),
    }))
}

fn http(error: impl std::fmt::Display) -> Error {
    Error::Http(error.to_string())
}
