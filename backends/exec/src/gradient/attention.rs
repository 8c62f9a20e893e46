//! Attention with a gradient: the scores of one head at a time, computed anew on the way back.

use awqc_ir::op::Sdpa;
use burn_autodiff::checkpoint::base::Checkpointer;
use burn_autodiff::checkpoint::strategy::NoCheckpointing;
use burn_autodiff::grads::Gradients;
use burn_autodiff::ops::{Backward, Ops, OpsKind};
use burn_backend::TensorMetadata;
use burn_backend::tensor::FloatTensor;
use rayon::prelude::*;

use super::tracked::Tracked;
use crate::host::math::{dot, simd, softmax};
use crate::host::matmul::{Into, Mat, product};
use crate::host::{Host, floats, tensor};
use crate::interp::ops::sdpa::{score_scale, sees};

/// Whether [`attend`] covers an `sdpa`: scores are products and nothing else.
pub(super) fn covered(op: &Sdpa) -> bool {
    op.softcap.is_none() && op.alibi.is_none()
}

/// `sdpa` without a cache, for one that is [`covered`]. `q: [B,S,H·d]`, `k: [B,S,K·d]`, `v: [B,S,K·e]`.
pub(super) fn attend(
    op: &Sdpa,
    q: FloatTensor<Tracked>,
    k: FloatTensor<Tracked>,
    v: FloatTensor<Tracked>,
) -> FloatTensor<Tracked> {
    let heads = Heads::of(op, &q.primitive, &k.primitive, &v.primitive);
    let out = heads.forward(&floats(&q.primitive), &floats(&k.primitive), &floats(&v.primitive));
    let out = tensor(out, vec![heads.batch, heads.queries, heads.heads * heads.value]);
    let nodes = [q.node.clone(), k.node.clone(), v.node.clone()];
    match Attention.prepare::<NoCheckpointing>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((op.clone(), q.primitive, k.primitive, v.primitive), out),
        OpsKind::UnTracked(prep) => prep.finish(out),
    }
}

/// The way back.
#[derive(Debug)]
struct Attention;

impl Backward<Host, 3> for Attention {
    type State = (Sdpa, FloatTensor<Host>, FloatTensor<Host>, FloatTensor<Host>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (op, q, k, v) = ops.state;
        let gradient = grads.consume::<Host>(&ops.node);
        let heads = Heads::of(&op, &q, &k, &v);
        let found = heads.backward(&floats(&q), &floats(&k), &floats(&v), &floats(&gradient));
        for ((node, of), found) in ops.parents.into_iter().zip([&q, &k, &v]).zip(found) {
            if let Some(node) = node {
                grads.register::<Host>(node.id, tensor(found, of.shape().to_vec()));
            }
        }
    }
}

/// The sizes of an attention.
struct Heads<'a> {
    op: &'a Sdpa,
    batch: usize,
    queries: usize,
    keys: usize,
    heads: usize,
    kv: usize,
    /// Channels of a query and a key.
    width: usize,
    /// Channels of a value.
    value: usize,
}

impl<'a> Heads<'a> {
    fn of(op: &'a Sdpa, q: &FloatTensor<Host>, k: &FloatTensor<Host>, v: &FloatTensor<Host>) -> Self {
        let (q, k, v) = (q.shape().to_vec(), k.shape().to_vec(), v.shape().to_vec());
        let (heads, kv) = (op.heads.max(1) as usize, op.kv_heads.max(1) as usize);
        Self { op, batch: q[0], queries: q[1], keys: k[1], heads, kv, width: q[2] / heads, value: v[2] / kv }
    }

    /// Where head `h` of sequence `b` begins, in a tensor of `heads` heads, `rows` rows and `width` channels.
    fn at(b: usize, h: usize, rows: usize, heads: usize, width: usize) -> usize {
        (b * rows * heads + h) * width
    }

    /// The probabilities of one head, `[queries, keys]`.
    fn probabilities(&self, q: &[f32], k: &[f32], b: usize, h: usize) -> Vec<f32> {
        let (share, keys) = (self.heads / self.kv, self.keys);
        let scale = score_scale(self.op, self.width) as f32;
        let mut p = vec![0.0; self.queries * keys];
        let q = &q[Self::at(b, h, self.queries, self.heads, self.width)..];
        let k = &k[Self::at(b, h / share, keys, self.kv, self.width)..];
        let q = Mat { data: q, row: self.heads * self.width, col: 1 };
        let k = Mat { data: k, row: 1, col: self.kv * self.width };
        product(self.queries, keys, self.width, &mut p, keys, Into::Replace, q, k, scale);
        for (i, row) in p.chunks_mut(keys.max(1)).enumerate() {
            for (j, score) in row.iter_mut().enumerate() {
                if !sees(self.op, i, j) {
                    *score = f32::NEG_INFINITY;
                }
            }
            simd(
                #[inline(always)]
                || softmax(row),
            );
        }
        p
    }

