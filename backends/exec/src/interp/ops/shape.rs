//! `split`, `concat` and `repeat` in burn's primitives.

use awqc_ir::op::Split;
use burn_backend::tensor::FloatTensor;
use burn_backend::{Backend, Slice};

use super::{dims, reshape};

/// A part of one axis.
pub(crate) fn narrow<B: Backend>(x: FloatTensor<B>, axis: usize, start: usize, len: usize) -> FloatTensor<B> {
    let part = |(i, n): (usize, usize)| if i == axis { Slice::from(start..start + len) } else { Slice::from(0..n) };
    let slices: Vec<Slice> = dims::<B>(&x).into_iter().enumerate().map(part).collect();
    B::float_slice(x, &slices)
}

/// The shape of `x` with its last axis as `[heads, width]`.
fn by_heads<B: Backend>(heads: usize, x: FloatTensor<B>) -> FloatTensor<B> {
    let mut shape = dims::<B>(&x);
    let width = shape.pop().unwrap_or(1) / heads.max(1);
    shape.extend([heads, width]);
    reshape::<B>(x, &shape)
}

/// The reverse of [`by_heads`].
fn flat<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let mut shape = dims::<B>(&x);
    let width = shape.pop().unwrap_or(1);
    if let Some(heads) = shape.last_mut() {
        *heads *= width;
    }
    reshape::<B>(x, &shape)
}

/// See [`crate::interp::ExecBackend::op_split`].
pub fn split<B: Backend>(op: &Split, x: FloatTensor<B>) -> Vec<FloatTensor<B>> {
    let x = by_heads::<B>(op.heads as usize, x);
    let axis = dims::<B>(&x).len().saturating_sub(1);
    let mut start = 0;
    let part = |size: &u64| {
        let out = narrow::<B>(x.clone(), axis, start, *size as usize);
        start += *size as usize;
        flat::<B>(out)
    };
    op.sizes.iter().map(part).collect()
}

/// See [`crate::interp::ExecBackend::op_concat`].
pub fn concat<B: Backend>(heads: usize, parts: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    let parts: Vec<_> = parts.into_iter().map(|p| by_heads::<B>(heads, p)).collect();
    let axis = parts.first().map_or(0, |p| dims::<B>(p).len().saturating_sub(1));
    flat::<B>(B::float_cat(parts, axis))
}
