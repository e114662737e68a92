//! The command line.

use super::choice::{
    AIO, CONTENTS, ENCRYPTION, KTLS, ON_REBOOT, ON_STALL, OnReboot, SECCOMP, THP, TRANSPORTS, one_of,
};
use clap::{Args, Parser, Subcommand};
use migration::policy::OnStall;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use transport_tcp::tls::Pattern;
use vmm::guest::Content;
use vmm::host::MAX_VCPUS;
use vmm::limits::{Limits, NamePattern};
use vmm::memory::{PageSize, Thp};
use vmm::names;
use vmm::sandbox::Mode;
use vmm::virtio::block::{Aio, BlockConfig, MAX_QUEUES, OnError};
use vmm::virtio::net::{Announcing, MAX_PAIRS, Mac, TapConfig};
use whimbrel::api::model::TransportChoice;
use whimbrel::security::{Encryption, Ktls, Security, TlsFiles};

/// Moves running KVM virtual machines from host to host.
#[derive(Debug, Parser)]
#[command(name = "whimbrel", version, about, max_term_width = 110, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 wrong usage; 3 the migration failed and the guest runs \
on at the source; 4 the guest is held paused and an operator must decide; 5 the guest crashed; 6 it is unknown whether the guest has \
moved; 7 (status) no guest runs here; 8 nobody answers on the API's socket; 130, 143 (migrate) interrupted, and the \
migration goes on.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine
    Run(RunArgs),
    /// Wait for a virtual machine to arrive, then run it
    Receive(ReceiveArgs),
    /// Move a running virtual machine to a waiting receiver
    Migrate(MigrateArgs),
    /// Show what a virtual machine is doing, and its migration
    Status(Target),
    /// Cancel a migration; the guest continues to run where it is
    Cancel(Target),
    /// Pause a virtual machine
    Pause(Target),
    /// Let a paused virtual machine continue
    Resume(ResumeArgs),
    /// Press a virtual machine's power button: a guest that listens to it shuts down
    Shutdown(Target),
    /// End a virtual machine's process
    Quit(Target),
    /// Show what this host can do, what it lacks, and how to provide that
    Doctor(DoctorArgs),
    /// Move an embedded guest between two processes on this machine and show what it felt
    Demo(DemoArgs),
    /// Make the certificates by which hosts know each other
    Pki(PkiArgs),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Write man pages
    Man {
        /// Folder to write them to
        folder: PathBuf,
    },
}

/// What kind of machine.
#[derive(Args, Clone, Debug)]
pub struct MachineArgs {
    /// Guest memory, such as 512M or 4G; from 16M up
    #[arg(long, short = 'm', default_value = "1G", value_parser = memory)]
    pub memory: u64,
    /// Virtual CPUs
    #[arg(long, short = 'c', default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_VCPUS)))]
    pub vcpus: u32,
    /// Pages that back guest memory: 4k, or 2m and 1g huge pages
    #[arg(long, default_value = "4k")]
    pub pages: PageSize,
}

/// The embedded guest.
#[derive(Args, Clone, Debug)]
pub struct WorkloadArgs {
    /// Memory that the embedded guest keeps rewriting and checking; 0 for an idle guest
    #[arg(long, default_value = "0", value_parser = size)]
    pub working_set: u64,
    /// Pages that it rewrites each second; 0 for as many as it can
    #[arg(long, default_value_t = 0)]
    pub rate: u64,
    /// Timer interrupts a second on each of its virtual CPUs. The default is 1000 for an idle guest, which
    /// looks at the clock at each of them, and 100 for a guest that never sleeps
    #[arg(long, value_parser = clap::value_parser!(u32).range(20..=10_000))]
    pub timer_hz: Option<u32>,
    /// Memory to fill before it starts, in addition to its working set
    #[arg(long, default_value = "0", value_parser = size)]
    pub fill: u64,
    /// What to fill it with
    #[arg(long, default_value = "random", value_parser = one_of(CONTENTS))]
    pub fill_with: Content,
    /// Number of blocks of 4 KiB at the start of its first disk that it keeps writing and checking; their
    /// present content is lost
    #[arg(long, value_name = "BLOCKS", default_value_t = 0)]
    pub journal: u64,
}

