//! Kicking a vCPU out of KVM_RUN: a signal to its thread, and what the signal does there.

use kvm_bindings::kvm_run;
use std::cell::Cell;
use std::ptr;

/// A vCPU's thread.
pub type Thread = libc::pthread_t;

/// Has a vCPU's KVM_RUN, the one under way or the next one, come back with EINTR.
///
/// # Safety
/// The thread must not have been joined.
pub unsafe fn kick(thread: &Thread) {
    // SAFETY: the caller's promise.
    unsafe { libc::pthread_kill(*thread, kick_signal()) };
}

thread_local! {
    /// The page this thread's vCPU shares with KVM, while the thread runs it. Has no destructor and
    /// needs no initialisation, so that a signal handler may read it.
    static RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer was set by this thread to its vCPU's shared page and is reset before
        // that page goes away. KVM reads the byte on its own terms, so a plain volatile store does.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}

/// Installs the handler of the signal that kicks vCPUs; calling it again changes nothing.
pub fn install_kick_handler() -> std::io::Result<()> {
    vmm_sys_util::signal::register_signal_handler(kick_signal(), on_kick)
        .map_err(|e| std::io::Error::from_raw_os_error(e.errno()))
}

/// Makes kicks of the current thread reach `run` for as long as it lives.
pub struct KickTarget;

impl KickTarget {
    /// # Safety
    /// `run` must stay mapped until the target is dropped.
    pub unsafe fn set(run: *mut kvm_run) -> Self {
        RUN.set(run);
        KickTarget
    }
}

impl Drop for KickTarget {
    fn drop(&mut self) {
        RUN.set(ptr::null_mut());
    }
}
