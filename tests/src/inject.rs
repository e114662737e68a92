//! Makes a thread of another process carry out system calls, as an attacker who has taken that thread over
//! would.

use crate::sides::wait_until;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr;

/// What became of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It returned this; errors are negative.
    Returned(i64),
    /// The thread ended by this signal.
    Killed(i32),
}

/// The thread of a process that has this name; of several, one.
///
/// # Panics
/// When there is none.
pub fn thread(pid: u32, name: &str) -> i32 {
    let named =
        |path: &Path| std::fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim() == name);
    let mut found = None;
    // It may not have given itself its name yet.
    wait_until(&format!("the thread {name:?} of process {pid}"), || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a process that runs").flatten();
        found = tasks.map(|task| task.path()).find(|path| named(path));
        found.is_some()
    });
    let found = found.expect("it was waited for");
    found.file_name().and_then(|id| id.to_str()?.parse().ok()).expect("a number")
}

/// Makes the thread `id`, which waits in some system call, carry out another one, and then go on with its
/// own.
///
/// # Panics
/// When this process may not trace it.
pub fn system_call(id: i32, number: i64, arguments: [u64; 3]) -> Outcome {
    carry_out(id, number, |_| arguments)
}

/// Makes the thread `id` open a file, as [`system_call`] does.
///
/// # Panics
/// When this process may not trace it, or not write to its memory.
pub fn open(id: i32, path: &Path, flags: i32) -> Outcome {
    let name = CString::new(path.as_os_str().as_bytes()).expect("a path without zeros");
    let place = |own: &libc::user_regs_struct| {
        // Below what the thread has on its stack.
        let address = own.rsp - 8192;
        let memory = File::options().write(true).open(format!("/proc/{id}/mem")).expect("its memory");
        memory.write_all_at(name.as_bytes_with_nul(), address).expect("its stack");
        [libc::AT_FDCWD as u64, address, flags as u64]
    };
    carry_out(id, libc::SYS_openat, place)
}

/// Makes a thread carry out a call with the arguments that come of its registers.
fn carry_out(id: i32, number: i64, arguments: impl FnOnce(&libc::user_regs_struct) -> [u64; 3]) -> Outcome {
    let nothing = ptr::null_mut::<libc::c_void>();
    trace(libc::PTRACE_SEIZE, id, nothing, nothing);
    trace(libc::PTRACE_INTERRUPT, id, nothing, nothing);
    assert!(libc::WIFSTOPPED(wait(id)), "it stops");
    let own = registers(id);
    let mut changed = own;
    // Back to the instruction by which it came into the kernel.
    changed.rip -= 2;
    let code = trace(libc::PTRACE_PEEKTEXT, id, changed.rip as *mut libc::c_void, nothing);
    assert_eq!(code & 0xffff, 0x050f, "a thread that waits in a system call");
    changed.rax = number as u64;
    // No call of its own is to be restarted now.
    changed.orig_rax = u64::MAX;
    [changed.rdi, changed.rsi, changed.rdx] = arguments(&own);
    // The fourth is a mode or an offset, if anything.
    changed.r10 = 0;
    set_registers(id, &changed);
    trace(libc::PTRACE_SINGLESTEP, id, nothing, nothing);
    let mut status = wait(id);
    // A filter's signal is the process's own business, and so is what follows; the step's own signal is ours.
    let mut filtered = false;
    while libc::WIFSTOPPED(status) {
        let signal = libc::WSTOPSIG(status);
        filtered |= signal == libc::SIGSYS;
        if !filtered {
            break;
        }
        let passed_on = if signal == libc::SIGSYS { signal as usize } else { 0 };
        trace(libc::PTRACE_CONT, id, nothing, ptr::without_provenance_mut(passed_on));
        status = wait(id);
    }
    if libc::WIFSIGNALED(status) {
        return Outcome::Killed(libc::WTERMSIG(status));
    }
    let result = registers(id).rax as i64;
    // The kernel restarts what it had interrupted.
    set_registers(id, &own);
    trace(libc::PTRACE_DETACH, id, nothing, nothing);
    Outcome::Returned(result)
}

fn registers(id: i32) -> libc::user_regs_struct {
    let mut registers = MaybeUninit::<libc::user_regs_struct>::uninit();
    trace(libc::PTRACE_GETREGS, id, ptr::null_mut(), registers.as_mut_ptr().cast());
    // SAFETY: the request, which has succeeded, fills the structure in.
    unsafe { registers.assume_init() }
}

fn set_registers(id: i32, registers: &libc::user_regs_struct) {
    trace(libc::PTRACE_SETREGS, id, ptr::null_mut(), ptr::from_ref(registers).cast_mut().cast());
}

fn trace(request: libc::c_uint, id: i32, address: *mut libc::c_void, data: *mut libc::c_void) -> i64 {
    // SAFETY: `data` is null, or the structure that the request reads or fills in, which lives across the
    // call; addresses are the other process's.
    let result = unsafe { libc::ptrace(request, id, address, data) };
    let peek = request == libc::PTRACE_PEEKTEXT;
    assert!(peek || result == 0, "ptrace: {}", io::Error::last_os_error());
    result
}

fn wait(id: i32) -> libc::c_int {
    let mut status = 0;
    // SAFETY: the status lives across the call.
    let waited = unsafe { libc::waitpid(id, &mut status, libc::__WALL) };
    assert_eq!(waited, id, "waitpid: {}", io::Error::last_os_error());
    status
}
