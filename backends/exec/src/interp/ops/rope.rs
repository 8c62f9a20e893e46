//! Rotary embedding in burn's primitives.

use awqc_ir::op::{Rope, RopeTable};
use awqc_passes::{ExecError, Tensor};
use burn_backend::tensor::{Device, FloatTensor, IntTensor};
use burn_backend::{Backend, TensorMetadata};

use super::shape::narrow;
use super::{dims, embedding, last, reshape};
use crate::interp::frequencies::{angles, frequencies};
use crate::interp::upload;

/// `cos` and `sin`, `[S, dim/2]`, of integer positions. There are few: the host computes them.
///
/// # Errors
/// When the device cannot be read.
pub fn table<B: Backend>(
    op: &RopeTable,
    positions: IntTensor<B>,
    device: &Device<B>,
) -> Result<(FloatTensor<B>, FloatTensor<B>), ExecError> {
    let positions = embedding::read_ints::<B>(positions).map_err(ExecError::Unavailable)?;
    let len = positions.iter().max().map_or(0, |p| p.saturating_add(1)).max(0) as u64;
    let (frequencies, factor) = frequencies(op, len);
    let (cos, sin) = positions.iter().flat_map(|p| angles(&frequencies, factor, *p)).unzip();
    let tensor = |data| upload::<B>(Tensor { shape: vec![positions.len(), frequencies.len()], data }, device);
    Ok((tensor(cos), tensor(sin)))
}

/// See [`crate::interp::ExecBackend::op_rope`].
pub fn rope<B: Backend>(op: &Rope, x: FloatTensor<B>, cos: &FloatTensor<B>, sin: &FloatTensor<B>) -> FloatTensor<B> {
    let shape = x.shape().to_vec();
    let pairs = last(&dims::<B>(cos));
    let heads = op.heads as usize;
    let width = last(&shape) / heads.max(1);
    let (batch, seq) = (shape[0], shape[1]);
    let angle = |t: &FloatTensor<B>| reshape::<B>(t.clone(), &[1, seq, 1, pairs]);
    let (cos, sin) = (angle(cos), angle(sin));
    let x = reshape::<B>(x, &[batch, seq, heads, width]);
    let turned = narrow::<B>(x.clone(), 3, 0, 2 * pairs);
    let (a, b) = if op.interleaved {
        let t = reshape::<B>(turned, &[batch, seq, heads, pairs, 2]);
        let side = |i| reshape::<B>(narrow::<B>(t.clone(), 4, i, 1), &[batch, seq, heads, pairs]);
        (side(0), side(1))
    } else {
        (narrow::<B>(turned.clone(), 3, 0, pairs), narrow::<B>(turned, 3, pairs, pairs))
    };
    let first = B::float_sub(B::float_mul(a.clone(), cos.clone()), B::float_mul(b.clone(), sin.clone()));
    let second = B::float_add(B::float_mul(b, cos), B::float_mul(a, sin));
    let turned = if op.interleaved {
        let wide = |t: FloatTensor<B>| reshape::<B>(t, &[batch, seq, heads, pairs, 1]);
        let both = B::float_cat(vec![wide(first), wide(second)], 4);
        reshape::<B>(both, &[batch, seq, heads, 2 * pairs])
    } else {
        B::float_cat(vec![first, second], 3)
    };
    let out = if width > 2 * pairs {
        let rest = narrow::<B>(x, 3, 2 * pairs, width - 2 * pairs);
        B::float_cat(vec![turned, rest], 3)
    } else {
        turned
    };
    reshape::<B>(out, &shape)
}
