//! What a device can do.

use crate::api::Api;
use crate::zeroed::Zeroed;
use rdma_sys::*;
use std::io;
use std::mem::offset_of;

/// Limits of a device and of one of its ports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Abilities {
    /// Most memory regions.
    pub max_mr: u64,
    /// Most work requests in a queue.
    pub max_qp_wr: u32,
    /// Largest message or RDMA write, in bytes.
    pub max_message_bytes: u32,
    /// Whether memory can be registered without pinning it, as source and as target of writes.
    pub on_demand: bool,
}

impl Abilities {
    /// Asks a device.
    ///
    /// # Safety
    /// `context` must be an open device's, and `port` one of its ports.
    pub(crate) unsafe fn of(api: &Api, context: *mut ibv_context, port: u8) -> io::Result<Abilities> {
        let mut device = ibv_device_attr::zeroed();
        // SAFETY: the caller vouches for the context; `device` is where the answer goes.
        verbs_result(unsafe { (api.ibv_query_device)(context, &mut device) })?;
        // SAFETY: as above.
        let port = unsafe { port_attributes(api, context, port) }?;
        Ok(Abilities {
            max_mr: device.max_mr.max(0) as u64,
            max_qp_wr: device.max_qp_wr.max(0) as u32,
            max_message_bytes: port.max_msg_sz,
            // SAFETY: as above.
            on_demand: unsafe { on_demand(context) },
        })
    }
}

/// The attributes of a port; zero where the library is older than the field.
///
/// # Safety
/// As for [`Abilities::of`].
pub(crate) unsafe fn port_attributes(
    api: &Api,
    context: *mut ibv_context,
    port: u8,
) -> io::Result<ibv_port_attr> {
    // The zeros matter: the entry point fills in only the fields that the structure's first version had.
    let mut attributes = ibv_port_attr::zeroed();
    // SAFETY: the caller vouches for the context; the old structure is a prefix of the new one.
    verbs_result(unsafe { (api.ibv_query_port)(context, port, (&raw mut attributes).cast()) })?;
    Ok(attributes)
}

/// Turns what a verb has returned into a result: 0, an errno, or -1 with `errno` set.
pub(crate) fn verbs_result(result: i32) -> io::Result<()> {
    match result {
        0 => Ok(()),
        negative if negative < 0 => Err(io::Error::last_os_error()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Whether the device pages on demand for writes over reliable connections.
///
/// `ibv_query_device_ex` is an inline function that would bring the link back, since it falls back on a
/// symbol; this does what it does as far as the device's own table goes. A device that has no such entry has
/// no on-demand paging.
///
/// # Safety
/// `context` must be an open device's.
unsafe fn on_demand(context: *mut ibv_context) -> bool {
    // SAFETY: the caller vouches for the context.
    if unsafe { (*context).abi_compat } as usize != usize::MAX {
        return false;
    }
    // SAFETY: the mark that was just found says that the context is the last member of a `verbs_context`.
    let extended = unsafe { &*context.byte_sub(offset_of!(verbs_context, context)).cast::<verbs_context>() };
    // The table grows at its front; `sz` says how much of it, counted from its end, the library has.
    if extended.sz < size_of::<verbs_context>() - offset_of!(verbs_context, query_device_ex) {
        return false;
    }
    let Some(query) = extended.query_device_ex else { return false };
    let mut attributes = ibv_device_attr_ex::zeroed();
    // SAFETY: the context is valid, no input is a valid input, and the size is that of `attributes`: the
    // library fills in no more than it.
    let result =
        unsafe { query(context, std::ptr::null(), &mut attributes, size_of::<ibv_device_attr_ex>()) };
    let general = u64::from(ibv_odp_general_caps::IBV_ODP_SUPPORT.0);
    let write = ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_WRITE.0;
    result == 0
        && attributes.odp_caps.general_caps & general != 0
        && attributes.odp_caps.per_transport_caps.rc_odp_caps & write != 0
}
