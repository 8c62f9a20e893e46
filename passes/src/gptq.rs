//! Rounding with error compensation: GPTQ (arXiv 2210.17323).
//!
//! The columns of a weight are rounded one after the other. What rounding column `j` loses is made up for, as well as
//! can be, by the columns that are still floats: with `H = Σ x xᵀ` over the calibration tokens and `H⁻¹ = UᵀU`, `U`
//! upper triangular, the best change of column `k > j` is `−(w_j − q_j) / U_jj · U_jk` (equations 2 and 3 of the paper,
//! in the form of its section 3.3). [`Factor`] has `U`, which all weights that read one input share; [`compensate`]
//! goes through the columns.
//!
//! Rows do not know of each other: tiles of them run in parallel. Within a tile a block of columns is worked off in
//! cache ([`kernel`]), then one product carries its errors to all columns after it.

mod cholesky;
mod factor;
mod kernel;
pub mod reference;

use awqc_ir::Quant;
use rayon::prelude::*;

use crate::dense::{Put, TILE, View, product, quadratic};
use crate::rtn::{self, Codes, Grid};

pub use factor::{Factor, FactorError};
use kernel::{GridLanes, LANES};

/// Where the grid of a group comes from.
#[derive(Clone, Copy, Debug)]
pub enum Grids<'a> {
    /// They are given, for groups of columns as they lie in the weight ("static groups"). They need not be the grids of
    /// the weight itself: compensation absorbs what a narrower grid cuts off.
    Given {
        /// Steps, `[rows, groups]`.
        scales: &'a [f32],
        /// Codes of 0, `[rows, groups]`.
        zeros: &'a [u8],
    },
    /// A group is a run of columns in the order in which they are rounded, and its grid spans the numbers that it has
    /// at the start of the block of columns in which it begins: as published.
    Running(fn(Quant, f32, f32) -> Grid),
}

/// What [`compensate`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Compensated {
    /// Codes in the order of the weight's columns; scales and zeros by group.
    pub codes: Codes,
    /// The group of each column of the weight. With [`Grids::Given`], groups are runs of columns and
    /// [`Codes::decode`] holds; so it does with [`Grids::Running`] if the columns are rounded in their own order.
    pub group_of: Vec<u32>,
}

impl Compensated {
    /// The numbers that the codes stand for, `[rows, cols]`, whatever the columns' groups.
    pub fn decode(&self) -> Vec<f32> {
        let (cols, groups) = (self.codes.cols.max(1), self.codes.groups().max(1));
        let rows = self.codes.codes.chunks(cols).zip(self.codes.scales.chunks(groups));
        rows.zip(self.codes.zeros.chunks(groups))
            .flat_map(|((codes, scales), zeros)| {
                codes.iter().zip(&self.group_of).map(|(code, g)| {
                    let (scale, zero) = (scales[*g as usize], zeros[*g as usize]);
                    f32::from(i16::from(*code) - i16::from(zero)) * scale
                })
            })
            .collect()
    }
}

/// Rounds `w`, `[rows, cols]`, whose input has the factor `factor`, in blocks of `block` columns. Columns without
/// signal become 0.
///
/// # Panics
/// When `w`, `factor` and `grids` do not fit each other: a fault of the caller, not of data.
pub fn compensate(
    w: &[f32],
    cols: usize,
    factor: &Factor,
    grids: Grids<'_>,
    quant: Quant,
    block: usize,
) -> Compensated {
    assert!(cols > 0 && w.len().is_multiple_of(cols) && factor.order.len() == cols, "the shapes do not fit");
    let (rows, groups) = (w.len() / cols, quant.group.count(cols));
    let len = quant.group.len(cols);
    let mut codes = vec![0u8; w.len()];
    let (mut scales, mut zeros) = (vec![0.0f32; rows * groups], vec![0u8; rows * groups]);
    if let Grids::Given { scales: s, zeros: z } = grids {
        assert!(s.len() == rows * groups && z.len() == rows * groups, "the grids do not fit");
        scales.copy_from_slice(s);
        zeros.copy_from_slice(z);
    }
    let running = matches!(grids, Grids::Running(_));
    let mut group_of = vec![0u32; cols];
    for (at, column) in factor.order.iter().enumerate() {
        group_of[*column] = (if running { at } else { *column } / len) as u32;
    }
    let job = Job { cols, factor, grids, quant, block: block.max(1), group_of: &group_of };
    let parts = w.par_chunks(TILE * cols).zip(codes.par_chunks_mut(TILE * cols));
    let parts = parts.zip(scales.par_chunks_mut(TILE * groups)).zip(zeros.par_chunks_mut(TILE * groups));
    parts.for_each(|(((w, codes), scales), zeros)| job.tile(w, codes, scales, zeros));
    Compensated { codes: Codes { quant, rows, cols, codes, scales, zeros }, group_of }
}

/// What all tiles share.
struct Job<'a> {
    cols: usize,
    factor: &'a Factor,
    grids: Grids<'a>,
    quant: Quant,
    block: usize,
    group_of: &'a [u32],
}

