//! A folder on an NFS server, and two hosts that mount it. In the lab.
//!
//! Server and hosts share one kernel. Two things make the hosts two. Each has its own network and its own
//! name, so the server knows two clients, each with its own locks, caches and lease. And the processes of
//! each host see only their own mount at the folder's path.

use crate::command::must;
use crate::lab;
use crate::lab::mount_ext4;
use crate::program::whimbrel;
use crate::sides::wait_until;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::OnceLock;

const HOSTS: [&str; 2] = ["host-a", "host-b"];
const STORAGE: u64 = 256 << 20;
/// How long the server keeps the locks of a client that says nothing: the least that it can be told.
const LEASE_S: u32 = 10;

/// The folder.
pub struct Nfs {
    root: tempfile::TempDir,
}

impl Nfs {
    /// The only one; it lasts as long as the lab's VM.
    ///
    /// # Panics
    /// Outside the lab, and without the programs of `nfs-kernel-server`.
    pub fn get() -> &'static Nfs {
        static NFS: OnceLock<Nfs> = OnceLock::new();
        NFS.get_or_init(Nfs::build)
    }

    fn build() -> Self {
        // Names a variable of the lab, without which this would change the host.
        let _ = lab::node();
        let nfs = Nfs { root: tempfile::tempdir().expect("a folder") };
        let (storage, folder) = (nfs.path("storage"), nfs.folder());
        mount_ext4(&storage, STORAGE, &folder);
        must("mount -t nfsd nfsd /proc/fs/nfsd");
        must(&format!("exportfs -o rw,no_root_squash,no_subtree_check,fsid=0 *:{}", folder.display()));
        must(&format!("rpc.nfsd --no-nfs-version 3 --lease-time {LEASE_S} --grace-time {LEASE_S} 4"));
        must("rpc.mountd --no-nfs-version 3");
        // Nobody had locks of this server before it began.
        fs::write("/proc/fs/nfsd/v4_end_grace", "Y").expect("an NFS server");
        for (number, host) in HOSTS.iter().enumerate() {
            nfs.join(host, number);
        }
        nfs
    }

    /// Makes a host of this name.
    fn join(&self, host: &str, number: usize) {
        let mount = self.path(host);
        must(&format!("ip netns add {host}"));
        must(&format!("ip link add to-{host} type veth peer name eth0 netns {host}"));
        must(&format!("ip address add 10.8.{number}.1/24 dev to-{host}"));
        must(&format!("ip link set to-{host} up"));
        must(&format!("ip -n {host} address add 10.8.{number}.2/24 dev eth0"));
        must(&format!("ip -n {host} link set eth0 up"));
        // Two clients of one name are to a server one that has started anew, and lost its locks.
        let name = self.path("name");
        fs::write(&name, host).expect("a name");
        let identifier = "/sys/fs/nfs/net/nfs_client/identifier";
        must(&format!("ip netns exec {host} cp {} {identifier}", name.display()));
        fs::create_dir(&mount).expect("a folder");
        must(&format!(
            "nsenter --net=/run/netns/{host} mount -t nfs4 -o vers=4.2 10.8.{number}.1:/ {}",
            mount.display()
        ));
        // A process there is `whimbrel` itself, started by this one.
        let enter = r#"mount --bind "$0" "$1" && shift && exec "$@""#;
        let words = [&mount, &self.folder(), whimbrel()].map(|path| path.display().to_string()).join(" ");
        let script = format!("#!/bin/sh\nexec unshare --mount sh -c '{enter}' {words} \"$@\"\n");
        let program = self.program(host);
        fs::write(&program, script).expect("a script");
        fs::set_permissions(&program, Permissions::from_mode(0o755)).expect("a script that can be run");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn program(&self, host: &str) -> PathBuf {
        self.path(&format!("{host}.sh"))
    }

    /// Where it is, for the processes of both hosts, and on the server, where this process is.
    pub fn folder(&self) -> PathBuf {
        self.path("shared")
    }

    /// The server carries out no write until this is dropped.
    pub fn freeze(&self) -> Frozen<'_> {
        must(&format!("fsfreeze --freeze {}", self.folder().display()));
        Frozen(self)
    }

    /// Waits until the server would give a silent client's locks to the next who asks.
    pub fn wait_lease(&self) {
        let courtesy = || {
            let clients = fs::read_dir("/proc/fs/nfsd/clients").into_iter().flatten().flatten();
            let infos = clients.filter_map(|client| fs::read_to_string(client.path().join("info")).ok());
            infos.into_iter().any(|info| info.contains("status: courtesy"))
        };
        wait_until("the lease's end", courtesy);
    }

    /// The host that guests come from cannot reach the server until this is dropped.
    pub fn cut(&self) -> Cut {
        must(&format!("ip link set to-{} down", HOSTS[0]));
        Cut(())
    }

    /// The `whimbrel` of each host.
    pub fn programs(&self) -> [PathBuf; 2] {
        HOSTS.map(|host| self.program(host))
    }
}

/// A server whose storage is frozen.
pub struct Frozen<'a>(&'a Nfs);

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        must(&format!("fsfreeze --unfreeze {}", self.0.folder().display()));
    }
}

/// A cut line between a host and the server.
pub struct Cut(());

impl Drop for Cut {
    fn drop(&mut self) {
        must(&format!("ip link set to-{} up", HOSTS[0]));
    }
}
