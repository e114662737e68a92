//! The lists of system calls.

use libc::*;
use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};
use std::collections::BTreeMap;

/// Calls, and for each the conditions on its arguments: one of the rules must hold, if there are any.
/// What is allowed, and under which conditions.
pub type Calls = BTreeMap<i64, Vec<SeccompRule>>;

/// A list of calls with their names.
macro_rules! named {
    ($($(#[$_:meta])* $call:ident,)*) => {
        const FATAL: &[(i64, &str)] = &[$(($call, stringify!($call)),)*];
    };
}

// Calls that neither this program nor a library ever needs, and that somebody who has taken over a process
// tries first: other programs, other processes, the kernel, the system's settings, namespaces and mounts.
named! {
    // other programs
    SYS_execve,
    SYS_execveat,
    SYS_uselib,
    SYS_personality,
    // other processes
    SYS_ptrace,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_process_madvise,
    SYS_pidfd_getfd,
    SYS_kcmp,
    // the kernel
    SYS_bpf,
    SYS_perf_event_open,
    SYS_userfaultfd,
    SYS_init_module,
    SYS_finit_module,
    SYS_delete_module,
    SYS_kexec_load,
    SYS_kexec_file_load,
    SYS_iopl,
    SYS_ioperm,
    SYS_modify_ldt,
    SYS_syslog,
    SYS_add_key,
    SYS_request_key,
    SYS_keyctl,
    // the system
    SYS_reboot,
    SYS_swapon,
    SYS_swapoff,
    SYS_acct,
    SYS_quotactl,
    SYS_quotactl_fd,
    SYS_settimeofday,
    SYS_clock_settime,
    SYS_sethostname,
    SYS_setdomainname,
    SYS_vhangup,
    SYS_fanotify_init,
    SYS_open_by_handle_at,
    SYS_mknod,
    SYS_mknodat,
    // namespaces and mounts
    SYS_setns,
    SYS_unshare,
    SYS_chroot,
    SYS_pivot_root,
    SYS_mount,
    SYS_umount2,
    SYS_open_tree,
    SYS_move_mount,
    SYS_fsopen,
    SYS_fsconfig,
    SYS_fsmount,
    SYS_fspick,
    SYS_mount_setattr,
    // users
    SYS_setuid,
    SYS_setgid,
    SYS_setreuid,
    SYS_setregid,
    SYS_setresuid,
    SYS_setresgid,
    SYS_setgroups,
    SYS_setfsuid,
    SYS_setfsgid,
}

/// What threads that serve a guest need: working on files that others have opened, memory, waiting, and
/// ending.
const SERVING: &[i64] = &[
    // files and devices that are open
    SYS_ioctl,
    SYS_read,
    SYS_write,
    SYS_readv,
    SYS_writev,
    SYS_pread64,
    SYS_pwrite64,
    SYS_preadv,
    SYS_pwritev,
    SYS_preadv2,
    SYS_pwritev2,
    SYS_fallocate,
    SYS_fsync,
    SYS_fdatasync,
    SYS_lseek,
    SYS_close,
    SYS_poll,
    SYS_ppoll,
    SYS_io_uring_enter,
    // memory; further calls have conditions
    SYS_brk,
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_membarrier,
    // threads, signals and time
    SYS_futex,
    SYS_sched_yield,
    SYS_sched_getaffinity,
    SYS_gettid,
    SYS_getpid,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sigaltstack,
    SYS_restart_syscall,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_nanosleep,
    SYS_gettimeofday,
    SYS_rseq,
    SYS_set_robust_list,
    SYS_getrandom,
    SYS_exit,
    SYS_exit_group,
];

/// What the other threads need in addition: opening files, talking, threads, and what the C library and the
/// libraries of RDMA devices and of name resolution may ask for.
const FURTHER: &[i64] = &[
    // files
    SYS_open,
    SYS_openat,
    SYS_openat2,
    SYS_close_range,
    SYS_stat,
    SYS_fstat,
    SYS_lstat,
    SYS_newfstatat,
    SYS_statx,
    SYS_statfs,
    SYS_fstatfs,
    SYS_access,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_readlink,
    SYS_readlinkat,
    SYS_getcwd,
    SYS_getdents,
    SYS_getdents64,
    SYS_fcntl,
    SYS_flock,
    SYS_utimensat,
    SYS_dup,
    SYS_dup2,
    SYS_dup3,
    SYS_pipe,
    SYS_pipe2,
    SYS_ftruncate,
    SYS_sync_file_range,
    SYS_fadvise64,
    SYS_readahead,
    SYS_copy_file_range,
    SYS_sendfile,
    SYS_splice,
    SYS_tee,
    SYS_vmsplice,
    // the API's socket, and its name
    SYS_link,
    SYS_linkat,
    SYS_unlink,
    SYS_unlinkat,
    SYS_chmod,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_umask,
    // waiting
    SYS_select,
    SYS_pselect6,
    SYS_epoll_create,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_epoll_pwait2,
    SYS_eventfd,
    SYS_eventfd2,
    SYS_timerfd_create,
    SYS_timerfd_settime,
    SYS_timerfd_gettime,
    SYS_signalfd,
    SYS_signalfd4,
    SYS_inotify_init1,
    SYS_inotify_add_watch,
    SYS_inotify_rm_watch,
    SYS_io_uring_setup,
    SYS_io_uring_register,
    // sockets; opening one has a condition
    SYS_socketpair,
    SYS_connect,
    SYS_accept,
    SYS_accept4,
    SYS_bind,
    SYS_listen,
    SYS_getsockname,
    SYS_getpeername,
    SYS_getsockopt,
    SYS_setsockopt,
    SYS_sendto,
    SYS_sendmsg,
    SYS_sendmmsg,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_recvmmsg,
    SYS_shutdown,
    // memory
    SYS_mmap,
    SYS_mprotect,
    SYS_pkey_mprotect,
    SYS_pkey_alloc,
    SYS_pkey_free,
    SYS_mincore,
    SYS_msync,
    SYS_mlock,
    SYS_mlock2,
    SYS_munlock,
    SYS_mlockall,
    SYS_munlockall,
    SYS_memfd_create,
    SYS_mbind,
    SYS_get_mempolicy,
    SYS_set_mempolicy,
    // threads, signals and time
    SYS_set_tid_address,
    SYS_get_robust_list,
    SYS_arch_prctl,
    SYS_futex_waitv,
    SYS_sched_setaffinity,
    SYS_sched_getparam,
    SYS_sched_getscheduler,
    SYS_sched_get_priority_max,
    SYS_sched_get_priority_min,
    SYS_getpriority,
    SYS_setpriority,
    SYS_getcpu,
    SYS_rt_sigpending,
    SYS_rt_sigsuspend,
    SYS_rt_sigtimedwait,
    SYS_pause,
    SYS_clock_getres,
    SYS_time,
    SYS_times,
    SYS_getrusage,
    // who and where we are
    SYS_getppid,
    SYS_getuid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getegid,
    SYS_getresuid,
    SYS_getresgid,
    SYS_getgroups,
    SYS_getpgrp,
    SYS_getsid,
    SYS_capget,
    SYS_uname,
    SYS_sysinfo,
    SYS_getrlimit,
    // giving up further rights
    SYS_capset,
    SYS_seccomp,
];

/// What `prctl` may be used for: naming threads and memory, and giving up rights.
const PRCTL: &[c_int] = &[
    PR_SET_NAME,
    PR_GET_NAME,
    PR_GET_DUMPABLE,
    PR_SET_VMA,
    PR_CAPBSET_READ,
    PR_CAP_AMBIENT,
    PR_SET_NO_NEW_PRIVS,
    PR_GET_NO_NEW_PRIVS,
];

/// Sockets of migrations, of the API, of taps and of name resolution, and those by which libraries of RDMA
/// devices ask the kernel. No raw sockets, and none that reach rarely used parts of the kernel.
const SOCKETS: &[c_int] = &[AF_UNIX, AF_INET, AF_INET6, AF_NETLINK];

/// What a call that ends the process is called.
pub fn name(call: i64) -> &'static str {
    let named = FATAL.iter().find(|(number, _)| *number == call);
    match named.and_then(|(_, name)| name.strip_prefix("SYS_")) {
        Some(name) => name,
        None if call == SYS_ioctl => "ioctl",
        None => "unknown",
    }
}

/// What ends the process.
///
/// # Errors
/// None; the library cannot know.
pub fn fatal() -> Result<Calls, BackendError> {
    let mut calls: Calls = FATAL.iter().map(|(call, _)| (*call, Vec::new())).collect();
    // Typing into the terminal that the process was started from, and pasting there.
    calls.insert(SYS_ioctl, vec![rule(1, SeccompCmpOp::Eq, TIOCSTI)?, rule(1, SeccompCmpOp::Eq, TIOCLINUX)?]);
    Ok(calls)
}

/// The list for threads that serve a guest.
///
/// # Errors
/// None; the library cannot know.
pub fn serving() -> Result<Calls, BackendError> {
    let mut calls = plain(SERVING);
    // No new code: a guest that takes one of these threads over has only the code that is there.
    let no_code = rule(2, SeccompCmpOp::MaskedEq(PROT_EXEC as u64), 0)?;
    calls.insert(SYS_mmap, vec![no_code.clone()]);
    calls.insert(SYS_mprotect, vec![no_code]);
    calls.insert(SYS_tgkill, vec![own_process()?]);
    calls.insert(SYS_rt_sigaction, vec![other_signals()?]);
    // A thread that is ended says its name.
    calls.insert(SYS_prctl, vec![rule(0, SeccompCmpOp::Eq, PR_GET_NAME as u64)?]);
    Ok(calls)
}

/// What reading a disk takes, whatever the arguments.
const READING: &[i64] = &[
    SYS_brk,
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_futex,
    SYS_clock_gettime,
    SYS_getrandom,
    SYS_gettid,
    SYS_getpid,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_exit,
    SYS_exit_group,
];

/// The list for a process that reads a disk, and writes what it has found.
///
/// # Errors
/// None; the library cannot know.
pub fn reader(input: c_int, output: c_int) -> Result<Calls, BackendError> {
    let mut calls = plain(READING);
    let file = |fd: c_int| rule(0, SeccompCmpOp::Eq, fd as u64);
    calls.insert(SYS_pread64, vec![file(input)?]);
    // The runtime's own messages go to standard error, which is closed.
    calls.insert(SYS_write, vec![file(output)?, file(STDERR_FILENO)?]);
    let condition = |index, mask: c_int, value: c_int| {
        let how = SeccompCmpOp::MaskedEq(mask as u64);
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, how, value as u64)
    };
    let anonymous = vec![condition(2, PROT_EXEC, 0)?, condition(3, MAP_ANONYMOUS, MAP_ANONYMOUS)?];
    calls.insert(SYS_mmap, vec![SeccompRule::new(anonymous)?]);
    calls.insert(SYS_mprotect, vec![rule(2, SeccompCmpOp::MaskedEq(PROT_EXEC as u64), 0)?]);
    calls.insert(SYS_tgkill, vec![own_process()?]);
    Ok(calls)
}

