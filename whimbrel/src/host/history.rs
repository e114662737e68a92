//! What became of the moves from and to a host, for as long as there is room.
//!
//! All processes of the host append to one file. One that begins, and finds the file full, makes it the
//! older one, and begins another: there are two at most. A process that can no longer make files goes on in
//! the new one, which is there by then.

use crate::record::{self, Records};
use serde::Deserialize;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::VecDeque;
use std::fs::{DirBuilder, File};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// How large a file is when another is begun: some thousand moves.
const FULL: u64 = 8 << 20;

/// The folder's files, the older one first.
const FILES: [&str; 2] = ["history.old", "history"];

/// Makes the folder if it is not there, and opens its history to add to it.
///
/// # Errors
/// [`record::Error`].
pub fn open(folder: &Path) -> Result<Records, record::Error> {
    open_within(folder, FULL)
}

fn open_within(folder: &Path, full: u64) -> Result<Records, record::Error> {
    let [older, newer] = FILES.map(|file| folder.join(file));
    let failed = |source| record::Error::new(&newer, source);
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
    let turn = || -> io::Result<()> {
        let file = match File::open(&newer) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file?,
        };
        // Of two processes that begin now, one makes it the older file. The other finds that it is no longer
        // the newer one.
        file.lock()?;
        let found = file.metadata()?;
        let same =
            std::fs::metadata(&newer).is_ok_and(|now| (now.dev(), now.ino()) == (found.dev(), found.ino()));
        if same && found.len() >= full { std::fs::rename(&newer, &older) } else { Ok(()) }
    };
    turn().map_err(failed)?;
    Records::open(&newer)
}

/// All entries, from the oldest on; of the machine of this name, if one is given. A line that nobody can
/// read is left out: a host that went down may have cut it off.
///
/// # Errors
/// Those of reading a file. No file is no error.
pub fn read(folder: &Path, name: Option<&str>) -> io::Result<Vec<Value>> {
    let mut entries = Vec::new();
    for path in FILES.map(|file| folder.join(file)) {
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            file => read_file(file?, name, &mut entries)?,
        }
    }
    Ok(entries)
}

fn read_file(file: impl Read, name: Option<&str>, entries: &mut Vec<Value>) -> io::Result<()> {
    for line in BufReader::new(file).split(b'\n') {
        let Ok(entry) = serde_json::from_slice::<Value>(&line?) else { continue };
        if name.is_none_or(|name| entry["name"] == name) {
            entries.push(entry);
        }
    }
    Ok(())
}

/// The last `most` entries as they are written, from the oldest on; of the machine of this name, if one is
/// given.
///
/// # Errors
/// Those of reading a file. No file is no error.
pub fn last(folder: &Path, name: Option<&str>, most: usize) -> io::Result<Vec<Vec<u8>>> {
    #[derive(Deserialize)]
    struct Entry<'a> {
        #[serde(borrow, default)]
        name: Cow<'a, str>,
    }
    let wanted = |line: &[u8]| {
        serde_json::from_slice(line)
            .is_ok_and(|entry: Entry<'_>| name.is_none_or(|name| entry.name.as_ref() == name))
    };
    let mut last = VecDeque::new();
    for path in FILES.map(|file| folder.join(file)) {
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file?,
        };
        for line in BufReader::new(file).split(b'\n') {
            let line = line?;
            if most > 0 && wanted(&line) {
                if last.len() == most {
                    last.pop_front();
                }
                last.push_back(line);
            }
        }
    }
    Ok(last.into())
}

