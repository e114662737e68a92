//! Tables and progress on a terminal.

use crate::statistics::Distribution;
use comfy_table::presets::UTF8_HORIZONTAL_ONLY;
use comfy_table::{CellAlignment, Table};
use indicatif::{ProgressBar, ProgressStyle};

/// A table with these columns. The first is aligned to the left, the others to the right.
pub fn table<S: ToString>(columns: impl IntoIterator<Item = S>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_HORIZONTAL_ONLY);
    table.set_header(columns.into_iter().map(|column| column.to_string()));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The cells of a distribution: minimum, median, 90th percentile, maximum.
pub fn cells(of: &Distribution, digits: usize) -> [String; 4] {
    [of.min, of.median, of.p90, of.max].map(|figure| format!("{figure:.digits$}"))
}

/// `median (min to max)`, or a dash where nothing was measured.
pub fn brief(of: Option<&Distribution>, digits: usize) -> String {
    of.map_or("–".into(), |d| format!("{:.digits$} ({:.digits$} to {:.digits$})", d.median, d.min, d.max))
}

/// A progress bar on standard error, if that is a terminal.
pub fn progress(steps: u64) -> ProgressBar {
    let bar = ProgressBar::new(steps);
    // The template is constant: the first run on a terminal shows whether it parses.
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
