//! Attention on slices: blocks of query rows in parallel, scores of one block and head at a time.

use std::ops::Range;

use awqc_ir::op::Sdpa;
use burn_ndarray::NdArrayTensor;
use rayon::prelude::*;

use super::math::{dot, exponentials, simd, softmax, tanh};
use super::matmul::{Into, Mat, product};
use super::view::{floats, shape_of, tensor};
use crate::interp::ops::sdpa::{NOT_CAUSAL, batch_differs, score_scale, sees};

/// Query rows of one task: a function of the shape alone, so that results do not depend on the threads.
const ROWS: usize = 32;

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
    let channels_of = |t: &NdArrayTensor| shape_of(t).last().copied().unwrap_or(0);
    let (shape, key_channels, channels) = (shape_of(&q), channels_of(&k), channels_of(&v));
    let (batch, seq) = (shape[0], shape[1]);
    let (q, k, v) = (floats(&q), floats(&k), floats(&v));
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
    let heads = Heads::new(op, key_channels, channels);
    let (row, stride) = (heads.outputs(), heads.queries());
    let mut out = vec![0.0; batch * seq * row];
    if !out.is_empty() {
        out.par_chunks_mut(seq * row).zip(pairs).enumerate().for_each(|(b, (out, (k, v)))| {
            let q = part(&q, b, batch);
            out.par_chunks_mut(ROWS * row).enumerate().for_each(|(block, out)| {
                let all = k.len() / key_channels.max(1);
                let first = all.saturating_sub(seq) + block * ROWS;
                let mut scores = Vec::new();
                for h in 0..heads.count() {
                    let queries = &q[block * ROWS * stride + h * heads.width..];
                    let new = Rows { first, count: out.len() / row, q: queries, q_stride: stride, out_stride: row };
                    heads.attend(h, &new, k, v, &mut scores, &mut out[h * heads.out..]);
                }
            });
        });
    }
    Ok(tensor(out, vec![batch, seq, row]))
}

/// The heads of one attention.
pub struct Heads<'a> {
    op: &'a Sdpa,
    /// Channels of a query or key head.
    pub width: usize,
    /// Channels of a value head.
    pub out: usize,
    key_channels: usize,
    channels: usize,
    /// The factor on the scores.
    pub scale: f32,
    /// Each head's slope of the position bias; none without one.
    slopes: Vec<f32>,
}

/// Query rows of one head.
pub(super) struct Rows<'a> {
    /// Position of the first row in the sequence.
    pub first: usize,
    /// Number of rows.
    pub count: usize,
    /// The head's channels of the first row, `[width]`; the next row begins `q_stride` later.
    pub q: &'a [f32],
    /// See [`Rows::q`].
    pub q_stride: usize,
    /// Distance of rows in the output.
    pub out_stride: usize,
}

impl<'a> Heads<'a> {
    /// For keys of `key_channels` and values of `channels`, all heads together.
    pub fn new(op: &'a Sdpa, key_channels: usize, channels: usize) -> Self {
        let kv_heads = op.kv_heads as usize;
        let width = key_channels / kv_heads;
        let scale = score_scale(op, width) as f32;
        let slopes = op.alibi.iter().flat_map(|a| a.slopes(op.heads)).map(|m| m as f32).collect();
        Self { op, width, out: channels / kv_heads, key_channels, channels, scale, slopes }
    }

    /// Query heads.
    pub fn count(&self) -> usize {
        self.op.heads as usize
    }

    /// Channels of a row of queries.
    pub fn queries(&self) -> usize {
        self.count() * self.width
    }

    /// Channels of a row of the output.
    pub fn outputs(&self) -> usize {
        self.count() * self.out
    }

    /// The keys that some row sees, of `count` rows from position `first` on, where there are `all`.
    pub fn seen(&self, first: usize, count: usize, all: usize) -> Range<usize> {
        let end = if self.op.causal { (first + count).min(all) } else { all };
        let window = self.op.window.and_then(|w| usize::try_from(w).ok());
        window.map_or(0, |w| (first + 1).saturating_sub(w)).min(end)..end
    }

    /// Head `h` of some rows over `k`, `[all, key_channels]`, and `v`, `[all, channels]`, into the head's channels of
    /// `out`. `scores` is scratch memory.
    pub(super) fn attend(
        &self,
        h: usize,
        rows: &Rows<'_>,
        k: &[f32],
        v: &[f32],
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let all = k.len() / self.key_channels.max(1);
        let kv = h / (self.op.heads / self.op.kv_heads) as usize;
        let Range { start, end } = self.seen(rows.first, rows.count, all);
        let span = end - start;
        scores.resize(rows.count * span, 0.0);
        let keys = &k[start * self.key_channels + kv * self.width..];
        let values = &v[start * self.channels + kv * self.out..];
        if rows.count == 1 {
            simd(
                #[inline(always)]
                || {
                    let q = &rows.q[..self.width];
                    for (j, s) in scores.iter_mut().enumerate() {
                        *s = self.scale * dot(q, &keys[j * self.key_channels..j * self.key_channels + self.width]);
                    }
                    self.probabilities(h, scores, rows.first, start);
                    let out = &mut out[..self.out];
                    out.fill(0.0);
                    for (j, s) in scores.iter().enumerate() {
                        let value = &values[j * self.channels..j * self.channels + self.out];
                        out.iter_mut().zip(value).for_each(|(o, v)| *o += s * v);
                    }
                },
            );
            return;
        }
        let queries = Mat { data: rows.q, row: rows.q_stride, col: 1 };
        let keys = Mat { data: keys, row: 1, col: self.key_channels };
        product(rows.count, span, self.width, scores, span, Into::Replace, queries, keys, self.scale);
        simd(
            #[inline(always)]
            || {
                for (i, line) in scores.chunks_exact_mut(span).enumerate() {
                    self.probabilities(h, line, rows.first + i, start);
                }
            },
        );
        let weights = Mat { data: scores, row: span, col: 1 };
        let values = Mat { data: values, row: self.channels, col: 1 };
        product(rows.count, self.out, span, out, rows.out_stride, Into::Replace, weights, values, 1.0);
    }

    /// Scores of head `h`'s query at `position` against the keys from `start` become probabilities.
    #[inline(always)]
    pub fn probabilities(&self, h: usize, line: &mut [f32], position: usize, start: usize) {
        softmax(self.masked(h, line, position, start));
    }

    /// As [`Heads::probabilities`] for a part of the keys: scores become exp(score − top). Gives `top` and the sum,
    /// with which parts can be joined; the sum is 0 if no key is seen.
    #[inline(always)]
    pub fn exponentials(&self, h: usize, line: &mut [f32], position: usize, start: usize) -> (f32, f32) {
        exponentials(self.masked(h, line, position, start))
    }

    /// The scores of the keys that are seen, capped and with the bias of their positions; the others become 0.
    #[inline(always)]
    fn masked<'l>(&self, h: usize, line: &'l mut [f32], position: usize, start: usize) -> &'l mut [f32] {
        // What a row sees is one run of keys: the mask has no holes.
        let lo = line.iter().enumerate().position(|(j, _)| sees(self.op, position, start + j)).unwrap_or(line.len());
        let hi = if self.op.causal { (position + 1).saturating_sub(start).min(line.len()) } else { line.len() };
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
        if let Some(slope) = self.slopes.get(h) {
            // Relative to the query: the same for the softmax, and the numbers stay small.
            let first = (start + lo) as f32 - position as f32;
            seen.iter_mut().enumerate().for_each(|(j, s)| *s += slope * (first + j as f32));
        }
        seen
    }
}
