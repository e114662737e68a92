//! The client, which writes and measures.

use super::{MAX_MEMORY, REPLY_TIMEOUT, Reply, Request, SessionConfig, cpu_us, receive, send};
use crate::figures::{self, Figures};
use crate::guest::size;
use crate::peers::perftest::Perftest;
use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use hdrhistogram::Histogram;
use migration::memory::{Extent, PAGE_SIZE};
use migration::transport::{Lane, PlaneError, Session, SourcePlane, SourceTransport, Token};
use serde::Serialize;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};
use transport_rdma::RdmaSource;
use transport_tcp::{Connection, Error, TcpSource, connect_control};
use vmm::memory::GuestRam;
use whimbrel::api::model::TransportChoice;

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// Bytes of each write of the warm-up.
const WARM_UP_WRITE: u64 = 1 << 20;

/// Time between two attempts to connect to a busy server.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// A test of a transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Test {
    /// What all lanes write together, message after message without waiting.
    Bandwidth,
    /// How long it takes until the destination confirms that a message is in memory. A message of size 0 is a
    /// barrier alone.
    Latency,
    /// What it costs to register populated memory at both sides.
    Registration,
}

/// One run of a test.
#[derive(Clone, Debug, Serialize)]
pub struct Probe {
    /// The server, as `host:port`.
    pub to: String,
    /// The session.
    pub terms: SessionConfig,
    /// Number of lanes, which are streams or queue pairs.
    pub streams: u16,
    /// Bytes of a message.
    pub size: u64,
    /// Messages handed to the transport at once.
    pub batch: u16,
    /// Requests that a queue pair may have in flight, 0 for the default.
    pub depth: u32,
    /// How long it runs.
    pub time: Duration,
    /// The test.
    pub test: Test,
}

impl Probe {
    /// Runs the test.
    ///
    /// # Errors
    /// When the server cannot be reached, refuses, or the transport breaks.
    pub fn run(&self) -> anyhow::Result<Figures> {
        ensure!(self.size.is_multiple_of(PAGE_SIZE), "messages are whole pages: use a multiple of 4 KiB");
        let memory = self.terms.memory;
        let share = memory.min(MAX_MEMORY) / u64::from(self.streams.max(1)) / PAGE_SIZE * PAGE_SIZE;
        // Extents of one batch must not overlap.
        ensure!(
            self.size * u64::from(self.batch) <= share,
            "{} streams with {} messages of {} do not fit into {}; use more --memory",
            self.streams,
            self.batch,
            size(self.size),
            size(memory)
        );
        ensure!(self.size > 0 || self.test != Test::Bandwidth, "messages of no bytes have no bandwidth");
        let token = Token::random()?;
        let mut link = connect(&self.to, token)?;
        send(&mut link, &Request::Open(self.terms))?;
        let offer = match receive(&mut link, REPLY_TIMEOUT)? {
            Reply::Open { offer } => offer,
            Reply::Refused { why } => bail!("the server refused: {why}"),
            Reply::Cpu { .. } | Reply::Perftest { .. } => bail!("the server answered something else"),
        };
        let ram = GuestRam::new(memory, self.terms.pages)?;
        for region in ram.ram().regions() {
            // SAFETY: the whole mapping, to which nobody holds references.
            unsafe { std::ptr::write_bytes(region.address(), 0xa5, region.len() as usize) };
        }
        let session = Session::new(token, ram.ram().clone(), REPLY_TIMEOUT);
        let mut plane = self.connect(&link, &session, &offer)?;
        if self.test == Test::Registration {
            return self.registration(plane.as_mut());
        }
        warm_up(plane.as_mut(), memory)?;
        let before = (cpu_us(), server_cpu(&mut link)?);
        let mut figures = if self.test == Test::Bandwidth {
            self.bandwidth(plane.as_mut(), share)?
        } else {
            self.latency(plane.as_mut())?
        };
        let after = (cpu_us(), server_cpu(&mut link)?);
        if let Some(gib) = figures.remove("gib") {
            let per_gib = |us: u64| Some(us as f64 / 1e6 / gib);
            figures.extend(figures::named([
                ("source_cpu_s_per_gib", per_gib(after.0 - before.0)),
                ("target_cpu_s_per_gib", per_gib(after.1.saturating_sub(before.1))),
            ]));
        }
        Ok(figures)
    }

