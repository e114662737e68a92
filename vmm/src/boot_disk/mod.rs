//! Booting a disk that has its own kernel: what a boot loader would do, done from outside.
//!
//! The kernel and its initramfs are read from the root file system, ext2 to ext4, where distributions keep a
//! link to the newest ones; the file system is the whole disk or a partition. The kernel is told which one it
//! came from in a way that does not depend on the order of disks.
//!
//! A file system for `/boot` alone is found as well: it is what the root file system's links to `/boot` lead
//! into.
//!
//! The image is under its lock while it is read, and is not written to. Its content is the guest's, and the
//! guest is not trusted: what it says of sizes is checked before anything is allocated, and [`read_apart`]
//! reads it in a process that can do nothing else, as a [`BootReader`] does when the guest reboots.

mod apart;

mod filesystem;
mod partitions;
mod standby;
mod system;
#[cfg(test)]
mod tests;

use crate::loader::{Boot, Image};
use crate::virtio::block::{self, BlockConfig, DiskImage, Images};
use filesystem::FileSystem;
use partitions::Volume;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use system::System;

pub use apart::read_apart;
pub use standby::BootReader;

/// Where distributions link to the kernel to boot, and to the initramfs that belongs to it.
const PLACES: [(&str, &str); 2] = [("/vmlinuz", "/initrd.img"), ("/boot/vmlinuz", "/boot/initrd.img")];
/// Largest kernel that is read, in bytes.
const MAX_KERNEL: u64 = 256 << 20;
/// Largest initramfs that is read, in bytes.
const MAX_INITRAMFS: u64 = 1 << 30;
/// Longest command line or message, in bytes.
const MAX_TEXT: u64 = 64 << 10;

/// Why a disk cannot be booted from.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The image cannot be opened, or is somebody else's.
    #[error(transparent)]
    Image(#[from] block::Error),
    /// Reading failed.
    #[error("cannot read the disk image {}: {source}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The process that reads it could not be started, or ended before it was done.
    #[error(
        "the disk image {} cannot be read: {what}; check its file systems, or pass --kernel and --initramfs",
        path.display()
    )]
    Reader {
        /// The image.
        path: PathBuf,
        /// What became of it.
        what: String,
    },
    /// What the process that reads it says.
    #[error("{0}")]
    Told(String),
    /// No kernel where one was looked for.
    #[error(
        "the disk image {} has no kernel to boot ({looked}); kernels are found as /vmlinuz or /boot/vmlinuz of a \
         system whose root file system is ext2, ext3 or ext4, as is that for /boot if it has one. Pass --kernel, \
         --initramfs and --cmdline root=...",
        path.display()
    )]
    NoKernel {
        /// The image.
        path: PathBuf,
        /// What was seen instead, for each volume.
        looked: String,
    },
    /// A file that is far larger than any kernel or initramfs.
    #[error(
        "{file} in the disk image {} has {len} bytes, and at most {most} are read; pass --kernel and --initramfs",
        path.display()
    )]
    TooBig {
        /// The image.
        path: PathBuf,
        /// The file in it.
        file: &'static str,
        /// Its size in bytes.
        len: u64,
        /// The most there may be.
        most: u64,
    },
    /// The file system contradicts itself, or has what only a newer reader knows.
    #[error(
        "cannot read {file} in the disk image {}: {what}; check the file system, or pass --kernel and --initramfs",
        path.display()
    )]
    File {
        /// The image.
        path: PathBuf,
        /// The file in it.
        file: &'static str,
        /// What is wrong.
        what: String,
    },
}

/// What is read of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Kernel,
    Initramfs,
    Cmdline,
}

impl Part {
    /// Most bytes of it.
    fn most(self) -> u64 {
        match self {
            Part::Kernel => MAX_KERNEL,
            Part::Initramfs => MAX_INITRAMFS,
            Part::Cmdline => MAX_TEXT,
        }
    }
}

/// Takes what is read, piece by piece, of one part after the other.
type Sink<'a> = dyn FnMut(Part, &[u8]) -> io::Result<()> + 'a;

/// What there is to boot, as it is put together.
#[derive(Default)]
struct Gathered {
    kernel: Vec<u8>,
    initramfs: Option<Vec<u8>>,
    cmdline: Vec<u8>,
}

impl Gathered {
    fn add(&mut self, part: Part, piece: &[u8]) -> io::Result<()> {
        let whole = match part {
            Part::Kernel => &mut self.kernel,
            Part::Initramfs => self.initramfs.get_or_insert_default(),
            Part::Cmdline => &mut self.cmdline,
        };
        if (whole.len() + piece.len()) as u64 > part.most() {
            return Err(io::Error::other("more was read than there may be"));
        }
        whole.extend_from_slice(piece);
        Ok(())
    }

    fn into_boot(self) -> Result<Boot, std::string::FromUtf8Error> {
        Ok(Boot {
            kernel: Image::Bytes(self.kernel.into()),
            initramfs: self.initramfs.map(|bytes| Image::Bytes(bytes.into())),
            cmdline: String::from_utf8(self.cmdline)?,
        })
    }
}

