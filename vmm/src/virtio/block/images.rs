//! Which images a machine may have, and opening them.
//!
//! A path is resolved once, and everything is asked of the file that came of it. Whoever may exchange files
//! and symbolic links below a folder cannot lead a machine out of it: not by a link that was another when it
//! was looked at, since nothing is looked at before it is opened.

use super::lock::{self, LockKind};
use super::{BlockConfig, Error};
use crate::lock::lock;
use crate::names;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How long the last write of a process that has ended may take.
const LAST_WRITE: Duration = Duration::from_millis(500);

/// How often resolving is tried again when files are renamed meanwhile.
const MAX_TRIES: usize = 100;

/// Which disk images a machine may have. A machine that comes from elsewhere names its own, and whoever
/// sent it must not thereby reach every file of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Images {
    /// Whatever this process can open.
    #[default]
    Any,
    /// Those below these folders. Symbolic links are followed as long as they stay below the folder.
    Below(Vec<PathBuf>),
    /// Those that were opened before.
    Opened(Opened),
    /// Those of these storages, if a disk names its storage, and otherwise these others.
    Named(Storages, Box<Images>),
}

/// The folders of a host's storages, by their names. Symbolic links are followed as long as they stay below
/// the folder.
pub type Storages = BTreeMap<String, PathBuf>;

/// Images that were opened before this process gave up its privileges. Each is had once.
#[derive(Clone, Debug)]
pub struct Opened(Arc<Mutex<Vec<(Wanted, PathBuf, File)>>>);

/// An image, and what it is opened for.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    storage: Option<String>,
    path: PathBuf,
    write: bool,
    direct: bool,
}

impl From<&BlockConfig> for Wanted {
    fn from(disk: &BlockConfig) -> Self {
        let (storage, path) = (disk.storage.clone(), disk.path.clone());
        Wanted { storage, path, write: !disk.readonly, direct: !disk.cached }
    }
}

impl PartialEq for Opened {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Opened {}

impl Opened {
    /// Opens the images of these disks.
    ///
    /// # Errors
    /// [`Error::NoImage`], [`Error::NoDirectIo`], [`Error::UnknownStorage`], [`Error::Open`];
    /// [`Error::Held`] if another process has an image: who that is may be seen now, but not by a process
    /// that is confined.
    pub fn new<'a>(disks: impl IntoIterator<Item = &'a BlockConfig>, images: &Images) -> Result<Self, Error> {
        let open = |disk: &BlockConfig| {
            let disk = disk.clone().portable()?;
            let (path, file) = images.open(&disk)?;
            let lock = if disk.readonly { LockKind::Shared } else { LockKind::Exclusive };
            // A file system without locks is told of when the lock is taken.
            if !is_free_soon(&file, lock) {
                return Err(Error::Held { path, holder: lock::holder(&file) });
            }
            Ok((Wanted::from(&disk), path, file))
        };
        let opened = disks.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
        Ok(Opened(Arc::new(Mutex::new(opened))))
    }

    fn take(&self, wanted: &Wanted) -> Option<(PathBuf, File)> {
        let mut opened = lock(&self.0);
        let at = opened.iter().position(|(image, ..)| image == wanted)?;
        let (_, path, file) = opened.swap_remove(at);
        Some((path, file))
    }
}

