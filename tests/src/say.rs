//! What a test says beside passing: one line of figures for each scenario, and what was skipped.

use crate::wire::skip::line;
use migration::report::Report;

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
