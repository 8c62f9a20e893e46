//! Rotary position embedding.

use cubecl::prelude::*;

use super::{From, Grid, THREADS, first, start};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spec {
    pub(super) heads: u32,
    /// Columns of a head.
    pub(super) width: u32,
    /// Pairs that turn; the columns behind them pass.
    pub(super) pairs: u32,
    /// Pairs are `(2j, 2j+1)`, otherwise `(j, j + pairs)`.
    pub(super) interleaved: bool,
    pub(super) from: From,
    /// The angles.
    pub(super) angles: From,
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
    let row = start(spec.from);
    let items = comptime!(spec.width - spec.pairs);
    let mut i = first();
    while i < comptime!(spec.heads) * items {
        let head = i / items * comptime!(spec.width);
        let item = i % items;
        if item < comptime!(spec.pairs) {
            let (a, b) = if comptime!(spec.interleaved) {
                (head + 2 * item, head + 2 * item + 1)
            } else {
                (head + item, head + item + comptime!(spec.pairs))
            };
            let angle = start(spec.angles) + item;
            let (c, s) = (cos[angle as usize], sin[angle as usize]);
            let (u, v) = (x[(row + a) as usize], x[(row + b) as usize]);
            out[(base + a) as usize] = O::cast_from(u * c - v * s);
            out[(base + b) as usize] = O::cast_from(v * c + u * s);
        } else {
            let at = head + comptime!(spec.pairs) + item;
            out[(base + at) as usize] = O::cast_from(x[(row + at) as usize]);
        }
        i += comptime!(THREADS * grid.blocks);
    }
}
