//! The plot of a study: perplexity on a logarithmic axis, over what was varied. Error bars are those of the ratio to
//! the float model.

use std::ops::Range;

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::{
    ChartBuilder, Circle, DrawingArea, IntoDrawingArea, PathElement, RGBColor, SVGBackend, Text, WHITE,
};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, IntoFont, ShapeStyle};

use super::{Outcome, Row};
use crate::failure::{Exit, Failure};

/// The picture, in pixels, of which the last are for the legend.
const SIZE: (u32, u32) = (860, 460);
const LEGEND: u32 = 240;

/// Colours that people tell apart who see colours differently (Okabe and Ito).
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(120, 120, 0),
];
const GREY: RGBColor = RGBColor(90, 90, 90);

/// An axis with marks where they are wanted.
struct Axis {
    ends: (f64, f64),
    marks: Vec<f64>,
}

impl Ranged for Axis {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (value - self.ends.0) / (self.ends.1 - self.ends.0);
        limit.0 + (share * f64::from(limit.1 - limit.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.marks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.ends.0..self.ends.1
    }
}

/// One curve: its name; x, perplexity and its error.
type Curve = (String, Vec<(f64, f64, f64)>);

/// The plot as SVG text.
///
/// # Errors
/// When it cannot be drawn.
pub fn svg(outcome: &Outcome) -> Result<String, Failure> {
    let mut text = String::new();
    draw(outcome, &mut text).map_err(|e| Failure::new(Exit::Failed, format!("the plot cannot be drawn: {e}")))?;
    Ok(text)
}

/// What `plotters` fails with, as text.
fn said(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn draw(outcome: &Outcome, text: &mut String) -> Result<(), String> {
    let axes = outcome.axes;
    let several = outcome.texts.len() > 1;
    let (mut curves, mut lines): (Vec<Curve>, Vec<(String, f64)>) = (Vec::new(), Vec::new());
    for row in &outcome.rows {
        let name = name(outcome, row, several);
        // The error of the comparison with float: what makes a text hard for all variants is none.
        let y = row.measured.perplexity;
        let error = y * row.measured.ratio_error.unwrap_or(0.0) / row.measured.ratio;
        match row.cells.get(axes.x).and_then(serde_json::Value::as_f64) {
            None => lines.push((name, y)),
            Some(x) => match curves.iter_mut().find(|(n, _)| *n == name) {
                Some((_, points)) => points.push((x, y, error)),
                None => curves.push((name, vec![(x, y, error)])),
            },
        }
    }
    curves.iter_mut().for_each(|(_, points)| points.sort_by(|a, b| a.0.total_cmp(&b.0)));

    // Both axes are linear in these.
    let across = |x: f64| if axes.log { x.max(1e-9).ln() } else { x };
    let ends = |y: f64, e: f64| ((y - e).max(y / 10.0).ln(), (y + e).ln());
    let mut xs: Vec<f64> = curves.iter().flat_map(|(_, p)| p.iter().map(|(x, _, _)| *x)).collect();
    xs.sort_by(f64::total_cmp);
    xs.dedup();
    let (x0, x1) = padded(xs.iter().map(|x| across(*x)));
    let all = curves.iter().flat_map(|(_, p)| p.iter().map(|(_, y, e)| ends(*y, *e)));
    let all = all.chain(lines.iter().map(|(_, y)| ends(*y, 0.0)));
    let (y0, y1) = padded(all.flat_map(|(a, b)| [a, b]));

    let root = SVGBackend::with_string(text, SIZE).into_drawing_area();
    root.fill(&WHITE).map_err(said)?;
    let (left, right) = root.split_horizontally(SIZE.0 - LEGEND);
    let mut chart = ChartBuilder::on(&left)
        .caption(format!("{}: {}", outcome.study, outcome.model), ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(
            Axis { ends: (x0, x1), marks: thinned(&xs, x0, x1, across) },
            Axis { ends: (y0, y1), marks: ticks(y0.exp(), y1.exp()) },
        )
        .map_err(said)?;
    let tick = move |v: &f64| short(if axes.log { v.exp() } else { *v });
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .bold_line_style(RGBColor(225, 225, 225))
        .x_desc(axes.label)
        .y_desc("perplexity")
        .x_label_formatter(&tick)
        .y_label_formatter(&|v| short(v.exp()))
        .label_style(("sans-serif", 13))
        .axis_desc_style(("sans-serif", 15))
        .draw()
        .map_err(said)?;
    let mut legend = Legend { area: right, at: 44 };
    for (i, (name, y)) in lines.iter().enumerate() {
        let (dash, gap) = [(0.02, 0.015), (0.004, 0.01), (0.04, 0.01)][i % 3];
        let mut from = 0.0;
        while from < 1.0 {
            let at = |t: f64| (x0 + (x1 - x0) * t.min(1.0), y.ln());
            chart
                .draw_series([PathElement::new(vec![at(from), at(from + dash)], GREY.stroke_width(1))])
                .map_err(said)?;
            from += dash + gap;
        }
        legend.entry(&format!("{name}: {}", short(*y)), GREY.stroke_width(1), if i % 3 == 1 { 3 } else { 7 })?;
    }
    for (i, (name, points)) in curves.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let path = points.iter().map(|(x, y, _)| (across(*x), y.ln())).collect::<Vec<_>>();
        chart.draw_series([PathElement::new(path.clone(), colour.stroke_width(2))]).map_err(said)?;
        let cap = (x1 - x0) * 0.006;
        for ((x, y), (_, value, error)) in path.iter().zip(points) {
            let (low, high) = ends(*value, *error);
            for bar in [[(*x, low), (*x, high)], [(x - cap, low), (x + cap, low)], [(x - cap, high), (x + cap, high)]] {
                chart.draw_series([PathElement::new(bar.to_vec(), colour.stroke_width(1))]).map_err(said)?;
            }
            chart.draw_series([Circle::new((*x, *y), 4, colour.filled())]).map_err(said)?;
        }
        legend.entry(name, colour.stroke_width(3), 20)?;
    }
    drop(chart);
    root.present().map_err(said)
}

/// What a curve is called.
fn name(outcome: &Outcome, row: &Row, several: bool) -> String {
    let keys = outcome.axes.series.iter().filter_map(|k| Some((k, row.cells.get(*k)?)));
    let mut parts: Vec<String> = keys
        .map(|(key, v)| match v.as_str() {
            Some(text) => text.to_owned(),
            None => format!("{key} {v}"),
        })
        .collect();
    parts.extend(several.then(|| format!("on {}", row.text)));
    parts.join(", ")
}

/// The names of the curves, one below the other.
struct Legend<'a> {
    area: DrawingArea<SVGBackend<'a>, plotters::coord::Shift>,
    at: i32,
}

impl Legend<'_> {
    fn entry(&mut self, name: &str, style: ShapeStyle, dash: i32) -> Result<(), String> {
        for from in (0..20).step_by((dash + if dash < 20 { 4 } else { 0 }) as usize) {
            let line = vec![(from, self.at), ((from + dash).min(20), self.at)];
            self.area.draw(&PathElement::new(line, style)).map_err(said)?;
        }
        // Long names go on below.
        let mut lines = vec![String::new()];
        for word in name.split_inclusive(' ') {
            if lines.last().is_some_and(|l| !l.is_empty() && l.len() + word.len() > 29) {
                lines.push(String::new());
            }
            lines.iter_mut().last().into_iter().for_each(|l| l.push_str(word));
        }
        for line in lines {
            let style =
                ("sans-serif", 13).into_font().color(&RGBColor(0, 0, 0)).pos(Pos::new(HPos::Left, VPos::Center));
            self.area.draw(&Text::new(line.trim_end().to_owned(), (28, self.at), style)).map_err(said)?;
            self.at += 18;
        }
        self.at += 4;
        Ok(())
    }
}

