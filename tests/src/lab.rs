//! The lab, as seen from within: `ci/lab` sets these variables, and `ci/rdma` runs the tests that need it.

use crate::command::must;
use std::fs::{self, File};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("no {name}: this test runs in the lab, by `ci/rdma`"))
}

fn address_in(name: &str) -> IpAddr {
    variable(name).parse().expect("an address")
}

/// The address of this VM's RDMA device, the near one of two.
pub fn address() -> IpAddr {
    address_in("LAB_ADDR")
}

/// The address at the other end of the cable: in a single VM its second device, in a pair the other VM.
pub fn peer() -> IpAddr {
    address_in("LAB_PEER")
}

/// Which of two joined VMs this is: "a" or "b".
pub fn node() -> String {
    variable("LAB_NODE")
}

/// Makes a file system of so many bytes in `storage`, a new file, and mounts it at `folder`, a new folder:
/// the lab's own has no direct I/O. The lab must have been told to load ext4 and loop.
///
/// # Panics
/// When that is not possible.
pub fn mount_ext4(storage: &Path, bytes: u64, folder: &Path) {
    File::create(storage).and_then(|file| file.set_len(bytes)).expect("storage");
    fs::create_dir(folder).expect("a folder");
    must(&format!("mkfs.ext4 -q {}", storage.display()));
    must(&format!("mount -o loop {} {}", storage.display(), folder.display()));
}

/// How long the kernel may take to make a device.
const PATIENCE: Duration = Duration::from_secs(20);

/// The far device of a single VM goes away and comes back when this is dropped. Its network interface stays.
///
/// Soft-RoCE deletes a device only when the last process that has it open lets go, and librdmacm keeps
/// devices open for as long as a process lives: the processes under test must have ended before this is
/// dropped.
pub struct DeviceGone {
    deletion: Child,
}

impl DeviceGone {
    /// Takes it away: every user of it is notified at once.
    ///
    /// # Panics
    /// Outside the lab.
    pub fn begin() -> Self {
        let deletion = Command::new("rdma").args(["link", "delete", "rxe1"]).spawn().expect("iproute2");
        DeviceGone { deletion }
    }
}

impl Drop for DeviceGone {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        let patient = || {
            thread::sleep(Duration::from_millis(20));
            Instant::now() < deadline
        };
        while matches!(self.deletion.try_wait(), Ok(None)) && patient() {}
        let add = ["link", "add", "rxe1", "type", "rxe", "netdev", "lab1"];
        let added = Command::new("rdma").args(add).status().is_ok_and(|status| status.success());
        // The second entry of its table is the IPv4 address's.
        let ready = || {
            fs::read_to_string("/sys/class/infiniband/rxe1/ports/1/gids/1")
                .is_ok_and(|gid| gid.contains("ffff"))
        };
        while added && !ready() && patient() {}
        assert!(added && ready() || thread::panicking(), "the device does not come back");
    }
}

/// A single VM's cable is cut until this is dropped: for RDMA and for TCP.
pub struct CableCut(());

impl CableCut {
    /// Cuts it.
    pub fn new() -> Self {
        must("ip link set lab1 down");
        CableCut(())
    }
}

impl Default for CableCut {
    fn default() -> Self {
        CableCut::new()
    }
}

impl Drop for CableCut {
    fn drop(&mut self) {
        must("ip link set lab1 up");
        // The kernel forgets routes over an interface that goes down.
        must("ip route replace 10.77.0.1 dev lab1 src 10.77.0.2 table 772");
    }
}