/// The list for a process that waits until there is a disk to be read, and starts another one then, which
/// narrows the list further.
///
/// # Errors
/// None; the library cannot know.
pub fn standby() -> Result<Calls, BackendError> {
    let mut calls = plain(&[
        // requests and answers
        SYS_recvmsg,
        SYS_sendto,
        SYS_write,
        SYS_close,
        SYS_wait4,
        SYS_alarm,
        SYS_setitimer,
        // what the other process does before it has a list of its own, and what that has
        SYS_close_range,
        SYS_getrlimit,
        SYS_setrlimit,
        SYS_prlimit64,
        SYS_seccomp,
        SYS_set_robust_list,
        SYS_pread64,
        SYS_tgkill,
        SYS_fork,
    ]);
    calls.append(&mut plain(READING));
    // A process, but neither a thread nor a namespace.
    let process = CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID | SIGCHLD;
    calls.insert(SYS_clone, vec![rule(0, SeccompCmpOp::Eq, process as u64)?]);
    calls.insert(SYS_kill, vec![rule(1, SeccompCmpOp::Eq, SIGKILL as u64)?]);
    // The standard library looks at what it closes, where it is built to.
    calls.insert(SYS_fcntl, vec![rule(1, SeccompCmpOp::Eq, F_GETFD as u64)?]);
    let prctl = [PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_VMA];
    let prctl = prctl.iter().map(|what| rule(0, SeccompCmpOp::Eq, *what as u64));
    calls.insert(SYS_prctl, prctl.collect::<Result<_, _>>()?);
    let no_code = rule(2, SeccompCmpOp::MaskedEq(PROT_EXEC as u64), 0)?;
    calls.insert(SYS_mmap, vec![no_code.clone()]);
    calls.insert(SYS_mprotect, vec![no_code]);
    Ok(calls)
}

