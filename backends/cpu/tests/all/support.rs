//! Random weights and activations, and what they multiply to in f64.

use awqc_exec::layout::r16::pack_codes;
use awqc_ir::panels::Panels;
use half::f16;

/// A small generator of numbers, the same on every machine.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32
    }

    /// In -1..1.
    pub(crate) fn number(&mut self) -> f32 {
        (self.bits() % (1 << 24)) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// A weight, packed and not.
pub(crate) struct Weight {
    pub(crate) shape: Panels,
    pub(crate) codes: Vec<u8>,
    pub(crate) scales: Vec<f16>,
    pub(crate) zeros: Vec<u8>,
    pub(crate) bytes: Vec<u8>,
}

impl Weight {
    pub(crate) fn new(shape: Panels, codes: Vec<u8>, scales: Vec<f16>, zeros: Vec<u8>) -> Self {
        let bytes = pack_codes(&shape, &codes, &scales, &zeros);
        Self { shape, codes, scales, zeros, bytes }
    }

    pub(crate) fn random(rng: &mut Random, rows: usize, cols: usize, bits: u32, symmetric: bool, group: usize) -> Self {
        let shape = Panels::new(rows, cols, bits, symmetric, group).expect("a shape that there is");
        let mask = (1u32 << bits) - 1;
        let codes = (0..rows * cols).map(|_| (rng.bits() & mask) as u8).collect();
        let count = rows * shape.groups();
        let scales = (0..count).map(|_| f16::from_f32(0.01 + 0.02 * rng.number().abs())).collect();
        let zero = |rng: &mut Random| if symmetric { shape.middle() } else { (rng.bits() & mask) as u8 };
        let zeros = (0..count).map(|_| zero(rng)).collect();
        Self::new(shape, codes, scales, zeros)
    }

    /// The number at a row and a column, exactly.
    pub(crate) fn number(&self, row: usize, col: usize) -> f64 {
        let at = row * self.shape.groups() + col / self.shape.group();
        let code = i32::from(self.codes[row * self.shape.cols() + col]) - i32::from(self.zeros[at]);
        f64::from(code) * self.scales[at].to_f64()
    }
}

pub(crate) fn numbers(rng: &mut Random, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.number()).collect()
}
