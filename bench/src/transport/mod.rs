//! A transport without a guest, between two processes of this program on one machine or two.
//!
//! The server gives memory to one client at a time, for as long as the client's control connection lasts. The
//! client opens a session for each run. Control messages are JSON.

pub mod client;
pub mod server;

use crate::peers::perftest::Perftest;
use crate::usage;
use anyhow::{Context, bail};
use clap::ValueEnum;
use migration::link::ControlLink;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::time::Duration;
use transport_rdma::Waiting;
use vmm::memory::PageSize;
use whimbrel::api::model::TransportChoice;

/// The most memory of a session in bytes: one region must hold it, below the gap that a machine's memory has.
pub const MAX_MEMORY: u64 = 2 << 30;

/// How long either side waits for a reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// What both sides of a session must agree on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionConfig {
    /// The transport.
    pub transport: TransportChoice,
    /// Bytes of memory that the client writes to, over and over.
    pub memory: u64,
    /// The pages of that memory.
    pub pages: PageSize,
    /// How RDMA's completions are awaited.
    pub completion: Completion,
    /// Bytes of memory that RDMA registers at a time, 0 for the default.
    pub chunk: u64,
}

/// How RDMA's completions are awaited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Completion {
    /// Sleep until the completion channel reports an event.
    #[default]
    Channel,
    /// Poll without sleeping, which takes one processor for each queue pair.
    BusyPoll,
}

impl SessionConfig {
    fn rdma(&self) -> transport_rdma::Options {
        let waiting = match self.completion {
            Completion::Channel => Waiting::Sleep,
            Completion::BusyPoll => Waiting::BusyPoll,
        };
        let chunk = if self.chunk == 0 { transport_rdma::DEFAULT_CHUNK } else { self.chunk };
        transport_rdma::Options::default().with_waiting(waiting).with_chunk(chunk)
    }
}

/// What a client asks the server for.
#[derive(Debug, Serialize, Deserialize)]
enum Request {
    /// Memory to write to: a session.
    Open(SessionConfig),
    /// The server side of perftest.
    Perftest(Perftest),
    /// The processor time that the server has used so far.
    Cpu,
}

/// What the server replies.
#[derive(Debug, Serialize, Deserialize)]
enum Reply {
    /// A session, and how to connect to it.
    Open { offer: Vec<u8> },
    /// The port on which perftest listens.
    Perftest { port: u16 },
    /// Processor time of the whole process in microseconds.
    Cpu { us: u64 },
    /// The request was refused.
    Refused { why: String },
}

fn send(link: &mut dyn ControlLink, message: &impl Serialize) -> anyhow::Result<()> {
    Ok(link.send(&serde_json::to_vec(message)?)?)
}

fn receive<T: DeserializeOwned>(link: &mut dyn ControlLink, wait: Duration) -> anyhow::Result<T> {
    let Some(frame) = link.receive(wait)? else { bail!("the other side said nothing for {wait:?}") };
    serde_json::from_slice(&frame).context("the other side said what this version does not know")
}

/// Processor time in microseconds that this process has used so far.
fn cpu_us() -> u64 {
    (usage::cpu_seconds(libc::RUSAGE_SELF) * 1e6) as u64
}

#[cfg(test)]
mod tests {
    use super::client::{Probe, Test};
    use super::server::Server;
    use super::*;
    use std::thread;

    fn probe(to: String, test: Test, size: u64, streams: u16) -> Probe {
        let (memory, chunk, completion) = (16 << 20, 0, Completion::Channel);
        let (transport, pages) = (TransportChoice::Tcp, PageSize::Small);
        let terms = SessionConfig { transport, memory, pages, completion, chunk };
        Probe { to, terms, streams, size, batch: 3, depth: 0, time: Duration::from_millis(200), test }
    }

    /// A server that serves until the tests end.
    fn server() -> String {
        let server = Server::bind((std::net::Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = server.address().to_string();
        thread::spawn(move || while server.serve_one().is_ok() {});
        address
    }

    #[test]
    fn bandwidth_and_latency_are_measured() {
        let to = server();
        let figures = probe(to.clone(), Test::Bandwidth, 64 << 10, 2).run().unwrap();
        let (rate, messages) = (figures["stream_mib_s"], figures["messages_s"]);
        assert!(rate > 0.0 && (messages / 16.0 / rate - 1.0).abs() < 1e-6, "{figures:?}");
        assert!(figures.contains_key("source_cpu_s_per_gib") && figures.contains_key("target_cpu_s_per_gib"));
        for size in [0, 4096] {
            let figures = probe(to.clone(), Test::Latency, size, 1).run().unwrap();
            let [median, p99, most] =
                ["latency_us", "latency_p99_us", "latency_most_us"].map(|id| figures[id]);
            assert!(median > 0.0 && median <= p99 && p99 <= most, "{figures:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_either_side() {
        let usual = probe(server(), Test::Bandwidth, 4096, 1);
        let refused = |terms| Probe { terms, ..usual.clone() }.run().unwrap_err().to_string();
        let huge = refused(SessionConfig { memory: 1 << 60, ..usual.terms });
        assert!(huge.contains("too much memory"), "{huge}");
        let chunk = refused(SessionConfig { chunk: u64::MAX, ..usual.terms });
        assert!(chunk.contains("chunks"), "{chunk}");
        let odd = probe("127.0.0.1:1".into(), Test::Bandwidth, 1000, 1);
        assert!(odd.run().unwrap_err().to_string().contains("4 KiB"));
        let alone = probe("127.0.0.1:1".into(), Test::Bandwidth, 4096, 1).run().unwrap_err();
        assert!(format!("{alone:#}").contains("whimbrel-bench transport --server"), "{alone:#}");
        let wide = probe("127.0.0.1:1".into(), Test::Bandwidth, 4 << 20, 2);
        assert!(wide.run().unwrap_err().to_string().contains("--memory"));
    }
}
