//! What rounding the linears of a region is expected to cost the model.

use awqc_ir::{Group, Quant, Region, ValueId};
use rayon::prelude::*;

use super::{MEASURED, Unit};
use crate::analysis::linears::{LinearUse, label, quantizable, units, weights};
use crate::dense::{TILE, View, quadratic};
use crate::exec::Executor;
use crate::facts::InputStats;
use crate::pass::PassError;
use crate::rtn;

/// The units of a region ([`units`]) with what it costs to round them to the nearest of [`MEASURED`] bits.
///
/// The cost of a linear is half of `Σ_r F_r · (ΔW_r G ΔW_rᵀ) / tokens`: G is the Gram matrix of its input and `F_r` the
/// mean over tokens of the squared derivative of the loss by its output's channel r, which `sensitivity` gives for its
/// place in
/// `linears`. That is the second-order term of the loss with the Fisher matrix, input and output apart (K-FAC, arXiv
/// 1503.05671, there with the whole output side, here with its diagonal), in nats per token.
///
/// # Errors
/// When a tensor cannot be read, or statistics or sensitivities do not fit the linears.
pub fn costs(
    region: &Region,
    exec: &dyn Executor,
    taps: &[(ValueId, InputStats)],
    sensitivity: &[(LinearUse, Vec<f64>)],
    symmetric: bool,
    group: Group,
) -> Result<Vec<Unit>, PassError> {
    let quant = Quant { bits: MEASURED, symmetric, group };
    let mut out = Vec::new();
    for unit in units(region) {
        let mut elements = 0;
        let mut cost = 0.0;
        for weight in weights(&unit) {
            let numbers = exec.realize(region, weight)?;
            let (rows, cols) = (numbers.rows(), numbers.cols());
            elements += numbers.data.len() as u64;
            let mut error = rtn::quantize(&numbers.data, rows, cols, quant).decode();
            error.iter_mut().zip(&numbers.data).for_each(|(e, w)| *e -= w);
            for linear in unit.iter().filter(|l| l.weight == weight) {
                let stats = taps.iter().find(|(v, _)| *v == linear.input).map(|(_, s)| s);
                let minds = sensitivity.iter().find(|(l, _)| l == linear).map(|(_, f)| f.as_slice());
                let fits = |(s, f): &(&InputStats, &[f64])| s.gram.len() == cols * cols && f.len() == rows;
                let Some((stats, minds)) = stats.zip(minds).filter(fits) else {
                    let name = label(region, weight);
                    return Err(PassError::Refused(format!("what was measured of `{name}` does not fit its weight")));
                };
                cost += weighted(&error, cols, &stats.gram, minds) / (2.0 * stats.tokens.max(1) as f64);
            }
        }
        out.push(Unit { elements, cost });
    }
    Ok(out)
}

/// Whether bits can be spread over the linears of a region.
///
/// # Errors
/// When there are experts among them: tokens go to experts by a choice that no gradient sees.
pub fn covered(region: &Region) -> Result<(), PassError> {
    match quantizable(region).iter().find(|l| region.weight(l.weight).ty.rank() > 2) {
        None => Ok(()),
        Some(l) => Err(PassError::Refused(format!(
            "region {}: `{}` holds a matrix for each of several experts, and a mean of bits cannot be spread over mixtures \
             of experts: give bits=2, 3, 4 or 8",
            region.name,
            label(region, l.weight)
        ))),
    }
}

/// `Σ_r minds_r · (e_r G e_rᵀ)` over the rows of an error.
fn weighted(error: &[f32], cols: usize, gram: &[f32], minds: &[f64]) -> f64 {
    let tile = |(e, minds): (&[f32], &[f64])| {
        let energies = quadratic(View::new(e, minds.len(), cols), gram, &mut Vec::new());
        energies.iter().zip(minds).map(|(e, f)| e.max(0.0) * f).sum::<f64>()
    };
    let tiles: Vec<f64> = error.par_chunks(TILE * cols.max(1)).zip(minds.par_chunks(TILE)).map(tile).collect();
    tiles.iter().sum()
}
