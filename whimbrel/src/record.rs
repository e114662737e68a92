//! A file that keeps what became of each move, one JSON object a line, on either side.

use serde::Serialize;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A file that is only ever appended to. Several processes may share one. If somebody puts another file in
/// its place, what is added from then on goes there.
#[derive(Debug)]
pub struct Records {
    path: PathBuf,
    file: Mutex<File>,
}

/// Why a record cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep records in {}: {source}", path.display())]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

impl Error {
    pub(crate) fn new(path: &Path, source: io::Error) -> Self {
        Error { path: path.into(), source }
    }
}

impl Records {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// [`Error`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error { path: path.into(), source };
        let file = OpenOptions::new().append(true).create(true).open(path).map_err(failed)?;
        // A new file's name is to survive a power failure as well.
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all()).map_err(failed)?;
        Ok(Records { path: path.into(), file: Mutex::new(file) })
    }

    /// Appends `record`; returns when it is durable.
    ///
    /// # Errors
    /// [`Error`].
    pub fn add(&self, record: &impl Serialize) -> Result<(), Error> {
        let failed = |source| Error { path: self.path.clone(), source };
        let mut line = serde_json::to_vec(record).map_err(|error| failed(error.into()))?;
        line.push(b'\n');
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = |found: Metadata| (found.dev(), found.ino());
        let now = std::fs::metadata(&self.path).map(identity);
        if now.is_ok_and(|now| file.metadata().is_ok_and(|found| identity(found) != now))
            && let Ok(other) = OpenOptions::new().append(true).open(&self.path)
        {
            *file = other;
        }
        // In one piece, so that it is not mixed with another process's.
        file.write_all(&line).and_then(|()| file.sync_all()).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_appended() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("moves");
        for number in 1..3 {
            Records::open(&path).unwrap().add(&serde_json::json!({ "number": number })).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"number\":1}\n{\"number\":2}\n");
        let refused = Records::open(&folder.path().join("absent/moves")).unwrap_err().to_string();
        assert!(refused.contains("absent/moves"), "{refused}");
    }
}
