//! `whimbrel fleet`: what a cluster of Pacemaker needs to run machines on several hosts, out of one file.
//!
//! ```text
//! README            what to do with each of the following
//! pki/              the authority of the hosts' certificates: keep it to yourself
//! authkey           Corosync's key
//! cib.xml           the cluster's configuration
//! hosts/NAME/       is copied to / of that host
//! ```
//! Made anew in the same folder, the authority, certificates and the key stay as they are.

mod cib;
mod corosync;
mod file;

use super::args::{Command, FleetArgs, FleetCommand};
use super::{Exit, config, say};
use anyhow::Context;
use file::{Fleet, Host, Machine, MachineOptions};
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use toml::{Table, Value};
use whimbrel::host::config::{HostConfig, PORT};
use whimbrel::pki::{Authority, days_from_now};

/// Bytes of Corosync's key.
const KEY: usize = 256;

pub fn fleet(args: FleetArgs) -> anyhow::Result<Exit> {
    match args.command {
        FleetCommand::Init { file, folder, without_fencing, days } => {
            let fleet = Fleet::read(&file)?;
            let scratch = tempfile::tempdir().context("cannot make a folder for a while")?;
            let machines = fleet.machines.iter().map(|(name, table)| machine(name, table, scratch.path()));
            let machines = machines.collect::<anyhow::Result<Vec<_>>>()?;
            fleet.check_safe(&machines, without_fencing)?;
            write(&fleet, &machines, &folder, days)?;
            say(readme(&fleet, &folder))?;
        }
    }
    Ok(Exit::Done)
}

/// Understands a machine as `whimbrel run` would.
fn machine(name: &str, table: &Table, scratch: &Path) -> anyhow::Result<Machine> {
    let of = || format!("machine {name}");
    let path = scratch.join(format!("{name}.toml"));
    let (options, entries) = parts(table).with_context(of)?;
    fs::write(&path, entries.to_string()).with_context(of)?;
    let words = ["whimbrel", "run", "--config"].map(OsString::from);
    let cli = config::parse(words.into_iter().chain([path.into()])).with_context(of)?;
    let Command::Run(run) = cli.command else { unreachable!("it is `run`") };
    Ok(Machine {
        name: name.into(),
        memory: run.machine.memory,
        vcpus: run.machine.vcpus,
        disks: run.disk,
        options,
        entries,
    })
}

/// What the cluster has to know of a machine, and what the host service has to.
fn parts(table: &Table) -> anyhow::Result<(MachineOptions, Table)> {
    let mut entries = table.clone();
    let options = match entries.remove("fleet") {
        Some(options) => options.try_into()?,
        None => MachineOptions::default(),
    };
    Ok((options, entries))
}

fn write(fleet: &Fleet, machines: &[Machine], folder: &Path, days: u32) -> anyhow::Result<()> {
    make(folder)?;
    let pki = folder.join("pki");
    let authority =
        if pki.join("ca.key").exists() { Authority::open(&pki) } else { Authority::create(&pki)? };
    let key = key(&folder.join("authkey"))?;
    let conf = corosync::conf(fleet);
    for host in &fleet.hosts {
        let root = folder.join("hosts").join(&host.name);
        let etc = root.join("etc");
        if !authority.host(&host.name).join("cert.pem").exists() {
            let others: Vec<_> =
                host.migration_name().into_iter().chain([host.takes_in().to_string()]).collect();
            authority.issue(&host.name, &others, days_from_now(days))?;
        }
        for name in ["ca.pem", "cert.pem", "key.pem", "crl.pem"] {
            let content = authority.host(&host.name).join(name);
            let content = fs::read(&content).with_context(|| content.display().to_string())?;
            put(
                &etc.join("whimbrel/tls").join(name),
                &content,
                if name == "key.pem" { 0o600 } else { 0o644 },
            )?;
        }
        let path = etc.join("whimbrel/host.toml");
        put(&path, host_toml(fleet, host).to_string().as_bytes(), 0o644)?;
        HostConfig::read(&path).context("what the fleet's file says of hosts' services")?;
        let files = etc.join("whimbrel/machines");
        let _ = fs::remove_dir_all(&files);
        make(&files)?;
        for Machine { name, entries, .. } in machines {
            put(&files.join(format!("{name}.toml")), entries.to_string().as_bytes(), 0o644)?;
        }
        put(&etc.join("corosync/corosync.conf"), conf.as_bytes(), 0o644)?;
        put(&etc.join("corosync/authkey"), &key, 0o400)?;
    }
    put(&folder.join("cib.xml"), &cib::cib(fleet, machines)?, 0o600)?;
    put(&folder.join("hosts.names"), names(fleet).as_bytes(), 0o644)?;
    put(&folder.join("README"), readme(fleet, folder).as_bytes(), 0o644)
}

