//! A program in a namespace of processes of its own: whatever it starts ends with it, however it ends.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Runs a command to its end as the first process of its namespace. At SIGINT and SIGTERM it is sent SIGTERM,
/// and killed at the second signal. This process survives that. To be called before there are further
/// threads.
///
/// # Errors
/// Without the right to make namespaces, or when there is no such program.
pub fn run(command: &mut Command) -> io::Result<ExitStatus> {
    // SAFETY: takes a number only; the next child is the first one in the namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWPID | libc::CLONE_NEWNS) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let told = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&told))?;
    }
    let die_together = || {
        // SAFETY: takes numbers only.
        match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // Ctrl-C on a terminal is for this process alone.
    command.process_group(0);
    // SAFETY: makes a system call and allocates nothing.
    let mut child = unsafe { command.pre_exec(die_together) }.spawn()?;
    let mut asked = false;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if told.swap(false, Ordering::AcqRel) {
            if asked {
                child.kill()?;
            } else {
                // SAFETY: takes numbers only; the child has not been waited for.
                unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGTERM) };
                asked = true;
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// To be called by the first process: `/proc` shows its namespace from then on.
///
/// # Errors
/// Without the right to mount.
pub fn arrive() -> io::Result<()> {
    mount(c"none", c"/", libc::MS_REC | libc::MS_PRIVATE)?;
    mount(c"proc", c"/proc", 0)
}

fn mount(what: &std::ffi::CStr, place: &std::ffi::CStr, flags: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the strings live across the call, and nothing else is pointed to.
    let mounted =
        unsafe { libc::mount(what.as_ptr(), place.as_ptr(), what.as_ptr(), flags, std::ptr::null()) };
    if mounted == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// To be called by the first process: whether it has been asked to end.
///
/// # Errors
/// When signals cannot be handled.
pub fn asked() -> io::Result<Arc<AtomicBool>> {
    let asked = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::clone(&asked))?;
    Ok(asked)
}

/// How long orphans have to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// To be called by the first process, when it waits for no child of its own: lets go of orphans that have
/// ended. Whether others are left.
pub fn reap() -> bool {
    loop {
        // SAFETY: takes numbers, and nothing is written.
        match unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } {
            0 => return true,
            -1 if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted => return false,
            _ => {}
        }
    }
}

/// Processes of this namespace besides this one, once those that end with their parents have ended.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn others() -> io::Result<Vec<String>> {
    let begun = Instant::now();
    while reap() && begun.elapsed() < PATIENCE {
        thread::sleep(Duration::from_millis(20));
    }
    let mut others = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let path = entry?.path();
        let is_process =
            path.file_name().and_then(|name| name.to_str()).is_some_and(|n| n.parse::<u32>().is_ok());
        if is_process && !path.ends_with(std::process::id().to_string()) {
            // It may have ended meanwhile.
            others.extend(std::fs::read_to_string(path.join("comm")).map(|name| name.trim().to_string()));
        }
    }
    Ok(others)
}
