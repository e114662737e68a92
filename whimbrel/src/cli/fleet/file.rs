//! The file that describes a fleet: its hosts, what they share, and the machines that run on them.
//!
//! ```toml
//! name = "shop"
//!
//! [[hosts]]                       # a new host comes behind the others: its place is its number
//! name = "hosta"
//! addresses = ["10.1.0.1"]        # of Corosync's links
//! memory = "200G"                 # what its guests may have together
//! cpus = 128
//! fencing = { ip = "10.9.0.1" }
//!
//! [fencing]
//! agent = "fence_ipmilan"
//! options = { username = "fleet", password = "…" }
//!
//! [networks.blue]
//! bridge = "br0"
//!
//! [storage.fast]
//! path = "/shared/fast"
//! type = "nfs4"
//!
//! [machines.web1]                 # the options of `whimbrel run`
//! memory = "2G"
//! disk = "storage=fast,file=web1.raw"
//! ```

use anyhow::{Context, bail, ensure};
use serde::Deserialize;
use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use toml::{Table, Value};
use vmm::names;
use vmm::virtio::block::BlockConfig;
use whimbrel::toml_file::TomlFile;

/// File systems whose locks reach all hosts.
const LOCKS_REACH: [&str; 5] = ["nfs4", "cephfs", "gfs2", "ocfs2", "gpfs"];

/// Fencing agents that take the host's right to write away, and so are a reservation themselves.
const RESERVING: [&str; 2] = ["fence_scsi", "fence_mpath"];

/// What is appended to a host's name to have its name in the network of migrations.
pub const MIGRATION_SUFFIX: &str = "-migration";

/// A fleet.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Fleet {
    /// Its name.
    pub name: String,
    /// Its hosts. A host's place is its number in Corosync, from 1.
    pub hosts: Vec<Host>,
    /// How a host is turned off that does not answer.
    pub fencing: Option<Fencing>,
    /// What further stands in the configuration of each host's service.
    #[serde(default)]
    pub host: Table,
    /// The networks of guests, as the host service knows them.
    #[serde(default)]
    pub networks: Table,
    /// Where images are.
    #[serde(default)]
    pub storage: BTreeMap<String, Storage>,
    /// The machines: options of `whimbrel run`, and the table `fleet`.
    #[serde(default)]
    pub machines: BTreeMap<String, Table>,
    /// What holds for all machines in the cluster.
    #[serde(default)]
    pub times: Times,
    /// Properties of the cluster, in the place of ours or further ones.
    #[serde(default)]
    pub properties: BTreeMap<String, Value>,
    /// Entries of corosync.conf by their sections, likewise.
    #[serde(default)]
    pub corosync: BTreeMap<String, BTreeMap<String, Value>>,
    /// Whether each host's health is watched, and by which parameters of ocf:whimbrel:health.
    #[serde(default)]
    pub health: Health,
}

/// A host.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Host {
    /// Its name in the cluster, which has to be what `uname -n` says there.
    pub name: String,
    /// Its addresses, one for each of Corosync's links.
    pub addresses: Vec<IpAddr>,
    /// Where guests come in, if that is another network.
    pub migration: Option<IpAddr>,
    /// What its guests may have together.
    pub memory: Option<String>,
    /// The same of processors.
    pub cpus: Option<u32>,
    /// Options of the fencing agent for this host.
    #[serde(default)]
    pub fencing: Table,
}

/// How a host is turned off.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fencing {
    /// The agent, such as fence_ipmilan.
    pub agent: String,
    /// Its options.
    #[serde(default)]
    pub options: Table,
}

/// A storage.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Storage {
    /// The folder of its images, or the block device, on all hosts.
    pub path: PathBuf,
    /// The kind of its file system, or `block`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether a host that was fenced is kept from writing by the storage itself, such as by a persistent
    /// reservation of SCSI.
    #[serde(default)]
    pub reservation: bool,
}

/// The times of operations, in seconds.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Times {
    /// Between two looks at a guest.
    pub monitor_interval: u32,
    /// Of such a look.
    pub monitor: u32,
    /// Of a start.
    pub start: u32,
    /// Of a stop.
    pub stop: u32,
    /// Of a move.
    pub r#move: u32,
    /// Between two looks at moves that have failed.
    pub settle_interval: u32,
}

impl Default for Times {
    fn default() -> Self {
        Times { monitor_interval: 10, monitor: 30, start: 120, stop: 120, r#move: 600, settle_interval: 5 }
    }
}

/// The watch over hosts' health.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Health {
    /// Whether there is one.
    pub enabled: bool,
    /// Parameters of ocf:whimbrel:health.
    pub options: BTreeMap<String, Value>,
    /// Seconds between two looks.
    pub interval: u32,
}

impl Default for Health {
    fn default() -> Self {
        Health { enabled: true, options: BTreeMap::new(), interval: 20 }
    }
}

/// What the cluster has to know of a machine.
#[derive(Debug)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Bytes of its memory.
    pub memory: u64,
    /// Its processors.
    pub vcpus: u32,
    /// Its disks.
    pub disks: Vec<BlockConfig>,
    /// What the file says of it for the cluster.
    pub options: MachineOptions,
    /// The rest, for the host service: options of `whimbrel run`.
    pub entries: Table,
}

