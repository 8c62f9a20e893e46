//! The published program's grids (its `quant.py`): steps are not rounded to f16, and symmetric codes use the whole
//! range.

use awqc_ir::Quant;

use crate::rtn::{Grid, round};

/// The grid that the published program gives a group whose numbers span `[lo, hi]`; for [`super::Grids::Running`].
pub fn grid(quant: Quant, lo: f32, hi: f32) -> Grid {
    let max = f32::from((1u16 << quant.bits) - 1);
    let (mut lo, mut hi) = (lo.min(0.0), hi.max(0.0));
    if quant.symmetric {
        hi = hi.max(-lo);
        if lo < 0.0 {
            lo = -hi;
        }
    }
    if lo == 0.0 && hi == 0.0 {
        (lo, hi) = (-1.0, 1.0);
    }
    let scale = (hi - lo) / max;
    let zero = if quant.symmetric { f32::from(1u16 << (quant.bits - 1)) } else { round(-lo / scale) };
    Grid { scale, zero, max }
}

/// Does to a weight, `[rows, cols]`, and its `H`, `[cols, cols]`, what the published program does about channels that
/// are always 0: their weights become 0, their `H` an identity.
pub fn settle_dead(w: &mut [f32], h: &mut [f32], cols: usize) {
    for c in (0..cols).filter(|c| h[c * cols + c] == 0.0).collect::<Vec<_>>() {
        h[c * cols + c] = 1.0;
        w.chunks_mut(cols).for_each(|row| row[c] = 0.0);
    }
}