#[derive(Args, Debug)]
pub struct RunArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Kernel to start: a PVH ELF image or a 64-bit bzImage. Without it, the machine boots the kernel on its
    /// first disk, or the embedded guest if it has no disk
    #[arg(long, short = 'k')]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk for the kernel
    #[arg(long, requires = "kernel")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line. For a kernel from a disk, root= and ro are put before it
    #[arg(long, default_value = "console=ttyS0")]
    pub cmdline: String,
    /// What follows when the guest reboots, or resets its machine in another way, also after it has moved
    #[arg(long, default_value = "reset", value_parser = one_of(ON_REBOOT))]
    pub on_reboot: OnReboot,
    /// Give the machine a disk (virtio-blk): a raw image or a block device, as
    /// PATH[,readonly][,cached][,queues=N][,werror=POLICY][,rerror=POLICY]. In the place of PATH,
    /// storage=NAME,file=PATH names a file of a storage that each host's configuration (--host-config)
    /// knows. The policies say what follows
    /// when this host cannot write or read: report tells the guest, stop pauses it until that is over, enospc
    /// does so if there is no room. Default: werror=enospc,rerror=report. Repeat it for further disks
    #[arg(long, value_name = "PATH[,OPTION]...", value_parser = disk)]
    pub disk: Vec<BlockConfig>,
    /// Give the machine a network interface (virtio-net), as
    /// network=NAME[,tap=NAME][,mac=ADDRESS][,queues=PAIRS][,offloads=off]. Each host's configuration
    /// (--host-config) knows the bridge of the network, to which a tap is made; a tap that is named is used
    /// as it is. With a tap, the network can be left out. Repeat it for further interfaces
    #[arg(long, value_name = "network=NAME[,OPTION]...", value_parser = net)]
    pub net: Vec<NetArg>,
    /// Give the machine a source of entropy (virtio-rng)
    #[arg(long)]
    pub rng: bool,
    #[command(flatten)]
    pub workload: WorkloadArgs,
    #[command(flatten)]
    pub process: ProcessArgs,
}

/// What a machine's process is connected to.
#[derive(Args, Clone, Debug)]
pub struct ProcessArgs {
    /// TOML file with further options, by their long names. Options on the command line replace those of the
    /// file
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// TOML file that says what networks and storages are on this host
    #[arg(long, value_name = "FILE")]
    pub host_config: Option<PathBuf>,
    /// Unix socket for the API; the other commands reach the machine through it
    #[arg(long)]
    pub api: Option<PathBuf>,
    /// The machine's name, as `status` shows it. Default: `vm`, or for a guest that arrives the name that it
    /// has
    #[arg(long, value_parser = name)]
    pub name: Option<String>,
    /// File to which what became of each move is appended, one JSON object a line
    #[arg(long, value_name = "FILE")]
    pub record: Option<PathBuf>,
    /// Where the serial port goes: stdio, stdout, none, or a file to append to. With stdio it also reads
    /// standard input. If that is a terminal, all keys go to the guest; Ctrl-A x quits, and Ctrl-A twice
    /// sends one Ctrl-A
    #[arg(long, default_value = "stdout")]
    pub serial: SerialTarget,
    /// Where the output of the virtio console goes: stdout, none, or a file to append to. With `run`, this
    /// option also gives the machine a console. A machine that arrives has one or not, and without this
    /// option its output is dropped
    #[arg(long)]
    pub console: Option<OutputTarget>,
    /// File, pipe or terminal that the virtio console reads
    #[arg(long, requires = "console")]
    pub console_input: Option<PathBuf>,
    /// Whether guest memory in pages of 4k may come to lie in transparent huge pages, at once or later. Each
    /// host decides for itself
    #[arg(long, default_value = "on", value_parser = one_of(THP))]
    pub thp: Thp,
    /// How disks carry out requests: several at a time with io_uring, or one after the other with system
    /// calls (sync). auto uses io_uring if the kernel has it, except for disks that use the page cache
    #[arg(long, default_value = "auto", value_parser = one_of(AIO))]
    pub aio: Aio,
    /// How often, and when, the network is told where the guest is after it has arrived here or come back, as
    /// rounds=N[,initial=TIME][,step=TIME][,max=TIME]. initial is the wait after the first round; each
    /// further wait is longer by step, up to max
    #[arg(long, value_name = "OPTION,...", default_value = "rounds=5,initial=50ms,step=100ms,max=550ms")]
    #[arg(value_parser = announcing)]
    pub announce: Announcing,
    #[command(flatten)]
    pub security: SecurityArgs,
    /// Whether this process limits itself to the system calls, files and privileges that it needs
    #[arg(long, default_value = "on", value_parser = one_of(SECCOMP))]
    pub seccomp: Mode,
    /// Report on standard output as JSON, one object a line (send the serial port elsewhere)
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialTarget {
    Stdio,
    Output(OutputTarget),
}

impl std::str::FromStr for SerialTarget {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "stdio" => SerialTarget::Stdio,
            output => SerialTarget::Output(output.parse()?),
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutputTarget {
    Stdout,
    None,
    File(PathBuf),
}

impl std::str::FromStr for OutputTarget {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "stdout" => OutputTarget::Stdout,
            "none" => OutputTarget::None,
            path => OutputTarget::File(path.into()),
        })
    }
}

