//! The published search of AWQ (arXiv 2306.00978, section 3.2, and the programs of its authors and of AutoAWQ), in f32
//! and in the published order of operations: twenty exponents, the first of equal losses wins, ranges that need not
//! contain 0, scales that are not rounded to f16, clip bounds of ten sizes.
//!
//! It differs from what [`crate::awq_scale`] and [`crate::awq_clip`] do by default on purpose; use it to compare.

use awqc_ir::{Group, Quant};
use rayon::prelude::*;

/// Exponents in the published grid: `0, 1/20, …, 19/20`.
pub const RATIOS: usize = 20;

/// Clip bounds in the published grid: `1, 0.95, …, 0.55` of the largest magnitude.
pub const SHRINKS: usize = 10;

/// A matrix rounded the published way.
#[derive(Clone, Debug, PartialEq)]
pub struct Rounded {
    /// `[rows, cols]`: `0..2^bits` for asymmetric codes, signed for symmetric ones.
    pub codes: Vec<i32>,
    /// `[rows, groups]`.
    pub scales: Vec<f32>,
    /// `[rows, groups]`; 0 for symmetric codes.
    pub zeros: Vec<f32>,
    /// `(code − zero) · scale`, `[rows, cols]`.
    pub values: Vec<f32>,
}

/// The grid of one group: scale and zero point.
fn grid(w: &[f32], quant: Quant) -> (f32, f32) {
    let (min_code, max_code) = limits(quant);
    let (lo, hi) = crate::rtn::range(w);
    if quant.symmetric {
        return (hi.max(-lo).max(1e-5) / max_code, 0.0);
    }
    let scale = (hi - lo).max(1e-5) / max_code;
    (scale, (-(lo / scale).round_ties_even()).clamp(min_code, max_code))
}

fn limits(quant: Quant) -> (f32, f32) {
    let (min, max) = quant.code_range();
    (min as f32, max as f32)
}

fn code(w: f32, (scale, zero): (f32, f32), (min, max): (f32, f32)) -> f32 {
    ((w / scale).round_ties_even() + zero).clamp(min, max)
}

/// Rounds `w`, `[rows, cols]`: `pseudo_quantize_tensor` of the published programs.
pub fn pseudo_quantize(w: &[f32], cols: usize, quant: Quant) -> Rounded {
    let mut out = Rounded { codes: Vec::new(), scales: Vec::new(), zeros: Vec::new(), values: Vec::new() };
    for row in w.chunks(cols.max(1)) {
        for group in row.chunks(quant.group.len(cols)) {
            let (scale, zero) = grid(group, quant);
            out.scales.push(scale);
            out.zeros.push(zero);
            for w in group {
                let c = code(*w, (scale, zero), limits(quant));
                out.codes.push(c as i32);
                out.values.push((c - zero) * scale);
            }
        }
    }
    out
}

/// What rounding does to a weight whose columns are scaled: `Q(w · s) / s`, `[rows, cols]`.
pub fn fake_quantize(w: &[f32], s: &[f32], quant: Quant) -> Vec<f32> {
    let cols = s.len().max(1);
    let mut out = vec![0.0; w.len()];
    out.par_chunks_mut(cols).zip(w.par_chunks(cols)).for_each(|(out, w)| {
        let scaled: Vec<f32> = w.iter().zip(s).map(|(w, s)| w * s).collect();
        let rounded = pseudo_quantize(&scaled, cols, quant).values;
        out.iter_mut().zip(rounded).zip(s).for_each(|((o, r), s)| *o = r / s);
    });
    out
}

/// Mean of |x| by channel over the tokens of `x`, `[tokens, cols]`.
pub fn activation_mean(x: &[f32], cols: usize) -> Vec<f32> {
    let mut sum = vec![0.0f64; cols];
    for row in x.chunks(cols.max(1)) {
        sum.iter_mut().zip(row).for_each(|(s, x)| *s += f64::from(x.abs()));
    }
    let tokens = (x.len() / cols.max(1)).max(1) as f64;
    sum.into_iter().map(|s| (s / tokens) as f32).collect()
}

/// Mean over all rows of all `weights`, each `[rows, cols]`, of |w| relative to the largest of its group.
pub fn weight_mean(weights: &[&[f32]], cols: usize, group: Group) -> Vec<f32> {
    let (mut sum, mut rows) = (vec![0.0f64; cols], 0usize);
    for row in weights.iter().flat_map(|w| w.chunks(cols.max(1))) {
        let parts = row.chunks(group.len(cols)).zip(sum.chunks_mut(group.len(cols)));
        for (w, sum) in parts {
            let largest = w.iter().fold(0.0f32, |m, v| m.max(v.abs())) + 1e-6;
            sum.iter_mut().zip(w).for_each(|(s, w)| *s += f64::from(w.abs() / largest));
        }
        rows += 1;
    }
    sum.into_iter().map(|s| (s / rows.max(1) as f64) as f32).collect()
}