    fn forward(&self, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
        let (share, pitch) = (self.heads / self.kv, self.heads * self.value);
        let mut out = vec![0.0; self.batch * self.queries * pitch];
        let pairs: Vec<(usize, usize)> = (0..self.batch).flat_map(|b| (0..self.heads).map(move |h| (b, h))).collect();
        let each = |(b, h): &(usize, usize)| {
            let p = self.probabilities(q, k, *b, *h);
            let mut part = vec![0.0; self.queries * self.value];
            let v = &v[Self::at(*b, h / share, self.keys, self.kv, self.value)..];
            let p = Mat { data: &p, row: self.keys, col: 1 };
            let v = Mat { data: v, row: self.kv * self.value, col: 1 };
            product(self.queries, self.value, self.keys, &mut part, self.value, Into::Replace, p, v, 1.0);
            part
        };
        let parts: Vec<Vec<f32>> = pairs.par_iter().map(each).collect();
        for ((b, h), part) in pairs.iter().zip(parts) {
            for (s, row) in part.chunks(self.value.max(1)).enumerate() {
                let at = (b * self.queries + s) * pitch + h * self.value;
                out[at..at + self.value].copy_from_slice(row);
            }
        }
        out
    }

    /// The gradients at queries, keys and values.
    fn backward(&self, q: &[f32], k: &[f32], v: &[f32], dy: &[f32]) -> [Vec<f32>; 3] {
        let share = self.heads / self.kv;
        let scale = score_scale(self.op, self.width) as f32;
        let (n, m, d, e) = (self.queries, self.keys, self.width, self.value);
        let pairs: Vec<(usize, usize)> = (0..self.batch).flat_map(|b| (0..self.heads).map(move |h| (b, h))).collect();
        let each = |(b, h): &(usize, usize)| {
            let p = self.probabilities(q, k, *b, *h);
            let dy = Mat { data: &dy[Self::at(*b, *h, n, self.heads, e)..], row: self.heads * e, col: 1 };
            let v = &v[Self::at(*b, h / share, m, self.kv, e)..];
            let mut ds = vec![0.0; n * m];
            product(n, m, e, &mut ds, m, Into::Replace, dy, Mat { data: v, row: 1, col: self.kv * e }, 1.0);
            let mut dv = vec![0.0; m * e];
            product(m, e, n, &mut dv, e, Into::Replace, Mat { data: &p, row: 1, col: m }, dy, 1.0);
            simd(
                #[inline(always)]
                || {
                    for (ds, p) in ds.chunks_mut(m.max(1)).zip(p.chunks(m.max(1))) {
                        let mean = dot(ds, p);
                        ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - mean));
                    }
                },
            );
            let k = Mat { data: &k[Self::at(*b, h / share, m, self.kv, d)..], row: self.kv * d, col: 1 };
            let q = Mat { data: &q[Self::at(*b, *h, n, self.heads, d)..], row: self.heads * d, col: 1 };
            let (mut dq, mut dk) = (vec![0.0; n * d], vec![0.0; m * d]);
            product(n, d, m, &mut dq, d, Into::Replace, Mat { data: &ds, row: m, col: 1 }, k, scale);
            product(m, d, n, &mut dk, d, Into::Replace, Mat { data: &ds, row: 1, col: m }, q, scale);
            (dq, dk, dv)
        };
        let parts: Vec<(Vec<f32>, Vec<f32>, Vec<f32>)> = pairs.par_iter().map(each).collect();
        let zeros = |rows: usize, heads: usize, width: usize| vec![0.0; self.batch * rows * heads * width];
        let (mut dq, mut dk, mut dv) = (zeros(n, self.heads, d), zeros(m, self.kv, d), zeros(m, self.kv, e));
        // Query heads that share keys and values add up, in order.
        for ((b, h), (q, k, v)) in pairs.iter().zip(&parts) {
            let group = h / share;
            scatter(&mut dq, q, Self::at(*b, *h, n, self.heads, d), self.heads * d, d);
            scatter(&mut dk, k, Self::at(*b, group, m, self.kv, d), self.kv * d, d);
            scatter(&mut dv, v, Self::at(*b, group, m, self.kv, e), self.kv * e, e);
        }
        [dq, dk, dv]
    }
}

/// Adds rows of `width` numbers to those that begin at `first` and are `pitch` apart.
fn scatter(out: &mut [f32], rows: &[f32], first: usize, pitch: usize, width: usize) {
    for (i, row) in rows.chunks(width.max(1)).enumerate() {
        let at = first + i * pitch;
        out[at..at + width].iter_mut().zip(row).for_each(|(o, r)| *o += r);
    }
}