#[derive(Args, Debug)]
pub struct ReceiveArgs {
    /// Address to listen on, for control and data over TCP; port 0 lets the kernel choose. Without
    /// certificates (--tls) it has to be this host's own, such as 127.0.0.1
    #[arg(long, short = 'l')]
    pub listen: SocketAddr,
    /// Host that may send a guest, by a name or an address that its certificate is for, or *.DOMAIN for any
    /// host of a domain; repeatable. Without it, all hosts may that the CA vouches for
    #[arg(long, value_name = "PEER", requires = "certificates")]
    pub allow: Vec<Pattern>,
    /// What may arrive unencrypted if there are certificates: memory over RDMA (preferred), nothing
    /// (required), or memory over TCP as well (off)
    #[arg(long, default_value = "preferred", value_parser = one_of(ENCRYPTION))]
    pub encryption: Encryption,
    /// Make guest memory exist before the source may write to it. This takes time at first, and saves time
    /// later
    #[arg(long)]
    pub populate: bool,
    /// Spin on RDMA completions instead of sleeping
    #[arg(long)]
    pub busy_poll: bool,
    /// Folder whose files an arriving guest may have as disks; repeatable. Without it, guests with disks are
    /// refused
    #[arg(long, value_name = "FOLDER")]
    pub disks: Vec<PathBuf>,
    /// Take in guests whose disks this host cannot prove to be the same as the source's, by the source's
    /// locks on them. If they are not the same, the guest gets wrong data and overwrites what is there
    #[arg(long)]
    pub trust_storage: bool,
    /// Tap for a guest's network interface, as tap=NAME[,offloads=off]. Give it once for each of the guest's
    /// interfaces, in their order; a guest with more interfaces is refused. With --host-config, interfaces
    /// that name a network need none
    #[arg(long, value_name = "tap=NAME[,OPTION]", value_parser = tap)]
    pub net: Vec<TapConfig>,
    #[command(flatten)]
    pub limits: LimitArgs,
    /// End after the first migration that fails, instead of waiting for another
    #[arg(long)]
    pub once: bool,
    #[command(flatten)]
    pub process: ProcessArgs,
}

/// The most that a guest may have which arrives.
#[derive(Args, Clone, Debug, Default)]
pub struct LimitArgs {
    /// Most memory that an arriving guest may have. Without it, what the host has available
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub max_memory: Option<u64>,
    /// Most vCPUs that it may have. Without it, eight for each processor of the host
    #[arg(long, value_name = "N")]
    pub max_vcpus: Option<u32>,
    /// Most disks
    #[arg(long, value_name = "N")]
    pub max_disks: Option<usize>,
    /// Most network interfaces
    #[arg(long, value_name = "N")]
    pub max_nics: Option<usize>,
    /// Most entropy devices
    #[arg(long, value_name = "N")]
    pub max_rngs: Option<usize>,
    /// Most virtio consoles
    #[arg(long, value_name = "N")]
    pub max_consoles: Option<usize>,
    /// Name that an arriving guest may have, in which * stands for any text; repeatable. Without it, any
    #[arg(long, value_name = "NAME")]
    pub names: Vec<NamePattern>,
}

