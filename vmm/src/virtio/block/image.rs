//! A disk's image.

use super::bounce::{BounceBuffer, MAX_BOUNCE, PAGE};
use super::format;
use super::lock::{self, LockKind};
use super::mark::{self, Mark};
use super::request::SECTOR;
use super::statx::statx;
use super::{BlockConfig, Error, Geometry, Images};
use crate::component::Kind;
use crate::lock::lock;
use crate::retry::retry;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// An open image.
pub struct DiskImage {
    path: PathBuf,
    file: File,
    readonly: bool,
    geometry: Geometry,
    on_nfs: bool,
    /// No guest has had it yet. One that has may write whatever it likes to where a format has its magic.
    unused: AtomicBool,
    /// Alignment that buffers must have, in memory; 1 without direct I/O.
    alignment: usize,
    /// Whether the lock is held: without it nothing is read or written.
    held: AtomicBool,
    /// Its mark when the lock was released.
    released_at: Mutex<Option<Mark>>,
}

impl DiskImage {
    /// Opens the image without touching its content and without a lock.
    ///
    /// # Errors
    /// [`Error`], if there is no such image, none that this machine may have, or another than the guest
    /// knows.
    pub fn open(config: &BlockConfig, images: &Images) -> Result<Self, Error> {
        let (path, file) = images.open(config)?;
        let failed = |source| Error::Open { path: path.clone(), source };
        let is_device = file.metadata().map_err(failed)?.file_type().is_block_device();
        // Also right for block devices, whose metadata has no length.
        // SAFETY: seeking needs nothing but a descriptor; this file's position is not used.
        let len = unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_END) };
        let len = u64::try_from(len).map_err(|_| failed(io::Error::last_os_error()))?;
        let on_nfs = lock::is_on_nfs(&file);
        // Direct I/O to a server takes any buffers.
        let (alignment, unit) = if config.cached || on_nfs { (1, 512) } else { direct_io(&file, is_device) };
        if len == 0 || !len.is_multiple_of(u64::from(unit)) {
            return Err(Error::Size { path, len, unit });
        }
        let found = Geometry { len, unit };
        // The guest may know larger units than this host needs.
        let geometry = config.geometry.unwrap_or(found);
        if geometry.len != len || geometry.unit < unit || !matches!(geometry.unit, 512 | 4096) {
            return Err(Error::Geometry { path, found, wanted: geometry });
        }
        let held = AtomicBool::new(false);
        let released_at = Mutex::default();
        Ok(DiskImage {
            path,
            file,
            readonly: config.readonly,
            geometry,
            on_nfs,
            unused: AtomicBool::new(config.geometry.is_none()),
            alignment,
            held,
            released_at,
        })
    }

    /// The same open image, to be read only: under the lock of this one, for as long as this one has it.
    ///
    /// # Errors
    /// [`Error::Open`], or [`Error::Lock`] if the lock is not held.
    pub fn to_read(&self) -> Result<DiskImage, Error> {
        let path = self.path.clone();
        if !self.holds_lock() {
            return Err(Error::Lock { path, source: io::Error::other("it is not locked here") });
        }
        let file = self.file.try_clone().map_err(|source| Error::Open { path: path.clone(), source })?;
        Ok(DiskImage {
            path,
            file,
            readonly: true,
            geometry: self.geometry,
            on_nfs: self.on_nfs,
            unused: AtomicBool::new(false),
            alignment: self.alignment,
            held: AtomicBool::new(true),
            released_at: Mutex::default(),
        })
    }

    /// An image that another process has open, and under its lock, to be read.
    pub(crate) fn to_be_read(path: PathBuf, file: File, geometry: Geometry, alignment: usize) -> DiskImage {
        DiskImage {
            path,
            file,
            readonly: true,
            geometry,
            on_nfs: false,
            unused: AtomicBool::new(false),
            alignment,
            held: AtomicBool::new(true),
            released_at: Mutex::default(),
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Alignment that buffers must have, in memory; 1 without direct I/O.
    pub(crate) fn alignment(&self) -> usize {
        self.alignment
    }

    /// Its size and unit.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether it is on an NFS server. There, a process that is killed waits for no system call of its own:
    /// its lock goes while the server may still be at its last write. What io_uring reads and writes by
    /// direct I/O keeps the file open, and the lock held, until it is done; `fallocate` does
    /// not, neither as a system call nor by io_uring.
    pub fn is_on_nfs(&self) -> bool {
        self.on_nfs
    }

    /// Whether its lock can decide which of two hosts owns the guest.
    pub fn lock_decides(&self) -> bool {
        !self.readonly && lock::decides(&self.file)
    }

    /// Refuses an image on which nobody else has a lock that this host can see. The machine that a guest
    /// comes from has locked its images, so such an image is another file, or on storage whose locks end at a
    /// host. Touches nothing of the image. One that is `trusted` needs no lock, but must be raw.
    ///
    /// # Errors
    /// [`Error::NotShared`] or [`Error::Lock`]; [`Error::Format`] or [`Error::Read`] for one that is trusted.
    pub fn check_shared(&self, trusted: bool) -> Result<(), Error> {
        match lock::is_seen(&self.file) {
            Ok(true) => Ok(()),
            Ok(false) if trusted => self.check_format(),
            Ok(false) => Err(Error::NotShared { path: self.path.clone() }),
            Err(source) => Err(Error::Lock { path: self.path.clone(), source }),
        }
    }

    /// Takes the lock that its use needs. Does nothing if the lock is held here.
    ///
    /// # Errors
    /// [`Error::Held`] or [`Error::Lock`]; [`Error::UsedElsewhere`] or [`Error::Mark`] if it was released
    /// before and somebody else has used the image since, or nobody can tell; [`Error::Format`] or
    /// [`Error::Read`] for the image of a new guest.
    pub fn take_lock(&self) -> Result<(), Error> {
        // Not asked for again: an NFS server that has given it to somebody else meanwhile, because it had not
        // heard of this host for too long, would give it anew, and the guest go on with a disk that is newer
        // than its memory. As it is, the host's kernel fails all that is written.
        if self.holds_lock() {
            return Ok(());
        }
        let lock = if self.readonly { LockKind::Shared } else { LockKind::Exclusive };
        match lock::set(&self.file, lock) {
            Ok(true) => {
                if let Err(why) = self.check_unused().and_then(|()| self.check_new()) {
                    // Closing the file releases it as well.
                    let _ = lock::set(&self.file, LockKind::None);
                    return Err(why);
                }
                self.unused.store(false, Ordering::Relaxed);
                self.held.store(true, Ordering::Release);
                Ok(())
            }
            Ok(false) => Err(Error::Held { path: self.path.clone(), holder: lock::holder(&self.file) }),
            Err(source) => Err(Error::Lock { path: self.path.clone(), source }),
        }
    }

    /// Refuses a new guest's image that is not raw.
    fn check_new(&self) -> Result<(), Error> {
        if self.unused.load(Ordering::Relaxed) { self.check_format() } else { Ok(()) }
    }

    /// Refuses an image that is not raw.
    fn check_format(&self) -> Result<(), Error> {
        let mut head = [0; format::HEAD];
        let read = self.read(0, &mut head);
        read.map_err(|source| Error::Read { path: self.path.clone(), source })?;
        match format::of(&head) {
            Some(format) => Err(Error::Format { path: self.path.clone(), format }),
            None => Ok(()),
        }
    }

    /// Whether nobody has used the image since the lock was released here, if it was.
    fn check_unused(&self) -> Result<(), Error> {
        let released_at = *lock(&self.released_at);
        match released_at {
            Some(mark) if self.mark()? != mark => Err(Error::UsedElsewhere { path: self.path.clone() }),
            _ => Ok(()),
        }
    }

    fn mark(&self) -> Result<Mark, Error> {
        mark::read(&self.file).map_err(|source| Error::Mark { path: self.path.clone(), source })
    }

    /// Marks the image as used from here on, so that whoever released the lock before can tell. Called with
    /// the lock held. Where the lock cannot decide between hosts, neither could the mark.
    ///
    /// # Errors
    /// [`Error::Mark`].
    pub fn claim(&self) -> Result<(), Error> {
        if !self.lock_decides() {
            return Ok(());
        }
        mark::change(&self.file).map_err(|source| Error::Mark { path: self.path.clone(), source })
    }

    /// Makes all that was written durable and releases the lock.
    ///
    /// # Errors
    /// [`Error::Flush`], [`Error::Mark`] or [`Error::Lock`]; the lock is then still held.
    pub fn release_lock(&self) -> Result<(), Error> {
        if !self.holds_lock() {
            return Ok(());
        }
        self.flush().map_err(|source| Error::Flush { path: self.path.clone(), source })?;
        let mark = if self.lock_decides() { Some(self.mark()?) } else { None };
        *lock(&self.released_at) = mark;
        self.held.store(false, Ordering::Release);
        match lock::set(&self.file, LockKind::None) {
            Ok(_) => Ok(()),
            Err(source) => {
                self.held.store(true, Ordering::Release);
                Err(Error::Lock { path: self.path.clone(), source })
            }
        }
    }

    /// Whether the lock is held.
    pub fn holds_lock(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// What the system says.
    pub fn flush(&self) -> io::Result<()> {
        if self.readonly { Ok(()) } else { self.file.sync_data() }
    }

    /// The open file, for system calls.
    pub fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The open file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether the guest may only read.
    pub fn is_readonly(&self) -> bool {
        self.readonly
    }

    /// Whether direct I/O takes buffers that lie so.
    pub fn takes(&self, vectors: &[libc::iovec]) -> bool {
        let fits = |vector: &libc::iovec| {
            (vector.iov_base as usize).is_multiple_of(self.alignment)
                && vector.iov_len.is_multiple_of(self.geometry.unit as usize)
        };
        self.alignment == 1 || vectors.iter().all(fits)
    }

    /// Gives the offset in bytes of `len` bytes from `sector` on.
    ///
    /// # Errors
    /// If they are not held, not writable or not there.
    pub fn check(&self, sector: u64, len: u64, write: bool) -> io::Result<u64> {
        let unit = u64::from(self.geometry.unit);
        let start =
            sector.checked_mul(SECTOR).filter(|start| start.is_multiple_of(unit) && len.is_multiple_of(unit));
        let end = start.and_then(|start| start.checked_add(len)).filter(|end| *end <= self.geometry.len);
        if !self.holds_lock() || write && self.readonly || end.is_none() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        start.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    /// Reads from byte `offset` on, whatever the alignment of offset and buffer. For this process's own use,
    /// not for a guest's.
    ///
    /// # Errors
    /// What the system says, or if the range is none of the disk's, or the lock not held.
    pub fn read_exact_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        if self.holds_lock() { self.read(offset, bytes) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    /// The same, whoever holds the lock.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let unit = u64::from(self.geometry.unit);
        let end = offset.checked_add(bytes.len() as u64).filter(|end| *end <= self.geometry.len);
        let end = end.ok_or(io::ErrorKind::InvalidInput)?;
        // The image is whole units, so what is read beyond the range is there too.
        let (mut at, end) = (offset / unit * unit, end.next_multiple_of(unit));
        let mut bounce = BounceBuffer::new(MAX_BOUNCE.min((end - at) as usize))?;
        let (mut skip, mut rest) = ((offset - at) as usize, bytes);
        while !rest.is_empty() {
            let piece = &mut bounce.bytes()[..MAX_BOUNCE.min((end - at) as usize)];
            self.file.read_exact_at(piece, at)?;
            let count = rest.len().min(piece.len() - skip);
            rest[..count].copy_from_slice(&piece[skip..skip + count]);
            (at, skip, rest) = (at + piece.len() as u64, 0, &mut rest[count..]);
        }
        Ok(())
    }

    /// What to say of a state of another disk.
    pub fn mismatch(&self, index: u8, len: u64, unit: u32) -> crate::component::Error {
        let Geometry { len: own, unit: own_unit } = self.geometry;
        let what = format!("{len} bytes in units of {unit} where {own} in units of {own_unit} belong");
        crate::component::Error::Malformed { kind: Kind::Block, index, what }
    }
}

/// What direct I/O on `file` needs: the alignment of buffers in memory, and the unit of offsets and
/// lengths.
fn direct_io(file: &File, is_device: bool) -> (usize, u32) {
    let unit = |reported: u32| if reported <= 512 { 512 } else { 4096 };
    if let Ok(stat) = statx(file, 0, libc::STATX_DIOALIGN)
        && stat.stx_mask & libc::STATX_DIOALIGN != 0
        && stat.stx_dio_offset_align != 0
    {
        return (stat.stx_dio_mem_align.max(512) as usize, unit(stat.stx_dio_offset_align));
    }
    if is_device {
        let mut size: libc::c_int = 0;
        // SAFETY: the request writes one int, which lives across the call.
        if retry!(unsafe { libc::ioctl(file.as_raw_fd(), BLKSSZGET, &mut size) }).is_ok() {
            return (512, unit(size.unsigned_abs()));
        }
    }
    // Before Linux 6.1, and on file systems that do not say: a direct read, which no cache keeps.
    let probe = BounceBuffer::new(PAGE).and_then(|mut page| {
        loop {
            match file.read_at(&mut page.bytes()[..512], 512) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    });
    if probe.is_ok() { (512, 512) } else { (PAGE, 4096) }
}

/// The logical block size of a device; libc has it for some targets only.
const BLKSSZGET: libc::c_ulong = 0x1268;
