//! How much memory this process may pin.

use crate::message::Refusal;
use crate::unavailable;
use migration::transport::PlaneError;
use std::fs;
use std::io;

/// Capability number of `CAP_IPC_LOCK`.
const CAP_IPC_LOCK: u32 = 14;

/// Bytes that this process may lock into memory; `None` for no limit.
pub fn locked_memory() -> Option<u64> {
    if may_lock_anything() {
        return None;
    }
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the call writes one rlimit through a pointer to one.
    let result = unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    (result == 0 && limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)
}

/// Whether the limit does not apply. The kernel asks for the capability in the initial user namespace, so
/// that root of a container with a namespace of its own does not have it.
fn may_lock_anything() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let mask = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0);
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let initial = map.split_ascii_whitespace().eq(["0", "0", "4294967295"]);
    initial && mask >> CAP_IPC_LOCK & 1 == 1
}

/// Whether `bytes` of guest RAM can be pinned.
///
/// # Errors
/// [`PlaneError::Unavailable`] with the limit that is needed.
pub(crate) fn check_locked_memory(bytes: u64) -> Result<(), PlaneError> {
    match locked_memory() {
        Some(limit) if limit < bytes + OVERHEAD_BYTES => {
            Err(PlaneError::Unavailable(too_little(limit, bytes)))
        }
        _ => Ok(()),
    }
}

/// Bytes that are locked for queues and messages, besides RAM.
const OVERHEAD_BYTES: u64 = 4 << 20;

fn too_little(limit: u64, bytes: u64) -> String {
    let needed = (bytes + OVERHEAD_BYTES).div_ceil(1 << 10);
    format!(
        "RDMA must pin guest memory, and this process may lock only {} KiB of the {needed} KiB it takes; raise \
         it (`ulimit -l {needed}`, LimitMEMLOCK=infinity in a unit), or give it CAP_IPC_LOCK",
        limit >> 10
    )
}

/// A registration of `len` bytes on this side failed.
pub(crate) fn registration_failed(error: io::Error, len: u64) -> PlaneError {
    match (error.raw_os_error(), locked_memory()) {
        (Some(libc::ENOMEM), Some(limit)) => PlaneError::Unavailable(format!(
            "{len} bytes of guest memory cannot be pinned ({error}): the limit of locked memory is {} KiB; \
             raise it with `ulimit -l` or LimitMEMLOCK=",
            limit >> 10
        )),
        (Some(libc::ENOMEM), None) => PlaneError::Unavailable(format!(
            "{len} bytes of guest memory cannot be pinned ({error}): the host, its memory cgroup or the device \
             has no more room"
        )),
        _ => unavailable::resource("registering guest memory", error),
    }
}

/// The destination could not register `len` bytes.
pub(crate) fn refused_by_destination(len: u64, refusal: Refusal) -> PlaneError {
    let error = io::Error::from_raw_os_error(refusal.errno);
    PlaneError::Unavailable(match (refusal.errno, refusal.limit) {
        (libc::ENOMEM, 0) => format!(
            "the destination cannot pin {len} bytes of guest memory ({error}): it, its memory cgroup or its \
             device has no more room"
        ),
        (libc::ENOMEM, limit) => format!(
            "the destination cannot pin {len} bytes of guest memory ({error}): its limit of locked memory is \
             {} KiB; raise it there with `ulimit -l` or LimitMEMLOCK=",
            limit >> 10
        ),
        _ => format!("the destination cannot register {len} bytes of guest memory: {error}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_names_what_is_needed() {
        let text = too_little(8 << 20, 1 << 30);
        assert!(text.contains("8192 KiB") && text.contains("ulimit -l 1052672"), "{text}");
    }
}
