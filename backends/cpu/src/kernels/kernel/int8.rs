//! Products with 8-bit activations.
//!
//! One token: panels are streamed once, in two places at a time; sums stay in registers. More tokens: each block is
//! unpacked once to eight registers, which stay there while all tokens of the tile go past; the tokens' sums are in the
//! first-level cache. With registers enough, two panels go together, and an activation is spread over a register once
//! for both. As every token and block has a chain of its own, no chain waits for another.

use std::ops::Range;

use super::unpack::{nibbles, unpack};
use super::{Simd, Sums, Weights, grid};
use crate::kernels::act::{Acts, Tile};
use crate::kernels::out::OutTile;
use awqc_ir::panels::{ALIGN, BLOCK, PANEL_ROWS, Panels, QUAD};

/// `out = acts · weightsᵀ` for the rows of the panels.
///
/// # Safety
/// As [`Simd`]. `acts` serve the weight's shape, `out` has their tokens and the panels' rows.
#[inline(always)]
pub(crate) unsafe fn matmul_i8<S: Simd>(weights: Weights<'_>, acts: &Acts, out: OutTile<'_>) {
    // SAFETY: the caller's promise.
    unsafe {
        match weights.shape.bits() {
            2 => all::<S, 2>(weights, acts, out),
            3 => all::<S, 3>(weights, acts, out),
            4 => all::<S, 4>(weights, acts, out),
            _ => all::<S, 8>(weights, acts, out),
        }
    }
}

#[inline(always)]
unsafe fn all<S: Simd, const BITS: u32>(weights: Weights<'_>, acts: &Acts, mut out: OutTile<'_>) {
    let Weights { shape, bytes, panels } = weights;
    let skipped = shape.panel_rows(panels.clone()).start;
    let at =
        |p: usize| PanelAt { shape, panel: bytes[p * shape.panel_bytes()..(p + 1) * shape.panel_bytes()].as_ptr() };
    let (mut results, mut pairs) = (Sums::<1>::ZERO, Sums::<2>::ZERO);
    for (first, tile) in acts.tiles() {
        let mut give = |panels: Range<usize>, t: usize, line: &[f32]| {
            let rows = shape.panel_rows(panels);
            out.line(first + t, rows.start - skipped, rows.len()).copy_from_slice(&line[..rows.len()]);
        };
        if tile.tokens == 1 {
            // Memory is faster when it is read in two places.
            let half = panels.len() / 2;
            for p in panels.start..panels.start + half {
                let mut two = [[0.0; PANEL_ROWS]; 2];
                // SAFETY: the panels are as long as their shape says, the tile has the shape's blocks and groups.
                unsafe { one::<S, BITS, 2>(&[at(p), at(p + half)], tile, &mut two) };
                give(p..p + 1, 0, &two[0]);
                give(p + half..p + half + 1, 0, &two[1]);
            }
            if panels.len() % 2 == 1 {
                let mut last = [[0.0; PANEL_ROWS]];
                // SAFETY: as above.
                unsafe { one::<S, BITS, 1>(&[at(panels.end - 1)], tile, &mut last) };
                give(panels.end - 1..panels.end, 0, &last[0]);
            }
            continue;
        }
        let mut p = panels.start;
        while p < panels.end {
            // Two panels at once where there are two, and registers for both.
            let pair = S::PAIRS && (BITS < 8 || S::WIDE) && p + 1 < panels.end;
            let next = p + if pair { 2 } else { 1 };
            let w = PanelAt { shape, panel: bytes[p * shape.panel_bytes()..next * shape.panel_bytes()].as_ptr() };
            // SAFETY: as above.
            unsafe {
                if pair {
                    many::<S, BITS, 2>(&w, tile, &mut pairs);
                } else {
                    many::<S, BITS, 1>(&w, tile, &mut results);
                }
            }
            for t in 0..tile.tokens {
                let line = if pair { pairs.0[t].as_flattened() } else { results.0[t].as_flattened() };
                give(p..next, t, line);
            }
            p = next;
        }
    }
}

/// How far ahead of their use the weights of many tokens are asked for, in bytes. The processor does so by itself, but
/// less far and not across pages; a panel ends where the next begins, so most of what is asked for is used.
const AHEAD: usize = 1024;

/// The same for one token, which waits for nothing else. Each line is asked for several times, always nearer to its
/// use: a core that waits for as many lines as it can passes over further requests.
const ASK: [usize; 6] = [4096, 3072, 2048, 1024, 512, 256];

