//! Which of a privileged user's capabilities are kept. Capabilities belong to threads, not to processes.
//!
//! They cannot be reduced further as time goes on, once a guest runs and its files and taps are open. A
//! process talks to RDMA devices through files that the kernel serves only under the credentials with which
//! they were opened (otherwise `EACCES`), and librdmacm opens a device once for the process. A receiver opens
//! it while it still has to open images, and uses it again when it becomes a source. So all threads that may
//! use such a device keep one set, which they have from before there are two of them. Threads that serve a
//! guest never use one, and keep nothing.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};

/// What building and moving machines needs.
pub const KEPT: &[Capability] = &[
    // Images, kernels and devices of other users.
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    // Taps of other users.
    Capability::CAP_NET_ADMIN,
    // A receiver at a port below 1024.
    Capability::CAP_NET_BIND_SERVICE,
    // Looking at another process's files, to say which process holds a lock on an image.
    Capability::CAP_SYS_PTRACE,
    // A migration over RDMA pins guest memory beyond what the limit allows.
    Capability::CAP_IPC_LOCK,
];

/// Gives up the capabilities of the current thread that `kept` does not name.
pub fn keep(kept: &[Capability]) -> Result<(), CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = kept.iter().copied().filter(|one| permitted.contains(one)).collect();
    // Ambient capabilities are among the inheritable ones, effective capabilities among the permitted ones.
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}
