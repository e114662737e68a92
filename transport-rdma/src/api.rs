//! The entry points of libibverbs and librdmacm, resolved when they are first needed.
//!
//! Nothing is linked. A program that never asks for RDMA starts on a host without the libraries, and one that
//! asks gets an error that says what to install. Types and constants are `rdma-sys`'s, and so are the calls
//! that go through a device's own table of operations (`ibv_post_send`, `ibv_post_recv`, `ibv_poll_cq`,
//! `ibv_req_notify_cq`): these are inline functions in C too, and name no symbol.

use libloading::Library;
use rdma_sys::*;
use std::ffi::{c_char, c_int, c_void};
use std::sync::OnceLock;

/// Where the verbs are.
const VERBS: &str = "libibverbs.so.1";

/// Where the connection manager is.
const CM: &str = "librdmacm.so.1";

macro_rules! entry_points {
    ($($library:ident { $(fn $name:ident($($arg:ident: $ty:ty),*) -> $result:ty;)+ })+) => {
        /// The resolved entry points. The libraries stay loaded for ever.
        pub(crate) struct Api {
            $($(pub(crate) $name: unsafe extern "C" fn($($arg: $ty),*) -> $result,)+)+
        }

        impl Api {
            fn resolve(verbs_name: &str, cm_name: &str) -> Result<Api, String> {
                $(let $library = load(stringify!($library), verbs_name, cm_name)?;)+
                Ok(Api { $($($name: {
                    // SAFETY: the signature is the one that the library's header declares for this name;
                    // both libraries keep it stable under the version of their file names.
                    *unsafe { $library.get(concat!(stringify!($name), "\0")) }
                        .map_err(|e| absent(stringify!($name), &e))?
                },)+)+ })
            }
        }
    };
}

entry_points! {
    verbs {
    fn ibv_get_device_list(count: *mut c_int) -> *mut *mut ibv_device;
    fn ibv_free_device_list(list: *mut *mut ibv_device) -> ();
    fn ibv_get_device_name(device: *mut ibv_device) -> *const c_char;
    fn ibv_open_device(device: *mut ibv_device) -> *mut ibv_context;
    fn ibv_close_device(context: *mut ibv_context) -> c_int;
    fn ibv_query_device(context: *mut ibv_context, attr: *mut ibv_device_attr) -> c_int;
    fn ibv_query_port(context: *mut ibv_context, port: u8, attr: *mut _compat_ibv_port_attr) -> c_int;
    fn ibv_query_gid(context: *mut ibv_context, port: u8, index: c_int, gid: *mut ibv_gid) -> c_int;
    fn ibv_alloc_pd(context: *mut ibv_context) -> *mut ibv_pd;
    fn ibv_dealloc_pd(pd: *mut ibv_pd) -> c_int;
    fn ibv_reg_mr_iova(pd: *mut ibv_pd, address: *mut c_void, len: usize, iova: u64, access: c_int)
        -> *mut ibv_mr;
    fn ibv_dereg_mr(mr: *mut ibv_mr) -> c_int;
    fn ibv_create_comp_channel(context: *mut ibv_context) -> *mut ibv_comp_channel;
    fn ibv_destroy_comp_channel(channel: *mut ibv_comp_channel) -> c_int;
    fn ibv_create_cq(context: *mut ibv_context, entries: c_int, user: *mut c_void,
        channel: *mut ibv_comp_channel, vector: c_int) -> *mut ibv_cq;
    fn ibv_destroy_cq(cq: *mut ibv_cq) -> c_int;
    fn ibv_get_cq_event(channel: *mut ibv_comp_channel, cq: *mut *mut ibv_cq, user: *mut *mut c_void)
        -> c_int;
    fn ibv_ack_cq_events(cq: *mut ibv_cq, events: u32) -> ();
    fn ibv_modify_qp(qp: *mut ibv_qp, attr: *mut ibv_qp_attr, mask: c_int) -> c_int;
    fn ibv_destroy_qp(qp: *mut ibv_qp) -> c_int;
    }
    cm {
    fn rdma_create_event_channel() -> *mut rdma_event_channel;
    fn rdma_destroy_event_channel(channel: *mut rdma_event_channel) -> ();
    fn rdma_create_id(channel: *mut rdma_event_channel, id: *mut *mut rdma_cm_id, user: *mut c_void,
        space: rdma_port_space::Type) -> c_int;
    fn rdma_destroy_id(id: *mut rdma_cm_id) -> c_int;
    fn rdma_bind_addr(id: *mut rdma_cm_id, address: *mut libc::sockaddr) -> c_int;
    fn rdma_listen(id: *mut rdma_cm_id, backlog: c_int) -> c_int;
    fn rdma_get_src_port(id: *mut rdma_cm_id) -> u16;
    fn rdma_resolve_addr(id: *mut rdma_cm_id, from: *mut libc::sockaddr, to: *mut libc::sockaddr,
        timeout_ms: c_int) -> c_int;
    fn rdma_resolve_route(id: *mut rdma_cm_id, timeout_ms: c_int) -> c_int;
    fn rdma_create_qp(id: *mut rdma_cm_id, pd: *mut ibv_pd, attr: *mut ibv_qp_init_attr) -> c_int;
    fn rdma_connect(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int;
    fn rdma_accept(id: *mut rdma_cm_id, param: *mut rdma_conn_param) -> c_int;
    fn rdma_reject(id: *mut rdma_cm_id, private: *const c_void, len: u8) -> c_int;
    fn rdma_disconnect(id: *mut rdma_cm_id) -> c_int;
    fn rdma_set_option(id: *mut rdma_cm_id, level: c_int, option: c_int, value: *mut c_void, len: usize)
        -> c_int;
    fn rdma_get_cm_event(channel: *mut rdma_event_channel, event: *mut *mut rdma_cm_event) -> c_int;
    fn rdma_ack_cm_event(event: *mut rdma_cm_event) -> c_int;
    }
}

/// Loads one of the two libraries for as long as the process lives.
fn load(which: &str, verbs_name: &str, cm_name: &str) -> Result<&'static Library, String> {
    let name = if which == "verbs" { verbs_name } else { cm_name };
    // SAFETY: rdma-core's libraries run only initialisers of their own, which do not rely on the state of
    // the program that loads them.
    let library = unsafe { Library::new(name) }.map_err(|e| absent(name, &e))?;
    // Never unloaded: providers register handlers for the end of the process.
    Ok(Box::leak(Box::new(library)))
}

fn absent(what: &str, error: &libloading::Error) -> String {
    // The loader's own words are in the error's source.
    let why = std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string);
    format!(
        "the RDMA libraries are not installed, or too old ({what}: {why}); install libibverbs1, librdmacm1 and \
         ibverbs-providers (rdma-core on Fedora and RHEL)"
    )
}

impl Api {
    /// The entry points, or what to install to have them.
    pub(crate) fn get() -> Result<&'static Api, &'static str> {
        static API: OnceLock<Result<Api, String>> = OnceLock::new();
        API.get_or_init(|| Api::resolve(VERBS, CM)).as_ref().map_err(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_absent_library_says_what_to_install() {
        let Err(why) = Api::resolve("libibverbs.so.of-no-host", CM) else { panic!("it was found") };
        assert!(why.contains("libibverbs.so.of-no-host") && why.contains("install libibverbs1"), "{why}");
    }
}
