//! The command line.

mod examples;
mod fleet;
mod host;
mod limits;
mod machine;
mod moving;
mod security;
mod target;
mod values;

pub use examples::HEADING;
pub use fleet::{FleetArgs, FleetCommand};
pub use host::{DrainArgs, ServiceArgs, StartArgs};
pub use limits::LimitArgs;
pub use machine::{MachineArgs, WorkloadArgs};
pub use moving::{ChangeArgs, EvacuateArgs, MigrateArgs, PolicyArgs};
pub use security::SecurityArgs;
pub use target::{EventsArgs, HistoryArgs, ListArgs, ResumeArgs, StopArgs, Target};
pub use values::{NetArg, OutputTarget, SerialTarget};

use super::choice::{AIO, APIS, Api, ENCRYPTION, ON_REBOOT, OnReboot, SECCOMP, THP, one_of};
use clap::{Args, Parser, Subcommand};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use transport_tcp::tls::Pattern;
use values::{announcing, disk, name, net, size, tap};
use vmm::memory::Thp;
use vmm::sandbox::Mode;
use vmm::virtio::block::{Aio, BlockConfig};
use vmm::virtio::net::{Announcing, TapConfig};
use whimbrel::security::Encryption;

/// Moves running KVM virtual machines from host to host.
#[derive(Debug, Parser)]
#[command(name = "whimbrel", version, about, max_term_width = 110, after_help = whole_help())]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

/// The help's end.
fn whole_help() -> String {
    format!("{}\n{EXIT_CODES}", examples::WHIMBREL)
}

pub const EXIT_CODES: &str = "Exit codes: 0 done; 1 failed; 2 wrong usage; 3 the migration failed and the guest runs \
on at the source; 4 the guest is held paused and an operator must decide; 5 the guest crashed; 6 it is unknown whether the guest has \
moved; 7 (status) no guest runs here; 8 nobody answers on the API's socket, or no machine has that name; 130, 143 (migrate) interrupted, and the \
migration goes on.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine
    #[command(after_help = examples::RUN)]
    Run(RunArgs),
    /// Wait for a virtual machine to arrive, then run it
    #[command(after_help = examples::RECEIVE)]
    Receive(ReceiveArgs),
    /// Serve a host: take virtual machines in through one port, each in a process of its own
    #[command(after_help = examples::HOST)]
    Host(ServiceArgs),
    /// Make units of the processes of virtual machines, for the host service
    #[command(hide = true)]
    Units,
    /// Let this host take no virtual machines in
    #[command(after_help = examples::DRAIN)]
    Drain(DrainArgs),
    /// Start a virtual machine that this host knows by a file
    #[command(after_help = examples::START)]
    Start(StartArgs),
    /// Move a running virtual machine to another host, or to a waiting receiver
    #[command(after_help = examples::MIGRATE)]
    Migrate(MigrateArgs),
    /// Move all virtual machines of this host to other hosts
    #[command(after_help = examples::EVACUATE)]
    Evacuate(EvacuateArgs),
    /// Show all virtual machines of this host
    #[command(after_help = examples::LIST)]
    List(ListArgs),
    /// Show what a virtual machine is doing, and its migration
    #[command(after_help = examples::STATUS)]
    Status(Target),
    /// Change a migration that is under way
    #[command(after_help = examples::CHANGE)]
    Change(ChangeArgs),
    /// Let a migration switch over after the round under way, however long the blackout will be
    SwitchNow(Target),
    /// Show what became of the moves from and to this host
    #[command(after_help = examples::HISTORY)]
    History(HistoryArgs),
    /// Show what happens on this host: to its machines, and in their migrations
    Events(EventsArgs),
    /// Cancel a migration; the guest continues to run where it is
    Cancel(Target),
    /// Pause a virtual machine
    Pause(Target),
    /// Let a paused virtual machine continue
    Resume(ResumeArgs),
    /// Press a virtual machine's power button: a guest that listens to it shuts down
    Shutdown(Target),
    /// Shut a virtual machine down, and end its process if that takes too long
    #[command(after_help = examples::STOP)]
    Stop(StopArgs),
    /// End a virtual machine's process
    Quit(Target),
    /// Show what this host can do, what it lacks, and how to provide that
    #[command(after_help = examples::DOCTOR)]
    Doctor(DoctorArgs),
    /// Move an embedded guest between two processes on this machine and show what it felt
    #[command(after_help = examples::DEMO)]
    Demo(DemoArgs),
    /// Make the certificates by which hosts know each other
    #[command(after_help = examples::PKI)]
    Pki(PkiArgs),
    /// Make what a cluster of Pacemaker needs to run machines on several hosts
    #[command(after_help = examples::FLEET)]
    Fleet(FleetArgs),
    /// Print what an API has, by OpenAPI 3.1: that of a machine, or of a host's service
    #[command(name = "openapi")]
    OpenApi {
        /// The API
        #[arg(value_parser = one_of(APIS))]
        api: Api,
    },
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
    #[arg(long, conflicts_with = "run_dir")]
    pub api: Option<PathBuf>,
    /// Folder of a host's sockets, which is made: the other commands reach the machine by its name.
    /// WHIMBREL_RUN_DIR names it as well if there is no --api
    #[arg(long, value_name = "FOLDER")]
    pub run_dir: Option<PathBuf>,
    /// Folder in which a machine of a run directory keeps the history of its moves. Default:
    /// /var/lib/whimbrel for /run/whimbrel, and `state` in any other
    #[arg(long, value_name = "FOLDER")]
    pub state_dir: Option<PathBuf>,
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

