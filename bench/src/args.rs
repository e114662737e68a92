//! The command line.

use crate::contender::Peers;
use crate::guest::Content;
use crate::transport::Completion;
use crate::transport::client::Test;
use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::net::IpAddr;
use std::path::PathBuf;
use vmm::memory::PageSize;
use whimbrel::api::model::TransportChoice;

/// Measures migrations between real processes on this machine.
#[derive(Debug, Parser)]
#[command(name = "whimbrel-bench", version, about, max_term_width = 110)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Measure the blackout: how long a guest stands still when it moves, by its own clock and the source's
    Blackout(BlackoutArgs),
    /// Measure how fast a guest moves that has touched next to nothing of its memory
    Untouched(UntouchedArgs),
    /// Measure how fast memory full of random content moves, compared with peers in the same run
    Throughput(ThroughputArgs),
    /// Measure guests of every combination of the options, and how figures grow with the guest
    Matrix(MatrixArgs),
    /// Measure a transport without a guest: bandwidth, message rate, latency and processor time, between a
    /// server and a client or two processes of this machine
    Transport(TransportArgs),
    /// Print the measurements in files that --save wrote, even if they are incomplete
    Show(ShowArgs),
    /// Tell which differences between two files that --save wrote are significant
    Compare(CompareArgs),
    /// Write one HTML page with plots of the measurements in files that --save wrote
    Report(ReportArgs),
    /// Write man pages
    Man {
        /// Folder to write them to
        folder: PathBuf,
    },
}

/// Where results go.
#[derive(Args, Clone, Debug)]
pub struct OutputArgs {
    /// Print JSON, a line for every run as soon as it is over, instead of tables
    #[arg(long)]
    pub json: bool,
    /// Append the same lines to this file
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
}

/// The program to measure, and where results go.
#[derive(Args, Clone, Debug)]
pub struct CommonArgs {
    /// The whimbrel program; without it, the one beside this program
    #[arg(long)]
    pub whimbrel: Option<PathBuf>,
    #[command(flatten)]
    pub output: OutputArgs,
}

impl CommonArgs {
    /// The program's path.
    ///
    /// # Errors
    /// When the file does not exist.
    pub fn program(&self) -> anyhow::Result<PathBuf> {
        let path = match &self.whimbrel {
            Some(path) => path.clone(),
            None => std::env::current_exe()
                .context("cannot find this program's own file")?
                .with_file_name("whimbrel"),
        };
        anyhow::ensure!(
            path.is_file(),
            "there is no program {}; build it (cargo build --release --bin whimbrel) or name one with --whimbrel",
            path.display()
        );
        Ok(path)
    }
}

#[derive(Args, Debug)]
pub struct BlackoutArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Guest memory
    #[arg(long, short = 'm', default_value = "1G", value_parser = size)]
    pub memory: u64,
    /// Virtual CPUs
    #[arg(long, short = 'c', default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub vcpus: u32,
    /// Memory that the guest keeps rewriting while it moves; 0 for an idle guest
    #[arg(long, default_value = "0", value_parser = size)]
    pub working_set: u64,
    /// Measure moves through TLS as well, with certificates that are made for each run
    #[arg(long)]
    pub tls: bool,
    /// Moves, each of a fresh guest
    #[arg(long, visible_alias = "runs", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
}

#[derive(Args, Debug)]
pub struct UntouchedArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Guest memory
    #[arg(long, short = 'm', default_value = "8G", value_parser = size)]
    pub memory: u64,
    /// Moves, each of a fresh guest
    #[arg(long, visible_alias = "runs", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
}

