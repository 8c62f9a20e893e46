//! Elementwise kernels over blocks of a tensor, in the tensor's own memory where nothing else uses it.

use burn_ndarray::NdArrayTensor;
use rayon::prelude::*;

use super::math::{erf, exp, sigmoid, simd, tanh};
use super::view::{floats, shape_of, take, tensor};

/// Elements of one task.
const BLOCK: usize = 1 << 15;

/// `f` on every block of `x`.
pub(super) fn map(x: NdArrayTensor, f: impl Fn(&mut [f32]) + Sync) -> NdArrayTensor {
    let shape = shape_of(&x);
    let mut data = take(x);
    data.par_chunks_mut(BLOCK).for_each(|block| {
        simd(
            #[inline(always)]
            || f(block),
        );
    });
    tensor(data, shape)
}

/// `f` on blocks of `a` and `b`; `b` repeats along the leading axes that it lacks.
pub(super) fn zip(a: NdArrayTensor, b: &NdArrayTensor, f: fn(&mut [f32], &[f32])) -> NdArrayTensor {
    let shape = shape_of(&a);
    let mut data = take(a);
    let other = floats(b);
    if other.is_empty() {
        return tensor(data, shape);
    }
    data.par_chunks_mut(other.len()).for_each(|part| {
        part.par_chunks_mut(BLOCK).zip(other.par_chunks(BLOCK)).for_each(|(a, b)| f(a, b));
    });
    tensor(data, shape)
}

/// `a += b`.
#[inline(always)]
pub fn plus(a: &mut [f32], b: &[f32]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
}

/// `a *= b`.
#[inline(always)]
pub fn times(a: &mut [f32], b: &[f32]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a *= b);
}

/// max(x, 0); NaN stays.
#[inline(always)]
pub fn relu(x: &mut [f32]) {
    // Not `max`, which would turn NaN into 0 and hide it.
    x.iter_mut().for_each(|v| *v = if *v < 0.0 { 0.0 } else { *v });
}

/// `x · sigmoid(x)`.
#[inline(always)]
pub fn silu(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v /= 1.0 + exp(-*v));
}

/// `1 / (1 + e^−x)`.
#[inline(always)]
pub fn logistic(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = sigmoid(*v));
}

/// Each number limited to `[−at, at]`; NaN stays.
#[inline(always)]
pub fn clamp(x: &mut [f32], at: f32) {
    // Not `max` and `min`, which would turn NaN into a bound and hide it.
    x.iter_mut().for_each(|v| {
        *v = if *v > at {
            at
        } else if *v < -at {
            -at
        } else {
            *v
        }
    });
}

/// The Gaussian error linear unit, exactly.
#[inline(always)]
pub fn gelu_erf(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = 0.5 * *v * (1.0 + erf(*v * std::f32::consts::FRAC_1_SQRT_2)));
}

/// Its approximation by tanh.
#[inline(always)]
pub fn gelu_tanh(x: &mut [f32]) {
    const K: f32 = 0.797_884_6; // √(2/π)
    x.iter_mut().for_each(|v| *v = 0.5 * *v * (1.0 + tanh(K * (*v + 0.044_715 * *v * *v * *v))));
}

/// Its approximation by a sigmoid.
#[inline(always)]
pub fn gelu_quick(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v *= sigmoid(1.702 * *v));
}

/// `at · tanh(x / at)`.
#[inline(always)]
pub fn softcap(x: &mut [f32], at: f32) {
    x.iter_mut().for_each(|v| *v = at * tanh(*v / at));
}
