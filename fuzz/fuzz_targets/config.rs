//! The command line and the configuration file: words, one a line, up to a zero byte; then the file.

#![no_main]

#[path = "../../whimbrel/src/cli"]
#[allow(dead_code, missing_docs)] // what only the program uses
mod cli {
    pub mod args;
    mod choice;
    pub mod config;
}

use libfuzzer_sys::fuzz_target;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;
use tempfile::NamedTempFile;

fuzz_target!(|bytes: &[u8]| {
    static FILE: OnceLock<NamedTempFile> = OnceLock::new();
    let path = FILE.get_or_init(|| NamedTempFile::new().expect("a file")).path();
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let words = parts.next().unwrap_or_default().split(|byte| *byte == b'\n').map(OsStr::from_bytes);
    let mut words: Vec<OsString> =
        [OsStr::new("whimbrel")].into_iter().chain(words).map(Into::into).collect();
    if let Some(content) = parts.next() {
        std::fs::write(path, content).expect("a file");
        words.extend(["--config".into(), path.into()]);
    }
    // Another file, such as a device that never ends, is not the parser's matter.
    let named = words.iter().filter(|word| word.as_bytes().starts_with(b"--con")).count();
    if named <= 1
        && (named == 0 || words.len() >= 2 && words[words.len() - 1] == path)
        && let Err(error) = cli::config::parse(words)
    {
        assert!(!error.to_string().is_empty());
    }
});