impl Job<'_> {
    fn tile(&self, w: &[f32], codes: &mut [u8], scales: &mut [f32], zeros: &mut [u8]) {
        let (cols, order) = (self.cols, &self.factor.order);
        let (rows, groups) = (w.len() / cols, self.quant.group.count(cols));
        let upper = View::new(&self.factor.upper, cols, cols);
        // The columns in their order; what no token sees becomes 0.
        let mut rest: Vec<f32> = Vec::with_capacity(w.len());
        for row in w.chunks(cols) {
            rest.extend(order.iter().map(|c| if self.factor.dead[*c] { 0.0 } else { row[*c] }));
        }
        let mut errors = vec![0.0f32; rows * self.block];
        let mut diagonal = Vec::new();
        let mut lanes = kernel::Lanes::default();
        for start in (0..cols).step_by(self.block) {
            let n = self.block.min(cols - start);
            if let Grids::Running(grid) = self.grids {
                self.look(&rest, start, n, grid, scales, zeros);
            }
            diagonal.clear();
            (start..start + n).for_each(|j| diagonal.extend_from_slice(&upper.data[j * cols + start..][..n]));
            let index: Vec<u32> = order[start..start + n].iter().map(|c| self.group_of[*c]).collect();
            for first in (0..rows).step_by(LANES) {
                let count = LANES.min(rows - first);
                lanes.load(&rest[first * cols + start..], cols, count, n);
                let grids = GridLanes::load(&scales[first * groups..], &zeros[first * groups..], groups, count);
                kernel::block(&mut lanes, &diagonal, &index, &grids, f32::from((1u16 << self.quant.bits) - 1));
                lanes.store_errors(&mut errors[first * n..], count, n);
                let places = order[start..start + n].iter();
                for (code, column) in lanes.codes.iter().zip(places) {
                    (0..count).for_each(|r| codes[(first + r) * cols + column] = code[r]);
                }
            }
            let end = start + n;
            if end < cols {
                let after = upper.block(start, end, n, cols - end);
                product(View::new(&errors[..rows * n], rows, n), after, &mut rest[end..], cols, Put::Add);
            }
        }
    }

    /// The grids of the groups that begin in columns `start..start + n` of what is left of the weight.
    fn look(
        &self,
        rest: &[f32],
        start: usize,
        n: usize,
        grid: fn(Quant, f32, f32) -> Grid,
        scales: &mut [f32],
        zeros: &mut [u8],
    ) {
        let (cols, len) = (self.cols, self.quant.group.len(self.cols));
        let groups = self.quant.group.count(cols);
        for g in start.div_ceil(len)..(start + n).div_ceil(len).min(groups) {
            for (r, row) in rest.chunks(cols).enumerate() {
                let (lo, hi) = rtn::range(&row[g * len..cols.min((g + 1) * len)]);
                let found = grid(self.quant, lo, hi);
                (scales[r * groups + g], zeros[r * groups + g]) = (found.scale, found.zero as u8);
            }
        }
    }
}

/// What [`keep_better`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Kept {
    /// The loss of the rounded weight, `tr(ΔW G ΔWᵀ)`.
    pub before: f64,
    /// The loss of what was kept.
    pub after: f64,
    /// Rows that were rounded better.
    pub rows: usize,
}

/// Replaces each row of `codes` by that of `rounded` where that loses less of `w`, `[rows, cols]`, by the Gram matrix
/// `gram`, `[cols, cols]`: the greedy way through the columns may end above the nearest codes.
///
/// # Panics
/// When the shapes do not fit each other: a fault of the caller, not of data.
pub fn keep_better(codes: &mut Codes, rounded: &Codes, w: &[f32], gram: &[f32]) -> Kept {
    let (cols, groups) = (codes.cols, codes.groups());
    assert!(
        codes.rows == rounded.rows && cols == rounded.cols && codes.quant == rounded.quant,
        "the shapes do not fit"
    );
    let loss = |codes: &Codes| -> Vec<f64> {
        let mut error = codes.decode();
        error.par_iter_mut().zip(w).for_each(|(e, w)| *e -= w);
        let tiles: Vec<Vec<f64>> = error
            .par_chunks(TILE * cols)
            .map_init(Vec::new, |scratch, d| quadratic(View::new(d, d.len() / cols, cols), gram, scratch))
            .collect();
        tiles.concat()
    };
    let mut kept = Kept::default();
    for (r, (new, old)) in loss(codes).into_iter().zip(loss(rounded)).enumerate() {
        let better = new <= old;
        if !better {
            let (row, part) = (r * cols..(r + 1) * cols, r * groups..(r + 1) * groups);
            codes.codes[row.clone()].copy_from_slice(&rounded.codes[row]);
            codes.scales[part.clone()].copy_from_slice(&rounded.scales[part.clone()]);
            codes.zeros[part.clone()].copy_from_slice(&rounded.zeros[part]);
            kept.rows += 1;
        }
        kept.before += old;
        kept.after += if better { new } else { old };
    }
    kept
}
