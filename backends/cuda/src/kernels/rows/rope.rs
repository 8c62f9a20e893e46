//! Rotary position embedding.

use cubecl::prelude::*;

use super::{Grid, THREADS, first};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    pub(super) heads: u32,
    /// Columns of a head.
    pub(super) width: u32,
    /// Pairs that turn; the columns behind them pass.
    pub(super) pairs: u32,
    /// Pairs are `(2j, 2j+1)`, otherwise `(j, j + pairs)`.
    pub(super) interleaved: bool,
    /// From one row to the next.
    pub(super) pitch: u32,
    /// From one row of angles to the next.
    pub(super) angles: u32,
}

/// A thread turns a pair, or passes a column.
#[cube]
pub(super) fn rope<O: Float>(
    x: &Array<f32>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] spec: Spec,
    #[comptime] grid: Grid,
) {
    let row = CUBE_POS_Y * comptime!(spec.pitch);
    let items = comptime!(spec.width - spec.pairs);
    let mut i = first();
    while i < comptime!(spec.heads) * items {
        let start = i / items * comptime!(spec.width);
        let item = i % items;
        if item < comptime!(spec.pairs) {
            let (a, b) = if comptime!(spec.interleaved) {
                (start + 2 * item, start + 2 * item + 1)
            } else {
                (start + item, start + item + comptime!(spec.pairs))
            };
            let angle = CUBE_POS_Y * comptime!(spec.angles) + item;
            let (c, s) = (cos[angle as usize], sin[angle as usize]);
            let (u, v) = (x[(row + a) as usize], x[(row + b) as usize]);
            out[(base + a) as usize] = O::cast_from(u * c - v * s);
            out[(base + b) as usize] = O::cast_from(v * c + u * s);
        } else {
            let at = start + comptime!(spec.pairs) + item;
            out[(base + at) as usize] = O::cast_from(x[(row + at) as usize]);
        }
        i += comptime!(THREADS * grid.blocks);
    }
}
