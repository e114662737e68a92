//! The directory tree of a system: its root file system, with another one at `/boot` if it has that.
//!
//! Links are followed here, one part of a path after the other, and not by the reader of file systems: that
//! one does not know what is mounted, and it allocates what a link claims to be long.

use super::filesystem::{Error, FileSystem};

/// Longest path that Linux takes, and longest target of a link, in bytes.
const MAX_PATH: usize = 4096;
/// Most links that are followed for one path, as in Linux.
const MAX_LINKS: usize = 40;

/// A system as its own kernel sees it.
#[derive(Clone, Copy)]
pub struct System<'a> {
    pub root: &'a FileSystem,
    /// What is mounted at `/boot`.
    pub boot: Option<&'a FileSystem>,
}

/// A file of a system.
pub struct Place<'a> {
    /// The file system that it is in, and its path there.
    pub file_system: &'a FileSystem,
    pub path: Vec<u8>,
}

impl<'a> System<'a> {
    /// Finds the file at a path; `None` if there is none, or a link leads nowhere.
    ///
    /// # Errors
    /// [`Error::Broken`].
    pub fn find(&self, path: &str) -> Result<Option<Place<'a>>, Error> {
        // The folders that were gone through, and what is left of the path, its next part last.
        let mut done: Vec<Vec<u8>> = Vec::new();
        let mut left = parts(path.as_bytes());
        let mut links = 0;
        while let Some(part) = left.pop() {
            if part == b".." {
                done.pop();
                continue;
            }
            done.push(part);
            let place = self.place(&done);
            let Some(found) = place.file_system.look(&place.path)? else { return Ok(None) };
            if found.is_symlink() {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Error::Broken("too many links".into()));
                }
                if found.len() > MAX_PATH as u64 {
                    return Err(Error::Broken(format!("a link of {} bytes", found.len())));
                }
                let target = place.file_system.target(&place.path)?;
                if target.starts_with(b"/") {
                    done.clear()
                } else {
                    drop(done.pop())
                }
                left.extend(parts(&target));
                if left.iter().map(|part| part.len() + 1).sum::<usize>() > MAX_PATH {
                    return Err(Error::Broken("a path that is too long".into()));
                }
            } else if left.is_empty() {
                return Ok((!found.is_dir()).then_some(place));
            } else if !found.is_dir() {
                return Ok(None);
            }
        }
        // A folder.
        Ok(None)
    }

    /// The file system that has a path, and the path there.
    fn place(&self, parts: &[Vec<u8>]) -> Place<'a> {
        match (self.boot, parts) {
            (Some(boot), [first, rest @ ..]) if first == b"boot" => {
                Place { file_system: boot, path: joined(rest) }
            }
            _ => Place { file_system: self.root, path: joined(parts) },
        }
    }
}

/// The parts of a path, the first one last.
fn parts(path: &[u8]) -> Vec<Vec<u8>> {
    let parts = path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".");
    parts.rev().map(<[u8]>::to_vec).collect()
}

fn joined(parts: &[Vec<u8>]) -> Vec<u8> {
    if parts.is_empty() {
        return b"/".to_vec();
    }
    parts.iter().flat_map(|part| [b"/", part.as_slice()].concat()).collect()
}
