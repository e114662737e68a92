//! `ib_write_bw` and `ib_write_lat` of perftest: what the RDMA devices alone can do.
//!
//! They run between the devices that our transport would use, which are those of the two ends of the control
//! connection. Our server starts their server side, so that they work between two hosts.
//!
//! `ib_write_lat` reports half of a round trip, while our transport reports the whole time until the
//! confirmation. Its times are therefore doubled. It polls memory for the arrival, without completions or
//! sleeping threads.

use super::free_port;
use crate::figures::{self, Figures};
use anyhow::{Context, bail, ensure};
use serde::{Deserialize, Serialize};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use transport_rdma::probe;

/// How long the server side may take to listen.
const LISTEN_TIMEOUT: Duration = Duration::from_secs(20);

/// Time between two checks whether it listens.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// The most bytes of a message.
const MAX_SIZE: u64 = 1 << 30;

/// Bytes that the bandwidth test has in flight in all, which is more than any link holds.
///
/// By default it posts 128 messages on each queue pair before it polls for the first completion. A device
/// whose driver works in the posting thread, as soft-RoCE's does, would then complete nothing in the time of
/// a test.
const WINDOW: u64 = 8 << 20;

/// The fewest and the most messages that each queue pair has in flight.
const DEPTHS: (u64, u64) = (2, 128);

/// From this message size on, perftest counts every message by itself and not in hundreds.
const COUNTED: u64 = 64 << 10;

/// Bytes that the latency test sends in all.
const LATENCY_BYTES: u64 = 64 << 20;

/// The fewest and the most messages of the latency test.
const LATENCY_MESSAGES: (u64, u64) = (20, 1000);

/// A program of perftest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tool {
    /// `ib_write_bw`
    Bandwidth,
    /// `ib_write_lat`
    Latency,
}

/// One run of perftest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Perftest {
    /// The program.
    pub tool: Tool,
    /// Bytes of a message.
    pub size: u64,
    /// Queue pairs of the bandwidth test.
    pub queue_pairs: u16,
    /// Seconds of the bandwidth test.
    pub seconds: u64,
}

/// The server side. Dropping it ends the process.
pub struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended by itself, unless the client failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Perftest {
    /// The program's name.
    pub fn name(&self) -> &'static str {
        match self.tool {
            Tool::Bandwidth => "ib_write_bw",
            Tool::Latency => "ib_write_lat",
        }
    }

    /// The command line for the device that has the address `local`.
    fn command(&self, local: IpAddr, port: u16) -> anyhow::Result<Command> {
        ensure!((1..=MAX_SIZE).contains(&self.size), "{} cannot send {} bytes", self.name(), self.size);
        let (device, device_port, gid) = device(local)?;
        let mut command = Command::new(self.name());
        command.args(["-F", "-d", &device, "-i", &device_port.to_string(), "-x", &gid.to_string()]);
        command.args(["-p", &port.to_string(), "-s", &self.size.to_string()]);
        match self.tool {
            Tool::Bandwidth => {
                let depth =
                    (WINDOW / self.size / u64::from(self.queue_pairs.max(1))).clamp(DEPTHS.0, DEPTHS.1);
                if self.size >= COUNTED {
                    command.args(["-Q", "1"]);
                }
                command.args(["-q", &self.queue_pairs.to_string(), "-t", &depth.to_string()]);
                command.args(["-D", &self.seconds.to_string()])
            }
            Tool::Latency => {
                let (least, most) = LATENCY_MESSAGES;
                command.args(["-n", &(LATENCY_BYTES / self.size).clamp(least, most).to_string()])
            }
        };
        command.stdin(Stdio::null());
        Ok(command)
    }

    fn absent(&self) -> String {
        format!("cannot run {}; install perftest, or leave --perftest out", self.name())
    }

    /// Starts the server side on the device that has the address `local`; returns it with its port.
    ///
    /// # Errors
    /// When perftest is not installed or no device has the address.
    pub fn listen(&self, local: IpAddr) -> anyhow::Result<(Server, u16)> {
        let port = free_port()?;
        let mut command = self.command(local, port)?;
        command.stdout(Stdio::null()).stderr(Stdio::inherit());
        let mut server = command.spawn().map(Server).with_context(|| self.absent())?;
        let deadline = Instant::now() + LISTEN_TIMEOUT;
        while !listens(port) {
            if let Some(status) = server.0.try_wait()? {
                bail!("the server's {} ended at once: {status}", self.name());
            }
            ensure!(Instant::now() < deadline, "the server's {} does not listen", self.name());
            thread::sleep(POLL_INTERVAL);
        }
        Ok((server, port))
    }

    /// Runs the client side on the device that has the address `local`.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, local: IpAddr, to: SocketAddr) -> anyhow::Result<Figures> {
        let mut command = self.command(local, to.port())?;
        let output = command.arg(to.ip().to_string()).output().with_context(|| self.absent())?;
        let Output { status, stdout, stderr } = output;
        let said = String::from_utf8_lossy(&stdout);
        ensure!(
            status.success(),
            "{} failed: {}{}",
            self.name(),
            said.trim(),
            String::from_utf8_lossy(&stderr).trim()
        );
        // The result is below a line of dashes.
        let row =
            || said.lines().rfind(|line| !line.is_empty() && !line.starts_with('-')).unwrap_or("nothing");
        self.figures(&said).with_context(|| format!("{} printed no result but {}", self.name(), row().trim()))
    }

    /// Reads the result, which is in the row that begins with the size of a message.
    fn figures(&self, said: &str) -> Option<Figures> {
        let row = said.lines().find_map(|line| {
            let row: Vec<f64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
            // It prints zeros when no message was completed in the time.
            (row.first() == Some(&(self.size as f64)) && row.get(3).is_some_and(|it| *it > 0.0))
                .then_some(row)
        })?;
        // What perftest calls MB is 2^20 bytes.
        Some(match self.tool {
            Tool::Bandwidth => figures::named([
                ("stream_mib_s", Some(row[3])),
                ("messages_s", Some(row[3] * f64::from(1 << 20) / self.size as f64)),
            ]),
            Tool::Latency => {
                let both_ways = |column: usize| row.get(column).map(|us| 2.0 * us);
                figures::named([
                    ("latency_us", both_ways(4)),
                    ("latency_p99_us", both_ways(7)),
                    ("latency_p99_9_us", both_ways(8)),
                    ("latency_most_us", both_ways(3)),
                ])
            }
        })
    }
}

