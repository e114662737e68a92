//! Plots as SVG.

use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::ops::Range;

const WIDTH: u32 = 920;

/// Width of the names to the left of rows.
const NAMES: u32 = 390;

/// Margin at the right end, for the last number of the axis.
const RIGHT: u32 = 30;

/// Height of a row.
const ROW: u32 = 24;

/// Height of everything but the rows.
const FRAME: u32 = 50;

const FONT: (&str, u32) = ("sans-serif", 13);

/// Colours that people with any kind of colour vision can tell apart (Okabe and Ito).
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
];

/// A row of runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Strip {
    /// Its name.
    pub name: String,
    /// A figure of each run.
    pub runs: Vec<f64>,
    /// Their median.
    pub median: f64,
}

/// A row with a bar.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// Its name.
    pub name: String,
    /// From where to where it reaches.
    pub range: Range<f64>,
}

/// Points and a line.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// Its name.
    pub name: String,
    /// The points.
    pub points: Vec<(f64, f64)>,
    /// Points joined by a line.
    pub line: Vec<(f64, f64)>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

/// Draws on a new area. Errors of plotters borrow from the area, so they are converted while it lives.
fn draw(height: u32, on: impl FnOnce(&Area<'_>) -> anyhow::Result<()>) -> anyhow::Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        on(&area)?;
        area.present().map_err(cannot)?;
    }
    Ok(svg)
}

fn cannot(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("cannot draw: {error}")
}

/// The range of an axis: from 0 or the least value to a little beyond the greatest, so that nothing lies on
/// the frame.
fn span(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (least, most) =
        values.filter(|x| x.is_finite()).fold((0.0f64, 0.0f64), |(a, b), x| (a.min(x), b.max(x)));
    if least == most { 0.0..1.0 } else { least..most + (most - least) * 0.04 }
}

/// A name, cut to the width that it has.
fn short(name: &str) -> String {
    const MAX: usize = 62;
    if name.chars().count() <= MAX {
        return name.into();
    }
    name.chars().take(MAX - 1).chain(['…']).collect()
}

/// A chart of rows with their names to the left. The centre of row `n` is at y = `n` + 0.5, and the first row
/// is on top.
fn rows<'a, 'b>(
    area: &'a Area<'b>,
    axis: &str,
    x: Range<f64>,
    names: &[&str],
) -> anyhow::Result<Chart<'a, 'b>> {
    let mut chart = ChartBuilder::on(area)
        .x_label_area_size(FRAME - 10)
        .margin_left(NAMES as i32)
        .margin_right(RIGHT as i32)
        .margin_top(8)
        .build_cartesian_2d(x, names.len() as f64..0.0)
        .map_err(cannot)?;
    chart
        .configure_mesh()
        .max_light_lines(1)
        .disable_y_mesh()
        .y_labels(0)
        .x_desc(axis)
        .label_style(FONT)
        .draw()
        .map_err(cannot)?;
    let style = TextStyle::from(FONT).pos(Pos::new(HPos::Right, VPos::Center));
    for (place, name) in names.iter().enumerate() {
        let (_, y) = chart.backend_coord(&(0.0, place as f64 + 0.5));
        area.draw(&Text::new(short(name), (NAMES as i32 - 10, y), style.clone())).map_err(cannot)?;
    }
    Ok(chart)
}

/// Every run as a dot, and medians as vertical lines.
pub fn strips(axis: &str, strips: &[Strip]) -> anyhow::Result<String> {
    let names: Vec<&str> = strips.iter().map(|strip| strip.name.as_str()).collect();
    draw(strips.len() as u32 * ROW + FRAME, |area| {
        let x = span(strips.iter().flat_map(|strip| strip.runs.iter().copied()));
        let mut chart = rows(area, axis, x, &names)?;
        for (place, strip) in strips.iter().enumerate() {
            let colour = COLOURS[place % COLOURS.len()];
            let y = place as f64 + 0.5;
            let dots = strip.runs.iter().map(|run| Circle::new((*run, y), 4, colour.mix(0.45).filled()));
            chart.draw_series(dots).map_err(cannot)?;
            let median = [(strip.median, y - 0.38), (strip.median, y + 0.38)];
            chart.draw_series([PathElement::new(median, colour.stroke_width(3))]).map_err(cannot)?;
        }
        Ok(())
    })
}

