//! Normalisations in burn's primitives.

use awqc_ir::op::{LayerNorm, RmsNorm};
use burn_backend::Backend;
use burn_backend::tensor::FloatTensor;

use super::{dims, last, lift, reshape};

/// See [`crate::interp::ExecBackend::op_rms_norm`].
pub fn rms_norm<B: Backend>(op: &RmsNorm, x: FloatTensor<B>, g: Option<&FloatTensor<B>>) -> FloatTensor<B> {
    let shape = dims::<B>(&x);
    let heads = op.heads.unwrap_or(1) as usize;
    let width = last(&shape) / heads.max(1);
    let rows = shape.iter().product::<usize>() / width.max(1);
    let x = reshape::<B>(x, &[rows, width]);
    let mean = B::float_mean_dim(B::float_mul(x.clone(), x.clone()), 1);
    let root = B::float_sqrt(B::float_add_scalar(mean, op.eps.into()));
    let y = B::float_div(x, root);
    let y = match g {
        Some(g) => B::float_mul(y, lift::<B>(B::float_add_scalar(g.clone(), op.offset.into()), 2)),
        None => y,
    };
    reshape::<B>(y, &shape)
}

/// See [`crate::interp::ExecBackend::op_layer_norm`].
pub fn layer_norm<B: Backend>(
    op: &LayerNorm,
    x: FloatTensor<B>,
    g: Option<&FloatTensor<B>>,
    b: Option<&FloatTensor<B>>,
) -> FloatTensor<B> {
    let shape = dims::<B>(&x);
    let heads = op.heads.unwrap_or(1) as usize;
    let width = last(&shape) / heads.max(1);
    let rows = shape.iter().product::<usize>() / (heads * width).max(1);
    let x = reshape::<B>(x, &[rows * heads, width]);
    let x = B::float_sub(x.clone(), B::float_mean_dim(x, 1));
    let var = B::float_mean_dim(B::float_mul(x.clone(), x.clone()), 1);
    let y = B::float_div(x, B::float_sqrt(B::float_add_scalar(var, op.eps.into())));
    // The parameters are those of one head, or of each.
    let mut y = reshape::<B>(y, &[rows, heads, width]);
    if let Some(g) = g {
        y = B::float_mul(y, lift::<B>(g.clone(), 3));
    }
    if let Some(b) = b {
        y = B::float_add(y, lift::<B>(b.clone(), 3));
    }
    reshape::<B>(y, &shape)
}
