//! Results for people and for machines.

use crate::facts::Facts;
use crate::statistics::Distribution;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

/// What a benchmark found.
pub struct Outcome {
    /// Its name.
    pub bench: &'static str,
    /// What it was asked to do.
    pub parameters: Value,
    /// Every single run.
    pub runs: Vec<Value>,
    /// The distributions.
    pub summary: Value,
    /// The same for people.
    pub text: String,
}

impl Outcome {
    /// Prints one form or the other on standard output.
    pub fn print(&self, json: bool) {
        if json {
            let Outcome { bench, parameters, runs, summary, .. } = self;
            let facts = Facts::gather();
            println!(
                "{}",
                json!({
                    "format": 1, "bench": bench, "facts": facts, "parameters": parameters,
                    "runs": runs, "summary": summary,
                })
            );
        } else {
            print!("{}", self.text);
        }
    }
}

/// Anything that has a JSON form, as a value; what has none is null.
pub fn value(of: impl Serialize) -> Value {
    serde_json::to_value(of).unwrap_or(Value::Null)
}

/// A table with these columns: names to the left, figures to the right.
pub fn table<const N: usize>(columns: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header(columns);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// A distribution's cells: least, median, 90th percentile, most.
pub fn cells(of: &Distribution, digits: usize) -> [String; 4] {
    [of.min, of.median, of.p90, of.max].map(|figure| format!("{figure:.digits$}"))
}

/// `median (min to max)`, or a dash where nothing was measured.
pub fn brief(of: Option<&Distribution>, digits: usize) -> String {
    of.map_or("–".into(), |d| format!("{:.digits$} ({:.digits$} to {:.digits$})", d.median, d.min, d.max))
}

/// A bar on standard error, where that is a terminal.
pub fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    // A template that does not parse would show in the very first run on a terminal.
    if let Ok(style) = ProgressStyle::with_template("[{bar:30}] {pos}/{len} {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_read_well() {
        let d = Distribution::of([1.0, 2.0, 4.0]).unwrap();
        assert_eq!(brief(Some(&d), 1), "2.0 (1.0 to 4.0)");
        assert_eq!(brief(None, 1), "–");
        assert_eq!(cells(&d, 0), ["1", "2", "4", "4"]);
    }
}
