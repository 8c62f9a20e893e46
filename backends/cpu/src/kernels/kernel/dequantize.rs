//! Decoding to f32, row by row.

use super::unpack::unpack;
use super::{Simd, Weights};
use awqc_exec::layout::r16::Panel;
use awqc_ir::panels::{BLOCK, PANEL_ROWS, QUAD};

/// `(code − zero) · scale` of the panels, padding rows and all: `[16 panels, cols]`.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(crate) unsafe fn dequantize<S: Simd>(weights: Weights<'_>, out: &mut [f32]) {
    // SAFETY: the caller has the instruction set.
    unsafe {
        match weights.shape.bits() {
            2 => all::<S, 2>(weights, out),
            3 => all::<S, 3>(weights, out),
            4 => all::<S, 4>(weights, out),
            _ => all::<S, 8>(weights, out),
        }
    }
}

#[inline(always)]
unsafe fn all<S: Simd, const BITS: u32>(weights: Weights<'_>, out: &mut [f32]) {
    let Weights { shape, bytes, panels } = weights;
    let cols = shape.cols();
    for (p, out) in panels.zip(out.chunks_exact_mut((PANEL_ROWS * cols).max(1))) {
        let panel = Panel { shape, bytes: &bytes[p * shape.panel_bytes()..][..shape.panel_bytes()] };
        for g in 0..shape.groups() {
            let (mut scales, mut zeros) = ([0.0; PANEL_ROWS], [0.0; PANEL_ROWS]);
            for r in 0..PANEL_ROWS {
                (scales[r], zeros[r]) = (panel.scale(g, r).to_f32(), f32::from(panel.zero(g, r)));
            }
            let (columns, first) = (shape.group_columns(g), shape.group_blocks(g).start);
            for b in shape.group_blocks(g) {
                let block = &panel.bytes[shape.block_at(b)..][..shape.block_bytes()];
                let mut quads = [0u8; 8 * QUAD];
                for h in 0..PANEL_ROWS / S::ROWS {
                    let at = h * 4 * S::ROWS;
                    // SAFETY: the block is as long as `BITS` says, `quads` holds eight quads of 16 rows.
                    unsafe {
                        let unpacked = unpack::<S, BITS>(block.as_ptr().add(at), &[]);
                        for (q, quad) in unpacked.into_iter().enumerate() {
                            S::store(quads.as_mut_ptr().add(q * QUAD + at), quad);
                        }
                    }
                }
                let start = columns.start + (b - first) * BLOCK;
                let n = BLOCK.min(columns.end - start);
                // All rows first: read back at once, what was written in fours would have to wait for the stores.
                let mut codes = [[0u8; BLOCK]; PANEL_ROWS];
                for (r, codes) in codes.iter_mut().enumerate() {
                    for (four, quad) in codes.as_chunks_mut::<4>().0.iter_mut().zip(quads.chunks_exact(QUAD)) {
                        four.copy_from_slice(&quad[4 * r..4 * r + 4]);
                    }
                }
                for (r, codes) in codes.iter().enumerate() {
                    // A closure would not be compiled for the caller's instruction set.
                    let mut row = [0.0; BLOCK];
                    for (v, code) in row.iter_mut().zip(codes) {
                        *v = (f32::from(*code) - zeros[r]) * scales[r];
                    }
                    out[r * cols + start..][..n].copy_from_slice(&row[..n]);
                }
            }
        }
    }
}
