//! A TOML file that an operator has written, and how it is told what is wrong in it.

use std::path::{Path, PathBuf};

/// Why a file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be read.
    #[error("cannot read {what} {}: {source}", path.display())]
    Read {
        /// What the file is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It says something that cannot be.
    #[error("{}:{line}: {what}", path.display())]
    Entry {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
}

/// A file that was read.
#[derive(Debug)]
pub struct TomlFile<'a> {
    path: &'a Path,
    /// What is in it.
    pub text: String,
}

impl<'a> TomlFile<'a> {
    /// Reads the file at `path`, which errors call `what`.
    ///
    /// # Errors
    /// [`Error::Read`].
    pub fn read(path: &'a Path, what: &'static str) -> Result<Self, Error> {
        let read = std::fs::read_to_string(path);
        let text = read.map_err(|source| Error::Read { what, path: path.into(), source })?;
        Ok(TomlFile { path, text })
    }

    /// The line, from 1, of the byte at this offset.
    pub fn line(&self, at: usize) -> usize {
        self.text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1
    }

    /// The entry at this offset is wrong.
    pub fn entry(&self, at: usize, what: String) -> Error {
        Error::Entry { path: self.path.into(), line: self.line(at), what }
    }

    /// What the parser found wrong.
    pub fn wrong(&self, error: &toml::de::Error) -> Error {
        self.entry(error.span().map_or(0, |span| span.start), error.message().into())
    }
}