/// The configuration of a host's service.
fn host_toml(fleet: &Fleet, host: &Host) -> Table {
    let text = |text: &str| Value::String(text.into());
    let mut table = Table::new();
    let listen = std::net::SocketAddr::new(host.takes_in(), PORT);
    table.insert("listen".into(), text(&listen.to_string()));
    table.insert("tls".into(), text("/etc/whimbrel/tls"));
    table.insert("machines".into(), text("/etc/whimbrel/machines"));
    table.extend(fleet.host.clone());
    table.insert("networks".into(), Value::Table(fleet.networks.clone()));
    let storages = fleet.storage.iter().map(|(name, storage)| {
        let path = Table::from_iter([("path".into(), text(&storage.path.to_string_lossy()))]);
        (name.clone(), Value::Table(path))
    });
    table.insert("storage".into(), Value::Table(storages.collect()));
    table
}

/// The names by which hosts call each other, as /etc/hosts has them.
fn names(fleet: &Fleet) -> String {
    let mut text = String::new();
    for host in &fleet.hosts {
        text += &format!("{} {}\n", host.addresses[0], host.name);
        if let (Some(address), Some(name)) = (host.migration, host.migration_name()) {
            text += &format!("{address} {name}\n");
        }
    }
    text
}

fn readme(fleet: &Fleet, folder: &Path) -> String {
    let at = folder.display();
    let mut text = format!(
        "The fleet {} is in {at}. As root:\n\n\
         1. On each host, have these packages: whimbrel, corosync, pacemaker, resource-agents, and fence-agents or what \
         else has your fencing agent. Its name (uname -n) is the one in this file, and all find each other by these \
         names: append {at}/hosts.names to /etc/hosts if no DNS does that.\n\n\
         2. Copy to each host its folder. It has keys: nobody else may read it.\n\n",
        fleet.name
    );
    for host in &fleet.hosts {
        text += &format!("    rsync -a --chown=root:root {at}/hosts/{0}/ root@{0}:/\n", host.name);
    }
    text += &format!(
        "\n3. On each host:\n\n    systemctl enable --now whimbrel-host.socket whimbrel-host.service corosync pacemaker\n\n\
         4. On one host, when `crm_mon -1` shows all of them online, with a copy of {at}/cib.xml (whoever reads it can \
         fence hosts):\n\n    cibadmin --replace --scope configuration --xml-file cib.xml\n\n\
         5. Try the fencing of each host, before there is a guest on it: stonith_admin --fence HOST\n\n\
         Keep {at}/pki and {at}/authkey to yourself. To add hosts or machines, add them to the file (hosts behind the \
         others), run the command again with the same folder, and do 2 and 4 again; of corosync.conf the hosts learn by \
         `corosync-cfgtool -R`. What was changed by the cluster's own commands meanwhile is replaced by 4."
    );
    if fleet.fencing.is_none() {
        text += "\n\nThere is NO FENCING: guests of a host that has died are started nowhere until it is back, and an \
                 operator has to say when it is known to be off: stonith_admin --confirm HOST";
    }
    text
}

/// Corosync's key in this file, which is made if there is none.
fn key(path: &Path) -> anyhow::Result<Vec<u8>> {
    if let Ok(known) = fs::read(path) {
        return Ok(known);
    }
    let mut key = vec![0; KEY];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut key)).context("/dev/urandom")?;
    put(path, &key, 0o400)?;
    Ok(key)
}

fn make(folder: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

/// Writes a file in the place of what was there.
fn put(path: &Path, content: &[u8], mode: u32) -> anyhow::Result<()> {
    make(path.parent().unwrap_or(Path::new("/")))?;
    let _ = fs::remove_file(path);
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(content))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests;