/// How far ahead of part `h` of a line, of which a register holds `4 ROWS` bytes, lines are asked for.
#[inline(always)]
pub(crate) fn ask<S: Simd>(h: usize) -> &'static [usize] {
    // Each part of a line asks a few times.
    let each = (ASK.len() * S::ROWS).div_ceil(PANEL_ROWS);
    &ASK[(h * each).min(ASK.len())..((h + 1) * each).min(ASK.len())]
}

/// Bytes of a header that a group takes.
const HEADER_SHARE: usize = 3 * PANEL_ROWS;

/// Asks for what comes [`AHEAD`] of `bytes` bytes at `at`.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(crate) unsafe fn ask_ahead<S: Simd>(at: *const u8, bytes: usize) {
    for line in (0..bytes).step_by(ALIGN) {
        // SAFETY: the caller has the instruction set; the address need not be valid.
        unsafe { S::prefetch(at.wrapping_add(AHEAD + line)) }
    }
}

/// A panel of a weight.
struct PanelAt<'a> {
    shape: &'a Panels,
    panel: *const u8,
}

/// The products of a block's `ROWS` rows with a block of activations.
///
/// # Safety
/// As [`Simd`]; `x` is readable for 32 bytes.
#[inline(always)]
unsafe fn dot<S: Simd, const BITS: u32>(quads: &Quads<S>, x: *const i8) -> S::Floats {
    // SAFETY: the caller's promise.
    unsafe {
        let x = S::acts(x);
        let low = S::block(&quads.low, x);
        if BITS == 8 && !S::WIDE {
            return S::float(S::with_high(low, S::block(&quads.high, x)));
        }
        S::float(low)
    }
}

/// As [`dot`] for two blocks of activations, with quads that are paired.
///
/// # Safety
/// As there.
#[inline(always)]
unsafe fn dots<S: Simd, const BITS: u32>(quads: &Quads<S>, x: *const i8, y: *const i8) -> [S::Floats; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let low = S::pair(&quads.low, x, y);
        if BITS == 8 && !S::WIDE {
            let high = S::pair(&quads.high, x, y);
            return [S::float(S::with_high(low[0], high[0])), S::float(S::with_high(low[1], high[1]))];
        }
        low.map(|ints| S::float(ints))
    }
}

/// A block's quads in the form that [`Simd::step`] takes.
struct Quads<S: Simd> {
    /// The codes, or their low nibbles.
    low: [S::Codes; 8],
    /// The high nibbles of 8-bit codes, if they are taken apart.
    high: [S::Codes; 8],
}

impl<S: Simd> Clone for Quads<S> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<S: Simd> Copy for Quads<S> {}

/// # Safety
/// As [`unpack`].
#[inline(always)]
unsafe fn quads<S: Simd, const BITS: u32>(block: *const u8, ahead: &[usize]) -> Quads<S> {
    // SAFETY: the caller's promise.
    unsafe {
        let codes = unpack::<S, BITS>(block, ahead);
        let mut quads = Quads { low: codes, high: codes };
        if BITS == 8 && !S::WIDE {
            for (p, codes) in codes.into_iter().enumerate() {
                (quads.low[p], quads.high[p]) = nibbles::<S>(codes);
            }
        }
        quads
    }
}

