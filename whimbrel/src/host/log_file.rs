//! The file to which a host's processes write, which is kept within bounds.
//!
//! Each process has it open for as long as it lives, so that another file cannot take its place: they would
//! go on writing to the old one. A file that is full is copied, and cut. Whoever appends to it begins at its
//! start then. What is written in the moment between both is lost.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// How large the file is, in bytes, when it is copied and cut.
const FULL: u64 = 4 << 20;

/// How many copies are kept, of which the first is the newest.
const COPIES: usize = 2;

/// Keeps the file at `path` within its bounds. Nobody else does so at the same time.
///
/// # Errors
/// Those of the files. A file that is not there is no error.
pub fn keep_within_bounds(path: &Path) -> io::Result<()> {
    bound(path, FULL)
}

fn bound(path: &Path, full: u64) -> io::Result<()> {
    match std::fs::metadata(path) {
        Ok(file) if file.len() >= full => {}
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => return Ok(()),
    }
    for number in (1..COPIES).rev() {
        match std::fs::rename(copy_of(path, number), copy_of(path, number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    let mut file = File::options().read(true).write(true).open(path)?;
    let mut copy = File::create(copy_of(path, 1))?;
    // The second time takes what has been written since.
    io::copy(&mut file, &mut copy)?;
    io::copy(&mut file, &mut copy)?;
    file.set_len(0)
}

fn copy_of(path: &Path, number: usize) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_file_and_its_copies_stay_small_while_others_append() {
        const FULL: u64 = 1000;
        const LINE: &str = "something is said\n";
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("processes.log");
        bound(&path, FULL).unwrap();
        let mut writers: Vec<_> =
            (0..3).map(|_| File::options().append(true).create(true).open(&path).unwrap()).collect();
        let mut largest = 0;
        for round in 0..400 {
            for writer in &mut writers {
                writer.write_all(LINE.as_bytes()).unwrap();
            }
            bound(&path, FULL).unwrap();
            let file = std::fs::metadata(&path).unwrap().len();
            largest = largest.max(file);
            assert!(file < FULL, "{file} bytes in round {round}");
        }
        assert!(largest > FULL / 2, "it is cut too early: {largest}");
        let mut files: Vec<_> =
            std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        files.sort();
        assert_eq!(files, ["processes.log", "processes.log.1", "processes.log.2"]);
        for number in 1..=COPIES {
            let copy = std::fs::read_to_string(copy_of(&path, number)).unwrap();
            assert!(copy.lines().all(|line| line == LINE.trim_end()), "{copy}");
            assert!((FULL..FULL + 200).contains(&(copy.len() as u64)), "{}", copy.len());
        }
    }
}
