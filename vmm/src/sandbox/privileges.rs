//! Which of a privileged user's capabilities are kept, and how long. They belong to threads, not to processes, so each
//! thread gives its own up.

use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};

/// While a machine is built, here or for a guest that arrives.
pub const BUILDING: &[Capability] = &[
    // Images, kernels and devices of other users.
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_DAC_READ_SEARCH,
    // Taps of other users.
    Capability::CAP_NET_ADMIN,
    // A receiver at a port below 1024.
    Capability::CAP_NET_BIND_SERVICE,
    // To say which process holds a lock on an image: looking at another one's files takes this.
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_IPC_LOCK,
];

/// Once it runs: a migration over RDMA pins guest memory beyond what the limit allows.
pub const MOVING: &[Capability] = &[Capability::CAP_IPC_LOCK];

/// Gives up what the current thread has and `kept` does not name.
pub fn keep(kept: &[Capability]) -> Result<(), CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = kept.iter().copied().filter(|one| permitted.contains(one)).collect();
    // Ambient ones are inheritable ones; effective ones are permitted ones.
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}
