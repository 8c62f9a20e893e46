//! The specification of the kernels, number by number. Every other instruction set gives these results to the last bit.
//!
//! In every group of a row a sum starts at 0; when the group ends, the row's total takes it with one fused
//! multiply-add. Where it says `mul_add`, there is one rounding; a row's result depends on nothing but the row and its
//! token.

use std::ops::Range;

use crate::kernels::act::{Acts, FloatActs};
use crate::kernels::attention::{Lines, Stacked};
use crate::kernels::out::OutTile;
use awqc_exec::layout::r16::Panel;
use awqc_ir::panels::{BLOCK, PANEL_ROWS, Panels};

fn panel<'a>(shape: &'a Panels, weights: &'a [u8], panel: usize) -> Panel<'a> {
    let at = panel * shape.panel_bytes();
    Panel { shape, bytes: &weights[at..at + shape.panel_bytes()] }
}

/// `(code − zero) · scale`, the difference exact, the product rounded once: `[16 panels, cols]`.
pub(crate) fn dequantize(shape: &Panels, weights: &[u8], panels: Range<usize>, out: &mut [f32]) {
    let lines = panels.flat_map(|p| (0..PANEL_ROWS).map(move |r| (p, r)));
    for ((p, r), out) in lines.zip(out.chunks_exact_mut(shape.cols().max(1))) {
        let panel = panel(shape, weights, p);
        for g in 0..shape.groups() {
            let (scale, zero) = (panel.scale(g, r).to_f32(), i16::from(panel.zero(g, r)));
            let first = shape.group_blocks(g).start;
            for (c, out) in out[shape.group_columns(g)].iter_mut().enumerate() {
                let code = panel.code(first + c / BLOCK, r, c % BLOCK);
                *out = f32::from(i16::from(code) - zero) * scale;
            }
        }
    }
}

/// With 8-bit activations. In a group, block after block: the exact integer product of codes and activations, as f32,
/// times the activations' scale, added with one rounding. The zero point takes the group's sum of activations.
pub(crate) fn matmul_i8(shape: &Panels, weights: &[u8], panels: Range<usize>, acts: &Acts, mut out: OutTile<'_>) {
    let skipped = shape.panel_rows(panels.clone()).start;
    for (first, tile) in acts.tiles() {
        for p in panels.clone() {
            let panel = panel(shape, weights, p);
            for (r, row) in shape.panel_rows(p..p + 1).enumerate() {
                for t in 0..tile.tokens {
                    let mut total = 0.0f32;
                    for g in 0..shape.groups() {
                        let mut sum = 0.0f32;
                        for b in shape.group_blocks(g) {
                            let at = b * tile.tokens + t;
                            let x = &tile.codes[at * BLOCK..(at + 1) * BLOCK];
                            let products =
                                x.iter().enumerate().map(|(c, x)| i32::from(panel.code(b, r, c)) * i32::from(*x));
                            // Below 2²⁴: exact in f32.
                            sum = (products.sum::<i32>() as f32).mul_add(tile.scales[at], sum);
                        }
                        let (scale, zero) = (panel.scale(g, r).to_f32(), f32::from(panel.zero(g, r)));
                        total = scale.mul_add((-zero).mul_add(tile.sums[g * tile.tokens + t], sum), total);
                    }
                    out.line(first + t, row - skipped, 1)[0] = total;
                }
            }
        }
    }
}

/// With f32 activations. A group has two sums, of its even and of its odd columns; to them goes `(code − zero) · x`,
/// the difference exact, with one rounding.
pub(crate) fn matmul_f32(shape: &Panels, weights: &[u8], panels: Range<usize>, acts: &FloatActs, mut out: OutTile<'_>) {
    let skipped = shape.panel_rows(panels.clone()).start;
    for (first, tokens, values) in acts.tiles() {
        for p in panels.clone() {
            let panel = panel(shape, weights, p);
            for (r, row) in shape.panel_rows(p..p + 1).enumerate() {
                for t in 0..tokens {
                    let mut total = 0.0f32;
                    for g in 0..shape.groups() {
                        let (scale, zero) = (panel.scale(g, r).to_f32(), i16::from(panel.zero(g, r)));
                        let mut sums = [0.0f32; 2];
                        for b in shape.group_blocks(g) {
                            let x = &values[(b * tokens + t) * BLOCK..][..BLOCK];
                            for (c, x) in x.iter().enumerate() {
                                let code = f32::from(i16::from(panel.code(b, r, c)) - zero);
                                sums[c % 2] = code.mul_add(*x, sums[c % 2]);
                            }
                        }
                        total = scale.mul_add(sums[0] + sums[1], total);
                    }
                    out.line(first + t, row - skipped, 1)[0] = total;
                }
            }
        }
    }
}

/// A sum of products, in their order with one rounding each, times `factor`.
pub(crate) fn times_panels(rows: usize, a: Lines<'_>, b: &Stacked<'_>, factor: f32, out: &mut [f32]) {
    for (r, line) in out.chunks_exact_mut((b.panels * PANEL_ROWS).max(1)).take(rows).enumerate() {
        let a = &a.data[a.at(r)..][..b.depth];
        for (column, out) in line.iter_mut().enumerate() {
            let from = column / PANEL_ROWS * b.panel_step + column % PANEL_ROWS;
            let sum = a.iter().enumerate().fold(0.0f32, |sum, (k, a)| a.mul_add(b.data.get(from + k * b.step), sum));
            *out = sum.mul_add(factor, 0.0);
        }
    }
}
