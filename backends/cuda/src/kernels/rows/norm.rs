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
    pub(super) gain: bool,
    pub(super) bias: bool,
    /// Every head has parameters of its own.
    pub(super) each: bool,
}

#[cube]
pub(super) fn rms_norm<O: Float>(
    x: &Array<f32>,
    gain: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] spec: Spec,
) {
    let row = start(spec.from);
    let mut squares = 0.0f32;
    let mut c = UNIT_POS_X;
    while c < comptime!(spec.width) {
        let v = x[(row + c) as usize];
        squares += v * v;
        c += THREADS;
    }
    let mean = block_sum(squares) / comptime!(spec.width as f32);
    let factor = 1.0f32 / (mean + comptime!(spec.eps)).sqrt();
    let mut c = UNIT_POS_X;
    while c < comptime!(spec.width) {
        let mut v = x[(row + c) as usize] * factor;
        if comptime!(spec.gain) {
            v *= gain[c as usize];
        }
        out[(base + c) as usize] = O::cast_from(v);
        c += THREADS;
    }
}

#[cube]
pub(super) fn layer_norm<O: Float>(
    x: &Array<f32>,
    gain: &Array<f32>,
    bias: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] spec: Spec,
) {
    let row = start(spec.from);
    let mut sum = 0.0f32;
    let mut c = UNIT_POS_X;
    while c < comptime!(spec.width) {
        sum += x[(row + c) as usize];
        c += THREADS;
    }
    let mean = block_sum(sum) / comptime!(spec.width as f32);
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

#[cube]
pub(super) fn head_norm<O: Float>(
    x: &Array<f32>,
    gain: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] spec: Spec,
    #[comptime] grid: Grid,
) {
    let row = start(spec.from);
    let lane = UNIT_POS_X % WARP;
    let mut head = first() / WARP;
    while head < comptime!(spec.heads) {
        let start = head * comptime!(spec.width);
        let mut squares = 0.0f32;
        let mut c = lane;
        while c < comptime!(spec.width) {
            let v = x[(row + start + c) as usize];
            squares += v * v;
            c += WARP;
        }
        let mean = plane_sum(squares) / comptime!(spec.width as f32);
        let factor = 1.0f32 / (mean + comptime!(spec.eps)).sqrt();
        let mut c = lane;
        while c < comptime!(spec.width) {
            let mut v = x[(row + start + c) as usize] * factor;
            if comptime!(spec.gain) {
                v *= gain[c as usize];
            }
            out[(base + start + c) as usize] = O::cast_from(v);
            c += WARP;
        }
        head += comptime!(THREADS * grid.blocks / WARP);
    }
}

#[cube]
pub(super) fn head_layer_norm<O: Float>(
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
        let mut sum = 0.0f32;
        let mut c = lane;
        while c < comptime!(spec.width) {
            sum += x[(row + begin + c) as usize];
            c += WARP;
        }
        let mean = plane_sum(sum) / comptime!(spec.width as f32);
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
fn block_sum(value: f32) -> f32 {
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