/// The table `fleet` of a machine.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct MachineOptions {
    /// Further options of `whimbrel migrate`.
    pub migrate_options: Option<String>,
    /// Whose guests are kept if there is not room for all.
    pub priority: Option<i32>,
}

impl Fleet {
    /// Reads the file at `path`.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let read = TomlFile::read(path, "the fleet's file")?;
        let fleet: Fleet = toml::from_str(&read.text).map_err(|error| read.wrong(&error))?;
        fleet.check().with_context(|| path.display().to_string())?;
        Ok(fleet)
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!(self.hosts.len() > 1, "a fleet has two hosts or more");
        let mut taken = HashSet::new();
        let links = self.hosts[0].addresses.len();
        for host in &self.hosts {
            id(&host.name)?;
            ensure!(taken.insert(host.name.clone()), "there are two hosts called {}", host.name);
            ensure!(
                (1..=8).contains(&host.addresses.len()),
                "{} needs one address for each link, 8 at most",
                host.name
            );
            ensure!(
                host.addresses.len() == links,
                "{} has another number of addresses than the first host",
                host.name
            );
            for address in host.addresses.iter().chain(&host.migration) {
                ensure!(taken.insert(address.to_string()), "two hosts have the address {address}");
            }
        }
        let all_or_none = |what: &str, has: &dyn Fn(&Host) -> bool| {
            let with = self.hosts.iter().filter(|host| has(host)).count();
            ensure!(with == 0 || with == self.hosts.len(), "either all hosts say `{what}`, or none");
            Ok(())
        };
        all_or_none("migration", &|host| host.migration.is_some())?;
        // A host that says nothing would have room for nothing.
        all_or_none("memory", &|host| host.memory.is_some())?;
        all_or_none("cpus", &|host| host.cpus.is_some())?;
        all_or_none("fencing", &|host| !host.fencing.is_empty())?;
        ensure!(
            self.fencing.is_some() || self.hosts.iter().all(|host| host.fencing.is_empty()),
            "hosts have options of a fencing agent, but [fencing] is not there, which names it"
        );
        for name in self.storage.keys() {
            names::check(name)?;
        }
        for name in self.machines.keys() {
            id(name)?;
            ensure!(
                !name.starts_with("whimbrel-") && !name.starts_with("fence-"),
                "a machine cannot be called {name}: resources of the cluster's own are"
            );
        }
        Ok(())
    }

    /// Refuses what could let a guest run twice, or two guests write to one image.
    pub fn check_safe(&self, machines: &[Machine], without_fencing: bool) -> anyhow::Result<()> {
        if self.fencing.is_none() && !without_fencing {
            bail!(
                "there is no [fencing]. Without it nobody can know that the guests of a silent host do not run any \
                 more, and they are started nowhere else. Name an agent; or say --without-fencing if no guest \
                 is to survive its host"
            );
        }
        let agent = self.fencing.as_ref().map(|fencing| fencing.agent.as_str());
        for (name, storage) in &self.storage {
            let reserved = storage.reservation || agent.is_some_and(|agent| RESERVING.contains(&agent));
            if LOCKS_REACH.contains(&storage.kind.as_str()) || agent.is_some() && reserved {
                continue;
            }
            bail!(
                "storage {name}: locks of {} do not reach other hosts, so that they keep nobody from using an image \
                 twice. Use one of {}; or have fencing and a reservation ({}, or `reservation = true` if the storage \
                 itself keeps a host that was fenced from writing)",
                storage.kind,
                LOCKS_REACH.join(", "),
                RESERVING.join(", "),
            );
        }
        for machine in machines {
            for disk in machine.disks.iter().filter(|disk| !disk.readonly) {
                let known = match &disk.storage {
                    Some(storage) => self.storage.contains_key(storage),
                    None => self.storage.values().any(|storage| disk.path.starts_with(&storage.path)),
                };
                ensure!(
                    known,
                    "machine {}: its disk {} is on no storage of this file, so nobody knows how far its locks reach",
                    machine.name,
                    disk.path.display()
                );
            }
        }
        Ok(())
    }
}

impl Host {
    /// Where it takes guests in.
    pub fn takes_in(&self) -> IpAddr {
        self.migration.unwrap_or(self.addresses[0])
    }

    /// Its name in the network of migrations, if that is another one.
    pub fn migration_name(&self) -> Option<String> {
        self.migration.map(|_| format!("{}{MIGRATION_SUFFIX}", self.name))
    }

    /// What it has for guests, by the names of utilization: MiB of memory, and processors.
    pub fn room(&self) -> anyhow::Result<Vec<(&'static str, String)>> {
        let mut room = Vec::new();
        if let Some(memory) = &self.memory {
            let bytes = parse_size::Config::new().with_binary().parse_size(memory);
            let bytes = bytes
                .with_context(|| format!("{}: memory = {memory:?}; write a size such as 200G", self.name))?;
            room.push(("memory", (bytes >> 20).to_string()));
        }
        room.extend(self.cpus.map(|cpus| ("cpu", cpus.to_string())));
        Ok(room)
    }
}

/// Whether a name can be that of a resource or a node.
fn id(name: &str) -> anyhow::Result<()> {
    names::check(name)?;
    ensure!(
        name.starts_with(|first: char| first.is_ascii_alphabetic()),
        "{name:?} does not begin with a letter"
    );
    Ok(())
}

/// A value as it stands in another file.
pub fn plain(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
