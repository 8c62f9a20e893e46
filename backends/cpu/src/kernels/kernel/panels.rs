//! Products of rows of numbers with panels of numbers: the two products of attention.

use super::Simd;
use crate::kernels::attention::{Lines, Numbers, Stacked};
use awqc_ir::panels::PANEL_ROWS;
use half::f16;

/// A number as it lies in memory.
trait Number: Copy {
    /// The numbers of a register, in f32.
    unsafe fn load<S: Simd>(from: *const Self) -> S::Floats;
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::Floats {
        // SAFETY: the caller's promise.
        unsafe { S::load_floats(from) }
    }
}

impl Number for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(from: *const Self) -> S::Floats {
        // SAFETY: the caller's promise.
        unsafe { S::load_halves(from.cast()) }
    }
}

/// `to = from`, both multiples of 16 numbers long.
///
/// # Safety
/// As [`Simd`]; the slices are equally long.
#[inline(always)]
pub(crate) unsafe fn widen<S: Simd>(from: &[f16], to: &mut [f32]) {
    for at in (0..from.len()).step_by(S::ROWS) {
        // SAFETY: the caller's promise.
        unsafe { S::store_floats(to.as_mut_ptr().add(at), f16::load::<S>(from.as_ptr().add(at))) }
    }
}

/// `out[r][16 p + i] = factor · Σ_k a[r][k] · b[p][k][i]`, added in the order of `k` with fused multiply-adds; lines of
/// `out` are `16 panels` numbers long.
///
/// # Safety
/// As [`Simd`]. `a` has `rows` lines of `b.depth` numbers, `out` room for as many of all panels.
#[inline(always)]
pub(crate) unsafe fn times_panels<S: Simd>(rows: usize, a: Lines<'_>, b: &Stacked<'_>, factor: f32, out: &mut [f32]) {
    let out = out.as_mut_ptr();
    // SAFETY: the caller's promise.
    unsafe {
        match b.data {
            Numbers::F16(data) => Product { a, b, data: data.as_ptr(), factor, out }.all::<S>(rows),
            Numbers::F32(data) => Product { a, b, data: data.as_ptr(), factor, out }.all::<S>(rows),
        }
    }
}

/// What is multiplied, and where it goes.
struct Product<'a, N> {
    a: Lines<'a>,
    b: &'a Stacked<'a>,
    data: *const N,
    factor: f32,
    out: *mut f32,
}

impl<N: Number> Product<'_, N> {
    /// All panels.
    ///
    /// # Safety
    /// As [`times_panels`].
    #[inline(always)]
    unsafe fn all<S: Simd>(&self, rows: usize) {
        // A panel is `each` registers, one or two; a tile takes as many panels as there are registers for.
        let each = PANEL_ROWS / S::ROWS;
        let mut panel = 0;
        while panel < self.b.panels {
            let left = self.b.panels - panel;
            // SAFETY: the caller's promise; the panels of each call are those of `b`.
            unsafe {
                let done = match each {
                    1 if left >= 4 => self.columns::<S, 4>(rows, panel),
                    1 if left >= 2 => self.columns::<S, 2>(rows, panel),
                    1 => self.columns::<S, 1>(rows, panel),
                    _ => self.columns::<S, 2>(rows, panel),
                };
                panel += done / each;
            }
        }
    }

    /// `V` registers of every row, from panel `panel` on; returns `V`.
    ///
    /// # Safety
    /// As [`times_panels`], and there are so many panels.
    #[inline(always)]
    unsafe fn columns<S: Simd, const V: usize>(&self, rows: usize, panel: usize) -> usize {
        let mut row = 0;
        while row < rows {
            // SAFETY: the caller's promise.
            unsafe {
                row += match rows - row {
                    6.. => self.tile::<S, 6, V>(row, panel),
                    4 | 5 => self.tile::<S, 4, V>(row, panel),
                    3 => self.tile::<S, 3, V>(row, panel),
                    2 => self.tile::<S, 2, V>(row, panel),
                    _ => self.tile::<S, 1, V>(row, panel),
                };
            }
        }
        V
    }

    /// `R` rows of them; returns `R`.
    ///
    /// # Safety
    /// As [`Product::columns`], and there are so many rows.
    #[inline(always)]
    unsafe fn tile<S: Simd, const R: usize, const V: usize>(&self, row: usize, panel: usize) -> usize {
        let Self { a, b, data, factor, out } = self;
        // SAFETY: the caller's promise.
        unsafe {
            let mut lines = [a.data.as_ptr(); R];
            for (r, line) in lines.iter_mut().enumerate() {
                *line = line.add(a.at(row + r));
            }
            let mut from = [*data; V];
            for (v, from) in from.iter_mut().enumerate() {
                let column = v * S::ROWS;
                *from = from.add((panel + column / PANEL_ROWS) * b.panel_step + column % PANEL_ROWS);
            }
            let mut sums = [[S::splat(0.0); V]; R];
            for k in 0..b.depth {
                let mut part = [S::splat(0.0); V];
                for (part, from) in part.iter_mut().zip(from) {
                    *part = N::load::<S>(from.add(k * b.step));
                }
                for (sums, line) in sums.iter_mut().zip(lines) {
                    let x = S::splat(*line.add(k));
                    for (sum, part) in sums.iter_mut().zip(part) {
                        *sum = S::mul_add(x, part, *sum);
                    }
                }
            }
            let factor = S::splat(*factor);
            for (r, sums) in sums.into_iter().enumerate() {
                let to = out.add((row + r) * b.panels * PANEL_ROWS + panel * PANEL_ROWS);
                for (v, sum) in sums.into_iter().enumerate() {
                    S::store_floats(to.add(v * S::ROWS), S::mul_add(sum, factor, S::splat(0.0)));
                }
            }
        }
        R
    }
}