/// Which rule makes scales of statistics.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule<'a> {
    /// `x^r`: the paper's.
    Activation,
    /// `x^r / w^(1−r)`, with the means of [`weight_mean`]: "duo scaling".
    Duo(&'a [f32]),
}

/// The scales of exponent `ratio`, balanced so that largest times smallest is 1. Non-finite scales become 1.
pub fn scales(x_mean: &[f32], rule: Rule<'_>, ratio: f32) -> Vec<f32> {
    let mut s: Vec<f32> = match rule {
        Rule::Activation => x_mean.iter().map(|x| x.powf(ratio)).collect(),
        Rule::Duo(w) => x_mean.iter().zip(w).map(|(x, w)| x.powf(ratio) / (w.powf(1.0 - ratio) + 1e-4)).collect(),
    };
    s.iter_mut().for_each(|s| *s = s.max(1e-4));
    let (lo, hi) = crate::rtn::range(&s);
    let middle = (hi * lo).sqrt();
    s.iter_mut().for_each(|s| {
        *s /= middle;
        if !s.is_finite() {
            *s = 1.0;
        }
    });
    s
}

/// What a search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The loss of each exponent.
    pub losses: Vec<f64>,
    /// Index of the smallest, the first of equals.
    pub best: usize,
    /// The scales of the best exponent.
    pub scales: Vec<f32>,
}

/// Tries the twenty exponents; `loss` judges the scales of one. `None` if no loss is a number.
///
/// # Errors
/// The first error of `loss`.
pub fn search<E>(
    x_mean: &[f32],
    rule: Rule<'_>,
    mut loss: impl FnMut(&[f32]) -> Result<f64, E>,
) -> Result<Option<Found>, E> {
    let mut losses = Vec::with_capacity(RATIOS);
    let mut best: Option<(usize, Vec<f32>)> = None;
    for i in 0..RATIOS {
        let s = scales(x_mean, rule, i as f32 / RATIOS as f32);
        let l = loss(&s)?;
        if l.is_finite() && best.as_ref().is_none_or(|(b, _)| l < losses[*b]) {
            best = Some((i, s));
        }
        losses.push(l);
    }
    Ok(best.map(|(best, scales)| Found { losses, best, scales }))
}

/// Clip bounds.
#[derive(Clone, Debug, PartialEq)]
pub struct Clips {
    /// Largest magnitude left in each group, `[rows, groups]`.
    pub max: Vec<f32>,
    /// Which of the ten sizes it is, `[rows, groups]`.
    pub index: Vec<u8>,
}

/// Chooses clip bounds for `w`, `[rows, cols]`, by the squared error of each group's share of the output over sampled
/// rows of `x`, `[tokens, cols]`: at most `sample` of them, evenly spaced.
pub fn clip_search(w: &[f32], x: &[f32], cols: usize, quant: Quant, sample: usize) -> Clips {
    let cols = cols.max(1);
    let tokens: Vec<&[f32]> = x.chunks(cols).step_by((x.len() / cols / sample.max(1)).max(1)).collect();
    let group = quant.group.len(cols);
    let rows: Vec<Vec<(f32, u8)>> = w
        .par_chunks(cols)
        .map(|row| row.chunks(group).enumerate().map(|(g, w)| clip_group(w, &tokens, g * group, quant)).collect())
        .collect();
    let (max, index) = rows.into_iter().flatten().unzip();
    Clips { max, index }
}

/// The bound of one group, whose first channel is `start`, and its place in the grid.
fn clip_group(w: &[f32], tokens: &[&[f32]], start: usize, quant: Quant) -> (f32, u8) {
    let largest = w.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let share = |w: &[f32], x: &&[f32]| -> f32 { x[start..].iter().zip(w).map(|(x, w)| x * w).sum() };
    let original: Vec<f32> = tokens.iter().map(|x| share(w, x)).collect();
    let (mut best, mut least) = ((largest, 0), 1e9f64);
    for i in 0..SHRINKS {
        let max = largest * (1.0 - i as f32 / (2 * SHRINKS) as f32);
        let clipped: Vec<f32> = w.iter().map(|v| v.clamp(-max, max)).collect();
        let rounded = pseudo_quantize(&clipped, clipped.len(), Quant { group: Group::Row, ..quant }).values;
        let error = |(x, o): (&&[f32], &f32)| f64::from(share(&rounded, x) - o).powi(2);
        let loss = tokens.iter().zip(&original).map(error).sum::<f64>() / tokens.len().max(1) as f64;
        if loss < least {
            (best, least) = ((max, i as u8), loss);
        }
    }
    best
}