/// What changes whenever an entry is added.
///
/// # Errors
/// Those of looking at a file. No file is no error.
pub fn version(folder: &Path) -> io::Result<String> {
    match std::fs::metadata(file(folder)) {
        Ok(file) => Ok(format!("{:x}-{:x}-{:x}", file.dev(), file.ino(), file.len())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok("none".into()),
        Err(error) => Err(error),
    }
}

/// Reads a history as it grows: each entry once.
#[derive(Debug, Default)]
pub struct Tail {
    /// The newer file, by device and inode, and how much of it has been read.
    file: (u64, u64),
    read: u64,
}

impl Tail {
    /// What has been added since; all that there is at first.
    ///
    /// # Errors
    /// Those of reading a file. No file is no error.
    pub fn entries(&mut self, folder: &Path) -> io::Result<Vec<Value>> {
        let mut entries = Vec::new();
        let [older, newer] = FILES.map(|file| folder.join(file));
        let open = |path: &Path| match File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            file => file.map(Some),
        };
        // The newer one first: if it becomes the older one meanwhile, it is still the one that was opened.
        let Some(now) = open(&newer)? else { return Ok(entries) };
        let which = |file: &File| file.metadata().map(|file| (file.dev(), file.ino()));
        let current = which(&now)?;
        if current != self.file {
            // The one that was read so far is the older one by now, or there was none.
            if let Some(before) = open(&older)? {
                let begun = which(&before)? == self.file;
                read_from(before, if begun { self.read } else { 0 }, &mut entries)?;
            }
            (self.file, self.read) = (current, 0);
        }
        self.read += read_from(now, self.read, &mut entries)?;
        Ok(entries)
    }
}

/// Reads the whole lines from an offset on. Returns how many bytes they are.
fn read_from(mut file: File, offset: u64, entries: &mut Vec<Value>) -> io::Result<u64> {
    file.seek(SeekFrom::Start(offset))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    // A line that is being written is read the next time.
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    read_file(&bytes[..whole], None, entries)?;
    Ok(whole as u64)
}

/// The file to which entries are added.
pub fn file(folder: &Path) -> PathBuf {
    folder.join(FILES[1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn it_is_bounded_and_nobody_who_writes_loses_an_entry() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("state");
        assert_eq!(read(&place, None).unwrap(), [Value::Null; 0]);
        let entry = |number: u64| json!({ "name": format!("vm{}", number % 2), "number": number });
        let size = serde_json::to_vec(&entry(0)).unwrap().len() as u64 + 1;
        // A machine that lives for long.
        let old = open_within(&place, 4 * size).unwrap();
        for number in 0..9 {
            let new = open_within(&place, 4 * size).unwrap();
            new.add(&entry(number)).unwrap();
        }
        old.add(&entry(9)).unwrap();
        let numbers = |name| -> Vec<_> {
            read(&place, name).unwrap().iter().map(|entry| entry["number"].as_u64().unwrap()).collect()
        };
        // The first four are gone with their file.
        assert_eq!(numbers(None), [4, 5, 6, 7, 8, 9]);
        assert_eq!(numbers(Some("vm1")), [5, 7, 9]);
        assert_eq!(numbers(Some("vm2")), [0; 0]);
        let last = |name, most| -> Vec<_> {
            let lines = last(&place, name, most).unwrap();
            let entries = lines.iter().map(|line| serde_json::from_slice::<Value>(line).unwrap());
            entries.map(|entry| entry["number"].as_u64().unwrap()).collect()
        };
        assert_eq!(last(None, 3), [7, 8, 9]);
        assert_eq!(last(None, 100), [4, 5, 6, 7, 8, 9]);
        assert_eq!(last(Some("vm1"), 2), [7, 9]);
        assert_eq!(last(None, 0), [0; 0]);
        let before = version(&place).unwrap();
        assert_eq!(before, version(&place).unwrap());
        let mut tail = Tail::default();
        assert_eq!(tail.entries(&place).unwrap().len(), 6);
        assert_eq!(tail.entries(&place).unwrap().len(), 0);
        // What is added to the file that becomes the older one is read as well.
        old.add(&entry(10)).unwrap();
        assert_ne!(before, version(&place).unwrap());
        for number in 11..13 {
            let new = open_within(&place, 4 * size).unwrap();
            new.add(&entry(number)).unwrap();
        }
        let added: Vec<_> =
            tail.entries(&place).unwrap().iter().map(|entry| entry["number"].as_u64().unwrap()).collect();
        assert_eq!(added, [10, 11, 12]);
        // A line that was cut off harms no other.
        std::fs::write(file(&place), "{\"name\":\"vm0\",\"numb\n{\"name\":\"vm1\",\"number\":11}\n").unwrap();
        assert_eq!(numbers(None), [8, 9, 10, 11, 11]);
        assert_eq!(last(None, 2), [11, 11]);
    }
}
