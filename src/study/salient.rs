//! `study salient`: a few input channels of each linear stay in float, the others are rounded to nearest. Which few
//! matters: the paper's table 1.

use awqc_ir::Quant;
use awqc_passes::{Tensor, rtn};
use serde_json::json;

use super::activations::{Activations, Calibrated, statistics};
use super::overlay::Linear;
use super::{Axes, Lab, Outcome, cells};
use crate::failure::Failure;
use crate::metrics::Clusters;

/// By what channels are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// Largest mean magnitude of the activations.
    Activation,
    /// Largest norm of the weights that multiply the channel.
    Weight,
    /// Chance, by a seed.
    Random(u64),
}

impl Choice {
    fn name(self) -> &'static str {
        match self {
            Self::Activation => "activation",
            Self::Weight => "weight",
            Self::Random(_) => "random",
        }
    }
}

/// What to study.
pub struct Settings {
    /// How the other channels are rounded.
    pub quant: Quant,
    /// Shares of channels to keep, in percent.
    pub percents: Vec<f64>,
    /// How many random choices are averaged.
    pub seeds: u64,
}

/// Runs the study.
///
/// # Errors
/// When the model cannot be run, or the user interrupts.
pub fn run(lab: &mut Lab<'_>, settings: &Settings, calibrated: Calibrated) -> Result<Outcome, Failure> {
    let Settings { quant, percents, seeds } = settings;
    let axes = Axes { x: "percent", label: "channels kept in float, %", log: true, series: &["chosen_by"] };
    let fixed = json!({ "quant": quant.to_string(), "seeds": seeds });
    let mut outcome = lab.begin("salient", fixed, axes)?;
    let none = lab.score(&format!("{quant} rounded"), |lab| {
        lab.edited(&|_, w| keep(w, *quant, |_, _| Vec::new()), "nothing kept")
    })?;
    lab.add(&mut outcome, "nothing kept", cells([("chosen_by", "nothing kept".into())]), &none)?;
    let (mut activations, mut calibrated) = (None, Some(calibrated));
    let random = (0..*seeds).map(Choice::Random).collect::<Vec<_>>();
    for percent in percents {
        for choices in [&[Choice::Activation][..], &[Choice::Weight], &random] {
            let Some(name) = choices.first().map(|c| c.name()) else { continue };
            let label = format!("{percent} % by {name}");
            let mut all: Vec<Clusters> = Vec::new();
            for choice in choices {
                let key = format!("{quant} {percent} {choice:?}");
                let needed = *choice == Choice::Activation && !lab.knows(&key);
                if let Some(calibrated) = calibrated.take_if(|_| needed) {
                    activations = Some(Activations::read(lab, statistics(lab, calibrated, "statistics")?)?);
                }
                all.push(lab.score(&key, |lab| {
                    let edit = |linear: &Linear, w: &mut Tensor| {
                        let means = activations.as_ref().map_or(&[][..], |a| a.of(linear.region, linear.input));
                        let cols = w.cols();
                        let count = count(*percent, cols);
                        keep(w, *quant, |matrix, expert| match choice {
                            Choice::Activation => largest(expert_of(means, expert), count),
                            Choice::Weight => largest(&norms(matrix, cols), count),
                            Choice::Random(seed) => chance(*seed, linear, expert, cols, count),
                        });
                    };
                    lab.edited(&edit, &label)
                })?);
            }
            let mut row = cells([("chosen_by", name.into()), ("percent", json!(percent))]);
            if let [_, _, ..] = all[..] {
                row.insert("each".into(), json!(all.iter().map(|c| c.exp().0).collect::<Vec<_>>()));
            }
            lab.add(&mut outcome, &label, row, &Clusters::average(&all))?;
        }
    }
    Ok(outcome)
}

/// How many of `channels` are so many percent: one at least, unless none is asked for.
pub fn count(percent: f64, channels: usize) -> usize {
    let share = (percent / 100.0 * channels as f64).round() as usize;
    share.max(usize::from(percent > 0.0)).min(channels)
}