/// A bar in each row.
pub fn bars(axis: &str, bars: &[Bar]) -> anyhow::Result<String> {
    let names: Vec<&str> = bars.iter().map(|bar| bar.name.as_str()).collect();
    draw(bars.len() as u32 * ROW + FRAME, |area| {
        let x = span(bars.iter().flat_map(|bar| [bar.range.start, bar.range.end]));
        let mut chart = rows(area, axis, x, &names)?;
        for (place, bar) in bars.iter().enumerate() {
            let colour = COLOURS[place % COLOURS.len()];
            let corners = [(bar.range.start, place as f64 + 0.18), (bar.range.end, place as f64 + 0.82)];
            let outline = Rectangle::new(corners, colour.stroke_width(1));
            chart
                .draw_series([Rectangle::new(corners, colour.mix(0.7).filled()), outline])
                .map_err(cannot)?;
        }
        Ok(())
    })
}

/// Curves over one axis, with vertical lines at the marks.
pub fn curves(x: &str, y: &str, all: &[Series], marks: &[(f64, &str)]) -> anyhow::Result<String> {
    draw(260, |area| {
        let points = || all.iter().flat_map(|series| series.points.iter().chain(&series.line));
        let across = span(points().map(|p| p.0).chain(marks.iter().map(|mark| mark.0)));
        let up = span(points().map(|p| p.1));
        let top = up.end;
        let mut chart = ChartBuilder::on(area)
            .x_label_area_size(40)
            .y_label_area_size(70)
            .margin(8)
            .margin_right(RIGHT as i32)
            .build_cartesian_2d(across, up)
            .map_err(cannot)?;
        chart
            .configure_mesh()
            .max_light_lines(1)
            .x_desc(x)
            .y_desc(y)
            .label_style(FONT)
            .draw()
            .map_err(cannot)?;
        for (at, what) in marks {
            let grey = RGBColor(110, 110, 110);
            let line = PathElement::new([(*at, 0.0), (*at, top)], grey.stroke_width(1));
            chart.draw_series([line]).map_err(cannot)?;
            chart.draw_series([Text::new(what.to_string(), (*at, top), FONT)]).map_err(cannot)?;
        }
        for (place, series) in all.iter().enumerate() {
            let colour = COLOURS[place % COLOURS.len()];
            let dots = series.points.iter().map(|point| Circle::new(*point, 3, colour.mix(0.45).filled()));
            chart.draw_series(dots).map_err(cannot)?;
            let line = LineSeries::new(series.line.iter().copied(), colour.stroke_width(2));
            let named = chart.draw_series(line).map_err(cannot)?;
            if all.len() > 1 {
                let key = move |(x, y)| PathElement::new([(x, y), (x + 16, y)], colour.stroke_width(3));
                named.label(short(&series.name)).legend(key);
            }
        }
        if all.len() > 1 {
            let legend = &mut chart.configure_series_labels();
            legend.background_style(WHITE.mix(0.8)).label_font(FONT).draw().map_err(cannot)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_run_and_name_is_in_the_plot() {
        let strip =
            |name: &str, runs: &[f64]| Strip { name: name.into(), runs: runs.to_vec(), median: runs[0] };
        let svg = strips("MiB/s", &[strip("us <b>&amp;", &[1.0, 2.0]), strip("peer", &[3.0])]).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("peer") && svg.contains("MiB/s"));
        assert!(!svg.contains("<b>"), "names are text, whatever is in them");
    }

    #[test]
    fn plots_survive_what_files_may_hold() {
        for odd in [f64::NAN, f64::INFINITY, 0.0, -1.0, 1e300] {
            let strip = Strip { name: "x".repeat(500), runs: vec![odd; 2], median: odd };
            assert!(strips("x", &[strip]).is_ok(), "{odd}");
            assert!(bars("x", &[Bar { name: String::new(), range: odd..odd }]).is_ok(), "{odd}");
            let series = Series { name: "s".into(), points: vec![(odd, odd)], line: vec![(odd, odd); 2] };
            assert!(curves("x", "y", &[series.clone(), series], &[(0.0, "now")]).is_ok(), "{odd}");
        }
        assert!(strips("x", &[]).is_ok() && bars("x", &[]).is_ok() && curves("x", "y", &[], &[]).is_ok());
    }
}
