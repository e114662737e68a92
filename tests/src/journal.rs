//! A disk with the embedded guest's journal, seen from outside.

use crate::command::must;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::{fs, io};
use vmm::guest::journal;

/// Blocks of the journal: few, so that it comes round in less than a second.
pub const BLOCKS: u64 = 32;
const BLOCK: usize = 4096;

/// Blocks of a journal that is to need room for a while: it comes round after many seconds only.
const MANY: u64 = 4096;

/// An image for it.
pub struct Disk {
    blocks: u64,
    // Goes before the folder it is mounted on.
    own: Option<Tmpfs>,
    folder: tempfile::TempDir,
}

/// A file system in memory, of an image's size and a little more.
struct Tmpfs(PathBuf);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        must(&format!("umount --lazy {}", self.0.display()));
    }
}

impl Disk {
    /// A new one, in a folder of its own below `parent`.
    ///
    /// # Panics
    /// Where no files can be written.
    pub fn new(parent: &Path) -> Self {
        let folder = tempfile::tempdir_in(parent).expect("a folder");
        let disk = Disk { blocks: BLOCKS, own: None, folder };
        // Written, so that no block has to be found for it later.
        fs::write(disk.path(), vec![0; BLOCKS as usize * BLOCK]).expect("an image");
        File::open(disk.path()).and_then(|file| file.sync_all()).expect("an image");
        disk
    }

    /// One that takes room only when it is written to, on a file system of its own, which can be
    /// [filled](Disk::fill).
    ///
    /// # Panics
    /// Without the right to mount.
    pub fn sparse(parent: &Path) -> Self {
        let folder = tempfile::tempdir_in(parent).expect("a folder");
        let (bytes, path) = (MANY * BLOCK as u64, folder.path().to_path_buf());
        must(&format!("mount -t tmpfs -o size={} tmpfs {}", bytes + (1 << 20), path.display()));
        let disk = Disk { blocks: MANY, own: Some(Tmpfs(path)), folder };
        File::create(disk.path()).and_then(|file| file.set_len(bytes)).expect("an image");
        disk
    }

    /// Takes all the room that is left for it, until what is returned is called.
    ///
    /// # Panics
    /// Unless it is sparse.
    pub fn fill(&self) -> Box<dyn FnOnce()> {
        assert!(self.own.is_some(), "this would fill a file system of others");
        let ballast = self.folder.path().join("ballast");
        let written = File::create(&ballast).and_then(|mut file| io::copy(&mut io::repeat(1), &mut file));
        assert_eq!(written.expect_err("no end of room").kind(), io::ErrorKind::StorageFull);
        Box::new(move || fs::remove_file(ballast).expect("the ballast"))
    }

    /// Makes it as if nobody had written to it: a guest that begins anew begins its journal anew as well.
    /// Entries of the guest before, in blocks that the new one has not come to, would count for its own
    /// (where a journal comes round at once, there are none).
    pub fn begin_anew(&self) {
        if self.own.is_some() {
            let image = File::create(self.path()).expect("the image");
            image.set_len(self.blocks * BLOCK as u64).expect("an image");
        }
    }

    /// The image.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("journal")
    }

    /// Further arguments of the guest that keeps the journal.
    pub fn of_the_guest(&self) -> Vec<String> {
        // Files in memory have no direct I/O everywhere.
        let cached = if self.own.is_some() { ",cached" } else { "" };
        let disk = format!("{}{cached}", self.path().display());
        vec!["--disk".into(), disk, "--journal".into(), self.blocks.to_string()]
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