    fn connect(
        &self,
        link: &Connection,
        session: &Session,
        offer: &[u8],
    ) -> anyhow::Result<Box<dyn SourcePlane>> {
        Ok(match self.terms.transport {
            TransportChoice::Rdma => {
                let options = self.terms.rdma().with_lanes(self.streams).with_depth(self.depth);
                RdmaSource::new(options).connect(session, offer)?
            }
            TransportChoice::Auto | TransportChoice::Tcp => {
                TcpSource::new(link.peer(), self.streams).connect(session, offer)?
            }
        })
    }

    /// Each lane writes to its own share of memory, over and over.
    fn bandwidth(&self, plane: &mut dyn SourcePlane, share: u64) -> anyhow::Result<Figures> {
        let began = Instant::now();
        let messages = thread::scope(|scope| {
            let threads: Vec<_> = plane
                .lanes()
                .iter_mut()
                .zip((0u64..).map(|lane| lane * share))
                .map(|(lane, begin)| scope.spawn(move || self.drive(lane.as_mut(), begin, share, began)))
                .collect();
            let merged =
                threads.into_iter().map(|t| t.join().map_err(|_| anyhow::anyhow!("a lane panicked")));
            merged.map(|result| Ok(result??)).sum::<anyhow::Result<u64>>()
        })?;
        let seconds = began.elapsed().as_secs_f64();
        let bytes = (messages * self.size) as f64;
        Ok(figures::named([
            ("stream_mib_s", Some(bytes / MIB / seconds)),
            ("messages_s", Some(messages as f64 / seconds)),
            ("gib", Some(bytes / GIB)),
        ]))
    }

    /// Writes until the time is over and everything is confirmed; returns the number of messages.
    fn drive(&self, lane: &mut dyn Lane, begin: u64, share: u64, began: Instant) -> Result<u64, PlaneError> {
        let places = share / self.size;
        let at =
            |message: u64| Extent { region: 0, offset: begin + message % places * self.size, len: self.size };
        let mut batch = Vec::with_capacity(usize::from(self.batch));
        let mut messages = 0;
        while began.elapsed() < self.time {
            batch.clear();
            batch.extend((messages..).take(usize::from(self.batch)).map(at));
            lane.write(&batch)?;
            messages += u64::from(self.batch);
        }
        lane.post_barrier(1)?;
        lane.wait_barrier(1)?;
        Ok(messages)
    }

    /// One page of every chunk is written: all of them are registered, and hardly anything is sent.
    fn registration(&self, plane: &mut dyn SourcePlane) -> anyhow::Result<Figures> {
        let lane = plane.lanes().first_mut().context("the transport has no lanes")?;
        let memory = self.terms.memory;
        let began = Instant::now();
        for offset in (0..memory).step_by(self.terms.rdma().chunk as usize) {
            lane.write(&[Extent { region: 0, offset, len: PAGE_SIZE }])?;
        }
        lane.post_barrier(0)?;
        lane.wait_barrier(0)?;
        let ms = began.elapsed().as_secs_f64() * 1e3;
        let per_gib = |ms: f64| Some(ms / (memory as f64 / GIB));
        let source = lane.stats().registration_us as f64 / 1e3;
        Ok(figures::named([
            ("registered_ms_per_gib", per_gib(ms)),
            ("source_registered_ms_per_gib", per_gib(source)),
        ]))
    }

