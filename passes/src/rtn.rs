//! Round-to-nearest group quantization: from f32 rows to codes, scales and zero points, and back.

use awqc_ir::Quant;
use half::f16;

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
        let (group, groups) = (self.quant.group.len(self.cols), self.groups());
        let mut out = Vec::with_capacity(self.codes.len());
        for (r, row) in self.codes.chunks(self.cols.max(1)).enumerate() {
            for (g, codes) in row.chunks(group).enumerate() {
                let (scale, zero) = (self.scales[r * groups + g], i16::from(self.zeros[r * groups + g]));
                out.extend(codes.iter().map(|c| f32::from(i16::from(*c) - zero) * scale));
            }
        }
        out
    }
}

/// The grid of one group: what a code stands for is `(code − zero) · scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Step, representable in f16.
    pub scale: f32,
    /// The code of 0.
    pub zero: f32,
    /// Largest stored code; the smallest is 0.
    pub max: f32,
}

impl Grid {
    /// The grid that spans `[lo, hi]`, widened to contain 0, so that 0 is always representable.
    pub fn spanning(quant: Quant, lo: f32, hi: f32) -> Self {
        let max = f32::from((1u16 << quant.bits) - 1);
        let (lo, hi) = (lo.min(0.0), hi.max(0.0));
        if quant.symmetric {
            let half = f32::from(1u16 << (quant.bits - 1));
            let scale = f16::from_f32(hi.max(-lo) / (half - 1.0)).to_f32();
            return Self { scale, zero: half, max };
        }
        let scale = f16::from_f32((hi - lo) / max).to_f32();
        let zero = if scale > 0.0 { round(-lo / scale).clamp(0.0, max) } else { 0.0 };
        Self { scale, zero, max }
    }

    /// The stored code nearest to `w`.
    pub fn code(self, w: f32) -> f32 {
        if self.scale > 0.0 { (round(w / self.scale) + self.zero).clamp(0.0, self.max) } else { self.zero }
    }

    /// `w` rounded to the grid.
    pub fn round(self, w: f32) -> f32 {
        (self.code(w) - self.zero) * self.scale
    }
}

/// Nearest integer, halves to even, for |x| < 2²²; larger numbers stay nearly as they are. Two additions, so that it
/// vectorises on every machine.
pub fn round(x: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 · 2²³
    if x.abs() < 4_194_304.0 { (x + MAGIC) - MAGIC } else { x }
}

/// Smallest and largest number of a slice.
pub fn range(w: &[f32]) -> (f32, f32) {
    w.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), v| (lo.min(*v), hi.max(*v)))
}

/// Quantizes `w`, `[rows, cols]`, to the nearest codes.
pub fn quantize(w: &[f32], rows: usize, cols: usize, quant: Quant) -> Codes {
    let groups = quant.group.count(cols);
    let mut out = Codes {
        quant,
        rows,
        cols,
        codes: Vec::with_capacity(w.len()),
        scales: Vec::with_capacity(rows * groups),
        zeros: Vec::with_capacity(rows * groups),
    };
    for row in w.chunks(cols.max(1)) {
        for group in row.chunks(quant.group.len(cols)) {
            let (lo, hi) = range(group);
            let grid = Grid::spanning(quant, lo, hi);
            out.codes.extend(group.iter().map(|v| grid.code(*v) as u8));
            out.scales.push(grid.scale);
            out.zeros.push(grid.zero as u8);
        }
    }
    out
}
