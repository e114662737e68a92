//! For tests, in this package and others: a test that cannot run here says so, and does not pass where it has
//! to run.

use std::io::Write;

/// Writes a line past the harness, which keeps to itself what passing tests print with `println!`.
pub fn line(text: &str) {
    // With one thread the harness leaves the test's name standing without an end of line.
    let alone = std::thread::available_parallelism().is_ok_and(|n| n.get() == 1)
        || std::env::var("RUST_TEST_THREADS").is_ok_and(|n| n == "1");
    let start = if alone { "\n" } else { "" };
    // A closed output is no reason to fail.
    let _ = std::io::stdout().lock().write_all(format!("{start}{text}\n").as_bytes());
}

/// Says that the running test is skipped, on a line that `ci/test` counts.
///
/// # Panics
/// With `CI` set: there, a test that is skipped is a test that failed.
pub fn skipped(why: impl std::fmt::Display) {
    let test = std::thread::current();
    line(&format!("SKIPPED: {}: {why}", test.name().unwrap_or("a test")));
    assert!(std::env::var_os("CI").is_none(), "skipped, with CI set: {why}");
}
