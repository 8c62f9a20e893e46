//! `study scale`: the salient channels are multiplied by s before rounding and divided by it behind: their error shrinks
//! by s as long as the group's step Δ stays what it was. The paper's table 2.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use awqc_ir::Quant;
use awqc_passes::{Tensor, rtn};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::activations::{Activations, Calibrated, statistics};
use super::overlay::Linear;
use super::salient::{count, expert_of, largest, matrix_len};
use super::{Axes, Lab, Outcome, cells};
use crate::failure::Failure;
use crate::metrics::Clusters;

/// What to study.
pub struct Settings {
    /// How weights are rounded.
    pub quant: Quant,
    /// Share of channels that are scaled, in percent: those of the largest activations.
    pub percent: f64,
    /// What they are scaled by.
    pub scales: Vec<f64>,
}

/// What happens to the steps Δ of groups.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Steps {
    /// Groups, but for those that hold nothing but zeros.
    groups: u64,
    /// Of these, how many have another Δ′ ≠ Δ.
    changed: u64,
    /// Sum of Δ′/Δ.
    ratios: f64,
    /// Scaled weights.
    salient: u64,
    /// Sum of Δ′/Δ · 1/s over them.
    errors: f64,
}

impl Steps {
    fn add(&mut self, other: &Self) {
        self.groups += other.groups;
        self.changed += other.changed;
        self.ratios += other.ratios;
        self.salient += other.salient;
        self.errors += other.errors;
    }
}

/// Runs the study.
///
/// # Errors
/// When the model cannot be run, or the user interrupts.
pub fn run(lab: &mut Lab<'_>, settings: &Settings, calibrated: Calibrated) -> Result<Outcome, Failure> {
    let Settings { quant, percent, scales } = settings;
    let axes = Axes { x: "s", label: "scale of the salient channels", log: false, series: &["variant"] };
    let mut outcome = lab.begin("scale", json!({ "quant": quant.to_string(), "percent": percent }), axes)?;
    let (mut activations, mut calibrated) = (None, Some(calibrated));
    for s in scales {
        let key = format!("{quant} {percent} {s}");
        if let Some(calibrated) = calibrated.take_if(|_| !lab.knows(&key)) {
            activations = Some(Activations::read(lab, statistics(lab, calibrated, "statistics")?)?);
        }
        let label = format!("s = {s}");
        let (nll, steps): (Clusters, Steps) = lab.score(&key, |lab| {
            // Weights are read in any order: sums are made in one.
            let found: Mutex<BTreeMap<(usize, usize), Steps>> = Mutex::default();
            let edit = |linear: &Linear, w: &mut Tensor| {
                let means = activations.as_ref().map_or(&[][..], |a| a.of(linear.region, linear.input));
                let steps = scaled(w, *quant, *s as f32, |expert, cols| {
                    largest(expert_of(means, expert), count(*percent, cols))
                });
                let place = (linear.region, linear.weight.index());
                found.lock().unwrap_or_else(PoisonError::into_inner).insert(place, steps);
            };
            let nll = lab.edited(&edit, &label)?;
            let mut sum = Steps::default();
            found.into_inner().unwrap_or_else(PoisonError::into_inner).values().for_each(|f| sum.add(f));
            Ok((nll, sum))
        })?;
        let groups = steps.groups.max(1) as f64;
        let row = cells([
            ("variant", "scaled".into()),
            ("s", json!(s)),
            ("changed_percent", json!(100.0 * steps.changed as f64 / groups)),
            ("mean_step_ratio", json!(steps.ratios / groups)),
            ("mean_error_ratio", json!(steps.errors / steps.salient.max(1) as f64)),
        ]);
        lab.add(&mut outcome, &label, row, &nll)?;
    }
    Ok(outcome)
}

/// Rounds `w` with the columns that `salient` names multiplied by `s` on the way.
fn scaled(w: &mut Tensor, quant: Quant, s: f32, salient: impl Fn(usize, usize) -> Vec<usize>) -> Steps {
    let (rows, cols, matrix) = (w.rows(), w.cols().max(1), matrix_len(w));
    let plain = rtn::quantize(&w.data, rows, cols, quant);
    let columns: Vec<Vec<usize>> = (0..w.data.len().div_ceil(matrix)).map(|expert| salient(expert, cols)).collect();
    let each = |w: &mut [f32], by: &dyn Fn(&mut f32)| {
        for (matrix, columns) in w.chunks_mut(matrix).zip(&columns) {
            for row in matrix.chunks_mut(cols) {
                columns.iter().for_each(|c| row.get_mut(*c).into_iter().for_each(by));
            }
        }
    };
    each(&mut w.data, &|v| *v *= s);
    let codes = rtn::quantize(&w.data, rows, cols, quant);
    w.data = codes.decode();
    each(&mut w.data, &|v| *v /= s);

    let mut steps = Steps::default();
    let (groups, size) = (plain.groups().max(1), quant.group.len(cols));
    for (row, (old, new)) in plain.scales.chunks(groups).zip(codes.scales.chunks(groups)).enumerate() {
        let ratio = |g: usize| (old[g] > 0.0).then(|| f64::from(new[g]) / f64::from(old[g]));
        for r in (0..old.len()).filter_map(ratio) {
            steps.groups += 1;
            steps.changed += u64::from(r != 1.0);
            steps.ratios += r;
        }
        for column in columns.get(row * cols / matrix).into_iter().flatten() {
            if let Some(r) = ratio(column / size) {
                steps.salient += 1;
                steps.errors += r / f64::from(s);
            }
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::*;
    use awqc_ir::Group;

    #[test]
    fn steps_are_counted_as_the_paper_does() {
        let quant = Quant { bits: 3, symmetric: false, group: Group::Size(4) };
        // Two groups: in the first the salient column 1 stays inside the range, in the second column 5 widens it.
        let w = vec![-7.0, 1.0, 0.0, 7.0, 0.0, 7.0, 1.0, 2.0];
        let mut t = Tensor::new(vec![1, 8], w.clone());
        let steps = scaled(&mut t, quant, 2.0, |_, _| vec![1, 5]);
        assert_eq!((steps.groups, steps.changed, steps.salient), (2, 1, 2));
        // The second group's range and with it Δ doubles.
        assert!((steps.ratios - 3.0).abs() < 1e-3, "{steps:?}");
        assert!((steps.errors - (0.5 + 1.0)).abs() < 1e-3, "{steps:?}");
        // Δ = 2 in the first group: 1·2 falls on the grid, so the salient weight is exact where rounding alone loses
        // it.
        assert!((t.data[1] - 1.0).abs() < 1e-3, "{:?}", t.data);
        let mut one = Tensor::new(vec![1, 8], w.clone());
        let none = scaled(&mut one, quant, 1.0, |_, _| vec![1, 5]);
        assert_eq!((none.changed, one.data), (0, rtn::quantize(&w, 1, 8, quant).decode()));
    }
}
