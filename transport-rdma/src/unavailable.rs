//! Why RDMA cannot be used here, in words that say what to do.

use migration::transport::PlaneError;
use std::io;
use std::net::IpAddr;

/// rdma_cm cannot be opened.
pub(crate) fn no_rdma(error: &io::Error) -> PlaneError {
    PlaneError::Unavailable(match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => format!(
            "RDMA is not permitted to this user ({error}); give it access to /dev/infiniband/rdma_cm and \
             /dev/infiniband/uverbs*"
        ),
        Some(libc::ENODEV | libc::ENOENT | libc::ENOSYS | libc::EOPNOTSUPP) => format!(
            "this host has no RDMA ({error}); load the driver of its device and rdma_ucm (see `rdma link`)"
        ),
        Some(libc::EMFILE | libc::ENFILE) => {
            format!("RDMA needs more open files ({error}); raise `ulimit -n`")
        }
        _ => format!("RDMA cannot be opened: {error}"),
    })
}

/// No device has this address of ours.
pub(crate) fn not_on_a_device(ip: IpAddr, error: &io::Error) -> PlaneError {
    PlaneError::Unavailable(match error.raw_os_error() {
        Some(libc::ENODEV | libc::EADDRNOTAVAIL | libc::ENOENT | libc::ENOSYS | libc::EOPNOTSUPP) => format!(
            "{ip} is on no RDMA device ({error}); let the source connect to an address of a device that \
             `rdma link` shows as ACTIVE"
        ),
        _ => match no_rdma(error) {
            PlaneError::Unavailable(text) => format!("{ip}: {text}"),
            other => return other,
        },
    })
}

/// The destination cannot be reached over RDMA.
pub(crate) fn not_reachable(to: IpAddr, why: &str) -> PlaneError {
    PlaneError::Unavailable(format!(
        "{to} cannot be reached over RDMA: {why}; check that this host's route to it goes through a device \
         that `rdma link` shows as ACTIVE"
    ))
}

/// A resource of the device cannot be had.
pub(crate) fn resource(what: &'static str, source: io::Error) -> PlaneError {
    match source.raw_os_error() {
        Some(libc::EAGAIN) => PlaneError::Unavailable(format!(
            "{what}: {source}; the rdma cgroup may limit hca_object or hca_handle (see rdma.max)"
        )),
        Some(libc::ENOMEM) => PlaneError::Unavailable(format!(
            "{what}: {source}; the device or the locked-memory limit is exhausted (see `ulimit -l`)"
        )),
        Some(libc::EACCES | libc::EPERM | libc::ENODEV | libc::ENOSYS | libc::EOPNOTSUPP) => {
            PlaneError::Unavailable(format!("{what}: {source}"))
        }
        _ => PlaneError::Io { what, source },
    }
}