/// Peers that are measured in every round.
#[derive(Args, Clone, Debug)]
pub struct PeerArgs {
    /// Measure iperf3 with zero copy over loopback
    #[arg(long)]
    pub iperf3: bool,
    /// Measure QEMU with this script, which migrates a paused guest and prints one line of JSON
    #[arg(long)]
    pub qemu_script: Option<PathBuf>,
    /// Measure this program of QEMU, which then moves a paused guest; with --tls, through TLS as well
    #[arg(long, value_name = "PATH", conflicts_with = "qemu_script")]
    pub qemu: Option<PathBuf>,
    /// QEMU's multifd channels; by default 2 for a populated destination, else 4
    #[arg(long, value_delimiter = ',')]
    pub multifd: Vec<u16>,
    /// Measure this program of Cloud Hypervisor, which then moves our guest; with --tls, through TLS as well
    #[arg(long, value_name = "PATH")]
    pub cloud_hypervisor: Option<PathBuf>,
    /// Cloud Hypervisor's connections
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8", requires = "cloud_hypervisor",
        value_parser = clap::value_parser!(u16).range(1..=128))]
    pub connections: Vec<u16>,
}

impl From<PeerArgs> for Peers {
    fn from(args: PeerArgs) -> Self {
        let PeerArgs { iperf3, qemu_script, qemu, multifd, cloud_hypervisor, connections } = args;
        Peers { iperf3, qemu_script, qemu, multifd, cloud_hypervisor, connections, tls: false }
    }
}

#[derive(Args, Debug)]
pub struct ThroughputArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// A second whimbrel program, which is measured alternately with the first
    #[arg(long)]
    pub against: Option<PathBuf>,
    /// Guest memory, filled with random content
    #[arg(long, short = 'm', default_value = "4G", value_parser = size)]
    pub memory: u64,
    /// Populate the destination's memory before the clock starts
    #[arg(long)]
    pub populate: bool,
    /// Measure moves through TLS as well, with certificates that are made for each run, and how fast they can
    /// be at most
    #[arg(long)]
    pub tls: bool,
    #[command(flatten)]
    pub comparison: ComparisonArgs,
}

/// What is compared, and how often.
#[derive(Args, Debug)]
pub struct ComparisonArgs {
    /// TCP streams, or several numbers to compare; 0 for the default
    #[arg(long, value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u16).range(0..=64))]
    pub streams: Vec<u16>,
    /// Rounds, each with one run of every contender
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    #[command(flatten)]
    pub peers: PeerArgs,
    /// Do not warm memory up before each run
    #[arg(long)]
    pub no_warm_up: bool,
}

/// Whether the destination is populated before it accepts data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Populate {
    No,
    Yes,
}

/// Pages that a guest rewrites each second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rate {
    /// This number; 0 for as many as it can.
    Pages(u64),
    /// This share of its memory, in per cent.
    Percent(f64),
}

impl Rate {
    /// Pages a second for a guest with this much memory. A share gives at least one page, because 0 means no
    /// limit.
    pub fn pages(self, memory: u64) -> u64 {
        match self {
            Rate::Pages(pages) => pages,
            Rate::Percent(share) => ((memory / 4096) as f64 * share / 100.0).round().max(1.0) as u64,
        }
    }
}

#[derive(Args, Debug)]
pub struct MatrixArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Guest memory
    #[arg(long, short = 'm', value_delimiter = ',', default_value = "1G", value_parser = size)]
    pub memory: Vec<u64>,
    /// Content of the memory
    #[arg(long, value_enum, value_delimiter = ',', default_value = "random")]
    pub content: Vec<Content>,
    /// Virtual CPUs
    #[arg(long, short = 'c', value_delimiter = ',', default_value = "1",
        value_parser = clap::value_parser!(u32).range(1..=64))]
    pub vcpus: Vec<u32>,
    /// Memory that the guest keeps rewriting while it moves; 0 for an idle guest
    #[arg(long, value_delimiter = ',', default_value = "0", value_parser = size)]
    pub working_set: Vec<u64>,
    /// Pages that the guest rewrites each second, as a number or as a share of its memory such as 1%; 0 for
    /// as many as it can
    #[arg(long, value_delimiter = ',', default_value = "0", value_parser = rate)]
    pub rate: Vec<Rate>,
    /// Timer interrupts a second on each virtual CPU; by default the guest's own
    #[arg(long, value_parser = clap::value_parser!(u32).range(20..=10_000))]
    pub timer_hz: Option<u32>,
    /// Populate the destination's memory before it accepts data
    #[arg(long, value_enum, value_delimiter = ',', default_value = "no")]
    pub populate: Vec<Populate>,
    /// Transport for memory: auto, tcp or rdma
    #[arg(long, value_delimiter = ',', default_value = "auto", value_parser = transport)]
    pub transport: Vec<TransportChoice>,
    /// Address of this machine on which the destination listens; for RDMA, one of an RDMA device
    #[arg(long, default_value = "127.0.0.1")]
    pub via: IpAddr,
    #[command(flatten)]
    pub comparison: ComparisonArgs,
}