/// The list for all threads.
///
/// # Errors
/// None; the library cannot know.
pub fn all() -> Result<Calls, BackendError> {
    let mut calls = plain(SERVING);
    calls.append(&mut plain(FURTHER));
    calls.insert(SYS_tgkill, vec![own_process()?]);
    calls.insert(SYS_rt_sigaction, vec![other_signals()?]);
    // Threads, but neither processes nor namespaces. `clone3` has its flags in memory, where no filter can
    // look. The C library uses `clone` if `clone3` is missing.
    const NAMESPACES: c_int = CLONE_NEWNS
        | CLONE_NEWUTS
        | CLONE_NEWIPC
        | CLONE_NEWUSER
        | CLONE_NEWPID
        | CLONE_NEWNET
        | CLONE_NEWCGROUP;
    let looked_at = (CLONE_THREAD | NAMESPACES) as u64;
    let thread = rule(0, SeccompCmpOp::MaskedEq(looked_at), CLONE_THREAD as u64)?;
    calls.insert(SYS_clone, vec![thread]);
    // The process's own limits. The C library also asks for the size of a stack in this way.
    calls.insert(SYS_prlimit64, vec![rule(0, SeccompCmpOp::Eq, 0)?]);
    let one_of = |allowed: &[c_int]| {
        allowed.iter().map(|value| rule(0, SeccompCmpOp::Eq, *value as u64)).collect::<Result<Vec<_>, _>>()
    };
    calls.insert(SYS_prctl, one_of(PRCTL)?);
    calls.insert(SYS_socket, one_of(SOCKETS)?);
    Ok(calls)
}

fn plain(calls: &[i64]) -> Calls {
    calls.iter().map(|call| (*call, Vec::new())).collect()
}

/// The rule that argument `index` compares so.
fn rule(index: u8, how: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(index, SeccompCmpArgLen::Dword, how, value)?])
}

/// The rule that the first argument is another signal than the one by which a filter ends the process.
fn other_signals() -> Result<SeccompRule, BackendError> {
    rule(0, SeccompCmpOp::Ne, SIGSYS as u64)
}

/// The rule that the first argument is this process.
fn own_process() -> Result<SeccompRule, BackendError> {
    rule(0, SeccompCmpOp::Eq, std::process::id().into())
}
