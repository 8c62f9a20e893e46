//! Products with f32 activations.
//!
//! One token: codes become numbers on their way into the sums. More tokens: some blocks of a panel become numbers in
//! the first-level cache, and are multiplied with as many tokens at once as there are registers for their sums.

use std::ops::Range;

use super::int8::ask;
use super::unpack::unpack;
use super::{Simd, Sums, Weights, grid};
use crate::kernels::act::FloatActs;
use crate::kernels::out::OutTile;
use awqc_ir::panels::{BLOCK, PANEL_ROWS, Panels};

/// Blocks that are made numbers of at a time: 4 KiB a panel.
const CHUNK: usize = 2;

/// `out = acts · weightsᵀ` for the rows of the panels. With more than one token, `V` panels are worked on at once if
/// there are so many, and the sums of `U` registers' rows and `T` tokens are kept in registers; the last panel may be
/// alone, a register at a time.
///
/// # Safety
/// As [`Simd`]. `acts` serve the weight's shape, `out` has their tokens and the panels' rows.
#[inline(always)]
pub(crate) unsafe fn matmul_f32<S: Simd, const V: usize, const U: usize, const T: usize>(
    weights: Weights<'_>,
    acts: &FloatActs,
    out: OutTile<'_>,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match weights.shape.bits() {
            2 => all::<S, 2, V, U, T>(weights, acts, out),
            3 => all::<S, 3, V, U, T>(weights, acts, out),
            4 => all::<S, 4, V, U, T>(weights, acts, out),
            _ => all::<S, 8, V, U, T>(weights, acts, out),
        }
    }
}

#[inline(always)]
unsafe fn all<S: Simd, const BITS: u32, const V: usize, const U: usize, const T: usize>(
    weights: Weights<'_>,
    acts: &FloatActs,
    mut out: OutTile<'_>,
) {
    let Weights { shape, bytes, panels } = weights;
    let skipped = shape.panel_rows(panels.clone()).start;
    let (mut results, mut together) = (Sums::<1>::ZERO, Sums::<V>::ZERO);
    for (first, tokens, x) in acts.tiles() {
        let mut p = panels.start;
        while p < panels.end {
            let several = tokens > 1 && p + V <= panels.end;
            let next = p + if several { V } else { 1 };
            let bytes = &bytes[p * shape.panel_bytes()..next * shape.panel_bytes()];
            // SAFETY: the panels are as long as their shape says, the tile has the shape's blocks.
            unsafe {
                if tokens == 1 {
                    one::<S, BITS>(shape, bytes, x, &mut results.0[0][0]);
                } else if several {
                    many::<S, BITS, V, U, T>(shape, bytes, tokens, x, &mut together);
                } else {
                    many::<S, BITS, 1, 1, T>(shape, bytes, tokens, x, &mut results);
                }
            }
            let rows = shape.panel_rows(p..next);
            for t in 0..tokens {
                let line = if several { together.0[t].as_flattened() } else { results.0[t].as_flattened() };
                let n = rows.len();
                out.line(first + t, rows.start - skipped, n).copy_from_slice(&line[..n]);
            }
            p = next;
        }
    }
}

/// # Safety
/// As [`Simd`]; the panel is as long as its shape says, `x` holds one token's blocks.
#[inline(always)]
unsafe fn one<S: Simd, const BITS: u32>(shape: &Panels, panel: &[u8], x: &[f32], out: &mut [f32; PANEL_ROWS]) {
    let parts = PANEL_ROWS / S::ROWS;
    // SAFETY: every address is inside of the panel or of `x`: blocks and groups are those of the shape.
    unsafe {
        let panel = panel.as_ptr();
        let mut totals = [S::splat(0.0); 4];
        for g in 0..shape.groups() {
            let mut sums = [[S::splat(0.0); 2]; 4];
            let mut grids = [(S::splat(0.0), S::splat(0.0)); 4];
            for (h, grid) in grids[..parts].iter_mut().enumerate() {
                let (scales, zeros) = self::grid::<S>(shape, panel, g, h * S::ROWS);
                *grid = (scales, S::offset(zeros));
            }
            for b in shape.group_blocks(g) {
                let (at, x) = (panel.add(shape.block_at(b)), x.as_ptr().add(b * BLOCK));
                for h in 0..parts {
                    let quads = unpack::<S, BITS>(at.add(h * 4 * S::ROWS), ask::<S>(h));
                    let ([mut even, mut odd], offset) = (sums[h], grids[h].1);
                    for (p, quad) in quads.into_iter().enumerate() {
                        let x = x.add(4 * p);
                        even = S::mul_add(S::centered::<0>(quad, offset), S::splat(*x), even);
                        odd = S::mul_add(S::centered::<1>(quad, offset), S::splat(*x.add(1)), odd);
                        even = S::mul_add(S::centered::<2>(quad, offset), S::splat(*x.add(2)), even);
                        odd = S::mul_add(S::centered::<3>(quad, offset), S::splat(*x.add(3)), odd);
                    }
                    sums[h] = [even, odd];
                }
            }
            for h in 0..parts {
                totals[h] = S::mul_add(grids[h].0, S::add(sums[h][0], sums[h][1]), totals[h]);
            }
        }
        for (h, total) in totals[..parts].iter().enumerate() {
            S::store_floats(out.as_mut_ptr().add(h * S::ROWS), *total);
        }
    }
}

