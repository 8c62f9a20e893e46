//! The inner loop of compensation: one block of columns of as many rows as a vector has lanes.
//!
//! Rows lie side by side, so that every step of the loop is the same operation on all of them. As in
//! [`crate::rtn::kernel`], every instruction set does the same f32 operations in the same order.

use crate::rtn::Grid;
use crate::rtn::kernel::versions;

/// Rows that are worked on together.
pub(super) const LANES: usize = 16;

/// A number of each row.
pub(super) type Lane = [f32; LANES];

/// A block of columns.
#[derive(Default)]
pub(super) struct Lanes {
    /// The numbers, column by column.
    w: Vec<Lane>,
    /// What the columns owe to those after the block: minus the errors.
    errors: Vec<Lane>,
    /// The codes.
    pub(super) codes: Vec<[u8; LANES]>,
}

impl Lanes {
    /// Takes `n` columns of `count` rows that are `stride` apart; the other lanes are 0.
    pub(super) fn load(&mut self, rows: &[f32], stride: usize, count: usize, n: usize) {
        self.w.clear();
        self.w.resize(n, [0.0; LANES]);
        self.errors.resize(n, [0.0; LANES]);
        self.codes.resize(n, [0; LANES]);
        for (r, row) in rows.chunks(stride).take(count).enumerate() {
            self.w.iter_mut().zip(row).for_each(|(w, v)| w[r] = *v);
        }
    }

    /// Writes what `count` rows owe, `[count, n]`.
    pub(super) fn store_errors(&self, out: &mut [f32], count: usize, n: usize) {
        for (r, out) in out.chunks_mut(n).take(count).enumerate() {
            out.iter_mut().zip(&self.errors).for_each(|(o, e)| *o = e[r]);
        }
    }
}

/// The grids of some rows.
pub(super) struct GridLanes {
    scales: Vec<Lane>,
    zeros: Vec<Lane>,
}

impl GridLanes {
    /// Takes the grids of `count` rows of `groups`; the other lanes have a step of 0.
    pub(super) fn load(scales: &[f32], zeros: &[u8], groups: usize, count: usize) -> Self {
        let mut out = Self { scales: vec![[0.0; LANES]; groups], zeros: vec![[0.0; LANES]; groups] };
        for (r, (scales, zeros)) in scales.chunks(groups).zip(zeros.chunks(groups)).take(count).enumerate() {
            for (g, (scale, zero)) in scales.iter().zip(zeros).enumerate() {
                (out.scales[g][r], out.zeros[g][r]) = (*scale, f32::from(*zero));
            }
        }
        out
    }
}

versions! {
    /// Rounds the columns of a block one after the other. `upper` is the block of the factor, `[n, n]`; `groups` says
    /// which grid each column has; `max` is the largest code.
    pub(super) fn block(lanes: &mut Lanes, upper: &[f32], groups: &[u32], grids: &GridLanes, max: f32) = block_body;
}

#[inline(always)]
fn block_body(lanes: &mut Lanes, upper: &[f32], groups: &[u32], grids: &GridLanes, max: f32) {
    let n = lanes.w.len();
    let mut left = lanes.w.as_mut_slice();
    let outputs = lanes.errors.iter_mut().zip(&mut lanes.codes).zip(groups);
    for (j, (((owed, codes), g), upper)) in outputs.zip(upper.chunks_exact(n)).enumerate() {
        let Some((w, after)) = std::mem::take(&mut left).split_first_mut() else { return };
        let (scales, zeros) = (&grids.scales[*g as usize], &grids.zeros[*g as usize]);
        let pivot = upper[j];
        for l in 0..LANES {
            let grid = Grid { scale: scales[l], zero: zeros[l], max };
            let code = grid.code(w[l]);
            codes[l] = code as u8;
            owed[l] = -((w[l] - (code - zeros[l]) * scales[l]) / pivot);
        }
        for (w, u) in after.iter_mut().zip(&upper[j + 1..]) {
            for l in 0..LANES {
                w[l] += owed[l] * u;
            }
        }
        left = after;
    }
}
