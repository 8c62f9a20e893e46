//! Elementwise functions of one and of two rows.

use cubecl::prelude::*;

use super::{From, Grid, Map, THREADS, Zip, first, start};

/// Sizes, in numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spec {
    pub(super) width: u32,
    /// The first operand.
    pub(super) from: From,
    /// The second operand.
    pub(super) by: From,
    /// Applied to the first operand.
    pub(super) f: Map,
}

#[cube]
pub(super) fn map<O: Float>(
    x: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] spec: Spec,
    #[comptime] grid: Grid,
) {
    let mut c = first();
    while c < comptime!(spec.width) {
        let value = apply(x[(start(spec.from) + c) as usize], comptime!(spec.f));
        out[(base + c) as usize] = O::cast_from(value);
        c += comptime!(THREADS * grid.blocks);
    }
}

#[cube]
pub(super) fn zip<O: Float>(
    a: &Array<f32>,
    b: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] spec: Spec,
    #[comptime] zip: Zip,
    #[comptime] grid: Grid,
) {
    let mut c = first();
    while c < comptime!(spec.width) {
        let left = apply(a[(start(spec.from) + c) as usize], comptime!(spec.f));
        let right = b[(start(spec.by) + c) as usize];
        let value = if comptime!(zip == Zip::Add) { left + right } else { left * right };
        out[(base + c) as usize] = O::cast_from(value);
        c += comptime!(THREADS * grid.blocks);
    }
}

/// `x` of `width` columns, so many times side by side.
#[cube]
pub(super) fn repeat<O: Float>(
    x: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] from: From,
    #[comptime] width: u32,
    #[comptime] times: u32,
    #[comptime] grid: Grid,
) {
    let mut c = first();
    while c < comptime!(width * times) {
        out[(base + c) as usize] = O::cast_from(x[(start(from) + c % width) as usize]);
        c += comptime!(THREADS * grid.blocks);
    }
}

/// `f(x)`.
#[cube]
fn apply(x: f32, #[comptime] f: Map) -> f32 {
    match comptime!(f) {
        Map::Same => x,
        Map::Silu => x / (1.0f32 + (0.0f32 - x).exp()),
        Map::GeluErf => 0.5f32 * x * (1.0f32 + Erf::erf(x * 0.707_106_77f32)),
        Map::GeluTanh => {
            let inner = 0.797_884_6f32 * (x + 0.044_715f32 * x * x * x);
            0.5f32 * x * (1.0f32 + tanh(inner))
        }
        Map::GeluQuick => x / (1.0f32 + (0.0f32 - 1.702f32 * x).exp()),
        Map::Relu => max(x, 0.0f32),
        Map::Scale(by) => x * f32::new(by),
        Map::Softcap(at) => f32::new(at) * tanh(x / f32::new(at)),
        Map::Sigmoid => 1.0f32 / (1.0f32 + (0.0f32 - x).exp()),
        Map::Clamp(at) => min(max(x, f32::new(0.0 - at)), f32::new(at)),
    }
}

/// The hyperbolic tangent, which saturates instead of overflowing.
#[cube]
pub(crate) fn tanh(x: f32) -> f32 {
    // exp(-2|x|) is between 0 and 1.
    let e = (-2.0f32 * x.abs()).exp();
    let t = (1.0f32 - e) / (1.0f32 + e);
    select(x < 0.0f32, 0.0f32 - t, t)
}
