//! Attention in burn's primitives, and a KV cache that any backend can use.

use awqc_ir::op::Sdpa;
use awqc_passes::Tensor;
use burn_backend::tensor::FloatTensor;
use burn_backend::{Backend, TensorMetadata};

use super::{last, reshape, softmax_last};
use crate::interp::{ExecBackend, upload};

/// Keys and values as tensors that grow by concatenation.
#[derive(Debug)]
pub struct GrowingCache<B: Backend> {
    kv: Option<(FloatTensor<B>, FloatTensor<B>)>,
}

impl<B: Backend> Default for GrowingCache<B> {
    fn default() -> Self {
        Self { kv: None }
    }
}

impl<B: Backend> GrowingCache<B> {
    /// Appends `k` and `v`, `[B,S,C]`, and returns all keys and values and the number of earlier positions.
    ///
    /// # Errors
    /// When the batch differs from the cache's.
    fn append(
        &mut self,
        k: FloatTensor<B>,
        v: FloatTensor<B>,
    ) -> Result<(FloatTensor<B>, FloatTensor<B>, usize), String> {
        let (k, v, past) = match self.kv.take() {
            None => (k, v, 0),
            Some((old_k, old_v)) => {
                let (have, new) = (old_k.shape().to_vec(), k.shape().to_vec());
                if have[0] != new[0] {
                    self.kv = Some((old_k, old_v));
                    return Err(batch_differs(have[0], new[0]));
                }
                (B::float_cat(vec![old_k, k], 1), B::float_cat(vec![old_v, v], 1), have[1])
            }
        };
        self.kv = Some((k.clone(), v.clone()));
        Ok((k, v, past))
    }
}

/// The message for a batch that changed under a cache.
pub(crate) fn batch_differs(have: usize, new: usize) -> String {
    format!("the cache holds {have} sequences, {new} are given: reset the session first")
}

/// The message for a bidirectional `sdpa` that continues.
pub(crate) const NOT_CAUSAL: &str =
    "an sdpa that is not causal cannot continue from a cache: give the whole sequence at once";

/// Whether the query at absolute position `i` sees the key at `j`.
pub(crate) fn sees(op: &Sdpa, i: usize, j: usize) -> bool {
    (!op.causal || j <= i) && op.window.is_none_or(|w| (j as u64).saturating_add(w) > i as u64)
}

/// The factor on the scores for heads of `width` channels.
pub(crate) fn score_scale(op: &Sdpa, width: usize) -> f64 {
    op.scale.unwrap_or_else(|| 1.0 / (width as f64).sqrt())
}

/// See [`crate::interp::ExecBackend::op_sdpa`].
///
/// # Errors
/// As there.
pub fn sdpa<B: ExecBackend>(
    op: &Sdpa,
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    cache: Option<&mut GrowingCache<B>>,
) -> Result<FloatTensor<B>, String> {
    let (k, v, past) = match cache {
        Some(cache) => cache.append(k, v)?,
        None => (k, v, 0),
    };
    if past > 0 && !op.causal {
        return Err(NOT_CAUSAL.into());
    }
    let (shape, all) = (q.shape().to_vec(), k.shape().to_vec());
    let (batch, seq, keys) = (shape[0], shape[1], all[1]);
    let (heads, kv) = (op.heads as usize, op.kv_heads as usize);
    let share = heads / kv;
    let (width, out) = (last(&shape) / heads, last(&v.shape().to_vec()) / kv);

    let q = B::float_permute(reshape::<B>(q, &[batch, seq, kv, share, width]), &[0, 2, 3, 1, 4]);
    let q = reshape::<B>(q, &[batch, kv, share * seq, width]);
    let k = B::float_permute(reshape::<B>(k, &[batch, keys, kv, width]), &[0, 2, 3, 1]);
    let v = B::float_permute(reshape::<B>(v, &[batch, keys, kv, out]), &[0, 2, 1, 3]);
    let device = B::float_device(&q);
    let mut scores = B::float_mul_scalar(B::op_matmul(q, k), score_scale(op, width).into());
    if let Some(at) = op.softcap {
        scores = super::elementwise::softcap::<B>(at, scores);
    }
    if let Some(alibi) = &op.alibi {
        let slopes = alibi.slopes(op.heads);
        let bias = slopes.iter().flat_map(|m| (0..keys).map(move |j| (m * j as f64) as f32)).collect();
        let bias = upload::<B>(Tensor { shape: vec![1, heads, 1, keys], data: bias }, &device);
        let wide = reshape::<B>(scores, &[batch, heads, seq, keys]);
        scores = reshape::<B>(B::float_add(wide, bias), &[batch, kv, share * seq, keys]);
    }
    if op.causal || op.window.is_some() {
        let bias = |i, j| if sees(op, past + i, j) { 0.0 } else { f32::NEG_INFINITY };
        let mask = (0..seq).flat_map(|i| (0..keys).map(move |j| bias(i, j))).collect();
        let mask = upload::<B>(Tensor { shape: vec![1, 1, seq, keys], data: mask }, &device);
        let wide = reshape::<B>(scores, &[batch * kv, share, seq, keys]);
        scores = reshape::<B>(B::float_add(wide, mask), &[batch, kv, share * seq, keys]);
    }
    let y = B::op_matmul(softmax_last::<B>(scores), v);
    let y = B::float_permute(reshape::<B>(y, &[batch, kv, share, seq, out]), &[0, 3, 1, 2, 4]);
    Ok(reshape::<B>(y, &[batch, seq, heads * out]))
}
