//! Which of a privileged user's capabilities are kept. They belong to threads, not to processes.
//!
//! Giving more of them up as time goes on, once a guest runs and files and taps are open, is not possible: a process
//! talks to RDMA devices through files that the kernel serves only under the very credentials that they were opened
//! with (else `EACCES`), and librdmacm opens a device once for the process. A receiver opens it while it still has to open
//! images, and goes on with it when it becomes a source. So all threads that may meet such a device keep one set, which they
//! have from before there are two of them. Threads that serve a guest never meet one, and keep nothing.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};

/// What building machines and moving them takes.
pub const KEPT: &[Capability] = &[
    // Images, kernels and devices of other users.
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    // Taps of other users.
    Capability::CAP_NET_ADMIN,
    // A receiver at a port below 1024.
    Capability::CAP_NET_BIND_SERVICE,
    // To say which process holds a lock on an image: looking at another one's files takes this.
    Capability::CAP_SYS_PTRACE,
    // A migration over RDMA pins guest memory beyond what the limit allows.
    Capability::CAP_IPC_LOCK,
];

/// Gives up what the current thread has and `kept` does not name.
pub fn keep(kept: &[Capability]) -> Result<(), CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = kept.iter().copied().filter(|one| permitted.contains(one)).collect();
    // Ambient ones are inheritable ones; effective ones are permitted ones.
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}