/// One token with `U` panels, which are anywhere.
///
/// # Safety
/// As [`Simd`]; the panels are readable as their shape says, the tile has one token and the shape's blocks.
#[inline(always)]
unsafe fn one<S: Simd, const BITS: u32, const U: usize>(
    panels: &[PanelAt<'_>; U],
    tile: Tile<'_>,
    out: &mut [[f32; PANEL_ROWS]; U],
) {
    let parts = PANEL_ROWS / S::ROWS;
    let shape = panels[0].shape;
    let mut block = shape.block_at(0);
    // SAFETY: every address is inside of the panels or the tile: blocks and groups are those of the shape.
    unsafe {
        let mut totals = [[S::splat(0.0); 4]; U];
        for g in 0..shape.groups() {
            let mut sums = [[S::splat(0.0); 4]; U];
            for b in shape.group_blocks(g) {
                let x = tile.codes.as_ptr().add(b * BLOCK);
                let scale = S::splat(*tile.scales.get_unchecked(b));
                for (w, sums) in panels.iter().zip(&mut sums) {
                    let at = w.panel.add(block);
                    for (h, sum) in sums[..parts].iter_mut().enumerate() {
                        let quads = quads::<S, BITS>(at.add(h * 4 * S::ROWS), ask::<S>(h));
                        *sum = S::mul_add(dot::<S, BITS>(&quads, x), scale, *sum);
                    }
                }
                block += shape.block_bytes();
            }
            let x_sum = S::splat(*tile.sums.get_unchecked(g));
            for (u, w) in panels.iter().enumerate() {
                // The header is read beside the codes: a group's share of it.
                ask_ahead::<S>(w.panel.wrapping_add(g * HEADER_SHARE), 1);
                for h in 0..parts {
                    let (scales, zeros) = grid::<S>(shape, w.panel, g, h * S::ROWS);
                    totals[u][h] = S::mul_add(scales, S::neg_mul_add(zeros, x_sum, sums[u][h]), totals[u][h]);
                }
            }
        }
        for (totals, out) in totals.iter().zip(out) {
            for (h, total) in totals[..parts].iter().enumerate() {
                S::store_floats(out.as_mut_ptr().add(h * S::ROWS), *total);
            }
        }
    }
}

/// `U` panels, one behind the other: every activation that is spread over a register serves all of them.
///
/// # Safety
/// As [`Simd`]; `w` and the `U - 1` panels behind it are readable as their shape says, the tile has the shape's blocks.
#[inline(always)]
unsafe fn many<S: Simd, const BITS: u32, const U: usize>(w: &PanelAt<'_>, tile: Tile<'_>, totals: &mut Sums<U>) {
    let mut sums = Sums::<U>::ZERO;
    totals.0[..tile.tokens].fill([[0.0; PANEL_ROWS]; U]);
    for h in 0..PANEL_ROWS / S::ROWS {
        let row = h * S::ROWS;
        let (sums, totals) = (sums.0.as_mut_ptr().cast::<f32>(), totals.0.as_mut_ptr().cast::<f32>());
        for g in 0..w.shape.groups() {
            let blocks = w.shape.group_blocks(g);
            // SAFETY: every address is inside of the panels or the tile: blocks, groups and tokens are those of the
            // shape and the tile.
            unsafe {
                let mut grids = [(S::splat(0.0), S::splat(0.0)); U];
                for (u, grid) in grids.iter_mut().enumerate() {
                    *grid = super::grid::<S>(w.shape, w.panel.add(u * w.shape.panel_bytes()), g, row);
                }
                for b in blocks.clone() {
                    let at = w.panel.add(w.shape.block_at(b) + 4 * row);
                    let mut quads = [quads::<S, BITS>(at, &[]); U];
                    for (u, quads) in quads.iter_mut().enumerate() {
                        let at = at.add(u * w.shape.panel_bytes());
                        ask_ahead::<S>(at, BITS as usize * QUAD);
                        *quads = self::quads::<S, BITS>(at, &[]);
                        if S::TOKENS == 2 {
                            *quads = Quads { low: S::paired(quads.low), high: S::paired(quads.high) };
                        }
                    }
                    let x = tile.codes.as_ptr().add(b * tile.tokens * BLOCK);
                    let x_scales = tile.scales.as_ptr().add(b * tile.tokens);
                    let x_sums = tile.sums.as_ptr().add(g * tile.tokens);
                    let ends = b + 1 == blocks.end;
                    for first in (0..tile.tokens).step_by(S::TOKENS) {
                        // The last token of an odd number makes a pair with itself.
                        let together = [first, (first + 1).min(tile.tokens - 1)];
                        let mut dots = [[S::splat(0.0); U]; 2];
                        for (u, quads) in quads.iter().enumerate() {
                            let [x, y] = together.map(|t| x.add(t * BLOCK));
                            if S::TOKENS == 2 {
                                [dots[0][u], dots[1][u]] = self::dots::<S, BITS>(quads, x, y);
                            } else {
                                dots[0][u] = self::dot::<S, BITS>(quads, x);
                            }
                        }
                        for (t, dots) in (first..tile.tokens).zip(dots).take(S::TOKENS) {
                            let scale = S::splat(*x_scales.add(t));
                            for (u, dot) in dots.into_iter().enumerate() {
                                let at = (t * U + u) * PANEL_ROWS + row;
                                let (sum, total) = (sums.add(at), totals.add(at));
                                let new = S::mul_add(dot, scale, S::load_floats(sum));
                                if ends {
                                    let of_group = S::neg_mul_add(grids[u].1, S::splat(*x_sums.add(t)), new);
                                    S::store_floats(total, S::mul_add(grids[u].0, of_group, S::load_floats(total)));
                                    S::store_floats(sum, S::splat(0.0));
                                } else {
                                    S::store_floats(sum, new);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}