/// Name, port and GID index of the RDMA device that has an address. RoCE v2 is preferred.
fn device(address: IpAddr) -> anyhow::Result<(String, u8, u32)> {
    let devices = probe::devices().map_err(anyhow::Error::msg)?;
    let gids = devices.iter().flat_map(|device| {
        device
            .ports
            .iter()
            .flat_map(move |port| port.gids.iter().map(move |gid| (&device.name, port.number, gid)))
    });
    gids.filter(|(.., gid)| gid.address == address)
        .max_by_key(|(.., gid)| gid.kind.contains("v2"))
        .map(|(name, port, gid)| (name.clone(), port, gid.index))
        .with_context(|| format!("{address} is on no RDMA device of this host"))
}

/// Whether a program listens on a port of this host. A connection would not do, because perftest would take
/// it for its client.
fn listens(port: u16) -> bool {
    let port = format!(":{port:04X}");
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().any(|path| {
        fs::read_to_string(path).unwrap_or_default().lines().any(|line| {
            let mut words = line.split_whitespace().skip(1);
            let (local, _, state) = (words.next(), words.next(), words.next());
            local.is_some_and(|local| local.ends_with(&port)) && state == Some("0A")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn the_row_of_the_result_is_read() {
        let bandwidth = Perftest { tool: Tool::Bandwidth, size: 1 << 20, queue_pairs: 1, seconds: 1 };
        let said = " Number of qps   : 1\n #bytes #iterations BW peak[MB/sec] BW average[MB/sec] MsgRate[Mpps]\n \
                    1048576    90               0.00               80.50              0.000081\n";
        let figures = bandwidth.figures(said).unwrap();
        assert_eq!((figures["stream_mib_s"], figures["messages_s"]), (80.5, 80.5));
        assert!(bandwidth.figures("1048576 0 0.00 0.00 0.000000").is_none());
        let latency = Perftest { tool: Tool::Latency, size: 4096, ..bandwidth };
        let said = " 4096    1000          1.50           9.00         2.00     \t       2.10    \t0.50   \t\t3.00    \t\t4.00\n";
        let figures = latency.figures(said).unwrap();
        let all =
            ["latency_us", "latency_p99_us", "latency_p99_9_us", "latency_most_us"].map(|id| figures[id]);
        assert_eq!(all, [4.0, 6.0, 8.0, 18.0], "there and back");
        assert!(latency.figures("Couldn't connect").is_none());
    }

    #[test]
    fn a_listening_port_is_seen_without_a_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        assert!(listens(port));
        drop(listener);
        assert!(!listens(port));
    }
}
