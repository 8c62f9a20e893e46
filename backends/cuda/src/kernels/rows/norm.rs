//! Norms: of a whole row by a block, of heads by a warp each.

use cubecl::prelude::*;

use super::{From, Grid, THREADS, first, start};
use crate::kernels::tile::WARP;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spec {
    /// Columns of a row, or of a head.
    pub(super) width: u32,
    pub(super) heads: u32,
    pub(super) from: From,
    pub(super) eps: f32,
    /// Whether the mean is taken off.
    pub(super) center: bool,
    pub(super) gain: bool,
    pub(super) bias: bool,
    /// Every head has parameters of its own.
    pub(super) each: bool,
}

/// The kernel for one head or several.
#[allow(clippy::too_many_arguments, reason = "those of the kernels")]
pub(super) fn expand<O: Float>(
    scope: &mut Scope,
    x: NativeExpand<Array<f32>>,
    gain: NativeExpand<Array<f32>>,
    bias: NativeExpand<Array<f32>>,
    out: NativeExpand<Array<O>>,
    base: NativeExpand<u32>,
    spec: Spec,
    grid: Grid,
) {
    if spec.heads == 1 {
        row_norm::expand(scope, x, gain, bias, out, base, spec);
    } else {
        head_norm::expand(scope, x, gain, bias, out, base, spec, grid);
    }
}

/// `(x − mean) / sqrt(var + eps) · gain + bias` of a row, by a block; without `center` the mean counts as 0.
#[cube]
pub(super) fn row_norm<O: Float>(
    x: &Array<f32>,
    gain: &Array<f32>,
    bias: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] spec: Spec,
) {
    let row = start(spec.from);
    let mut mean = 0.0f32;
    if comptime!(spec.center) {
        let mut sum = 0.0f32;
        let mut c = UNIT_POS_X;
        while c < comptime!(spec.width) {
            sum += x[(row + c) as usize];
            c += THREADS;
        }
        mean = block_sum(sum) / comptime!(spec.width as f32);
    }
    let mut squares = 0.0f32;
    let mut c = UNIT_POS_X;
    while c < comptime!(spec.width) {
        let d = x[(row + c) as usize] - mean;
        squares += d * d;
        c += THREADS;
    }
    let variance = block_sum(squares) / comptime!(spec.width as f32);
    let factor = 1.0f32 / (variance + comptime!(spec.eps)).sqrt();
    let mut c = UNIT_POS_X;
    while c < comptime!(spec.width) {
        let mut v = (x[(row + c) as usize] - mean) * factor;
        if comptime!(spec.gain) {
            v *= gain[c as usize];
        }
        if comptime!(spec.bias) {
            v += bias[c as usize];
        }
        out[(base + c) as usize] = O::cast_from(v);
        c += THREADS;
    }
}

/// The same of every head, by a warp each.
#[cube]
pub(super) fn head_norm<O: Float>(
    x: &Array<f32>,
    gain: &Array<f32>,
    bias: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] spec: Spec,
    #[comptime] grid: Grid,
) {
    let row = start(spec.from);
    let lane = UNIT_POS_X % WARP;
    let mut head = first() / WARP;
    while head < comptime!(spec.heads) {
        let begin = head * comptime!(spec.width);
        let mut mean = 0.0f32;
        if comptime!(spec.center) {
            let mut sum = 0.0f32;
            let mut c = lane;
            while c < comptime!(spec.width) {
                sum += x[(row + begin + c) as usize];
                c += WARP;
            }
            mean = plane_sum(sum) / comptime!(spec.width as f32);
        }
        let mut squares = 0.0f32;
        let mut c = lane;
        while c < comptime!(spec.width) {
            let d = x[(row + begin + c) as usize] - mean;
            squares += d * d;
            c += WARP;
        }
        let variance = plane_sum(squares) / comptime!(spec.width as f32);
        let factor = 1.0f32 / (variance + comptime!(spec.eps)).sqrt();
        let mut c = lane;
        while c < comptime!(spec.width) {
            let at = c + if comptime!(spec.each) { begin } else { 0u32.runtime() };
            let mut v = (x[(row + begin + c) as usize] - mean) * factor;
            if comptime!(spec.gain) {
                v *= gain[at as usize];
            }
            if comptime!(spec.bias) {
                v += bias[at as usize];
            }
            out[(base + begin + c) as usize] = O::cast_from(v);
            c += WARP;
        }
        head += comptime!(THREADS * grid.blocks / WARP);
    }
}

/// The sum of all threads of a block, the same in each.
#[cube]
pub(super) fn block_sum(value: f32) -> f32 {
    let warps = comptime!((THREADS / WARP) as usize);
    let mut shared = SharedMemory::<f32>::new(warps);
    let own = plane_sum(value);
    // Shared memory may have been another sum's, which some threads still read.
    sync_cube();
    if UNIT_POS_X % WARP == 0 {
        shared[(UNIT_POS_X / WARP) as usize] = own;
    }
    sync_cube();
    let mut sum = 0.0f32;
    #[unroll]
    for w in 0..warps {
        sum += shared[w];
    }
    sum
}
