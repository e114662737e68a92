//! Booting a disk that has its own kernel: what a boot loader would do, done from outside.
//!
//! The kernel and its initramfs are read from the root file system, ext2 to ext4, where distributions keep a
//! link to the newest ones; the file system is the whole disk or a partition. The kernel is told which one it
//! came from in a way that does not depend on the order of disks.
//!
//! The image is under its lock while it is read, and is not written to. Its content is the guest's, and the
//! guest is not trusted: what it says of sizes is checked before anything is allocated.

mod filesystem;
mod partitions;
#[cfg(test)]
mod tests;

use crate::loader::{Boot, Image};
use crate::virtio::block::{self, BlockConfig, DiskImage, Images};
use filesystem::RootFileSystem;
use partitions::Volume;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Where distributions link to the kernel to boot, and to the initramfs that belongs to it.
const PLACES: [(&str, &str); 2] = [("/vmlinuz", "/initrd.img"), ("/boot/vmlinuz", "/boot/initrd.img")];
/// Largest kernel that is read, in bytes.
const MAX_KERNEL: u64 = 256 << 20;
/// Largest initramfs that is read, in bytes.
const MAX_INITRAMFS: u64 = 1 << 30;

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
        source: std::io::Error,
    },
    /// No kernel where one was looked for.
    #[error(
        "the disk image {} has no kernel to boot ({looked}); kernels are found as /vmlinuz or /boot/vmlinuz in an \
         ext2, ext3 or ext4 root file system. Pass --kernel, --initramfs and --cmdline root=...",
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

/// Reads the kernel and initramfs of the first file system of `disk` that has a kernel. Its command line
/// names that file system as the root, followed by `cmdline`. `index` is the disk's place among the guest's
/// disks, from 0.
///
/// # Errors
/// [`Error`], also if a machine holds the image's lock.
pub fn read(disk: &BlockConfig, index: usize, cmdline: &str) -> Result<Boot, Error> {
    let image = DiskImage::open(&BlockConfig { readonly: true, ..disk.clone() }, &Images::Any)?;
    image.take_lock()?;
    read_open(image, index, cmdline)
}

/// The same for an image that is open, and under its lock.
///
/// # Errors
/// [`Error`].
pub(crate) fn read_open(image: DiskImage, index: usize, cmdline: &str) -> Result<Boot, Error> {
    let path = image.path().to_path_buf();
    let path = path.as_path();
    let image = Rc::new(image);
    let volumes =
        partitions::volumes(&image).map_err(|source| Error::Read { path: path.to_path_buf(), source })?;
    let mut looked = Vec::new();
    for volume in &volumes {
        match RootFileSystem::open(&image, volume) {
            Err(what) => looked.push(format!("{volume}: {what}")),
            Ok(None) => looked.push(format!("{volume}: no such file system")),
            Ok(Some(root)) => match boot(path, &root, volume, index, cmdline)? {
                Some(boot) => return Ok(boot),
                None => looked.push(format!("{volume}: none there")),
            },
        }
    }
    if looked.is_empty() {
        looked.push("its partition table is empty".into());
    }
    Err(Error::NoKernel { path: path.to_path_buf(), looked: looked.join(", ") })
}

/// What to boot from this file system, if it has a kernel.
fn boot(
    path: &Path,
    root: &RootFileSystem,
    volume: &Volume,
    index: usize,
    cmdline: &str,
) -> Result<Option<Boot>, Error> {
    for (kernel, initramfs) in PLACES {
        let Some(kernel) = file(path, root, kernel, MAX_KERNEL)? else { continue };
        let initramfs = file(path, root, initramfs, MAX_INITRAMFS)?;
        let device = root_device(volume, root.uuid(), index, initramfs.is_some());
        return Ok(Some(Boot {
            kernel: Image::Bytes(kernel.into()),
            initramfs: initramfs.map(|bytes| Image::Bytes(bytes.into())),
            cmdline: format!("root={device} ro {cmdline}").trim_end().to_owned(),
        }));
    }
    Ok(None)
}

fn file(path: &Path, root: &RootFileSystem, file: &'static str, most: u64) -> Result<Option<Vec<u8>>, Error> {
    let path = path.to_path_buf();
    root.read(file, most).map_err(|error| match error {
        filesystem::Error::TooBig { len } => Error::TooBig { path, file, len, most },
        filesystem::Error::Broken(what) => Error::File { path, file, what },
    })
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
