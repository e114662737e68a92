//! The side that is written to.

use super::{Answer, Ask, MOST_MEMORY, PATIENCE, cpu_us, receive, send};
use crate::guest::size;
use anyhow::{Context, ensure};
use migration::link::{ControlLink, LinkError};
use migration::transport::{DestinationPlane, Session};
use serde_json::from_slice;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;
use transport_tcp::{Call, Listener};
use vmm::api::model::TransportChoice;
use vmm::memory::{GuestRam, PageSize};
use vmm::transports;

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
        let Ask::Open { transport, memory } = receive(&mut call, PATIENCE)? else {
            anyhow::bail!("the client asked for something before it opened a session")
        };
        // Memory and plane live until the client is gone.
        let (_memory, mut plane) = match self.open(&call, transport, memory) {
            Ok((ram, offer, plane)) => {
                send(&mut call, &Answer::Open { offer })?;
                (ram, plane)
            }
            Err(error) => return send(&mut call, &Answer::Refused { why: format!("{error:#}") }),
        };
        loop {
            match call.receive(LOOK) {
                Ok(None) => {}
                Ok(Some(frame)) => match from_slice(&frame)? {
                    Ask::Cpu => send(&mut call, &Answer::Cpu { us: cpu_us() })?,
                    Ask::Open { .. } => anyhow::bail!("the client opened a session twice"),
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
        transport: TransportChoice,
        memory: u64,
    ) -> anyhow::Result<(GuestRam, Vec<u8>, Box<dyn DestinationPlane>)> {
        ensure!(memory <= MOST_MEMORY, "too much memory: use at most {}", size(MOST_MEMORY));
        let ram = GuestRam::new(memory, PageSize::Small)?;
        ram.populate(thread::available_parallelism().map_or(1, usize::from))?;
        let wanted = match transport {
            TransportChoice::Rdma => "rdma",
            TransportChoice::Auto | TransportChoice::Tcp => "tcp",
        };
        let mut all = transports::destination(call, &self.listener, false);
        let transport = all.iter_mut().find(|transport| transport.name() == wanted);
        let transport = transport.with_context(|| format!("there is no transport {wanted} here"))?;
        let session = Session { token: call.token(), ram: ram.ram().clone(), timeout: PATIENCE };
        let (offer, plane) = transport.offer(&session)?;
        Ok((ram, offer, plane))
    }
}