    /// One lane writes a message and waits for its confirmation, over and over.
    fn latency(&self, plane: &mut dyn SourcePlane) -> anyhow::Result<Figures> {
        let lane = plane.lanes().first_mut().context("the transport has no lanes")?;
        // From a nanosecond to a minute, with three digits.
        let mut histogram = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3)?;
        let places = self.terms.memory / self.size.max(PAGE_SIZE);
        let began = Instant::now();
        let mut round = 1u32;
        while began.elapsed() < self.time {
            let sent = Instant::now();
            if self.size > 0 {
                let offset = u64::from(round) % places * self.size;
                lane.write(&[Extent { region: 0, offset, len: self.size }])?;
            }
            lane.post_barrier(round)?;
            lane.wait_barrier(round)?;
            histogram.saturating_record(sent.elapsed().as_nanos() as u64);
            round += 1;
        }
        let us = |share: f64| Some(histogram.value_at_quantile(share) as f64 / 1e3);
        Ok(figures::named([
            ("latency_us", us(0.5)),
            ("latency_p99_us", us(0.99)),
            ("latency_p99_9_us", us(0.999)),
            ("latency_p99_99_us", us(0.9999)),
            ("latency_most_us", us(1.0)),
        ]))
    }
}

/// Connects to the server, which may be busy while it frees the last session's memory.
fn connect(to: &str, token: Token) -> anyhow::Result<Connection> {
    let deadline = Instant::now() + REPLY_TIMEOUT;
    loop {
        match connect_control(to, token, REPLY_TIMEOUT) {
            Err(Error::Busy { .. }) if Instant::now() < deadline => thread::sleep(RETRY_INTERVAL),
            result => {
                return result.with_context(|| {
                    format!(
                        "is `whimbrel-bench transport --server --bind ADDRESS` running there? No server of \
                         whimbrel-bench answers at {to}"
                    )
                });
            }
        }
    }
}

/// Writes all memory once on the first lane, so that it is populated and registered at both sides.
fn warm_up(plane: &mut dyn SourcePlane, memory: u64) -> anyhow::Result<()> {
    let lane = plane.lanes().first_mut().context("the transport has no lanes")?;
    for offset in (0..memory).step_by(WARM_UP_WRITE as usize) {
        lane.write(&[Extent { region: 0, offset, len: WARM_UP_WRITE.min(memory - offset) }])?;
    }
    lane.post_barrier(0)?;
    Ok(lane.wait_barrier(0)?)
}

fn server_cpu(link: &mut Connection) -> anyhow::Result<u64> {
    send(link, &Request::Cpu)?;
    match receive(link, REPLY_TIMEOUT)? {
        Reply::Cpu { us } => Ok(us),
        _ => bail!("the server answered something else"),
    }
}

/// Runs perftest with the server at `to`.
///
/// # Errors
/// When the server refuses, or perftest is missing or fails at either side.
pub fn perftest(to: &str, test: &Perftest) -> anyhow::Result<Figures> {
    let mut link = connect(to, Token::random()?)?;
    send(&mut link, &Request::Perftest(*test))?;
    match receive(&mut link, REPLY_TIMEOUT)? {
        Reply::Perftest { port } => test.run(link.local()?.ip(), SocketAddr::new(link.peer().ip(), port)),
        Reply::Refused { why } => bail!("the server refused: {why}"),
        Reply::Cpu { .. } | Reply::Open { .. } => bail!("the server answered something else"),
    }
}

/// Copies memory, which shows what a processor reaches without any transport.
///
/// # Errors
/// When the machine cannot address as much memory.
pub fn copy(memory: u64, time: Duration) -> anyhow::Result<Figures> {
    let len = usize::try_from(memory)?;
    let from = vec![0xa5u8; len];
    let mut to = vec![0u8; len];
    to.copy_from_slice(&from);
    let (began, cpu) = (Instant::now(), cpu_us());
    let mut copies = 0u32;
    while began.elapsed() < time {
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&to);
        copies += 1;
    }
    let (seconds, bytes) = (began.elapsed().as_secs_f64(), f64::from(copies) * len as f64);
    let cpu = (cpu_us() - cpu) as f64 / 1e6;
    Ok(figures::named([
        ("stream_mib_s", Some(bytes / MIB / seconds)),
        ("source_cpu_s_per_gib", Some(cpu / (bytes / GIB))),
    ]))
}