#[derive(Args, Debug)]
pub struct TransportArgs {
    #[command(flatten)]
    pub output: OutputArgs,
    /// Run the server, which the client writes to, until a signal ends it
    #[arg(long, short = 's', conflicts_with = "client")]
    pub server: bool,
    /// As the server, end when standard input ends
    #[arg(long, hide = true)]
    pub until_input_ends: bool,
    /// Address on which the server listens; for RDMA, one of an RDMA device. Any client that reaches it can
    /// make the server allocate memory
    #[arg(long, short = 'B', default_value = "127.0.0.1")]
    pub bind: IpAddr,
    /// Port of the server; 0 lets the server choose a free one
    #[arg(long, short = 'p', default_value_t = 5204)]
    pub port: u16,
    /// Run the client with the server on this host; by default a server is started on this machine
    #[arg(long, short = 'c', value_name = "HOST")]
    pub client: Option<String>,
    /// Transport: tcp or rdma
    #[arg(long, default_value = "tcp", value_parser = transport)]
    pub transport: TransportChoice,
    /// Number of streams or queue pairs
    #[arg(long, short = 'P', value_delimiter = ',', default_value = "1,4",
        value_parser = clap::value_parser!(u16).range(1..=64))]
    pub parallel: Vec<u16>,
    /// Bytes of a message, a multiple of 4K; ratios are those of the first length. For up to 1M, latency is
    /// measured too
    #[arg(long, short = 'l', value_delimiter = ',', default_value = "1M,4K,64K,16M", value_parser = size)]
    pub length: Vec<u64>,
    /// Messages handed to the transport at once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub batch: u16,
    /// Requests that a queue pair may have in flight, up to 256; 0 for the default. RDMA only
    #[arg(long, value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u32).range(0..=256))]
    pub depth: Vec<u32>,
    /// How both sides wait for completions. RDMA only
    #[arg(long, value_enum, value_delimiter = ',', default_value = "channel")]
    pub completion: Vec<Completion>,
    /// Tests to run; by default all that the transport has
    #[arg(long, value_enum, value_delimiter = ',')]
    pub test: Vec<Test>,
    /// Bytes of each memory registration, for the test of registration. RDMA only
    #[arg(long, value_delimiter = ',', default_value = "2M,16M,64M", value_parser = chunk)]
    pub chunk: Vec<u64>,
    /// Pages of the registered memory: 4k, 2m or 1g. Other tests use the first
    #[arg(long, value_delimiter = ',', default_value = "4k", value_parser = clap::value_parser!(PageSize))]
    pub page_size: Vec<PageSize>,
    /// Seconds of each run
    #[arg(long, short = 't', default_value_t = 1.0, value_parser = seconds)]
    pub time: f64,
    /// Memory that the client writes to, over and over
    #[arg(long, short = 'm', default_value = "256M", value_parser = size)]
    pub memory: u64,
    /// Rounds, each with one run of every contender
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Measure iperf3 with zero copy over loopback in every round; not with a server on another host
    #[arg(long)]
    pub iperf3: bool,
    /// Measure perftest's ib_write_bw and ib_write_lat between the same devices in every round; the server
    /// starts their server side
    #[arg(long)]
    pub perftest: bool,
    /// Measure a copy of memory in every round
    #[arg(long)]
    pub copy: bool,
}