/// The range of some numbers with room at both ends.
fn padded(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (lo, hi) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let (lo, hi) = if lo <= hi { (lo, hi) } else { (0.0, 1.0) };
    let room = ((hi - lo) * 0.06).max(0.02);
    (lo - room, hi + room)
}

/// Where something was measured, but for marks too close to each other.
fn thinned(xs: &[f64], x0: f64, x1: f64, across: impl Fn(f64) -> f64) -> Vec<f64> {
    let mut out: Vec<f64> = Vec::new();
    for at in xs.iter().map(|x| across(*x)) {
        if out.last().is_none_or(|last| at - last > (x1 - x0) * 0.06) {
            out.push(at);
        }
    }
    out
}

/// Round perplexities between two, as logarithms: not more than ten.
fn ticks(lo: f64, hi: f64) -> Vec<f64> {
    let fine =
        [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0, 2.2, 2.5, 2.8, 3.0, 3.2, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 9.0];
    let sets: [&[f64]; 6] = [
        &fine,
        &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0],
        &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
        &[1.0, 2.0, 5.0],
        &[1.0, 3.0],
        &[1.0],
    ];
    let of = |set: &[f64]| -> Vec<f64> {
        let decades = (lo.log10().floor() as i32)..=(hi.log10().ceil() as i32);
        let all = decades.flat_map(|d| set.iter().map(move |m| m * 10f64.powi(d)));
        all.filter(|v| (lo..=hi).contains(v)).map(f64::ln).collect()
    };
    sets.iter().map(|s| of(s)).find(|t| t.len() <= 10).unwrap_or_default()
}

/// Three digits.
fn short(v: f64) -> String {
    if !(1e-3..1e5).contains(&v) {
        return format!("{v:.0e}");
    }
    let decimals = (2 - v.max(1.0).log10().floor() as i32).max(0) as usize;
    let text = format!("{v:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_few() {
        let marks = |lo, hi| ticks(lo, hi).into_iter().map(|v: f64| short(v.exp())).collect::<Vec<_>>().join(" ");
        assert_eq!(marks(28.0, 42.0), "28 30 32 35 40");
        assert_eq!(marks(28.0, 110.0), "30 40 50 60 80 100");
        assert_eq!(marks(28.0, 4.0e6), "100 1000 10000 1e5 1e6");
    }
}