impl LimitArgs {
    pub fn limits(&self) -> Limits {
        Limits {
            memory: self.max_memory,
            vcpus: self.max_vcpus,
            disks: self.max_disks,
            nics: self.max_nics,
            rngs: self.max_rngs,
            consoles: self.max_consoles,
            names: self.names.clone(),
        }
    }
}

/// Certificates.
#[derive(Args, Clone, Debug, Default)]
#[group(id = "certificates", multiple = true)]
pub struct TlsArgs {
    /// Folder with this host's certificate for migrations: ca.pem, cert.pem, key.pem and perhaps crl.pem, as
    /// `whimbrel pki` makes them. They are read again for every migration
    #[arg(long, value_name = "FOLDER")]
    pub tls: Option<PathBuf>,
    /// Certificates of the CAs that vouch for other hosts, in PEM format
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// This host's certificate, and those between it and its CA
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// The key of this host's certificate
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// What the CAs have revoked
    #[arg(long, value_name = "FILE")]
    pub tls_crl: Option<PathBuf>,
}

/// Where to encrypt.
#[derive(Args, Clone, Debug, Default)]
pub struct KtlsArgs {
    /// Whether the kernel encrypts memory that travels by TLS
    #[arg(long, default_value = "auto", requires = "certificates", value_parser = one_of(KTLS))]
    pub ktls: Ktls,
}

/// How connections are protected.
#[derive(Args, Clone, Debug, Default)]
pub struct SecurityArgs {
    #[command(flatten)]
    pub tls: TlsArgs,
    #[command(flatten)]
    pub ktls: KtlsArgs,
    /// Migrate without certificates to and from other hosts: whoever is on the network can read and change
    /// the guest, and send one
    #[arg(long, conflicts_with = "certificates")]
    pub insecure: bool,
}

impl SecurityArgs {
    /// The files that are named.
    pub fn files(&self) -> Option<TlsFiles> {
        // Another process may read them, from another folder.
        let path =
            |path: &Option<PathBuf>| path.as_ref().map(|p| std::path::absolute(p).unwrap_or(p.clone()));
        let files = TlsFiles {
            folder: path(&self.tls.tls),
            ca: path(&self.tls.tls_ca),
            cert: path(&self.tls.tls_cert),
            key: path(&self.tls.tls_key),
            crl: path(&self.tls.tls_crl),
            ktls: self.ktls.ktls,
        };
        (!files.is_empty()).then_some(files)
    }

    /// What a process does that is told no more.
    pub fn security(&self) -> Security {
        match self.files() {
            Some(files) => Security::Tls(files),
            None if self.insecure => Security::Insecure,
            None => Security::Near,
        }
    }
}

#[derive(Args, Debug)]
pub struct PkiArgs {
    #[command(subcommand)]
    pub command: PkiCommand,
}

#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make an authority (CA)
    Init {
        /// Its folder, which is made
        folder: PathBuf,
    },
    /// Make or renew the certificate and the key of a host
    Host {
        /// The authority's folder
        folder: PathBuf,
        /// The host's name, as sources write it in --to
        name: String,
        /// Further names and addresses by which the host is reached
        others: Vec<String>,
        /// How long the certificate is good
        #[arg(long, default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36_500))]
        days: u32,
    },
    /// Revoke all certificates of a host
    Revoke {
        /// The authority's folder
        folder: PathBuf,
        /// The host's name
        name: String,
    },
}