/// Whether nobody has a lock in the way of this one. A process that has ended has its locks until its last
/// write is done.
fn is_free_soon(file: &File, kind: LockKind) -> bool {
    let began = Instant::now();
    loop {
        if lock::is_free(file, kind).unwrap_or(true) {
            return true;
        }
        if began.elapsed() >= LAST_WRITE {
            return false;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

impl Images {
    /// Opens a disk's image; with it, the path that it has here.
    ///
    /// # Errors
    /// [`Error::NotAllowed`] for one that a machine may not have, [`Error::UnknownStorage`],
    /// [`Error::NoImage`], [`Error::NoDirectIo`], [`Error::Open`].
    pub(super) fn open(&self, disk: &BlockConfig) -> Result<(PathBuf, File), Error> {
        let (path, place) = match (self, &disk.storage) {
            (Images::Opened(opened), _) => {
                return opened
                    .take(&Wanted::from(disk))
                    .ok_or_else(|| Error::NotAllowed { path: disk.path.clone() });
            }
            (Images::Named(storages, _), Some(storage)) => in_storage(storages, storage, &disk.path)?,
            (Images::Named(_, others), None) => return others.open(disk),
            (_, Some(storage)) => return Err(unknown(storage, &disk.path, &Storages::new())),
            (Images::Below(folders), None) => (disk.path.clone(), below(folders, &disk.path)?),
            (Images::Any, None) => {
                let failed = |source| Error::Open { path: disk.path.clone(), source };
                // A descriptor that names a file and does nothing with it: opening a device or a pipe can
                // have effects.
                let place = OpenOptions::new().read(true).custom_flags(libc::O_PATH).open(&disk.path);
                (disk.path.clone(), place.map_err(failed)?)
            }
        };
        let file = reopen(&path, &place, !disk.readonly, !disk.cached)?;
        Ok((path, file))
    }
}

/// Opens the image that a descriptor names.
fn reopen(path: &Path, place: &File, write: bool, direct: bool) -> Result<File, Error> {
    let failed = |source| Error::Open { path: path.into(), source };
    let kind = place.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(Error::NoImage { path: path.into() });
    }
    let flags = if direct { libc::O_DIRECT } else { 0 };
    // This opens what the descriptor names, whatever is at the path by now.
    let same = format!("/proc/self/fd/{}", place.as_raw_fd());
    match OpenOptions::new().read(true).write(write).custom_flags(flags).open(same) {
        Err(error) if direct && error.raw_os_error() == Some(libc::EINVAL) => {
            Err(Error::NoDirectIo { path: path.into() })
        }
        opened => opened.map_err(failed),
    }
}

/// Resolves `file` below the folder of a storage; with it, the path that it has here.
fn in_storage(storages: &Storages, storage: &str, file: &Path) -> Result<(PathBuf, File), Error> {
    names::check_file(file)?;
    let folder = storages.get(storage).ok_or_else(|| unknown(storage, file, storages))?;
    let path = folder.join(file);
    let failed = |source| Error::Open { path: path.clone(), source };
    let root = open_folder(folder).map_err(failed)?;
    match resolve(&root, file) {
        Err(error) if error.raw_os_error() == Some(libc::EXDEV) => Err(Error::NotAllowed { path }),
        place => place.map_err(failed).map(|place| (path.clone(), place)),
    }
}

fn unknown(storage: &str, file: &Path, known: &Storages) -> Error {
    Error::UnknownStorage { storage: storage.into(), file: file.into(), known: names::list(known.keys()) }
}

/// A descriptor that names a folder.
fn open_folder(folder: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY).open(folder)
}

/// Resolves `path` below the first of `folders` that has it.
fn below(folders: &[PathBuf], path: &Path) -> Result<File, Error> {
    let failed = |source| Error::Open { path: path.into(), source };
    // Only to learn how the folder and the image are called below one root: what is there is found out by
    // opening it.
    let real = path.canonicalize().map_err(failed)?;
    for folder in folders {
        let Ok(folder) = folder.canonicalize() else { continue };
        let Ok(rest) = real.strip_prefix(&folder) else { continue };
        let root = open_folder(&folder).map_err(failed)?;
        return match resolve(&root, rest) {
            // A link leads out of the folder, that was none or another a moment ago.
            Err(error) if error.raw_os_error() == Some(libc::EXDEV) => {
                Err(Error::NotAllowed { path: path.into() })
            }
            opened => opened.map_err(failed),
        };
    }
    Err(Error::NotAllowed { path: path.into() })
}

/// The file at `path` below the folder `root`, of which no part leads out of that folder.
fn resolve(root: &File, path: &Path) -> io::Result<File> {
    let name = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all zeros is a valid value of the structure.
    let mut how: libc::open_how = unsafe { std::mem::zeroed() };
    how.flags = (libc::O_PATH | libc::O_CLOEXEC) as u64;
    how.resolve = libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS;
    for _ in 0..MAX_TRIES {
        // SAFETY: the call reads a string that ends with a zero and a structure of the length given; both
        // live across the call.
        let fd = unsafe {
            libc::syscall(
                libc::SYS_openat2,
                root.as_raw_fd(),
                name.as_ptr(),
                &how,
                std::mem::size_of::<libc::open_how>(),
            )
        };
        if let Ok(fd) = i32::try_from(fd)
            && fd >= 0
        {
            // SAFETY: the kernel has just given us this descriptor, and nobody else has it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into());
        }
        match io::Error::last_os_error() {
            // Something was renamed in between, and the kernel cannot tell whether it led out.
            error if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EINTR)) => {}
            error => return Err(error),
        }
    }
    Err(io::Error::other("its folders are being renamed all the time"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::sync::atomic::{AtomicBool, Ordering};

    fn reader(path: &Path) -> BlockConfig {
        BlockConfig { readonly: true, cached: true, ..BlockConfig::new(path.into()) }
    }

    fn open(images: &Images, path: &Path) -> Result<File, Error> {
        images.open(&reader(path)).map(|(_, file)| file)
    }

    #[test]
    fn a_storage_is_where_each_host_has_it() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for (folder, content) in [(&inside, "inside"), (&outside, "outside")] {
            std::fs::write(folder.path().join("image"), content).unwrap();
        }
        symlink(outside.path().join("image"), inside.path().join("link")).unwrap();
        let storages = Storages::from([("fast".into(), inside.path().into())]);
        let images = Images::Named(storages, Box::new(Images::Below(vec![outside.path().into()])));
        let of = |storage: &str, file: &str| {
            let disk = BlockConfig { storage: Some(storage.into()), ..reader(Path::new(file)) };
            images.open(&disk).map(|(path, _)| path)
        };
        assert_eq!(of("fast", "image").unwrap(), inside.path().join("image"));
        assert!(matches!(of("fast", "link"), Err(Error::NotAllowed { .. })));
        assert!(matches!(of("fast", "../image"), Err(Error::File(_))));
        assert!(matches!(of("fast", outside.path().join("image").to_str().unwrap()), Err(Error::File(_))));
        assert!(matches!(of("fast", "none"), Err(Error::Open { .. })));
        let refused = of("slow", "image").unwrap_err().to_string();
        assert!(refused.contains("the storage slow") && refused.contains("it knows: fast"), "{refused}");
        // By path, from the folders for that alone.
        assert!(open(&images, &outside.path().join("image")).is_ok());
        assert!(matches!(open(&images, &inside.path().join("image")), Err(Error::NotAllowed { .. })));
        // A host without storages.
        let disk = BlockConfig { storage: Some("fast".into()), ..reader(Path::new("image")) };
        for images in [Images::Any, Images::Below(vec![inside.path().into()])] {
            assert!(matches!(images.open(&disk), Err(Error::UnknownStorage { .. })));
        }
        // Opened before.
        let opened = Images::Opened(Opened::new([&disk], &images).unwrap());
        assert_eq!(opened.open(&disk).unwrap().0, inside.path().join("image"));
    }

    #[test]
    fn links_may_lead_anywhere_below_the_folder_and_nowhere_else() {
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let images = Images::Below(vec![outside.path().join("none"), inside.path().into()]);
        let image = inside.path().join("image");
        std::fs::create_dir(inside.path().join("folder")).unwrap();
        for place in [&image, &outside.path().join("image")] {
            std::fs::write(place, "x").unwrap();
        }
        let ino = image.metadata().unwrap().ino();
        let link = inside.path().join("folder/link");
        for target in [Path::new("../image"), &image] {
            symlink(target, &link).unwrap();
            assert_eq!(open(&images, &link).unwrap().metadata().unwrap().ino(), ino);
            std::fs::remove_file(&link).unwrap();
        }
        symlink(outside.path().join("image"), &link).unwrap();
        assert!(matches!(open(&images, &link), Err(Error::NotAllowed { .. })));
        assert!(matches!(open(&images, &outside.path().join("image")), Err(Error::NotAllowed { .. })));
        assert!(matches!(open(&images, &inside.path().join("folder")), Err(Error::NoImage { .. })));
        assert!(matches!(open(&images, &inside.path().join("none")), Err(Error::Open { .. })));
        // By a link to the folder itself, which is the operator's.
        let alias = outside.path().join("alias");
        symlink(inside.path(), &alias).unwrap();
        assert!(open(&images, &alias.join("image")).is_ok());
        assert!(open(&Images::Below(vec![alias]), &image).is_ok());
    }

    /// Two names change places.
    fn exchange(a: &Path, b: &Path) {
        let [a, b] = [a, b].map(|path| CString::new(path.as_os_str().as_bytes()).unwrap());
        let (here, how) = (libc::AT_FDCWD, libc::RENAME_EXCHANGE);
        // SAFETY: the call reads two strings that end with a zero and live across the call.
        let result = unsafe { libc::renameat2(here, a.as_ptr(), here, b.as_ptr(), how) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    /// An image, and the folder of another, become links to the outside and back, all the time.
    #[test]
    fn a_link_that_is_exchanged_in_time_leads_nowhere() {
        const TRIES: usize = 20_000;
        let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let images = Images::Below(vec![inside.path().into()]);
        let at = |name: &str| inside.path().join(name);
        for parent in [&inside, &outside] {
            std::fs::create_dir(parent.path().join("folder")).unwrap();
            std::fs::write(parent.path().join("folder/image"), "x").unwrap();
            std::fs::write(parent.path().join("image"), "x").unwrap();
        }
        for name in ["image", "folder"] {
            symlink(outside.path().join(name), at(&format!("next-{name}"))).unwrap();
        }
        let secrets =
            ["image", "folder/image"].map(|name| outside.path().join(name).metadata().unwrap().ino());
        let stop = AtomicBool::new(false);
        let (mut opened, mut refused, mut escaped) = (0, 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for name in ["image", "folder"] {
                        exchange(&at(name), &at(&format!("next-{name}")));
                    }
                }
            });
            for number in 0..TRIES {
                match open(&images, &at(["image", "folder/image"][number % 2])) {
                    Ok(file) if secrets.contains(&file.metadata().unwrap().ino()) => escaped += 1,
                    Ok(_) => opened += 1,
                    Err(_) => refused += 1,
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(escaped, 0, "files outside were opened, of {TRIES} tries");
        assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused: this proves nothing");
    }

    #[test]
    fn what_was_opened_before_is_had_once_whatever_is_there_by_then() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, "first").unwrap();
        let disk = BlockConfig { cached: true, ..BlockConfig::new(path.clone()) };
        let opened = |disk: &BlockConfig| Opened::new([disk], &Images::Any);
        let images = Images::Opened(opened(&disk).unwrap());
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "second").unwrap();
        let disk_at = |write: bool, path: &Path| BlockConfig { readonly: !write, ..reader(path) };
        let refused = |write, path: &Path| {
            let refused = images.open(&disk_at(write, path)).unwrap_err();
            assert!(matches!(refused, Error::NotAllowed { .. }), "{refused}");
        };
        refused(false, &path);
        refused(true, &folder.path().join("other"));
        let mut content = String::new();
        images.open(&disk_at(true, &path)).unwrap().1.read_to_string(&mut content).unwrap();
        assert_eq!(content, "first");
        refused(true, &path);
        // Somebody else has it.
        let owner = File::options().read(true).write(true).open(&path).unwrap();
        assert!(lock::set(&owner, LockKind::Exclusive).unwrap());
        let refused = opened(&disk).map(drop).unwrap_err().to_string();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        lock::set(&owner, LockKind::Shared).unwrap();
        assert!(opened(&disk).is_err());
        opened(&BlockConfig { readonly: true, ..disk }).unwrap();
    }
}