/// Reads the kernel and initramfs of the first system on `disk` that has a kernel. Its command line names
/// that system's root, followed by `cmdline`. `index` is the disk's place among the guest's disks, from 0.
///
/// This looks into file systems that a guest wrote, in this process. [`read_apart`] and [`BootReader`] do it
/// in another one.
///
/// # Errors
/// [`Error`], also if a machine holds the image's lock.
pub fn read(disk: &BlockConfig, index: usize, cmdline: &str) -> Result<Boot, Error> {
    let mut gathered = Gathered::default();
    find(&open(disk, &Images::Any)?, &disk.path, index, cmdline, &mut |part, piece| {
        gathered.add(part, piece)
    })?;
    gathered.into_boot().map_err(|error| Error::Reader { path: disk.path.clone(), what: error.to_string() })
}

/// The same for an image that is open, and under its lock.
///
/// # Errors
/// [`Error`].
pub(crate) fn read_open(image: DiskImage, index: usize, cmdline: &str) -> Result<Boot, Error> {
    let path = image.path().to_path_buf();
    let mut gathered = Gathered::default();
    find(&Rc::new(image), &path, index, cmdline, &mut |part, piece| gathered.add(part, piece))?;
    gathered.into_boot().map_err(|error| Error::Reader { path, what: error.to_string() })
}

/// The image under its lock, to be read.
fn open(disk: &BlockConfig, images: &Images) -> Result<Rc<DiskImage>, Error> {
    let image = DiskImage::open(&BlockConfig { readonly: true, ..disk.clone() }, images)?;
    image.take_lock()?;
    Ok(Rc::new(image))
}

/// Gives `sink` what there is to boot.
fn find(
    image: &Rc<DiskImage>,
    path: &Path,
    index: usize,
    cmdline: &str,
    sink: &mut Sink<'_>,
) -> Result<(), Error> {
    let volumes =
        partitions::volumes(image).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    let mut looked = Vec::new();
    let mut found = Vec::new();
    for volume in &volumes {
        match FileSystem::open(image, volume) {
            Err(what) => looked.push(format!("{volume}: {what}")),
            Ok(None) => looked.push(format!("{volume}: no such file system")),
            Ok(Some(file_system)) => found.push((volume, file_system)),
        }
    }
    let (roots, others): (Vec<_>, Vec<_>) = found.iter().partition(|(_, one)| one.is_root());
    for (volume, root) in &roots {
        // Its own /boot comes first, then any that is mounted there.
        for boot in std::iter::once(None).chain(others.iter().map(|(_, other)| Some(other))) {
            let system = System { root, boot };
            if boot_from(path, &system, volume, index, cmdline, sink)? {
                return Ok(());
            }
        }
        looked.push(format!("{volume}: none there"));
    }
    looked.extend(others.iter().map(|(volume, _)| format!("{volume}: no root file system")));
    if looked.is_empty() {
        looked.push("its partition table is empty".into());
    }
    Err(Error::NoKernel { path: path.to_path_buf(), looked: looked.join(", ") })
}

/// Gives `sink` what this system boots; false if it has no kernel.
fn boot_from(
    path: &Path,
    system: &System<'_>,
    volume: &Volume,
    index: usize,
    cmdline: &str,
    sink: &mut Sink<'_>,
) -> Result<bool, Error> {
    for (kernel, initramfs) in PLACES {
        if !file(path, system, kernel, Part::Kernel, sink)? {
            continue;
        }
        let has_initramfs = file(path, system, initramfs, Part::Initramfs, sink)?;
        let device = root_device(volume, system.root.uuid(), index, has_initramfs);
        let cmdline = format!("root={device} ro {cmdline}");
        sink(Part::Cmdline, cmdline.trim_end().as_bytes()).map_err(|source| lost(path, source))?;
        return Ok(true);
    }
    Ok(false)
}

/// Gives `sink` a file; false if there is none.
fn file(
    path: &Path,
    system: &System<'_>,
    file: &'static str,
    part: Part,
    sink: &mut Sink<'_>,
) -> Result<bool, Error> {
    let most = part.most();
    let copied = system.find(file).and_then(|place| {
        let Some(place) = place else { return Ok(false) };
        // An initramfs that is empty is one as well.
        sink(part, &[]).map_err(filesystem::Error::Sink)?;
        place.file_system.copy(&place.path, most, |piece| sink(part, piece)).map(|()| true)
    });
    copied.map_err(|error| match error {
        filesystem::Error::TooBig { len } => Error::TooBig { path: path.into(), file, len, most },
        filesystem::Error::Broken(what) => Error::File { path: path.into(), file, what },
        filesystem::Error::Sink(source) => lost(path, source),
    })
}

/// What was read could not be handed on.
fn lost(path: &Path, error: io::Error) -> Error {
    Error::Reader { path: path.into(), what: error.to_string() }
}

/// The root file system as the kernel command line names it. The kernel itself knows partitions by their
/// identity, but not file systems by theirs: that takes an initramfs.
fn root_device(volume: &Volume, uuid: &str, index: usize, initramfs: bool) -> String {
    match (&volume.identity, initramfs) {
        (Some(identity), _) => format!("PARTUUID={identity}"),
        (None, true) => format!("UUID={uuid}"),
        (None, false) => format!("/dev/vd{}", letters(index)),
    }
}

/// How Linux counts disks: a to z, then aa.
fn letters(index: usize) -> String {
    let last = char::from(b'a' + (index % 26) as u8);
    if index < 26 { last.into() } else { letters(index / 26 - 1) + &last.to_string() }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