/// The statistics of an expert: its own, or the only ones there are.
pub fn expert_of(means: &[Vec<f32>], expert: usize) -> &[f32] {
    means.get(expert).or_else(|| means.first()).map_or(&[], Vec::as_slice)
}

/// The `count` channels of the largest measure, the first of equals first.
pub fn largest(measure: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..measure.len()).collect();
    order.sort_by(|a, b| measure[*b].total_cmp(&measure[*a]).then(a.cmp(b)));
    order.truncate(count);
    order
}

/// The norm of each column.
fn norms(matrix: &[f32], cols: usize) -> Vec<f32> {
    let mut squares = vec![0.0f64; cols];
    for row in matrix.chunks(cols.max(1)) {
        squares.iter_mut().zip(row).for_each(|(s, w)| *s += f64::from(*w).powi(2));
    }
    squares.into_iter().map(|s| s.sqrt() as f32).collect()
}

/// A choice by chance, the same whenever this seed is asked for this matrix.
fn chance(seed: u64, linear: &Linear, expert: usize, cols: usize, count: usize) -> Vec<usize> {
    let place = [linear.region, linear.weight.index(), expert];
    let seed = place.iter().fold(seed, |h, n| h.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(*n as u64 + 1));
    let mut order: Vec<usize> = (0..cols).collect();
    fastrand::Rng::with_seed(seed).shuffle(&mut order);
    order.truncate(count);
    order
}

/// Rounds a weight, but for the columns that `kept` names of each expert's matrix. Scales are those of the whole
/// groups.
fn keep(w: &mut Tensor, quant: Quant, kept: impl Fn(&[f32], usize) -> Vec<usize>) {
    let (rows, cols) = (w.rows(), w.cols());
    let rounded = rtn::quantize(&w.data, rows, cols, quant).decode();
    let matrix = matrix_len(w);
    for (expert, (float, rounded)) in w.data.chunks_mut(matrix).zip(rounded.chunks(matrix)).enumerate() {
        let columns = kept(float, expert);
        for (float, rounded) in float.chunks_mut(cols.max(1)).zip(rounded.chunks(cols.max(1))) {
            let own: Vec<(usize, f32)> = columns.iter().filter_map(|c| Some((*c, *float.get(*c)?))).collect();
            float.copy_from_slice(rounded);
            own.into_iter().for_each(|(c, v)| float[c] = v);
        }
    }
}

/// Elements of one expert's matrix.
pub fn matrix_len(w: &Tensor) -> usize {
    let experts = if let [experts, _, _] = w.shape[..] { experts } else { 1 };
    (w.data.len() / experts.max(1)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use awqc_ir::Group;

    #[test]
    fn kept_columns_are_float_and_the_others_rounded() {
        let quant = Quant { bits: 2, symmetric: false, group: Group::Size(4) };
        let data: Vec<f32> = (0..32).map(|i| ((i * 37) % 17) as f32 * 0.1 - 0.7).collect();
        let original = Tensor::new(vec![2, 2, 8], data);
        let rounded = rtn::quantize(&original.data, 4, 8, quant).decode();
        let mut w = original.clone();
        // Column 2 of the first expert, 5 of the second.
        keep(&mut w, quant, |_, expert| vec![2 + 3 * expert]);
        for (i, (got, (float, rounded))) in w.data.iter().zip(original.data.iter().zip(&rounded)).enumerate() {
            let kept = i % 8 == if i < 16 { 2 } else { 5 };
            assert_eq!(got, if kept { float } else { rounded }, "element {i}");
        }
        assert_ne!(w.data, rounded);
    }

    #[test]
    fn the_largest_are_chosen() {
        assert_eq!(largest(&[0.5, 3.0, 3.0, 1.0], 3), [1, 2, 3]);
        assert_eq!(norms(&[3.0, 1.0, 4.0, 0.0], 2), [5.0, 1.0]);
        assert_eq!([count(0.0, 576), count(0.1, 576), count(1.0, 576), count(100.0, 576)], [0, 1, 6, 576]);
    }
}
