//! Round-to-nearest group quantization: from f32 rows to codes, scales and zero points, and back.
//!
//! [`Grid`] is the one definition of the rounding rule; everything that searches (scales, clip bounds) uses it through
//! the vector kernels of [`kernel`], so that what a search predicts is what [`quantize`] does.

pub mod kernel;

use awqc_ir::Quant;
use rayon::prelude::*;

/// A quantized matrix, one code a byte.
#[derive(Clone, Debug, PartialEq)]
pub struct Codes {
    /// The element type.
    pub quant: Quant,
    /// Output channels.
    pub rows: usize,
    /// Input channels.
    pub cols: usize,
    /// `[rows, cols]`. Symmetric codes are stored plus `2^(bits-1)`, so that every code is unsigned.
    pub codes: Vec<u8>,
    /// `[rows, groups]`, each representable in f16.
    pub scales: Vec<f32>,
    /// `[rows, groups]`: zero points; `2^(bits-1)` everywhere for symmetric codes.
    pub zeros: Vec<u8>,
}

impl Codes {
    /// Groups in a row.
    pub fn groups(&self) -> usize {
        self.quant.group.count(self.cols)
    }

    /// The numbers that the codes stand for: `(code − zero) · scale`, `[rows, cols]`.
    pub fn decode(&self) -> Vec<f32> {
        self.decode_with(&self.scales)
    }

    /// The numbers that the codes would stand for with these scales, `[rows, groups]`.
    pub fn decode_with(&self, scales: &[f32]) -> Vec<f32> {
        let (cols, groups) = (self.cols.max(1), self.groups().max(1));
        let group = self.quant.group.len(self.cols);
        let mut out = vec![0.0; self.codes.len()];
        let rows = out.par_chunks_mut(cols).zip(self.codes.par_chunks(cols));
        rows.zip(scales.par_chunks(groups)).zip(self.zeros.par_chunks(groups)).for_each(
            |(((out, codes), scales), zeros)| {
                let parts = out.chunks_mut(group).zip(codes.chunks(group));
                for ((out, codes), (scale, zero)) in parts.zip(scales.iter().zip(zeros)) {
                    let zero = i16::from(*zero);
                    out.iter_mut().zip(codes).for_each(|(o, c)| *o = f32::from(i16::from(*c) - zero) * scale);
                }
            },
        );
        out
    }
}

/// The grid of one group: what a code stands for is `(code − zero) · scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Step, representable in f16; 0 for a group that holds nothing but (what rounds to) zeros.
    pub scale: f32,
    /// The code of 0.
    pub zero: f32,
    /// Largest stored code; the smallest is 0.
    pub max: f32,
}

impl Grid {
    /// The grid that spans `[lo, hi]`, widened to contain 0, so that 0 is always representable.
    #[inline(always)]
    pub fn spanning(quant: Quant, lo: f32, hi: f32) -> Self {
        let max = f32::from((1u16 << quant.bits) - 1);
        let (lo, hi) = (lo.min(0.0), hi.max(0.0));
        if quant.symmetric {
            let half = f32::from(1u16 << (quant.bits - 1));
            return Self { scale: round_f16(hi.max(-lo) / (half - 1.0)), zero: half, max };
        }
        let scale = round_f16((hi - lo) / max);
        let zero = if scale > 0.0 { round((-lo / scale).min(max)) } else { 0.0 };
        Self { scale, zero, max }
    }

    /// The stored code nearest to `w`.
    #[inline(always)]
    pub fn code(self, w: f32) -> f32 {
        self.signed(w) + self.zero
    }

    /// `w` rounded to the grid.
    #[inline(always)]
    pub fn round(self, w: f32) -> f32 {
        self.signed(w) * self.scale
    }

    /// The code less the zero point. The limits are whole numbers, so limiting first and rounding then is the same as
    /// the other way about, and the rounding sees small numbers only.
    #[inline(always)]
    fn signed(self, w: f32) -> f32 {
        let (step, lo, hi) =
            if self.scale > 0.0 { (self.scale, -self.zero, self.max - self.zero) } else { (1.0, 0.0, 0.0) };
        let x = w / step;
        let x = if x > lo { x } else { lo };
        let x = if x < hi { x } else { hi };
        round(x)
    }
}

/// Nearest integer, halves to even, for |x| < 2²². Two additions, so that it vectorises on every machine.
#[inline(always)]
pub fn round(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³
    (x + MAGIC) - MAGIC
}

/// The f16 nearest to `x >= 0`, halves to even, as f32; the largest finite f16 for what is above it.
#[inline(always)]
pub fn round_f16(x: f32) -> f32 {
    const LARGEST: f32 = 65504.0;
    const SMALLEST_NORMAL: f32 = 6.103_515_6e-5; // 2⁻¹⁴
    let bits = x.to_bits();
    let normal = f32::from_bits((bits + 0x0fff + ((bits >> 13) & 1)) & !0x1fff);
    // Adding 3/4 leaves a unit in the last place of 2⁻²⁴, the step of subnormal f16.
    let subnormal = (x + 0.75) - 0.75;
    let rounded = if x < SMALLEST_NORMAL { subnormal } else { normal };
    if rounded < LARGEST { rounded } else { LARGEST }
}

/// Smallest and largest number of a slice; `(∞, −∞)` for none.
pub fn range(w: &[f32]) -> (f32, f32) {
    kernel::range(w)
}

/// Quantizes `w`, `[rows, cols]`, to the nearest codes.
pub fn quantize(w: &[f32], rows: usize, cols: usize, quant: Quant) -> Codes {
    let groups = quant.group.count(cols);
    let mut codes = vec![0u8; w.len()];
    let mut scales = vec![0.0f32; rows * groups];
    let mut zeros = vec![0u8; rows * groups];
    let parts = w.par_chunks(cols.max(1)).zip(codes.par_chunks_mut(cols.max(1)));
    parts.zip(scales.par_chunks_mut(groups.max(1))).zip(zeros.par_chunks_mut(groups.max(1))).for_each(
        |(((row, codes), scales), zeros)| {
            let group = quant.group.len(cols);
            let parts = row.chunks(group).zip(codes.chunks_mut(group));
            for ((w, codes), (scale, zero)) in parts.zip(scales.iter_mut().zip(zeros)) {
                let (lo, hi) = range(w);
                let grid = Grid::spanning(quant, lo, hi);
                kernel::codes(w, grid, codes);
                (*scale, *zero) = (grid.scale, grid.zero as u8);
            }
        },
    );
    Codes { quant, rows, cols, codes, scales, zeros }
}