#[derive(Args, Debug)]
pub struct Target {
    /// Unix socket of the machine's API
    #[arg(long)]
    pub api: PathBuf,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct ResumeArgs {
    #[command(flatten)]
    pub target: Target,
    /// Resume a held guest; only if it certainly does not run at the destination
    #[arg(long)]
    pub force: bool,
}

#[derive(Args, Debug)]
pub struct MigrateArgs {
    #[command(flatten)]
    pub target: Target,
    /// Where the receiver listens, as host:port
    #[arg(long)]
    pub to: String,
    /// Return at once instead of watching
    #[arg(long)]
    pub detach: bool,
    #[command(flatten)]
    pub security: SecurityArgs,
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// How to move.
#[derive(Args, Clone, Debug)]
pub struct PolicyArgs {
    /// How memory travels
    #[arg(long, default_value = "auto", value_parser = one_of(TRANSPORTS))]
    pub transport: TransportChoice,
    /// What is encrypted if there are certificates: all but memory over RDMA (preferred), all, so that RDMA
    /// is not used (required), or not even memory over TCP, if the receiver permits that (off)
    #[arg(long, default_value = "preferred", value_parser = one_of(ENCRYPTION))]
    pub encryption: Encryption,
    /// TCP streams; 0 for the default
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub streams: u16,
    /// RDMA queue pairs; 0 for the default
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub queue_pairs: u16,
    /// Spin on RDMA completions instead of sleeping: shorter waits, but each queue pair keeps a processor
    /// busy
    #[arg(long)]
    pub busy_poll: bool,
    /// Longest acceptable blackout
    #[arg(long, default_value = "300ms", value_parser = humantime::parse_duration)]
    pub downtime_limit: Duration,
    /// The most pre-copy rounds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: u32,
    /// The longest time until the guest is handed over, such as 2m. Without it, memory is copied as long as
    /// that makes progress
    #[arg(long, value_parser = humantime::parse_duration)]
    pub timeout: Option<Duration>,
    /// What to do with a guest that dirties memory faster than it can be sent
    #[arg(long, default_value = "abort", value_parser = one_of(ON_STALL))]
    pub on_stall: OnStall,
    /// Compare all memory on both sides before handing over (lengthens the blackout)
    #[arg(long)]
    pub compare_memory: bool,
    /// How long the destination may give no sign of life before it counts as lost
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    pub silence: Duration,
}

#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Size of the virtual machine to check for
    #[arg(long, short = 'm', default_value = "1G", value_parser = size)]
    pub memory: u64,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct DemoArgs {
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Memory that the guest keeps rewriting and checking while it moves; 0 for an idle guest
    #[arg(long, default_value = "64M", value_parser = size)]
    pub working_set: u64,
    /// Address of this host that the guest moves through; the address of an RDMA device makes it move over
    /// RDMA
    #[arg(long, default_value = "127.0.0.1")]
    pub via: IpAddr,
    /// How many times it moves
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub moves: u32,
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// A size in bytes; K, M, G and T are powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let config = parse_size::Config::new().with_binary();
    config.parse_size(text).map_err(|e| format!("{e}; write a size such as 512M or 4G"))
}

/// A size that guest memory can have.
fn memory(text: &str) -> Result<u64, String> {
    let bytes = size(text)?;
    vmm::memory::layout::regions(bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// A name that a machine can have.
fn name(text: &str) -> Result<String, String> {
    vmm::machine::check_name(text).map_err(|error| error.to_string())?;
    Ok(text.into())
}

/// What is done about a disk's requests that fail.
fn on_error(option: &str, text: &str) -> Result<OnError, String> {
    match text {
        "report" => Ok(OnError::Report),
        "stop" => Ok(OnError::Stop),
        "enospc" => Ok(OnError::Enospc),
        _ => Err(format!("{option}={text}: use report, stop or enospc")),
    }
}

/// A disk, with the options after its path, or after the name of its storage.
fn disk(text: &str) -> Result<BlockConfig, String> {
    let mut parts = text.split(',');
    let mut config = match parts.next() {
        Some(first) => match first.strip_prefix("storage=") {
            Some(storage) => {
                names::check(storage).map_err(|error| error.to_string())?;
                let file = parts.next().and_then(|part| part.strip_prefix("file="));
                let file = PathBuf::from(file.ok_or("after the storage, name the image by file=PATH")?);
                names::check_file(&file).map_err(|error| error.to_string())?;
                BlockConfig::in_storage(storage.into(), file)
            }
            None if !first.is_empty() => BlockConfig::new(first.into()),
            None => return Err("begin with the path of an image, or with storage=NAME,file=PATH".into()),
        },
        None => return Err("begin with the path of an image".into()),
    };
    for option in parts {
        match option.split_once('=') {
            None if option == "readonly" => config.readonly = true,
            None if option == "cached" => config.cached = true,
            Some(("queues", number)) => {
                let queues = number.parse().ok().filter(|queues| (1..=MAX_QUEUES).contains(queues));
                config.queues = queues.ok_or_else(|| format!("queues={number}: use 1 to {MAX_QUEUES}"))?;
            }
            Some(("werror", policy)) => config.errors.write = on_error("werror", policy)?,
            Some(("rerror", policy)) => config.errors.read = on_error("rerror", policy)?,
            _ => {
                return Err(format!(
                    "\"{option}\" is not an option of a disk; use readonly, cached, queues=N, werror=POLICY or \
                     rerror=POLICY"
                ));
            }
        }
    }
    Ok(config)
}

/// A network interface of a machine that is started here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetArg {
    /// Its tap; without a name, one that is made for it.
    pub tap: TapConfig,
    /// Its network.
    pub network: Option<String>,
    /// Its address; without one, a random one.
    pub mac: Option<Mac>,
    /// Pairs of queues.
    pub pairs: u16,
}

/// A network interface, by its options.
fn net(text: &str) -> Result<NetArg, String> {
    let mut tap = TapConfig::named("");
    let (mut network, mut mac, mut pairs) = (None, None, 1);
    for option in text.split(',') {
        match option.split_once('=') {
            Some(("tap", name)) if !name.is_empty() => tap.name = name.into(),
            Some(("network", name)) => {
                names::check(name).map_err(|error| error.to_string())?;
                network = Some(name.into());
            }
            Some(("mac", address)) => mac = Some(address.parse()?),
            Some(("queues", number)) => {
                let number = number.parse().ok().filter(|pairs| (1..=MAX_PAIRS).contains(pairs));
                pairs = number.ok_or_else(|| format!("{option}: use 1 to {MAX_PAIRS} pairs"))?;
            }
            Some(("offloads", "off")) => tap.offloads = false,
            _ => {
                return Err(format!(
                    "\"{option}\" is not an option of a network interface; use network=NAME, tap=NAME, mac=ADDRESS, \
                     queues=PAIRS or offloads=off"
                ));
            }
        }
    }
    if tap.name.is_empty() && network.is_none() {
        return Err("name its network by network=NAME, or its tap by tap=NAME".into());
    }
    Ok(NetArg { tap, network, mac, pairs })
}

/// A tap for an interface that will arrive, and that brings everything else with it.
fn tap(text: &str) -> Result<TapConfig, String> {
    match net(text)? {
        NetArg { tap, network: None, mac: None, pairs: 1 } => Ok(tap),
        _ => Err("a guest brings the network, the address and the queues of its interfaces with it".into()),
    }
}

/// When to tell the network where a guest is.
fn announcing(text: &str) -> Result<Announcing, String> {
    let mut announcing = Announcing::default();
    for option in text.split(',') {
        let (name, value) = option.split_once('=').unwrap_or((option, ""));
        let time = || match humantime::parse_duration(value) {
            Ok(time) if time <= Duration::from_secs(3600) => Ok(time),
            _ => Err(format!("{option}: write a time such as 50ms, up to 1h")),
        };
        match name {
            "rounds" => {
                let rounds = value.parse().ok().filter(|rounds| *rounds <= 1000);
                announcing.rounds = rounds.ok_or_else(|| format!("{option}: use 0 to 1000"))?;
            }
            "initial" => announcing.initial = time()?,
            "step" => announcing.step = time()?,
            "max" => announcing.most = time()?,
            _ => return Err(format!("\"{option}\": use rounds=N, initial=TIME, step=TIME or max=TIME")),
        }
    }
    Ok(announcing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use vmm::virtio::block::ErrorPolicy;

    #[test]
    fn a_disk_is_a_path_with_options() {
        let config = disk("/img/a.raw,readonly,queues=4").unwrap();
        assert_eq!(config.path, PathBuf::from("/img/a.raw"));
        assert!(config.readonly && !config.cached);
        assert_eq!(config.queues, 4);
        let careful = disk("a,werror=stop,rerror=enospc").unwrap().errors;
        assert_eq!(careful, ErrorPolicy { read: OnError::Enospc, write: OnError::Stop });
        assert_eq!(disk("a").unwrap().errors, ErrorPolicy { read: OnError::Report, write: OnError::Enospc });
        let named = BlockConfig::in_storage("fast".into(), "web/1.raw".into());
        assert_eq!(disk("storage=fast,file=web/1.raw"), Ok(named.clone()));
        let readonly = BlockConfig { readonly: true, ..named };
        assert_eq!(disk("storage=fast,file=web/1.raw,readonly"), Ok(readonly));
        for wrong in [
            "storage=fast",
            "storage=,file=a",
            "storage=fast,file=",
            "storage=fast,file=/a",
            "storage=fast,file=../a",
            "storage=fast,readonly,file=a",
            "a,werror",
            "a,werror=ignore",
            "",
            ",readonly",
            "a,writable",
            "a,queues=0",
            "a,queues=17",
            "a,queues",
            "a,readonly=1",
        ] {
            assert!(disk(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_network_interface_is_a_tap_with_options() {
        let tap_config = |offloads| TapConfig { offloads, ..TapConfig::named("tap0") };
        let plain = NetArg { tap: tap_config(true), network: None, mac: None, pairs: 1 };
        assert_eq!(net("tap=tap0"), Ok(plain.clone()));
        let blue = Some("blue".to_string());
        assert_eq!(net("tap=tap0,network=blue"), Ok(NetArg { network: blue.clone(), ..plain.clone() }));
        assert_eq!(net("network=blue"), Ok(NetArg { network: blue, tap: TapConfig::named(""), ..plain }));
        let mac = Some(Mac([0x52, 0x54, 0, 0, 0, 1]));
        let all = NetArg { tap: tap_config(false), network: None, mac, pairs: 4 };
        assert_eq!(net("mac=52:54:00:00:00:01,queues=4,offloads=off,tap=tap0"), Ok(all));
        let wrong = [
            "",
            "tap0",
            "tap=",
            "queues=2",
            "tap=a,network=",
            "network=a b",
            "tap=a,queues=0",
            "tap=a,queues=9",
            "tap=a,mac=1",
            "tap=a,offloads=on",
            "tap=a,mac=00:00:00:00:00:00",
            "tap=a,mac=ff:ff:ff:ff:ff:ff",
        ];
        for wrong in wrong {
            assert!(net(wrong).is_err(), "{wrong}");
        }
        assert_eq!(tap("tap=tap0,offloads=off"), Ok(tap_config(false)));
        assert!(tap("network=blue").is_err() && tap("network=blue,tap=tap0").is_err());
        assert!(tap("tap=tap0,queues=2").is_err() && tap("tap=tap0,mac=52:54:00:00:00:01").is_err());
    }

    #[test]
    fn announcements_have_a_number_and_waits() {
        let default = "rounds=5,initial=50ms,step=100ms,max=550ms";
        assert_eq!(announcing(default), Ok(Announcing::default()));
        assert_eq!(announcing("rounds=0"), Ok(Announcing { rounds: 0, ..Announcing::default() }));
        let most = Duration::from_secs(1);
        assert_eq!(announcing("max=1s"), Ok(Announcing { most, ..Announcing::default() }));
        for wrong in ["", "5", "rounds", "rounds=-1", "rounds=1001", "initial=50", "step=2h", "often=1"] {
            assert!(announcing(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        assert_eq!(size("64M"), Ok(64 << 20));
        assert_eq!(size("1.5G"), Ok(3 << 29));
        assert!(size("many").is_err());
        assert!(size("-1").is_err());
        assert!(memory("0").is_err());
        assert_eq!(memory("16M"), Ok(16 << 20));
    }
}
