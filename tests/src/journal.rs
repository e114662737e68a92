//! A disk with the embedded guest's journal, seen from outside.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::{fs, io};
use vmm::guest::journal;

/// Blocks of the journal: few, so that it comes round in less than a second.
pub const BLOCKS: u64 = 32;
const BLOCK: usize = 4096;

/// An image for it.
pub struct Disk {
    folder: tempfile::TempDir,
}

impl Disk {
    /// A new one, in a folder of its own below `parent`.
    ///
    /// # Panics
    /// Where no files can be written.
    pub fn new(parent: &Path) -> Self {
        let folder = tempfile::tempdir_in(parent).expect("a folder");
        let disk = Disk { folder };
        // Written, so that no block has to be found for it later.
        fs::write(disk.path(), vec![0; BLOCKS as usize * BLOCK]).expect("an image");
        File::open(disk.path()).and_then(|file| file.sync_all()).expect("an image");
        disk
    }

    /// The image.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("journal")
    }

    /// Further arguments of the guest that keeps the journal.
    pub fn of_the_guest(&self) -> Vec<String> {
        let path = self.path().display().to_string();
        vec!["--disk".into(), path, "--journal".into(), BLOCKS.to_string()]
    }

    /// Further arguments of a receiver that may have it.
    pub fn of_a_receiver(&self) -> Vec<String> {
        vec!["--disks".into(), self.folder.path().display().to_string()]
    }

    /// How many entries there are; at the end of a guest, when nobody writes.
    ///
    /// # Errors
    /// If a block is torn, or one is missing or left over in the series.
    pub fn entries(&self) -> Result<u64, String> {
        let image = fs::read(self.path()).map_err(|error: io::Error| error.to_string())?;
        journal::entries(&image)
    }
}
