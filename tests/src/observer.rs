//! Watches which processes touch a file, as this host's kernel reports it.
//!
//! Before any process reads or writes the file, however it got hold of it, the kernel asks the watcher of the
//! file for permission (fanotify's `FAN_PRE_ACCESS`, Linux 6.14), and the process waits for the answer. So no
//! access is missed, and their order is known. While an access waits, its process can be examined: whether it
//! has the file's lock at that very moment.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// libc lacks this one.
const FAN_PRE_ACCESS: u64 = 0x0010_0000;

/// What an accessing process had of the file's lock while the access was held up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The exclusive lock.
    Locked,
    /// Nothing.
    Unlocked,
    /// The process was dead or dying: it has no files left to look at.
    Dying,
}

/// One access.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// The process.
    pub pid: u32,
    /// Its right.
    pub standing: Standing,
}

/// Watches a file until it is dropped.
pub struct Observer {
    seen: Arc<Mutex<Vec<Access>>>,
    stop: Arc<AtomicBool>,
    watching: Option<JoinHandle<()>>,
}

impl Observer {
    /// Begins.
    ///
    /// # Errors
    /// If the kernel does not do that here.
    pub fn begin(path: &Path) -> io::Result<Self> {
        let inode = fs::metadata(path)?.ino();
        let text = std::ffi::CString::new(path.as_os_str().as_bytes())?;
        let flags = libc::FAN_CLASS_PRE_CONTENT | libc::FAN_CLOEXEC | libc::FAN_UNLIMITED_QUEUE;
        // SAFETY: takes numbers only.
        let group = unsafe { libc::fanotify_init(flags, (libc::O_RDONLY | libc::O_CLOEXEC) as u32) };
        if group < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that was just made and that nobody else has.
        let group = unsafe { File::from_raw_fd(group) };
        // SAFETY: the path is a C string that lives across the call.
        let marked = unsafe {
            let (at, add) = (libc::AT_FDCWD, libc::FAN_MARK_ADD);
            libc::fanotify_mark(group.as_raw_fd(), add, FAN_PRE_ACCESS, at, text.as_ptr())
        };
        if marked != 0 {
            return Err(io::Error::last_os_error());
        }
        let (seen, stop) = (Arc::<Mutex<Vec<Access>>>::default(), Arc::<AtomicBool>::default());
        let (notes, stopped) = (Arc::clone(&seen), Arc::clone(&stop));
        let watching = thread::spawn(move || watch(group, inode, &notes, &stopped));
        Ok(Observer { seen, stop, watching: Some(watching) })
    }

    /// All accesses so far, in their order.
    pub fn seen(&self) -> Vec<Access> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(Err(panic)) = self.watching.take().map(JoinHandle::join)
            && !thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

/// Answers the kernel until told to stop. When the group is closed, it lets everything pass.
fn watch(mut group: File, inode: u64, notes: &Mutex<Vec<Access>>, stopped: &AtomicBool) {
    const HEAD: usize = size_of::<libc::fanotify_event_metadata>();
    let mut buffer = [0; 4096];
    while !stopped.load(Ordering::Acquire) {
        let mut poll = libc::pollfd { fd: group.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry, which lives across the call.
        if unsafe { libc::poll(&mut poll, 1, 20) } != 1 {
            continue;
        }
        let length = group.read(&mut buffer).expect("events");
        let mut rest = &buffer[..length];
        while rest.len() >= HEAD {
            // SAFETY: so many bytes are there, any of which make a value of the structure.
            let event: libc::fanotify_event_metadata =
                unsafe { std::ptr::read_unaligned(rest.as_ptr().cast()) };
            rest = &rest[(event.event_len as usize).clamp(HEAD, rest.len())..];
            // SAFETY: the kernel opened it for this event, and nobody else has it.
            let file = unsafe { File::from_raw_fd(event.fd) };
            let pid = event.pid.unsigned_abs();
            let access = Access { pid, standing: standing(pid, inode) };
            notes.lock().unwrap_or_else(PoisonError::into_inner).push(access);
            let mut answer = [0; 8];
            answer[..4].copy_from_slice(&file.as_raw_fd().to_ne_bytes());
            answer[4..].copy_from_slice(&libc::FAN_ALLOW.to_ne_bytes());
            // A process that was killed meanwhile wants no answer.
            let _ = group.write_all(&answer);
        }
    }
}

fn standing(pid: u32, inode: u64) -> Standing {
    let files = || fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let place = format!(":{inode} ");
    let has = |info: &str| {
        info.lines().any(|line| {
            line.starts_with("lock:")
                && line.contains("OFDLCK")
                && line.contains("WRITE")
                && line.contains(&place)
        })
    };
    if files().any(|entry| fs::read_to_string(entry.path()).is_ok_and(|info| has(&info))) {
        Standing::Locked
    } else if files().next().is_none() {
        Standing::Dying
    } else {
        Standing::Unlocked
    }
}

/// Who had the file one after the other, and how often each touched it.
///
/// # Errors
/// If somebody touched it without its lock, or came back after another had.
pub fn owners(accesses: &[Access]) -> Result<Vec<(u32, usize)>, String> {
    let mut owners: Vec<(u32, usize)> = Vec::new();
    for access in accesses {
        if access.standing == Standing::Unlocked {
            return Err(format!("process {} touched it without its lock, after {owners:?}", access.pid));
        }
        if let Some((pid, count)) = owners.last_mut()
            && *pid == access.pid
        {
            *count += 1;
        } else if owners.iter().any(|(pid, _)| *pid == access.pid) {
            return Err(format!("process {} touched it again after {owners:?}", access.pid));
        } else {
            owners.push((access.pid, 1));
        }
    }
    Ok(owners)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_follow_each_other() {
        let by = |pid| Access { pid, standing: Standing::Locked };
        assert_eq!(owners(&[by(1), by(1), by(2)]).unwrap(), [(1, 2), (2, 1)]);
        assert!(owners(&[by(1), by(2), by(1)]).unwrap_err().contains("again"));
        let unlocked = Access { pid: 2, standing: Standing::Unlocked };
        assert!(owners(&[by(1), unlocked]).unwrap_err().contains("without"));
        let dying = Access { pid: 1, standing: Standing::Dying };
        assert!(owners(&[by(1), dying, by(2)]).is_ok());
        assert!(owners(&[by(1), by(2), dying]).is_err());
    }
}
