//! Normalisations over rows, in place.

use rayon::prelude::*;

use super::math::{LANES, dot, simd, sum};

/// Rows of one task.
const ROWS: usize = 64;

fn by_rows(x: &mut [f32], width: usize, row: impl Fn(&mut [f32]) + Sync) {
    let width = width.max(1);
    x.par_chunks_mut(ROWS * width).for_each(|block| {
        simd(
            #[inline(always)]
            || block.chunks_exact_mut(width).for_each(&row),
        );
    });
}

/// `x / sqrt(mean(x²) + eps) · (gain + offset)` for every row of `width`.
pub(super) fn rms(x: &mut [f32], width: usize, eps: f32, offset: f32, gain: Option<&[f32]>) {
    let gain: Option<Vec<f32>> = gain.map(|g| g.iter().map(|g| g + offset).collect());
    by_rows(
        x,
        width,
        #[inline(always)]
        |row| rms_row(row, eps, gain.as_deref()),
    );
}

/// `x / sqrt(mean(x²) + eps) · gain` for one row.
#[inline(always)]
pub fn rms_row(row: &mut [f32], eps: f32, gain: Option<&[f32]>) {
    let k = 1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt();
    match gain {
        Some(gain) => row.iter_mut().zip(gain).for_each(|(x, g)| *x = *x * k * g),
        None => row.iter_mut().for_each(|x| *x *= k),
    }
}

/// `(x − mean) / sqrt(var + eps) · gain + bias` for every row of `width`. Parameters of more than `width` numbers are
/// those of several rows in turn.
pub(super) fn layer(x: &mut [f32], width: usize, eps: f32, gain: Option<&[f32]>, bias: Option<&[f32]>) {
    let longest = gain.map_or(0, <[f32]>::len).max(bias.map_or(0, <[f32]>::len));
    if longest > width {
        by_rows(
            x,
            width,
            #[inline(always)]
            |row| layer_row(row, eps, None, None),
        );
        x.chunks_exact_mut(longest).for_each(|row| affine(row, gain, bias));
        return;
    }
    by_rows(
        x,
        width,
        #[inline(always)]
        |row| layer_row(row, eps, gain, bias),
    );
}

/// `(x − mean) / sqrt(var + eps) · gain + bias` for one row.
#[inline(always)]
pub fn layer_row(row: &mut [f32], eps: f32, gain: Option<&[f32]>, bias: Option<&[f32]>) {
    let mean = sum(row) / row.len() as f32;
    row.iter_mut().for_each(|x| *x -= mean);
    let k = 1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt();
    row.iter_mut().for_each(|x| *x *= k);
    affine(row, gain, bias);
}

/// `x · gain + bias`; parameters repeat.
#[inline(always)]
fn affine(row: &mut [f32], gain: Option<&[f32]>, bias: Option<&[f32]>) {
    if let Some(gain) = gain.filter(|g| !g.is_empty()) {
        row.chunks_mut(gain.len()).for_each(|part| part.iter_mut().zip(gain).for_each(|(x, g)| *x *= g));
    }
    if let Some(bias) = bias.filter(|b| !b.is_empty()) {
        row.chunks_mut(bias.len()).for_each(|part| part.iter_mut().zip(bias).for_each(|(x, b)| *x += b));
    }
}

const _: () = assert!(LANES.is_power_of_two(), "partial sums are folded in halves");
