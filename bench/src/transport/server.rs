//! The server, which is written to.

use super::{MAX_MEMORY, REPLY_TIMEOUT, Reply, Request, SessionConfig, cpu_us, receive, send};
use crate::guest::size;
use crate::peers::perftest::Perftest;
use anyhow::{Context, bail, ensure};
use migration::link::{ControlLink, LinkError};
use migration::transport::{DestinationPlane, DestinationTransport, Session};
use serde_json::from_slice;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;
use transport_rdma::RdmaDestination;
use transport_tcp::{Call, Listener, TcpDestination};
use vmm::memory::GuestRam;
use whimbrel::api::model::TransportChoice;

/// How long the server waits for a connection or a request before it looks again.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// A listening server.
pub struct Server {
    listener: Listener,
}

impl Server {
    /// Listens on `address`; port 0 chooses a free one.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub fn bind(address: SocketAddr) -> anyhow::Result<Self> {
        Ok(Server { listener: Listener::bind(address)? })
    }

    /// The address on which it listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr()
    }

    /// Waits for a client and serves it until it leaves.
    ///
    /// # Errors
    /// When the listener fails. An error with one client goes to standard error.
    pub fn serve_one(&self) -> anyhow::Result<()> {
        let call = loop {
            if let Some(call) = self.listener.next_control(POLL_INTERVAL)? {
                break call;
            }
        };
        let peer = call.peer();
        if let Err(error) = self.serve(call) {
            eprintln!("whimbrel-bench: {peer}: {error:#}");
        }
        Ok(())
    }

    fn serve(&self, mut call: Call) -> anyhow::Result<()> {
        let terms = match receive(&mut call, REPLY_TIMEOUT)? {
            Request::Open(terms) => terms,
            Request::Perftest(test) => return serve_perftest(&mut call, &test),
            Request::Cpu => bail!("the client asked for something before it opened a session"),
        };
        // Memory and plane live until the client leaves.
        let (_memory, mut plane) = match self.open(&call, &terms) {
            Ok((ram, offer, plane)) => {
                send(&mut call, &Reply::Open { offer })?;
                (ram, plane)
            }
            Err(error) => return refuse(&mut call, &error),
        };
        loop {
            match call.receive(POLL_INTERVAL) {
                Ok(None) => {}
                Ok(Some(frame)) => match from_slice(&frame)? {
                    Request::Cpu => send(&mut call, &Reply::Cpu { us: cpu_us() })?,
                    Request::Open(_) | Request::Perftest(_) => bail!("the client opened a session twice"),
                },
                Err(LinkError::Closed) => return plane.fence().context("cannot end the session"),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Allocates and populates memory, and offers it to the client.
    fn open(
        &self,
        call: &Call,
        terms: &SessionConfig,
    ) -> anyhow::Result<(GuestRam, Vec<u8>, Box<dyn DestinationPlane>)> {
        ensure!(terms.memory <= MAX_MEMORY, "too much memory: use at most {}", size(MAX_MEMORY));
        ensure!(terms.chunk <= MAX_MEMORY, "chunks are at most {}", size(MAX_MEMORY));
        let ram = GuestRam::new(terms.memory, terms.pages)?;
        ram.populate(thread::available_parallelism().map_or(1, usize::from))?;
        let session = Session::new(call.token(), ram.ram().clone(), REPLY_TIMEOUT);
        let (offer, plane) = match terms.transport {
            // RDMA uses the address to which the client has connected.
            TransportChoice::Rdma => {
                RdmaDestination::new(call.local()?.ip(), terms.rdma()).offer(&session)?
            }
            TransportChoice::Auto | TransportChoice::Tcp => {
                TcpDestination::new(&self.listener).offer(&session)?
            }
        };
        Ok((ram, offer, plane))
    }
}

fn refuse(call: &mut Call, error: &anyhow::Error) -> anyhow::Result<()> {
    send(call, &Reply::Refused { why: format!("{error:#}") })
}

/// Runs the server side of perftest until the client leaves.
fn serve_perftest(call: &mut Call, test: &Perftest) -> anyhow::Result<()> {
    let (_listening, port) = match test.listen(call.local()?.ip()) {
        Ok(listening) => listening,
        Err(error) => return refuse(call, &error),
    };
    send(call, &Reply::Perftest { port })?;
    loop {
        match call.receive(POLL_INTERVAL) {
            Ok(None) => {}
            Ok(Some(_)) => bail!("the client asked for something while perftest runs"),
            Err(LinkError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
