//! Who may write to an image: a lock that belongs to the open file, is honoured by all hosts that
//! mount its file system, and goes when the process does, however it ends.

use crate::retry::retry;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

/// What a lock allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Reading, beside others who read.
    Shared,
    /// Writing, beside nobody.
    Exclusive,
    /// Nothing.
    None,
}

fn number(kind: LockKind) -> libc::c_int {
    match kind {
        LockKind::Shared => libc::F_RDLCK,
        LockKind::Exclusive => libc::F_WRLCK,
        LockKind::None => libc::F_UNLCK,
    }
}

/// A lock of this kind from the start (0) to wherever the end is (0). It names no process (0).
fn whole(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Changes the lock over all of `file`; false if somebody else's is in the way.
///
/// # Errors
/// If the file system has no such locks.
pub fn set(file: &File, kind: LockKind) -> io::Result<bool> {
    let range = whole(number(kind));
    // SAFETY: the command reads one flock, which lives across the call.
    match retry!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &range) }) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether somebody else has a lock on `file`, of whatever kind, that this host can see.
///
/// # Errors
/// If the file system has no such locks.
pub fn is_seen(file: &File) -> io::Result<bool> {
    // A lock for writing would conflict with any other.
    is_free(file, LockKind::Exclusive).map(|free| !free)
}

/// Whether nobody else's lock, that this host can see, is in the way of one of this kind.
///
/// # Errors
/// If the file system has no such locks.
pub fn is_free(file: &File, kind: LockKind) -> io::Result<bool> {
    let mut found = whole(number(kind));
    // SAFETY: the command reads and writes one flock, which lives across the call.
    retry!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut found) })?;
    Ok(found.l_type == libc::F_UNLCK as libc::c_short)
}

/// Whether a lock on `file` can decide between hosts. A block device's lock is known to its own host only,
/// however many hosts reach the device. A file's lock on the file systems named here is known to its own host
/// only as well, or nobody can tell. (A file on a local file system is one that no other host has.)
pub fn decides(file: &File) -> bool {
    // libc lacks this one.
    const NINE_P: libc::c_long = 0x0102_1997;
    const NOT: [libc::c_long; 2] = [NINE_P, libc::FUSE_SUPER_MAGIC];
    file_system(file).is_some_and(|kind| !NOT.contains(&kind)) && file.metadata().is_ok_and(|m| m.is_file())
}

/// Whether `file` is on an NFS server.
pub fn is_on_nfs(file: &File) -> bool {
    file_system(file) == Some(libc::NFS_SUPER_MAGIC)
}

/// The number of `file`'s kind of file system.
fn file_system(file: &File) -> Option<libc::c_long> {
    // SAFETY: all zeros is a valid value of the structure, and the kernel fills it in.
    let mut stat: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the structure lives across the call.
    let known = unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } == 0;
    known.then_some(stat.f_type)
}

/// Who holds a lock on `file`, for a person to read. Locks of open files name no process; this
/// host's processes tell what each of their open files has locked to whoever may look at them.
pub fn holder(file: &File) -> String {
    let Ok(inode) = file.metadata().map(|m| m.ino()) else { return "a process".into() };
    let named = named(file);
    // Here, a file of the same number on another file system would be mistaken for it.
    if named == Some(0) {
        return "a process of another host".into();
    }
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let mut holders: Vec<_> = pids.filter(|pid| holds(*pid, file, inode)).collect();
    if holders.is_empty() {
        holders.extend(named.and_then(|pid| u32::try_from(pid).ok()));
    }
    holders.sort_unstable();
    let names: Vec<_> = holders
        .iter()
        .map(|pid| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            format!("process {pid} ({})", name.trim())
        })
        .collect();
    if names.is_empty() {
        "a process that this one may not look at (`lslocks` and `fuser` tell root which), or one that has ended before \
         its last write".into()
    } else {
        names.join(", ")
    }
}

/// Which process the kernel names as holder of a lock on `file`: 0 for any of another host, that it knows
/// from the file's server; -1 for an open file of this one. Only this older command tells these apart.
fn named(file: &File) -> Option<libc::pid_t> {
    let mut found = whole(libc::F_WRLCK);
    // SAFETY: the command reads and writes one flock, which lives across the call.
    let known = retry!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &mut found) }).is_ok();
    (known && found.l_type != libc::F_UNLCK as libc::c_short).then_some(found.l_pid)
}

/// Whether process `pid` has a lock on the file with this inode number through another open file.
fn holds(pid: u32, file: &File, inode: u64) -> bool {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    for entry in entries {
        let own = pid == std::process::id()
            && entry.file_name().to_str().and_then(|fd| fd.parse().ok()) == Some(file.as_raw_fd());
        let info = fs::read_to_string(entry.path()).unwrap_or_default();
        // lock:	1: OFDLCK  ADVISORY  WRITE -1 fe:01:131 0 EOF
        let locked = info.lines().filter_map(|line| line.strip_prefix("lock:")).any(|line| {
            let place = line.split_whitespace().find(|word| word.matches(':').count() == 2);
            place.and_then(|place| place.rsplit(':').next()?.parse().ok()) == Some(inode)
        });
        if locked && !own {
            return true;
        }
    }
    false
}
