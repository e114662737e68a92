//! Which of a privileged user's capabilities are kept. Capabilities belong to threads, not to processes.
//!
//! They are few, because whoever starts a process opens what takes privileges before (`Needs`). They do not
//! change as time goes on: a process talks to RDMA devices through files that the kernel serves only under
//! the credentials with which they were opened (otherwise `EACCES`), and librdmacm opens a device once for
//! the process. A receiver opens it while it waits, and uses it again when it becomes a source. So all
//! threads that may use such a device keep one set, which they have from before there are two of them.
//! Threads that serve a guest never use one, and keep nothing.

use super::Needs;
use caps::errors::CapsError;
use caps::{CapSet, Capability, CapsHashSet};

/// What this process keeps.
pub fn kept(needs: &Needs) -> Vec<Capability> {
    // A migration over RDMA pins guest memory beyond what the limit allows.
    let mut kept = vec![Capability::CAP_IPC_LOCK];
    if needs.taps {
        // Taps of other users.
        kept.push(Capability::CAP_NET_ADMIN);
    }
    if needs.low_port {
        // A receiver at a port below 1024, over TCP and over RDMA.
        kept.push(Capability::CAP_NET_BIND_SERVICE);
    }
    kept
}

/// Gives up the capabilities of the current thread that `kept` does not name.
pub fn keep(kept: &[Capability]) -> Result<(), CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = kept.iter().copied().filter(|one| permitted.contains(one)).collect();
    // Ambient capabilities are among the inheritable ones, effective capabilities among the permitted ones.
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}
