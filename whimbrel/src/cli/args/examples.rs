//! Examples of each command, for `--help` and for the man pages ([`man`](super::super::man)).

/// How they begin. Each is a line that says what it does, and the command, further to the right.
pub const HEADING: &str = "Examples:";

macro_rules! examples {
    ($($what:literal: $command:literal;)*) => {
        concat!("Examples:\n", $("  ", $what, ":\n    ", $command, "\n",)*)
    };
}

pub const WHIMBREL: &str = examples! {
    "See whether this host can run and move virtual machines": "whimbrel doctor";
    "Watch a guest move between two processes": "whimbrel demo";
    "Start a machine that the host knows by a file": "whimbrel start web1";
    "Move it to another host": "whimbrel migrate web1 --to hostb";
    "Move all machines away": "whimbrel evacuate --to hostb,hostc";
};

pub const RUN: &str = examples! {
    "Run the embedded guest, which checks its own memory, under the name web1":
        "whimbrel run --run-dir /run/whimbrel --name web1 --memory 1G --working-set 256M --serial none";
    "Boot the kernel on a disk, with a network interface and the console on this terminal":
        "whimbrel run --disk debian.raw --net tap=tap0 --memory 2G --vcpus 2 --serial stdio";
    "Have a disk and a network by the names that each host's configuration gives them":
        "whimbrel run --host-config /etc/whimbrel/host.toml --disk storage=fast,file=web1.raw --net network=blue";
};

pub const RECEIVE: &str = examples! {
    "Take in one guest on this host, without a host service":
        "whimbrel receive --listen 127.0.0.1:4444 --once";
    "Take in guests of other hosts, whose disks are below /shared/fast":
        "whimbrel receive --listen 10.1.0.2:4444 --tls /etc/whimbrel/tls --disks /shared/fast";
};

pub const HOST: &str = examples! {
    "Serve this host as its operator has decided": "whimbrel host --config /etc/whimbrel/host.toml";
    "Have systemd start it with the first caller": "systemctl enable --now whimbrel-host.socket";
    "See the unit of one machine, and give it half the usual share of the processors":
        "systemctl set-property whimbrel-web1.scope CPUWeight=50";
};

pub const DRAIN: &str = examples! {
    "Take no guests in from now on": "whimbrel drain";
    "Take guests in again": "whimbrel drain --off";
};

pub const START: &str = examples! {
    "Start the machine that machines/web1.toml describes": "whimbrel start web1";
};

pub const MIGRATE: &str = examples! {
    "Move web1 to a host, which needs no preparation": "whimbrel migrate web1 --to hostb";
    "Only ask whether the host would take it": "whimbrel migrate web1 --to hostb --dry-run";
    "Use a tenth of a network of 10 Gbit/s, and accept a blackout of 50 ms":
        "whimbrel migrate web1 --to hostb --bandwidth 1G --downtime-limit 50ms";
    "Switch over only when told to, by whimbrel switch-now":
        "whimbrel migrate web1 --to hostb --pause-before-switchover 10m";
};

pub const EVACUATE: &str = examples! {
    "Empty this host, three machines at a time": "whimbrel evacuate --to hostb,hostc --parallel 3";
    "Only ask, for each machine": "whimbrel evacuate --to hostb,hostc --dry-run";
};

pub const LIST: &str = examples! {
    "Show the machines of this host": "whimbrel list";
    "The names of those that run, for a script":
        "whimbrel list --json | jq -r '.[] | select(.state == \"running\").name'";
};

pub const STATUS: &str = examples! {
    "Show what web1 does": "whimbrel status web1";
    "What an embedded guest says of itself": "whimbrel status web1 --json | jq .vm.guest";
};

pub const CHANGE: &str = examples! {
    "Let a move under way have a longer blackout": "whimbrel change web1 --downtime-limit 500ms";
};

pub const HISTORY: &str = examples! {
    "Show what became of the moves from and to this host": "whimbrel history";
};

pub const STOP: &str = examples! {
    "Press the power button of web1, and end it if that does not help": "whimbrel stop web1";
};

pub const DOCTOR: &str = examples! {
    "Examine this host for a guest of 16 GiB": "whimbrel doctor --memory 16G";
    "Examine whether guests of this host can move to another":
        "whimbrel doctor --with hostb --tls /etc/whimbrel/tls";
    "The same, with the networks and storages that this host knows":
        "whimbrel doctor --with hostb --tls /etc/whimbrel/tls --host-config /etc/whimbrel/host.toml";
};

pub const DEMO: &str = examples! {
    "Move a guest of 1 GiB three times": "whimbrel demo --memory 1G --moves 3";
};

pub const FLEET: &str = examples! {
    "Make certificates, corosync.conf and Pacemaker's configuration for the fleet that a file describes":
        "whimbrel fleet init fleet.toml fleet";
};

pub const PKI: &str = examples! {
    "Make an authority": "whimbrel pki init pki";
    "Make the certificate of a host, which is also reached by an address":
        "whimbrel pki host pki a.hosts.example 10.1.0.1";
    "Revoke it": "whimbrel pki revoke pki a.hosts.example";
};
