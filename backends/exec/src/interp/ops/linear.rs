//! `linear` in burn's primitives.

use burn_backend::tensor::FloatTensor;

use super::{dims, last, lift, reshape};
use crate::interp::ExecBackend;

/// See [`crate::interp::ExecBackend::op_linear`].
pub fn linear<B: ExecBackend>(x: FloatTensor<B>, w: &FloatTensor<B>, b: Option<&FloatTensor<B>>) -> FloatTensor<B> {
    let shape = dims::<B>(&x);
    let k = last(&shape);
    let m = shape.iter().product::<usize>() / k.max(1);
    let y = B::op_matmul(reshape::<B>(x, &[m, k]), B::float_transpose(w.clone()));
    let y = match b {
        Some(b) => B::float_add(y, lift::<B>(b.clone(), 2)),
        None => y,
    };
    let mut out = shape;
    if let Some(n) = out.last_mut() {
        *n = dims::<B>(w)[0];
    }
    reshape::<B>(y, &out)
}
