//! `learned`, `append` and `cut` in burn's primitives.

use awqc_ir::op::Cut;
use awqc_passes::Tensor;
use burn_backend::Backend;
use burn_backend::tensor::FloatTensor;

use super::shape::narrow;
use super::{dims, last, reshape};
use crate::interp::upload;

/// See [`awqc_ir::op::Learned`]; `sequences` is the first axis of its first operand.
pub fn learned<B: Backend>(sequences: usize, w: FloatTensor<B>) -> FloatTensor<B> {
    let shape = dims::<B>(&w);
    let width = last(&shape);
    let rows = shape.iter().product::<usize>() / width.max(1);
    if sequences == 0 {
        return upload::<B>(Tensor { shape: vec![0, rows, width], data: Vec::new() }, &B::float_device(&w));
    }
    B::float_cat(vec![reshape::<B>(w, &[1, rows, width]); sequences], 0)
}

/// See [`awqc_ir::op::Append`].
pub fn append<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>) -> FloatTensor<B> {
    B::float_cat(vec![a, b], 1)
}

/// See [`Cut`].
pub fn cut<B: Backend>(op: &Cut, x: FloatTensor<B>) -> FloatTensor<B> {
    narrow::<B>(x, 1, op.start as usize, op.len as usize)
}
