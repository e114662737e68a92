//! The side that is written to.

use super::{Answer, Ask, MOST_MEMORY, PATIENCE, Terms, cpu_us, receive, send};
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

/// Between two looks whether anybody has called or said anything.
const LOOK: Duration = Duration::from_secs(1);

/// A listening server.
pub struct Server {
    listener: Listener,
}

impl Server {
    /// Listens on `address`; port 0 chooses a free one.
    ///
    /// # Errors
    /// When that cannot be done.
    pub fn bind(address: SocketAddr) -> anyhow::Result<Self> {
        Ok(Server { listener: Listener::bind(address)? })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr()
    }

    /// Waits for a client and serves it to its end.
    ///
    /// # Errors
    /// When no more clients can be taken. What goes wrong with one is told on standard error.
    pub fn serve_one(&self) -> anyhow::Result<()> {
        let call = loop {
            if let Some(call) = self.listener.next_control(LOOK)? {
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
        let terms = match receive(&mut call, PATIENCE)? {
            Ask::Open(terms) => terms,
            Ask::Perftest(test) => return serve_perftest(&mut call, &test),
            Ask::Cpu => bail!("the client asked for something before it opened a session"),
        };
        // Memory and plane live until the client is gone.
        let (_memory, mut plane) = match self.open(&call, &terms) {
            Ok((ram, offer, plane)) => {
                send(&mut call, &Answer::Open { offer })?;
                (ram, plane)
            }
            Err(error) => return refuse(&mut call, &error),
        };
        loop {
            match call.receive(LOOK) {
                Ok(None) => {}
                Ok(Some(frame)) => match from_slice(&frame)? {
                    Ask::Cpu => send(&mut call, &Answer::Cpu { us: cpu_us() })?,
                    Ask::Open(_) | Ask::Perftest(_) => bail!("the client opened a session twice"),
                },
                Err(LinkError::Closed) => return plane.fence().context("cannot end the session"),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Makes memory, populated, and opens it to the client.
    fn open(
        &self,
        call: &Call,
        terms: &Terms,
    ) -> anyhow::Result<(GuestRam, Vec<u8>, Box<dyn DestinationPlane>)> {
        ensure!(terms.memory <= MOST_MEMORY, "too much memory: use at most {}", size(MOST_MEMORY));
        ensure!(terms.chunk <= MOST_MEMORY, "chunks are at most {}", size(MOST_MEMORY));
        let ram = GuestRam::new(terms.memory, terms.pages)?;
        ram.populate(thread::available_parallelism().map_or(1, usize::from))?;
        let session = Session { token: call.token(), ram: ram.ram().clone(), timeout: PATIENCE };
        let (offer, plane) = match terms.transport {
            // RDMA goes to the address that the client has called.
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
    send(call, &Answer::Refused { why: format!("{error:#}") })
}

/// Has perftest listen until the client is gone.
fn serve_perftest(call: &mut Call, test: &Perftest) -> anyhow::Result<()> {
    let (_listening, port) = match test.listen(call.local()?.ip()) {
        Ok(listening) => listening,
        Err(error) => return refuse(call, &error),
    };
    send(call, &Answer::Perftest { port })?;
    loop {
        match call.receive(LOOK) {
            Ok(None) => {}
            Ok(Some(_)) => bail!("the client asked for something while perftest runs"),
            Err(LinkError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
