//! Loading RDMA before it is asked for.

use crate::api::Api;
use std::thread;

/// Loads the RDMA libraries, and has them look for devices, in a thread of its own. For that they load every
/// provider that is installed.
///
/// The first use of RDMA in a process begins with this, and takes the longer for it. It needs nothing of a
/// migration, so it can be done while a destination waits for a guest, or a source for its destination. What
/// fails here fails again at the first use, which says what is missing.
///
/// No device stays open: one that comes or goes afterwards is seen.
pub fn warm_up() {
    let work = || {
        let Ok(api) = Api::get() else { return };
        // SAFETY: no count is asked for.
        let list = unsafe { (api.ibv_get_device_list)(std::ptr::null_mut()) };
        if !list.is_null() {
            // SAFETY: the list comes from the call above, and nothing points into it.
            unsafe { (api.ibv_free_device_list)(list) };
        }
    };
    // Without a thread the first use takes longer, no more.
    let _ = thread::Builder::new().name("rdma-load".into()).spawn(work);
}
