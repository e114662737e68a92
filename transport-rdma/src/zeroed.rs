//! Structures of C that are zero at first.

use rdma_sys::*;

/// A structure of C of which all-zero bytes are a valid value.
///
/// # Safety
/// Every field must be valid as zeros: an integer, a raw pointer, an optional function, or an array, a
/// structure or a union of these.
pub(crate) unsafe trait Zeroed: Sized {
    /// All zeros.
    fn zeroed() -> Self {
        // SAFETY: whoever implements the trait vouches for it.
        unsafe { std::mem::zeroed() }
    }
}

/// For structures whose definition in the header of libibverbs, librdmacm or libc has only such fields.
macro_rules! zeroed {
    ($($name:ty),+ $(,)?) => {
        $(
            // SAFETY: the definition, which bindgen or libc translates, has integers, raw pointers and
            // optional functions, also inside arrays, structures and unions; enumerations of C are integers
            // there.
            unsafe impl Zeroed for $name {}
        )+
    };
}

zeroed!(
    ibv_device_attr,
    ibv_device_attr_ex,
    ibv_port_attr,
    ibv_qp_attr,
    ibv_qp_init_attr,
    ibv_send_wr,
    ibv_wc,
    libc::sockaddr_storage,
);

#[cfg(feature = "null-device")]
zeroed!(ibv_comp_channel, ibv_context, ibv_cq, ibv_mr, ibv_pd, ibv_qp, rdma_cm_id, rdma_event_channel);

// SAFETY: an array has no bytes but those of its elements.
unsafe impl<T: Zeroed, const N: usize> Zeroed for [T; N] {}