#[derive(Args, Debug)]
pub struct ReceiveArgs {
    /// Address to listen on, for control and data over TCP; port 0 lets the kernel choose. Without
    /// certificates (--tls) it has to be this host's own, such as 127.0.0.1
    #[arg(long, short = 'l', required_unless_present = "gate")]
    pub listen: Option<SocketAddr>,
    /// Take connections from the host service that serves this socket
    #[arg(long, hide = true, requires = "run_dir", conflicts_with = "listen")]
    pub gate: Option<PathBuf>,
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
pub struct DoctorArgs {
    /// Size of the virtual machine to check for
    #[arg(long, short = 'm', default_value = "1G", value_parser = size)]
    pub memory: u64,
    /// Examine as well whether virtual machines can move from here to this host, which has a host service or
    /// a receiver: small ones made for this are offered to it, and never run there. The port is 4444 unless
    /// one is given
    #[arg(long, value_name = "HOST[:PORT]")]
    pub with: Option<String>,
    /// Where that host serves its API, which is asked for its time. Default: https://HOST:8443
    #[arg(long, value_name = "URL", requires = "with")]
    pub at: Option<String>,
    /// TOML file with the networks and storages of this host, each of which is tried. A file is made in each
    /// storage for that, and removed
    #[arg(long, value_name = "FILE", requires = "with")]
    pub host_config: Option<PathBuf>,
    #[command(flatten)]
    pub security: SecurityArgs,
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn examples_are_commands() {
        let mut all = vec![Cli::command()];
        all.extend(Cli::command().get_subcommands().cloned());
        let helps = all.iter().filter_map(|command| command.get_after_help().map(ToString::to_string));
        let helps: Vec<_> = helps.collect();
        let lines = helps.iter().flat_map(|help| help.lines()).map(str::trim);
        // Not those of other programs, and nothing that a shell does with the output.
        let commands: Vec<_> = lines
            .filter(|line| line.starts_with("whimbrel "))
            .map(|line| line.split(" | ").next().unwrap().split_whitespace())
            .collect();
        assert!(commands.len() > 25, "{commands:?}");
        for words in commands {
            let parsed = Cli::try_parse_from(words.clone());
            assert!(parsed.is_ok(), "{words:?}: {}", parsed.unwrap_err());
        }
    }
}
