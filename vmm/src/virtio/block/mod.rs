//! virtio-blk: a disk in a raw file or a block device.
//!
//! Several hosts may have the image open; at most one may write. The right to write is an
//! open-file-description lock over the whole image (`lock.rs`), which a machine takes before it
//! runs and releases, after flushing, when it hands its guest over. So a destination can open the
//! image in good time, before it may touch it. A disk that is only read takes a shared lock.
//!
//! I/O is direct by default: what the source wrote is on the storage, and the destination has no
//! stale page of it in its cache.
//!
//! | file | what |
//! |---|---|
//! | `device.rs` | features, configuration, which way requests are carried out |
//! | `request.rs` | a request's type and buffers |
//! | `job.rs` | a request as file operations that follow one another |
//! | `held.rs` | requests that wait until the host can carry them out |
//! | `file_op.rs` | a file operation, and how a system call executes it |
//! | `uring.rs` | several requests at a time, by io_uring |
//! | `bounce.rs` | bounce buffers, for what direct I/O does not take as it is |
//! | `image.rs` | the image: opening, locking, flushing |
//! | `format.rs` | images that are not raw |
//! | `images.rs` | which images there may be, and how their paths are resolved |
//! | `lock.rs` | who may write |
//! | `mark.rs` | whether somebody else could, since |
//! | `statx.rs` | what the system tells of an open file |

mod bounce;
mod device;
mod file_op;
mod format;
mod held;
mod image;
mod images;
mod job;
mod lock;
mod mark;
mod request;
mod state;
mod statx;
#[cfg(test)]
mod tests;
mod uring;

pub use device::Block;
pub(crate) use image::DiskImage;
pub use images::{Images, Opened, Storages};

use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;

/// Most queues that a disk has.
pub const MAX_QUEUES: u16 = 16;

/// What a disk is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockConfig {
    /// The image: by its path below the folder of its storage or, if it names no storage, by a path that
    /// leads to it on every host the guest may come to.
    pub path: PathBuf,
    /// The storage that has the image. Each host knows where that is. It travels beside the rest, and only if
    /// a machine has such names.
    #[serde(skip)]
    pub storage: Option<String>,
    /// Whether the guest may only read.
    pub readonly: bool,
    /// Whether the host's page cache is used.
    pub cached: bool,
    /// Number of queues, 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// What is done about requests that fail.
    pub errors: ErrorPolicy,
    /// The geometry that the guest knows; `None` for what the image has.
    pub geometry: Option<Geometry>,
}

/// What is done about a request that this host cannot carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OnError {
    /// The guest is told that it failed.
    Report,
    /// The guest is paused, and the request tried again when it is to go on.
    Stop,
    /// The same if there is no room for what it writes, and the guest is told of all other errors.
    Enospc,
}

/// What is done about a disk's requests that this host cannot carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorPolicy {
    /// About reads.
    pub read: OnError,
    /// About all that changes the disk, or makes changes durable.
    pub write: OnError,
}

impl Default for ErrorPolicy {
    fn default() -> Self {
        ErrorPolicy { read: OnError::Report, write: OnError::Enospc }
    }
}

impl OnError {
    /// Whether the guest is to wait because of this error.
    fn stops(self, error: &io::Error) -> bool {
        match self {
            OnError::Report => false,
            OnError::Stop => true,
            OnError::Enospc => matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)),
        }
    }
}

/// How a disk's requests are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// By io_uring; one after the other where that cannot be had, or where the page cache is used.
    #[default]
    Auto,
    /// By io_uring, several at a time.
    IoUring,
    /// One after the other.
    Sync,
}

/// Whether a disk can have an io_uring here.
///
/// # Errors
/// Why not.
pub fn io_uring() -> io::Result<()> {
    uring::Uring::new().map(drop)
}

/// A disk's size and unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Bytes.
    pub len: u64,
    /// Bytes of the smallest unit of I/O: 512 or 4096.
    pub unit: u32,
}

impl BlockConfig {
    /// A disk in the image at `path`, with one queue and direct I/O.
    pub fn new(path: PathBuf) -> Self {
        let errors = ErrorPolicy::default();
        BlockConfig { path, storage: None, readonly: false, cached: false, queues: 1, errors, geometry: None }
    }

    /// A disk in the image `file` of a storage, with one queue and direct I/O.
    pub fn in_storage(storage: String, file: PathBuf) -> Self {
        BlockConfig { storage: Some(storage), ..BlockConfig::new(file) }
    }
}

impl BlockConfig {
    /// The same for another process, on another host, which has another working directory.
    fn portable(mut self) -> Result<Self, Error> {
        if self.storage.is_none() {
            let path = std::path::absolute(&self.path);
            self.path = path.map_err(|source| Error::Open { path: self.path.clone(), source })?;
        }
        Ok(self)
    }
}

