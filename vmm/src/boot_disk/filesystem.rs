//! Files of an ext2, ext3 or ext4 file system in an image, read by `ext4-view`, which also looks into a
//! journal that was not played back.

use super::partitions::Volume;
use super::u32_at;
use crate::virtio::block::DiskImage;
use ext4_view::{Ext4, Ext4Error, Ext4Read, Metadata};
use std::io;
use std::rc::Rc;

/// Where a volume has its superblock.
const SUPERBLOCK: u64 = 1024;
/// Where the superblock has the magic number.
const MAGIC_AT: usize = 56;
/// The magic number of ext2, ext3 and ext4, and where a volume has it.
pub const MAGIC: u16 = 0xef53;
pub const MAGIC_OFFSET: u64 = SUPERBLOCK + MAGIC_AT as u64;
/// Block sizes up to 64 KiB, which is the most that Linux mounts anywhere; as the exponent over 1024.
const MAX_BLOCK_EXPONENT: u32 = 6;
/// Most groups of blocks, whose descriptors are kept in memory: 128 TiB of the usual 128 MiB each.
const MAX_GROUPS: u64 = 1 << 20;
/// Most bytes read in all. A file system in circles could keep its reader busy for ever.
const MAX_READ: u64 = 8 << 30;
/// Bytes of a file read at a time.
pub const PIECE: usize = 1 << 20;

/// Why a file cannot be had.
#[derive(Debug)]
pub enum Error {
    /// It is larger than what the caller allows.
    TooBig {
        /// Its size in bytes.
        len: u64,
    },
    /// What is wrong.
    Broken(String),
    /// Whoever takes the content failed.
    Sink(io::Error),
}

impl From<Ext4Error> for Error {
    fn from(error: Ext4Error) -> Self {
        Error::Broken(error.to_string())
    }
}

/// A file system.
pub struct FileSystem {
    inner: Ext4,
    uuid: String,
    is_root: bool,
}

impl FileSystem {
    /// The one in `volume`; `None` if there is no file system of this kind.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open(image: &Rc<DiskImage>, volume: &Volume) -> Result<Option<Self>, String> {
        let mut source =
            Source { image: Rc::clone(image), start: volume.start, len: volume.len, left: MAX_READ };
        if !plausible(&mut source)? {
            return Ok(None);
        }
        let inner = Ext4::load(Box::new(source)).map_err(|e| e.to_string())?;
        let uuid = inner.uuid().to_string();
        let mut opened = FileSystem { inner, uuid, is_root: false };
        opened.is_root = opened.look(b"/etc").map_err(|e| e.to_string())?.is_some_and(|etc| etc.is_dir());
        Ok(Some(opened))
    }

    /// Its UUID, as Linux writes it.
    pub fn uuid(&self) -> &str {
        &self.uuid
    }

    /// Whether it is a system's root directory: one for `/boot` alone does not say where the rest is.
    pub fn is_root(&self) -> bool {
        self.is_root
    }

    /// What is at a path, links not followed; `None` if there is nothing. The folders on the way are none
    /// that a link leads to.
    pub fn look(&self, path: &[u8]) -> Result<Option<Metadata>, Ext4Error> {
        match self.inner.symlink_metadata(path) {
            Ok(metadata) => Ok(Some(metadata)),
            Err(Ext4Error::NotFound | Ext4Error::NotADirectory) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where the link at a path leads to. The reader allocates what the link claims to be long, so that is to
    /// be looked at before.
    pub fn target(&self, path: &[u8]) -> Result<Vec<u8>, Ext4Error> {
        Ok(self.inner.read_link(path)?.as_ref().to_vec())
    }

    /// Gives `sink` the content of the file at a path that no link is part of.
    ///
    /// # Errors
    /// [`Error`]; nothing is read of a file with more than `most` bytes.
    pub fn copy(
        &self,
        path: &[u8],
        most: u64,
        mut sink: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<(), Error> {
        let mut file = self.inner.open(path)?;
        let len = file.metadata().len();
        if len > most {
            return Err(Error::TooBig { len });
        }
        // By pieces, so that a size that is a lie costs as much as there really is.
        let mut piece = vec![0; PIECE.min(len as usize)];
        let mut left = len;
        while left > 0 {
            let room = piece.len().min(left as usize);
            match file.read_bytes(&mut piece[..room])? {
                0 => break,
                count => {
                    left -= count as u64;
                    sink(&piece[..count]).map_err(Error::Sink)?;
                }
            }
        }
        Ok(())
    }
}

/// Whether there is a superblock of this kind at all.
///
/// # Errors
/// What is wrong with it: sizes that no such file system has, for which the reader would allocate.
fn plausible(source: &mut Source) -> Result<bool, String> {
    if source.len < SUPERBLOCK * 2 {
        return Ok(false);
    }
    let mut superblock = [0; 1024];
    source.read(SUPERBLOCK, &mut superblock).map_err(|e| e.to_string())?;
    let u32_at = |at| u32_at(&superblock, at);
    if u32_at(MAGIC_AT) as u16 != MAGIC {
        return Ok(false);
    }
    let (exponent, group) = (u32_at(24), u64::from(u32_at(32)));
    // The reader heeds the upper half of the number even where the file system says that it has none.
    let blocks = u64::from(u32_at(4)) | u64::from(u32_at(0x150)) << 32;
    if exponent > MAX_BLOCK_EXPONENT {
        return Err(format!("blocks of 2^{} bytes", u64::from(exponent) + 10));
    }
    if blocks > source.len >> (exponent + 10) {
        return Err("a file system that is larger than the disk or partition".into());
    }
    if group == 0 || blocks.div_ceil(group) > MAX_GROUPS {
        return Err(format!("{blocks} blocks in groups of {group}"));
    }
    Ok(true)
}

/// A volume as the file system's reader wants it.
struct Source {
    image: Rc<DiskImage>,
    start: u64,
    len: u64,
    left: u64,
}

impl Ext4Read for Source {
    fn read(
        &mut self,
        offset: u64,
        bytes: &mut [u8],
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync + 'static>> {
        let len = bytes.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err("it leads beyond its own end".into());
        }
        self.left = self.left.checked_sub(len).ok_or("reading it takes too long")?;
        Ok(self.image.read_exact_at(self.start + offset, bytes)?)
    }
}
