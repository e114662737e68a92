//! Names of networks and storages: a machine says which it belongs to, and each host what that is there.

use std::path::{Component, Path};

/// Most bytes of such a name.
pub const MAX_NAME: usize = 64;

/// A name that no network and no storage can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a name of a network or a storage: use 1 to {MAX_NAME} letters, digits, -, _ or .")]
pub struct BadName(String);

/// Whether a network or a storage can have this name.
///
/// # Errors
/// [`BadName`].
pub fn check(name: &str) -> Result<(), BadName> {
    let letter = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
    let good = (1..=MAX_NAME).contains(&name.len()) && name.chars().all(letter);
    if good { Ok(()) } else { Err(BadName(name.chars().take(MAX_NAME).collect())) }
}

/// A path that names no file of a storage.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a file of a storage: use a path below the storage's folder, without . and ..")]
pub struct BadFile(String);

/// Whether a path names a file by its place below a storage's folder.
///
/// # Errors
/// [`BadFile`].
pub fn check_file(path: &Path) -> Result<(), BadFile> {
    let mut parts = path.components().peekable();
    let good = parts.peek().is_some() && parts.all(|part| matches!(part, Component::Normal(_)));
    if good { Ok(()) } else { Err(BadFile(path.to_string_lossy().chars().take(256).collect())) }
}

/// What there is, for messages: `a, b`, or `none`.
pub fn list<'a>(names: impl IntoIterator<Item = &'a String>) -> String {
    let names: Vec<_> = names.into_iter().map(String::as_str).collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_and_files_stay_below() {
        for good in ["blue", "net-2_a.b", &"x".repeat(MAX_NAME)] {
            assert_eq!(check(good), Ok(()));
        }
        for wrong in ["", "a b", "a/b", "a\n", "é", "a=b", "a,b", &"x".repeat(MAX_NAME + 1)] {
            assert!(check(wrong).is_err(), "{wrong:?}");
        }
        for good in ["web1.raw", "team/web1.raw"] {
            assert_eq!(check_file(Path::new(good)), Ok(()));
        }
        for wrong in ["", "/web1.raw", "../web1.raw", "a/../../b", "./a"] {
            assert!(check_file(Path::new(wrong)).is_err(), "{wrong:?}");
        }
    }
}