#[derive(Args, Debug)]
pub struct ShowArgs {
    /// Files that --save wrote
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
}

#[derive(Args, Debug)]
pub struct CompareArgs {
    /// The earlier file
    pub old: PathBuf,
    /// The later file
    pub new: PathBuf,
    /// Least difference that matters, in per cent
    #[arg(long, value_name = "PERCENT", default_value_t = 2.0)]
    pub least: f64,
    /// Compare figures relative to those of this contender in the same round, such as "iperf3 -Z", so that
    /// disturbances of the machine count less
    #[arg(long, value_name = "CONTENDER")]
    pub relative_to: Option<String>,
    /// Compare every figure, not only those that the measurement shows
    #[arg(long)]
    pub all: bool,
    /// Print JSON, including the differences that are not real
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct ReportArgs {
    /// Files that --save wrote
    #[arg(required = true)]
    pub files: Vec<PathBuf>,
    /// The HTML file, which is overwritten
    #[arg(long, short = 'o', value_name = "FILE")]
    pub output: PathBuf,
    /// Title of the page
    #[arg(long, default_value = "Whimbrel, measured")]
    pub title: String,
}

/// A size in bytes; K, M, G and T are powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let config = parse_size::Config::new().with_binary();
    config.parse_size(text).map_err(|e| format!("{e}; write a size such as 512M or 4G"))
}

/// Bytes of a memory registration.
fn chunk(text: &str) -> Result<u64, String> {
    let range = transport_rdma::MIN_CHUNK..=crate::transport::MAX_MEMORY;
    size(text).and_then(|chunk| {
        let fits = range.contains(&chunk) && chunk.is_power_of_two();
        if fits { Ok(chunk) } else { Err("use a power of two from 2M to 2G".into()) }
    })
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().ok().filter(|seconds| (0.01..=3600.0).contains(seconds));
    seconds.ok_or_else(|| "write seconds from 0.01 to 3600".into())
}

fn rate(text: &str) -> Result<Rate, String> {
    let parsed = match text.strip_suffix('%') {
        Some(share) => share.parse().ok().filter(|share| (0.0..=100.0).contains(share)).map(Rate::Percent),
        None => text.parse().ok().map(Rate::Pages),
    };
    parsed.ok_or_else(|| "write a number of pages, or a share of memory from 0% to 100%".into())
}

fn transport(text: &str) -> Result<TransportChoice, String> {
    serde_json::from_value(text.into()).map_err(|_| "use auto, tcp or rdma".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.command)
    }

    #[test]
    fn lists_are_read() {
        let Command::Throughput(args) = parse("bench throughput --streams 1,2,4 --json").unwrap() else {
            panic!("another command")
        };
        assert!(args.common.output.json);
        assert_eq!((args.comparison.streams, args.memory), (vec![1, 2, 4], 4 << 30));
        assert!(parse("bench throughput --streams 65").is_err());
        let line = "bench matrix -m 1G,2G --content untouched,random --rate 0,1%,500 --populate no,yes --transport tcp";
        let Command::Matrix(args) = parse(line).unwrap() else { panic!("another command") };
        assert_eq!(args.memory, [1 << 30, 2 << 30]);
        assert_eq!(args.content, [Content::Untouched, Content::Random]);
        assert_eq!(args.rate, [Rate::Pages(0), Rate::Percent(1.0), Rate::Pages(500)]);
        assert_eq!(args.populate, [Populate::No, Populate::Yes]);
        assert_eq!(args.transport, [TransportChoice::Tcp]);
        for wrong in ["--rate 101%", "--rate some", "--transport carrier-pigeon", "--content full"] {
            assert!(parse(&format!("bench matrix {wrong}")).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_share_of_memory_is_a_number_of_pages() {
        assert_eq!(Rate::Percent(1.0).pages(1 << 30), 2621);
        assert_eq!(Rate::Percent(0.0).pages(1 << 30), 1);
        assert_eq!(Rate::Pages(0).pages(1 << 30), 0);
    }
}