/// # Safety
/// As [`Simd`]; `V` panels are as long as their shape says, `x` holds a tile of `tokens` tokens' blocks.
#[inline(always)]
unsafe fn many<S: Simd, const BITS: u32, const V: usize, const U: usize, const T: usize>(
    shape: &Panels,
    panels: &[u8],
    tokens: usize,
    x: &[f32],
    totals: &mut Sums<V>,
) {
    totals.0[..tokens].fill([[0.0; PANEL_ROWS]; V]);
    let mut sums = [Sums::<V>::ZERO, Sums::<V>::ZERO];
    let mut numbers = Numbers([[[0.0; PANEL_ROWS]; V]; CHUNK * BLOCK]);
    for g in 0..shape.groups() {
        let blocks = shape.group_blocks(g);
        for sums in &mut sums {
            sums.0[..tokens].fill([[0.0; PANEL_ROWS]; V]);
        }
        for start in blocks.clone().step_by(CHUNK) {
            let end = (start + CHUNK).min(blocks.end);
            // SAFETY: every address is inside of the panels, of `x` or of an array: blocks, groups and tokens are those
            // of the shape and the tile, and a tile has `TILE` tokens at most.
            unsafe {
                for row in (0..V * PANEL_ROWS).step_by(S::ROWS) {
                    let panel = panels.as_ptr().add(row / PANEL_ROWS * shape.panel_bytes());
                    let to = numbers.0.as_mut_ptr().cast::<f32>().add(row);
                    decode::<S, BITS, V>(shape, panel, g, row % PANEL_ROWS, start..end, to);
                }
                for row in (0..V * PANEL_ROWS).step_by(U * S::ROWS) {
                    let at = Ranks {
                        w: numbers.0.as_ptr().cast::<f32>().add(row),
                        x: x.as_ptr().add(start * tokens * BLOCK),
                        blocks: end - start,
                        tokens,
                        line: V * PANEL_ROWS,
                        even: sums[0].0.as_mut_ptr().cast::<f32>().add(row),
                        odd: sums[1].0.as_mut_ptr().cast::<f32>().add(row),
                    };
                    let mut t = 0;
                    while t + T <= tokens {
                        at.add::<S, U, T>(t);
                        t += T;
                    }
                    while t + 2 <= tokens {
                        at.add::<S, U, 2>(t);
                        t += 2;
                    }
                    if t < tokens {
                        at.add::<S, U, 1>(t);
                    }
                }
            }
        }
        for row in (0..V * PANEL_ROWS).step_by(S::ROWS) {
            // SAFETY: as above.
            unsafe {
                let panel = panels.as_ptr().add(row / PANEL_ROWS * shape.panel_bytes());
                let (scales, _) = grid::<S>(shape, panel, g, row % PANEL_ROWS);
                for t in 0..tokens {
                    let at = t * V * PANEL_ROWS + row;
                    let total = totals.0.as_mut_ptr().cast::<f32>().add(at);
                    let even = S::load_floats(sums[0].0.as_ptr().cast::<f32>().add(at));
                    let odd = S::load_floats(sums[1].0.as_ptr().cast::<f32>().add(at));
                    S::store_floats(total, S::mul_add(scales, S::add(even, odd), S::load_floats(total)));
                }
            }
        }
    }
}

