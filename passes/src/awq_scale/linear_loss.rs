//! The loss of scales from the Gram matrix: tr(ΔW G ΔWᵀ) with ΔW = Q(W·s)/s − W, summed over a site's linears.
//!
//! Q rounds all rows as they are or, where clip bounds will be searched behind, some of them within bounds that are
//! searched for each candidate, group by group: what a scale gains is then not what a bound would have gained as well.

use awqc_ir::Elem;
use rayon::prelude::*;

use super::Weight;
use super::candidates::Candidate;
use super::statistics::{Consumer, SiteData};
use crate::analysis::gauge::Site;
use crate::awq::reference;
use crate::awq_clip::{AwqClipOptions, Plan, Scope, search};
use crate::dense::{TILE, View, energy, quadratic};
use crate::exec::Tensor;
use crate::rtn::kernel;

/// How a weight is rounded for a trial.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judge {
    /// As it is.
    Rounded,
    /// About so many of its rows, each within the bounds that suit it best.
    Bounded { rows: usize },
    /// As the published search does.
    Published,
}

/// The loss of each candidate, over some of the site's consumers.
pub(super) fn losses<'c>(
    data: &SiteData<'_>,
    consumers: impl Iterator<Item = &'c Consumer>,
    site: &Site,
    candidates: &[Candidate],
    weight: Weight,
    judge: Judge,
) -> Vec<f64> {
    let mut total = vec![0.0f64; candidates.len()];
    for consumer in consumers {
        let columns: Vec<Vec<f32>> = candidates.iter().map(|c| data.columns(site, consumer, &c.scales)).collect();
        for input in &consumer.inputs {
            let Some(stats) = data.stats_of(*input, consumer) else { continue };
            let cols = consumer.weight.cols();
            let factor = match weight {
                Weight::Plain => 1.0,
                Weight::Energy => {
                    let output = energy(&consumer.weight.data, cols, &stats.gram);
                    if output > 0.0 { output.recip() } else { 0.0 }
                }
            };
            let losses = match judge {
                Judge::Rounded => of_consumer(consumer, &stats.gram, &columns),
                Judge::Bounded { rows } => bounded(consumer, &stats.gram, &columns, rows),
                Judge::Published => columns.iter().map(|s| published(consumer, &stats.gram, s)).collect(),
            };
            total.iter_mut().zip(losses).for_each(|(t, l)| *t += l * factor);
        }
    }
    total
}

/// One loss for each vector of column factors. Tiles of rows run in parallel; each goes through all candidates while
/// its weights are at hand.
fn of_consumer(consumer: &Consumer, gram: &[f32], columns: &[Vec<f32>]) -> Vec<f64> {
    let cols = consumer.weight.cols();
    if cols == 0 {
        return vec![0.0; columns.len()];
    }
    let inverses: Vec<Vec<f32>> = columns.iter().map(|s| s.iter().map(|v| v.recip()).collect()).collect();
    let tiles: Vec<Vec<f64>> = consumer
        .weight
        .data
        .par_chunks(TILE * cols)
        .map_init(
            || (Vec::new(), Vec::new()),
            |(delta, scratch), w| {
                delta.resize(w.len(), 0.0);
                let one = |(s, inverse): (&Vec<f32>, &Vec<f32>)| {
                    for (w, d) in w.chunks(cols).zip(delta.chunks_mut(cols)) {
                        kernel::scaled_error(w, s, inverse, consumer.quant, d);
                    }
                    quadratic(View::new(delta, w.len() / cols, cols), gram, scratch).iter().sum()
                };
                columns.iter().zip(&inverses).map(one).collect()
            },
        )
        .collect();
    (0..columns.len()).map(|k| tiles.iter().filter_map(|t| t.get(k)).sum()).collect()
}

/// The same for about `most` rows, evenly spread, within the bounds that a search by groups finds for them.
fn bounded(consumer: &Consumer, gram: &[f32], columns: &[Vec<f32>], most: usize) -> Vec<f64> {
    let Tensor { data, .. } = &consumer.weight;
    let cols = consumer.weight.cols();
    if cols == 0 {
        return vec![0.0; columns.len()];
    }
    let step = (data.len() / cols).div_ceil(most.max(1)).max(1);
    let rows: Vec<&[f32]> = data.chunks(cols).step_by(step).collect();
    let plan = Plan { scope: Scope::Group, ..Plan::of(&AwqClipOptions::default(), consumer.quant, Elem::F32) };
    let one = |s: &Vec<f32>| {
        let w: Vec<f32> = rows.iter().flat_map(|row| row.iter().zip(s).map(|(w, s)| w * s)).collect();
        let seen = gram.chunks(cols).zip(s);
        let gram: Vec<f32> = seen.flat_map(|(row, a)| row.iter().zip(s).map(move |(g, b)| g / (a * b))).collect();
        search(&w, cols, &gram, &plan).after.unwrap_or(f64::INFINITY)
    };
    columns.par_iter().map(one).collect()
}

/// The same with the published way of rounding.
fn published(consumer: &Consumer, gram: &[f32], s: &[f32]) -> f64 {
    let mut delta = reference::fake_quantize(&consumer.weight.data, s, consumer.quant);
    delta.iter_mut().zip(&consumer.weight.data).for_each(|(d, w)| *d -= w);
    energy(&delta, consumer.weight.cols(), gram)
}
