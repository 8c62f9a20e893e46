//! `count`, `cross_sdpa` and `gate` in burn's primitives.

use std::collections::BTreeMap;

use awqc_ir::op::{Count, CrossSdpa};
use awqc_passes::Tensor;
use burn_backend::Backend;
use burn_backend::tensor::{Device, FloatTensor, IntTensor};

use super::embedding::read_ints;
use super::routing::indices;
use super::sdpa::batch_differs;
use super::shape::narrow;
use super::{dims, last, lift, reshape};
use crate::interp::{ExecBackend, Val, upload};

/// See [`Count`]; `seen` holds the numbers of earlier positions, one for each sequence, and takes the new ones.
///
/// # Errors
/// When the batch differs from that of the earlier positions, or the device cannot be read.
pub fn count<B: Backend>(
    op: &Count,
    ids: IntTensor<B>,
    seen: Option<&mut Vec<i32>>,
    device: &Device<B>,
) -> Result<Val<B>, String> {
    let shape = Val::<B>::Int(ids.clone()).shape();
    let (batch, seq) = (shape[0], shape[1]);
    let mut counts = seen.as_ref().map_or_else(Vec::new, |s| s.to_vec());
    if counts.is_empty() {
        counts.resize(batch, 0);
    }
    if counts.len() != batch {
        return Err(batch_differs(counts.len(), batch));
    }
    let ids = read_ints::<B>(ids)?;
    let mut out = Vec::with_capacity(ids.len());
    for (count, ids) in counts.iter_mut().zip(ids.chunks(seq.max(1))) {
        for id in ids {
            *count += i32::from(*id == i64::from(op.token));
            out.push(*count);
        }
    }
    if let Some(seen) = seen {
        *seen = counts;
    }
    Ok(Val::ints(out, &[batch, seq], device))
}

/// See [`CrossSdpa`]: the positions that see one piece are an attention of their own.
///
/// # Errors
/// When a position sees a piece that is not there, or the device cannot be read.
pub fn cross_sdpa<B: ExecBackend>(
    op: &CrossSdpa,
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    which: IntTensor<B>,
) -> Result<FloatTensor<B>, String> {
    let (shape, memory) = (dims::<B>(&q), dims::<B>(&k));
    let (batch, seq, pieces) = (shape[0], shape[1], memory[0]);
    let width = last(&dims::<B>(&v)) / op.kv_heads.max(1) as usize * op.heads as usize;
    if batch == 0 || !pieces.is_multiple_of(batch) {
        return Err(format!("{pieces} images cannot be shared out to {batch} sequences: give each as many"));
    }
    let share = pieces / batch;
    let mut groups: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (at, piece) in read_ints::<B>(which)?.into_iter().enumerate().filter(|(_, p)| *p != 0) {
        let piece = usize::try_from(piece).ok().filter(|p| *p <= share).ok_or_else(|| {
            format!(
                "the text speaks of image {piece}, {share} are given: give as many images as the text has places for"
            )
        })?;
        groups.entry(at / seq.max(1) * share + piece - 1).or_default().push(at);
    }
    let device = B::float_device(&q);
    let q = reshape::<B>(q, &[batch * seq, last(&shape)]);
    // Row 0 is that of the positions that see nothing.
    let mut parts = vec![upload::<B>(Tensor { shape: vec![1, width], data: vec![0.0; width] }, &device)];
    let (mut order, mut next) = (vec![0; batch * seq], 1);
    for (piece, rows) in groups {
        let queries = B::float_select(q.clone(), 0, indices::<B>(&rows, &device));
        let queries = reshape::<B>(queries, &[1, rows.len(), last(&shape)]);
        let piece = |t: &FloatTensor<B>| narrow::<B>(t.clone(), 0, piece, 1);
        let seen = B::op_sdpa(&op.within(), queries, piece(&k), piece(&v), None)?;
        parts.push(reshape::<B>(seen, &[rows.len(), width]));
        for row in rows {
            order[row] = next;
            next += 1;
        }
    }
    let rows = B::float_select(B::float_cat(parts, 0), 0, indices::<B>(&order, &device));
    Ok(reshape::<B>(rows, &[batch, seq, width]))
}

/// See [`awqc_ir::op::Gate`].
pub fn gate<B: Backend>(x: FloatTensor<B>, g: FloatTensor<B>) -> FloatTensor<B> {
    let rank = dims::<B>(&x).len();
    B::float_mul(x, lift::<B>(B::float_tanh(g), rank))
}
