//! Where the `whimbrel` program is.
//!
//! Cargo tells an integration test where the programs of its *own* package are, and this is another
//! package. But it builds all packages of a profile into one folder, and `cargo test --workspace` builds the
//! programs first; so the program is beside the folder of the test that runs. A program that is older than
//! one of the files it is made from (Cargo lists them beside it) would test something else than what is in
//! the work tree: then the test fails and says what to do.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::SystemTime;

/// The `whimbrel` program of this profile.
///
/// # Panics
/// When it has not been built, or is older than its sources.
pub fn whimbrel() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let test = std::env::current_exe().expect("a test has a file");
        let folder = test.parent().expect("a file is in a folder");
        // Tests are in target/<profile>/deps, and programs are beside that folder.
        let folder = if folder.ends_with("deps") { folder.parent().expect("a profile") } else { folder };
        let program = folder.join("whimbrel");
        let (command, built) = (command(folder), modified(&program));
        let Some(built) = built else {
            panic!("{} is not built; run the tests with `{command}`", program.display());
        };
        for source in sources(&folder.join("whimbrel.d")) {
            assert!(
                changed(&source).is_none_or(|changed| changed <= built),
                "{} is older than {}; run the tests with `{command}`",
                program.display(),
                source.display()
            );
        }
        program
    })
}

fn command(folder: &Path) -> &'static str {
    if folder.ends_with("release") { "cargo test --release --workspace" } else { "cargo test --workspace" }
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|m| m.modified()).ok()
}

/// When a file, or the last of the files in a folder, was changed: a build script may name a whole folder.
fn changed(path: &Path) -> Option<SystemTime> {
    match std::fs::read_dir(path) {
        Ok(entries) => entries.flatten().filter_map(|entry| changed(&entry.path())).max(),
        Err(_) => modified(path),
    }
}

/// The files named in a dependency file, `program: file file …`. Without one, none: Cargo always writes it.
fn sources(list: &Path) -> Vec<PathBuf> {
    let text = std::fs::read_to_string(list).unwrap_or_default();
    let files = text.lines().next().and_then(|line| line.split_once(": ")).map_or("", |(_, files)| files);
    // A space within a name is written as "\ ".
    let files = files.replace("\\ ", "\0");
    files.split_whitespace().map(|file| PathBuf::from(file.replace('\0', " "))).collect()
}