/// Why a disk cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image cannot be opened or examined.
    #[error("cannot open the disk image {}: {source}", path.display())]
    Open {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// An arriving machine's image is outside the folders that were set aside for it.
    #[error(
        "the guest has the disk image {}, which is in no folder that guests may bring images from; start the \
         receiver with --disks FOLDER",
        path.display()
    )]
    NotAllowed {
        /// The image.
        path: PathBuf,
    },
    /// It is in a storage that this host does not know.
    #[error(
        "the disk image {} is in the storage {storage}, which this host does not know; the storages that it knows: \
         {known}. Add [storage.{storage}] to the host's configuration (--host-config)",
        file.display()
    )]
    UnknownStorage {
        /// The storage.
        storage: String,
        /// The image, by its place there.
        file: PathBuf,
        /// What this host knows.
        known: String,
    },
    /// It is named by a path that leads out of its storage.
    #[error(transparent)]
    File(#[from] crate::names::BadFile),
    /// Neither a file nor a block device.
    #[error("the disk image {} is neither a regular file nor a block device", path.display())]
    NoImage {
        /// What was named.
        path: PathBuf,
    },
    /// An image that is not raw: taken for raw, the guest would read the format's tables and overwrite them.
    #[error(
        "the disk image {} is in the format {format}, and disks must be raw; convert it: qemu-img convert -O raw {} {}.raw",
        path.display(), path.display(), path.display()
    )]
    Format {
        /// The image.
        path: PathBuf,
        /// What it is.
        format: &'static str,
    },
    /// It cannot be read.
    #[error("cannot read the disk image {}: {source}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Its file system has no direct I/O.
    #[error(
        "the file system of the disk image {} has no direct I/O; put it elsewhere, or add \",cached\" if no other \
         host will ever have it",
        path.display()
    )]
    NoDirectIo {
        /// The image.
        path: PathBuf,
    },
    /// A size that no disk has.
    #[error("the disk image {} has {len} bytes, which is not a positive multiple of {unit}", path.display())]
    Size {
        /// The image.
        path: PathBuf,
        /// Its length in bytes.
        len: u64,
        /// Bytes of the unit.
        unit: u32,
    },
    /// Another image than the guest knows.
    #[error(
        "the disk image {} has {} bytes in units of {}, the guest's disk has {} in units of {}; make the same \
         image reachable by the same path",
        path.display(), found.len, found.unit, wanted.len, wanted.unit
    )]
    Geometry {
        /// The image.
        path: PathBuf,
        /// What it has.
        found: Geometry,
        /// What the guest knows.
        wanted: Geometry,
    },
    /// There is to be an io_uring, and cannot be.
    #[error(
        "io_uring is not available for disks here: {0}; start with --aio auto to use system calls instead"
    )]
    NoRing(io::Error),
    /// It is on NFS and to be written to, and there is no io_uring, or is to be none.
    #[error(
        "the disk image {} is on NFS, where writing needs io_uring: without it, a killed machine loses its lock before \
         its last write is done; switch io_uring on, and start without --aio sync",
        path.display()
    )]
    NeedsRing {
        /// The image.
        path: PathBuf,
    },
    /// An arriving guest's image is locked by nobody, though the machine that it comes from has locked its
    /// own.
    #[error(
        "the guest's disk image {} is not locked here, as it is where the guest comes from: this host has another file \
         by this path, or storage whose locks do not reach from host to host; make the same image reachable by the \
         same path, or, if you are sure that both hosts have the same image, start the receiver with --trust-storage",
        path.display()
    )]
    NotShared {
        /// The image.
        path: PathBuf,
    },
    /// A number of queues that no disk has.
    #[error("a disk with {0} queues: use 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// Somebody else may write to it, or, for a writer, read it.
    #[error("the disk image {} is in use by {holder}; stop that first, or share it read-only", path.display())]
    Held {
        /// The image.
        path: PathBuf,
        /// Who holds the lock, as far as this host can tell.
        holder: String,
    },
    /// Somebody else has had it since it was given up: the guest's memory is older than its disk.
    #[error(
        "the disk image {} has been used elsewhere since it was given up, and the guest's memory here is older than \
         its disk; it must not continue here: end it, and start it from the disk",
        path.display()
    )]
    UsedElsewhere {
        /// The image.
        path: PathBuf,
    },
    /// Its time of last modification, by which others learn that it was taken, cannot be had or changed.
    #[error("cannot mark the disk image {} as taken: {source}", path.display())]
    Mark {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file system has no locks, or they failed.
    #[error("cannot lock the disk image {}: {source}", path.display())]
    Lock {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What was written could not be made durable.
    #[error("cannot flush the disk image {}: {source}", path.display())]
    Flush {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}
