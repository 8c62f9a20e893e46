//! Elementwise ops in burn's primitives.

use awqc_ir::op::GeluForm;
use burn_backend::Backend;
use burn_backend::tensor::FloatTensor;

use super::{dims, lift};

/// `x · sigmoid(x)`.
pub fn silu<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(x.clone(), B::sigmoid(x))
}

/// See [`awqc_ir::op::Gelu`].
pub fn gelu<B: Backend>(form: GeluForm, x: FloatTensor<B>) -> FloatTensor<B> {
    let half = |x: FloatTensor<B>, t: FloatTensor<B>| {
        B::float_mul(B::float_mul_scalar(x, 0.5.into()), B::float_add_scalar(t, 1.0.into()))
    };
    match form {
        GeluForm::Erf => {
            let erf = B::float_erf(B::float_mul_scalar(x.clone(), std::f64::consts::FRAC_1_SQRT_2.into()));
            half(x, erf)
        }
        GeluForm::Tanh => {
            let cube = B::float_mul(B::float_mul(x.clone(), x.clone()), x.clone());
            let inner = B::float_add(x.clone(), B::float_mul_scalar(cube, 0.044715.into()));
            let k = (2.0 / std::f64::consts::PI).sqrt();
            half(x, B::float_tanh(B::float_mul_scalar(inner, k.into())))
        }
        GeluForm::Quick => B::float_mul(x.clone(), B::sigmoid(B::float_mul_scalar(x, 1.702.into()))),
    }
}

/// `1 / (1 + e^−x)`.
pub fn sigmoid<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::sigmoid(x)
}

/// `e^x / Σ e^x` over the last axis.
pub fn softmax<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    super::softmax_last::<B>(x)
}

/// Each number limited to `[−at, at]`.
pub fn clamp<B: Backend>(at: f64, x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_clamp(x, (-at).into(), at.into())
}

/// `max(x, 0)`.
pub fn relu<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    B::relu(x)
}

/// `a + b`, `b` broadcast over the leading axes that it lacks.
pub fn add<B: Backend>(a: FloatTensor<B>, b: &FloatTensor<B>) -> FloatTensor<B> {
    let rank = dims::<B>(&a).len();
    B::float_add(a, lift::<B>(b.clone(), rank))
}

/// `a · b`.
pub fn mul<B: Backend>(a: FloatTensor<B>, b: &FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul(a, b.clone())
}

/// `by · x`.
pub fn scale<B: Backend>(by: f64, x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul_scalar(x, by.into())
}

/// `at · tanh(x / at)`.
pub fn softcap<B: Backend>(at: f64, x: FloatTensor<B>) -> FloatTensor<B> {
    B::float_mul_scalar(B::float_tanh(B::float_div_scalar(x, at.into())), at.into())
}