/// Columns of `V` panels as numbers, less their zero points.
#[repr(align(64))]
struct Numbers<const V: usize>([[[f32; PANEL_ROWS]; V]; CHUNK * BLOCK]);

/// Makes numbers of `ROWS` rows of some blocks of group `g`, one column of `V` panels behind the other.
///
/// # Safety
/// As [`Simd`]; `panel` is one of the shape, the blocks are in `g`; `to` is writable for as many columns.
#[inline(always)]
unsafe fn decode<S: Simd, const BITS: u32, const V: usize>(
    shape: &Panels,
    panel: *const u8,
    g: usize,
    row: usize,
    blocks: Range<usize>,
    to: *mut f32,
) {
    const COLUMN: usize = PANEL_ROWS;
    // SAFETY: the caller's promise.
    unsafe {
        let offset = S::offset(grid::<S>(shape, panel, g, row).1);
        for (i, b) in blocks.enumerate() {
            let quads = unpack::<S, BITS>(panel.add(shape.block_at(b) + 4 * row), &[]);
            for (p, quad) in quads.into_iter().enumerate() {
                let to = to.add((i * BLOCK + 4 * p) * V * COLUMN);
                S::store_floats(to, S::centered::<0>(quad, offset));
                S::store_floats(to.add(V * COLUMN), S::centered::<1>(quad, offset));
                S::store_floats(to.add(2 * V * COLUMN), S::centered::<2>(quad, offset));
                S::store_floats(to.add(3 * V * COLUMN), S::centered::<3>(quad, offset));
            }
        }
    }
}

/// Some blocks of columns to be multiplied with a tile, and the sums that they go to.
struct Ranks {
    /// `[blocks, 32, line]`.
    w: *const f32,
    /// `[blocks, tokens, 32]`.
    x: *const f32,
    blocks: usize,
    tokens: usize,
    /// Numbers of a column, and of a token's sums.
    line: usize,
    /// `[tokens, line]`: the sums of the even columns.
    even: *mut f32,
    /// The sums of the odd columns.
    odd: *mut f32,
}

impl Ranks {
    /// Adds the products with tokens `t..t + T` to their sums, for `U` registers of rows.
    ///
    /// # Safety
    /// As [`Simd`]; the pointers reach what their shapes say, and `t + T` is `tokens` at most.
    #[inline(always)]
    unsafe fn add<S: Simd, const U: usize, const T: usize>(&self, t: usize) {
        // SAFETY: the caller's promise.
        unsafe {
            let (mut even, mut odd) = ([[S::splat(0.0); U]; T], [[S::splat(0.0); U]; T]);
            for i in 0..T {
                for u in 0..U {
                    let at = (t + i) * self.line + u * S::ROWS;
                    even[i][u] = S::load_floats(self.even.add(at));
                    odd[i][u] = S::load_floats(self.odd.add(at));
                }
            }
            for b in 0..self.blocks {
                let mut w = self.w.add(b * BLOCK * self.line);
                let x = self.x.add((b * self.tokens + t) * BLOCK);
                for c in (0..BLOCK).step_by(2) {
                    column::<S, U, T>(w, x.add(c), &mut even);
                    column::<S, U, T>(w.add(self.line), x.add(c + 1), &mut odd);
                    w = w.add(2 * self.line);
                }
            }
            for i in 0..T {
                for u in 0..U {
                    let at = (t + i) * self.line + u * S::ROWS;
                    S::store_floats(self.even.add(at), even[i][u]);
                    S::store_floats(self.odd.add(at), odd[i][u]);
                }
            }
        }
    }
}

/// # Safety
/// As [`Simd`]; `w` is readable for `U` registers, `x` for `T` tokens, 32 numbers apart.
#[inline(always)]
unsafe fn column<S: Simd, const U: usize, const T: usize>(
    w: *const f32,
    x: *const f32,
    sums: &mut [[S::Floats; U]; T],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let mut rows = [S::load_floats(w); U];
        for (u, rows) in rows.iter_mut().enumerate().skip(1) {
            *rows = S::load_floats(w.add(u * S::ROWS));
        }
        for (i, sums) in sums.iter_mut().enumerate() {
            let x = S::splat(*x.add(i * BLOCK));
            for u in 0..U {
                sums[u] = S::mul_add(rows[u], x, sums[u]);
            }
        }
    }
}
