//! `split` and `concat` in burn's primitives.

use burn_backend::tensor::FloatTensor;
use burn_backend::{Backend, Slice};

use super::dims;

/// A part of one axis.
pub(crate) fn narrow<B: Backend>(x: FloatTensor<B>, axis: usize, start: usize, len: usize) -> FloatTensor<B> {
    let part = |(i, n): (usize, usize)| if i == axis { Slice::from(start..start + len) } else { Slice::from(0..n) };
    let slices: Vec<Slice> = dims::<B>(&x).into_iter().enumerate().map(part).collect();
    B::float_slice(x, &slices)
}

/// See [`crate::interp::ExecBackend::op_split`].
pub fn split<B: Backend>(sizes: &[usize], x: FloatTensor<B>) -> Vec<FloatTensor<B>> {
    let axis = dims::<B>(&x).len().saturating_sub(1);
    let mut start = 0;
    let part = |size: &usize| {
        let out = narrow::<B>(x.clone(), axis, start, *size);
        start += size;
        out
    };
    sizes.iter().map(part).collect()
}

/// See [`crate::interp::ExecBackend::op_concat`].
pub fn concat<B: Backend>(parts: Vec<FloatTensor<B>>) -> FloatTensor<B> {
    let axis = parts.first().map_or(0, |p| dims::<B>(p).len().saturating_sub(1));
    B::float_cat(parts, axis)
}
