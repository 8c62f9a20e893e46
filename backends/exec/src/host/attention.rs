//! Attention on slices: blocks of query rows in parallel, scores of one block and head at a time.

use awqc_ir::op::Sdpa;
use burn_ndarray::NdArrayTensor;
use rayon::prelude::*;

use super::math::{simd, softmax, tanh};
use super::matmul::{Into, Mat, product};
use super::view::{floats, shape_of, tensor};
use crate::interp::ops::sdpa::{NOT_CAUSAL, batch_differs, score_scale, sees};

/// Query rows of one task.
const ROWS: usize = 64;

/// Keys and values of earlier positions, one growing row-major buffer for each sequence.
#[derive(Debug, Default)]
pub struct HostCache {
    sequences: Vec<Sequence>,
}

#[derive(Debug, Default)]
struct Sequence {
    k: Vec<f32>,
    v: Vec<f32>,
}

impl HostCache {
    fn append(&mut self, batch: usize, k: &[f32], v: &[f32]) -> Result<(), String> {
        if self.sequences.is_empty() {
            self.sequences.resize_with(batch, Sequence::default);
        }
        if self.sequences.len() != batch {
            return Err(batch_differs(self.sequences.len(), batch));
        }
        for (i, sequence) in self.sequences.iter_mut().enumerate() {
            sequence.k.extend_from_slice(part(k, i, batch));
            sequence.v.extend_from_slice(part(v, i, batch));
        }
        Ok(())
    }
}

/// The `i`-th of `n` equal parts.
fn part(data: &[f32], i: usize, n: usize) -> &[f32] {
    let len = data.len() / n.max(1);
    &data[i * len..(i + 1) * len]
}

pub(super) fn sdpa(
    op: &Sdpa,
    q: NdArrayTensor,
    k: NdArrayTensor,
    v: NdArrayTensor,
    cache: Option<&mut HostCache>,
) -> Result<NdArrayTensor, String> {
    let (shape, channels) = (shape_of(&q), shape_of(&v).last().copied().unwrap_or(0));
    let (batch, seq) = (shape[0], shape[1]);
    let (q, k, v) = (floats(&q), floats(&k), floats(&v));
    let key_channels = k.len() / (batch * seq).max(1);
    let pairs: Vec<(&[f32], &[f32])> = match cache {
        None => (0..batch).map(|b| (part(&k, b, batch), part(&v, b, batch))).collect(),
        Some(cache) => {
            if !op.causal && cache.sequences.iter().any(|s| !s.k.is_empty()) {
                return Err(NOT_CAUSAL.into());
            }
            cache.append(batch, &k, &v)?;
            cache.sequences.iter().map(|s| (&s.k[..], &s.v[..])).collect()
        }
    };
    let (heads, kv_heads) = (op.heads as usize, op.kv_heads as usize);
    let head = Heads {
        op,
        heads,
        share: heads / kv_heads,
        width: key_channels / kv_heads,
        out: channels / kv_heads,
        key_channels,
        channels,
        seq,
    };
    let row = heads * head.out;
    let mut out = vec![0.0; batch * seq * row];
    if !out.is_empty() {
        out.par_chunks_mut(seq * row).zip(pairs).enumerate().for_each(|(b, (out, (k, v)))| {
            let q = part(&q, b, batch);
            out.par_chunks_mut(ROWS * row).enumerate().for_each(|(block, out)| head.block(block * ROWS, q, k, v, out));
        });
    }
    Ok(tensor(out, vec![batch, seq, row]))
}

/// The shape of one attention.
struct Heads<'a> {
    op: &'a Sdpa,
    heads: usize,
    /// Query heads a key/value head.
    share: usize,
    /// Channels of a query or key head.
    width: usize,
    /// Channels of a value head.
    out: usize,
    key_channels: usize,
    channels: usize,
    /// New positions.
    seq: usize,
}

impl Heads<'_> {
    /// Rows `first..` of one sequence, as many as `out` holds.
    fn block(&self, first: usize, q: &[f32], k: &[f32], v: &[f32], out: &mut [f32]) {
        let (row, all) = (self.heads * self.out, k.len() / self.key_channels);
        let (rows, past) = (out.len() / row, all - self.seq);
        let stride = self.heads * self.width;
        // The keys that some row of the block sees.
        let end = if self.op.causal { (past + first + rows).min(all) } else { all };
        let window = self.op.window.and_then(|w| usize::try_from(w).ok());
        let start = window.map_or(0, |w| (past + first + 1).saturating_sub(w));
        let span = end - start;
        let scale = score_scale(self.op, self.width) as f32;
        let mut scores = vec![0.0; rows * span];
        for h in 0..self.heads {
            let kv = h / self.share;
            let queries = Mat { data: &q[first * stride + h * self.width..], row: stride, col: 1 };
            let keys = Mat { data: &k[start * self.key_channels + kv * self.width..], row: 1, col: self.key_channels };
            product(rows, span, self.width, &mut scores, span, Into::Replace, queries, keys, scale);
            simd(
                #[inline(always)]
                || {
                    for (i, line) in scores.chunks_exact_mut(span).enumerate() {
                        self.probabilities(line, past + first + i, start);
                    }
                },
            );
            let weights = Mat { data: &scores, row: span, col: 1 };
            let values = Mat { data: &v[start * self.channels + kv * self.out..], row: self.channels, col: 1 };
            product(rows, self.out, span, &mut out[h * self.out..], row, Into::Replace, weights, values, 1.0);
        }
    }

    /// Scores of the query at `position` against the keys from `start` become probabilities.
    #[inline(always)]
    fn probabilities(&self, line: &mut [f32], position: usize, start: usize) {
        // What a row sees is one run of keys: the mask has no holes.
        let lo = line.iter().enumerate().position(|(j, _)| sees(self.op, position, start + j)).unwrap_or(line.len());
        let hi = if self.op.causal { (position + 1 - start).min(line.len()) } else { line.len() };
        let (before, rest) = line.split_at_mut(lo);
        let (seen, after) = rest.split_at_mut(hi.saturating_sub(lo));
        before.fill(0.0);
        after.fill(0.0);
        if let Some(at) = self.op.softcap {
            let at = at as f32;
            for s in seen.iter_mut() {
                *s = at * tanh(*s / at);
            }
        }
        softmax(seen);
    }
}
