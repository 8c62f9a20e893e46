//! From the bytes of a block to its eight quads: all that differs between bit widths.

use super::Simd;
use awqc_ir::panels::QUAD;

/// The quads of a block for `S::ROWS` of its rows, the first of which `block` points to. With every load, the lines
/// that lie so many bytes `ahead` of it are asked for.
///
/// # Safety
/// As [`Simd`]; a block of `BITS` bits is readable from `ROWS` rows' worth of bytes, `4 ROWS`, of each of its
/// registers.
#[inline(always)]
pub(crate) unsafe fn unpack<S: Simd, const BITS: u32>(block: *const u8, ahead: &[usize]) -> [S::Codes; 8] {
    // SAFETY: a block has `BITS` registers of `QUAD` bytes; what is asked for need not be valid.
    unsafe {
        let first = load::<S>(block, ahead);
        let mut quads = [first; 8];
        match BITS {
            8 => {
                for (l, quad) in quads.iter_mut().enumerate().skip(1) {
                    *quad = load::<S>(block.add(l * QUAD), ahead);
                }
            }
            4 => {
                (quads[0], quads[1]) = nibbles::<S>(first);
                for l in 1..4 {
                    (quads[2 * l], quads[2 * l + 1]) = nibbles::<S>(load::<S>(block.add(l * QUAD), ahead));
                }
            }
            _ => {
                let second = load::<S>(block.add(QUAD), ahead);
                for (l, v) in [first, second].into_iter().enumerate() {
                    quads[4 * l] = S::and(v, 3);
                    quads[4 * l + 1] = S::and(S::shift::<2>(v), 3);
                    quads[4 * l + 2] = S::and(S::shift::<4>(v), 3);
                    quads[4 * l + 3] = S::and(S::shift::<6>(v), 3);
                }
                if BITS == 3 {
                    let top = load::<S>(block.add(2 * QUAD), ahead);
                    // Bit `p`, moved to bit 2.
                    quads[0] = S::or(quads[0], S::and(S::shift::<-2>(top), 4));
                    quads[1] = S::or(quads[1], S::and(S::shift::<-1>(top), 4));
                    quads[2] = S::or(quads[2], S::and(top, 4));
                    quads[3] = S::or(quads[3], S::and(S::shift::<1>(top), 4));
                    quads[4] = S::or(quads[4], S::and(S::shift::<2>(top), 4));
                    quads[5] = S::or(quads[5], S::and(S::shift::<3>(top), 4));
                    quads[6] = S::or(quads[6], S::and(S::shift::<4>(top), 4));
                    quads[7] = S::or(quads[7], S::and(S::shift::<5>(top), 4));
                }
            }
        }
        quads
    }
}

/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn load<S: Simd>(from: *const u8, ahead: &[usize]) -> S::Codes {
    // SAFETY: the caller's promise.
    unsafe {
        let codes = S::load(from);
        for bytes in ahead {
            S::prefetch(from.wrapping_add(*bytes));
        }
        codes
    }
}

/// The low and the high nibbles of codes.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
pub(super) unsafe fn nibbles<S: Simd>(codes: S::Codes) -> (S::Codes, S::Codes) {
    // SAFETY: the caller has the instruction set.
    unsafe { (S::and(codes, 15), S::and(S::shift::<4>(codes), 15)) }
}
