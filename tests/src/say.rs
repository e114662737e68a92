//! What a test says beside passing: one line of figures for each scenario, and what was skipped.
//!
//! The harness keeps what passing tests print with `println!` to itself, so this writes to standard
//! output directly.

use migration::report::Report;
use std::io::Write;

fn line(text: &str) {
    // With one thread the harness leaves the test's name standing without an end of line.
    let alone = std::thread::available_parallelism().is_ok_and(|n| n.get() == 1)
        || std::env::var("RUST_TEST_THREADS").is_ok_and(|n| n == "1");
    let start = if alone { "\n" } else { "" };
    // A closed output is no reason to fail.
    let _ = std::io::stdout().lock().write_all(format!("{start}{text}\n").as_bytes());
}

/// The figures of a scenario.
pub fn figures(scenario: &str, figures: impl std::fmt::Display) {
    line(&format!("    {scenario}: {figures}"));
}

/// The figures of one move of a chain.
pub fn moved(number: u32, report: &Report) {
    figures(
        &format!("move {number} over {}", report.transport),
        format_args!(
            "{} MiB in {:.1} s, blackout {:.0} ms",
            report.sent() >> 20,
            report.total_us as f64 / 1e6,
            report.blackout_us as f64 / 1e3
        ),
    );
}

/// A scenario that cannot be run here, and why.
pub fn skipped(scenario: &str, why: impl std::fmt::Display) {
    line(&format!("SKIPPED {scenario}: {why}"));
}
