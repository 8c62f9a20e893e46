//! Mixtures of experts: the choice on the host, the rows in burn's primitives.

use std::ops::Range;
use std::sync::Arc;

use awqc_ir::op::{GroupScore, TopK};
use awqc_passes::{ExecError, Tensor};
use burn_backend::tensor::{Device, FloatTensor, IntTensor};
use burn_backend::{Backend, Shape, TensorData};

use super::embedding::read_ints;
use super::shape::narrow;
use super::{dims, last, linear, reshape};
use crate::interp::{ExecBackend, Val, upload};

/// Which rows each expert has: the tokens that were sent to it, in order, one expert after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where each expert's rows end.
    pub ends: Vec<usize>,
    /// The token of each row.
    pub tokens: Vec<usize>,
    /// The axes of the tokens, `[B, S]`.
    pub lead: Vec<usize>,
    /// For each token and choice the row.
    rows: Vec<usize>,
}

impl Route {
    /// The route of `chosen`, `[B,S,k]`.
    ///
    /// # Errors
    /// When a number is not that of an expert.
    pub fn new(chosen: &[i64], shape: &[usize], experts: usize) -> Result<Self, String> {
        let k = last(shape).max(1);
        let mut counts = vec![0usize; experts];
        for e in chosen {
            let expert = usize::try_from(*e).ok().and_then(|e| counts.get_mut(e));
            *expert.ok_or_else(|| format!("there is no expert {e} among {experts}"))? += 1;
        }
        let mut ends = counts;
        let mut total = 0;
        for end in &mut ends {
            let count = *end;
            *end = total;
            total += count;
        }
        // `ends` holds where each expert's next row goes, and at last where its rows end.
        let mut tokens = vec![0; total];
        let mut rows = Vec::with_capacity(total);
        for (at, e) in chosen.iter().enumerate() {
            let next = &mut ends[*e as usize];
            tokens[*next] = at / k;
            rows.push(*next);
            *next += 1;
        }
        Ok(Self { ends, tokens, lead: shape.get(..2).unwrap_or(&[]).to_vec(), rows })
    }

    /// The rows of each expert.
    pub fn ranges(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        let starts = [0].into_iter().chain(self.ends.iter().copied());
        starts.zip(&self.ends).map(|(start, end)| start..*end)
    }
}

/// Rows of several experts.
#[derive(Clone, Debug)]
pub struct Routed<B: Backend> {
    /// `[rows, C]`.
    pub rows: FloatTensor<B>,
    /// Whose they are.
    pub route: Arc<Route>,
}

impl<B: Backend> Routed<B> {
    /// The shape of the value, `[E,B,S,C]`.
    pub fn shape(&self) -> Vec<usize> {
        let experts = [self.route.ends.len()].into_iter();
        experts.chain(self.route.lead.iter().copied()).chain([last(&dims::<B>(&self.rows))]).collect()
    }
}

/// Integers that choose rows.
pub(super) fn indices<B: Backend>(of: &[usize], device: &Device<B>) -> IntTensor<B> {
    let data: Vec<i64> = of.iter().map(|i| *i as i64).collect();
    B::int_from_data(TensorData::new(data, Shape::from(vec![of.len()])).convert::<B::IntElem>(), device)
}

/// The rows of `x`, `[B,S,C]`, that each expert gets.
///
/// # Errors
/// When a number in `chosen` is not that of an expert, or the device cannot be read.
pub fn dispatch<B: Backend>(
    experts: usize,
    x: FloatTensor<B>,
    chosen: IntTensor<B>,
    device: &Device<B>,
) -> Result<Routed<B>, String> {
    let shape = Val::<B>::Int(chosen.clone()).shape();
    let route = Route::new(&read_ints::<B>(chosen)?, &shape, experts)?;
    let width = last(&dims::<B>(&x));
    let tokens = dims::<B>(&x).iter().product::<usize>() / width.max(1);
    let rows = B::float_select(reshape::<B>(x, &[tokens, width]), 0, indices::<B>(&route.tokens, device));
    Ok(Routed { rows, route: Arc::new(route) })
}

/// `Σ_j w[…,j] · y[i[…,j],…]`. `y` is what was dispatched, or has the rows of all tokens for all experts.
///
/// # Errors
/// When `chosen` is not what `y` was dispatched by, or the device cannot be read.
pub fn combine<B: Backend>(
    y: Val<B>,
    w: FloatTensor<B>,
    chosen: IntTensor<B>,
    device: &Device<B>,
) -> Result<FloatTensor<B>, String> {
    let (lead, k) = (Val::<B>::Int(chosen.clone()).shape(), last(&dims::<B>(&w)).max(1));
    let chosen = read_ints::<B>(chosen)?;
    let experts = y.shape().first().copied().unwrap_or(0);
    let route = Route::new(&chosen, &lead, experts)?;
    let tokens = chosen.len() / k;
    let (rows, at) = match y {
        Val::Routed(y) if *y.route == route => (y.rows, route.rows),
        Val::Routed(_) => return Err("the rows were dispatched by another choice of experts".into()),
        Val::Float(y) => {
            let width = last(&dims::<B>(&y));
            let at = chosen.iter().enumerate().map(|(i, e)| *e as usize * tokens + i / k).collect();
            (reshape::<B>(y, &[experts * tokens, width]), at)
        }
        Val::Int(_) => return Err("integers cannot be added up".into()),
    };
    let width = last(&dims::<B>(&rows));
    let rows = B::float_select(rows, 0, indices::<B>(&at, device));
    let rows = B::float_mul(reshape::<B>(rows, &[tokens, k, width]), reshape::<B>(w, &[tokens, k, 1]));
    let out: Vec<usize> = lead.iter().take(2).copied().chain([width]).collect();
    Ok(reshape::<B>(B::float_sum_dim(rows, 1), &out))
}

/// See [`ExecBackend::op_experts`]. Experts without rows cost nothing.
pub fn experts<B: ExecBackend>(
    x: FloatTensor<B>,
    ranges: impl Iterator<Item = Range<usize>>,
    w: &FloatTensor<B>,
) -> FloatTensor<B> {
    let shape = dims::<B>(w);
    let (out, width) = (shape[1], shape[2]);
    let mut parts = Vec::new();
    for (e, range) in ranges.enumerate().filter(|(_, r)| !r.is_empty()) {
        let rows = narrow::<B>(x.clone(), 0, range.start, range.len());
        let matrix = reshape::<B>(narrow::<B>(w.clone(), 0, e, 1), &[out, width]);
        parts.push(linear::linear::<B>(rows, &matrix, None));
    }
    match parts.is_empty() {
        true => upload::<B>(Tensor { shape: vec![0, out], data: Vec::new() }, &B::float_device(w)),
        false => B::float_cat(parts, 0),
    }
}

/// The same where every expert has the rows of all tokens, `[E,B,S,in]`.
pub fn all_experts<B: ExecBackend>(x: FloatTensor<B>, w: &FloatTensor<B>) -> FloatTensor<B> {
    let mut shape = dims::<B>(&x);
    let (count, width) = (shape[0], last(&shape));
    let rows = shape.iter().product::<usize>() / (count * width).max(1);
    let x = reshape::<B>(x, &[count * rows, width]);
    let y = B::op_experts(x, (0..count).map(|e| e * rows..(e + 1) * rows).collect(), w);
    if let Some(n) = shape.last_mut() {
        *n = dims::<B>(w)[1];
    }
    reshape::<B>(y, &shape)
}

/// See [`TopK`]: weights `[…,k]` and experts `[…,k]`.
///
/// # Errors
/// When the device cannot be read.
pub fn top_k<B: Backend>(
    op: &TopK,
    p: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
    device: &Device<B>,
) -> Result<(FloatTensor<B>, IntTensor<B>), ExecError> {
    let p = Val::<B>::Float(p).to_tensor()?;
    let bias = bias.map(|b| Val::<B>::Float(b).to_tensor()).transpose()?;
    let (mut weights, mut experts) = (Vec::new(), Vec::new());
    for row in p.data.chunks(p.cols().max(1)) {
        let choice: Vec<f32> = match &bias {
            Some(b) => row.iter().zip(&b.data).map(|(p, b)| p + b).collect(),
            None => row.to_vec(),
        };
        for (w, e) in choose(op, row, choice) {
            weights.push(w);
            experts.push(e as i32);
        }
    }
    let mut shape = p.shape.clone();
    if let Some(k) = shape.last_mut() {
        *k = op.k as usize;
    }
    let Val::Int(experts) = Val::<B>::ints(experts, &shape, device) else {
        return Err(ExecError::Tensor("top_k: the experts are not integers".into()));
    };
    Ok((upload::<B>(Tensor { shape, data: weights }, device), experts))
}

/// One token's experts and their weights. `choice` are the scores by which they are chosen.
pub fn choose(op: &TopK, scores: &[f32], mut choice: Vec<f32>) -> Vec<(f32, usize)> {
    if let Some(groups) = &op.groups {
        let size = (choice.len() / groups.count.max(1) as usize).max(1);
        let score = |group: &[f32]| -> f32 {
            let best = sorted(group);
            let n = if groups.by == GroupScore::TwoBest { 2 } else { 1 };
            best.iter().take(n).map(|i| group[*i]).sum()
        };
        let of_groups: Vec<f32> = choice.chunks(size).map(score).collect();
        for g in sorted(&of_groups).into_iter().skip(groups.keep as usize) {
            choice.iter_mut().skip(g * size).take(size).for_each(|v| *v = f32::NEG_INFINITY);
        }
    }
    let chosen: Vec<usize> = sorted(&choice).into_iter().take(op.k as usize).collect();
    let mut weights: Vec<f32> = match op.near {
        None => chosen.iter().map(|e| scores[*e]).collect(),
        Some(near) => (0..chosen.len()).map(|j| share(scores, &chosen, j, near as f32)).collect(),
    };
    if op.normalize {
        let sum: f32 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= sum + 1e-20);
    }
    if let Some(scale) = op.scale {
        weights.iter_mut().for_each(|w| *w *= scale as f32);
    }
    weights.into_iter().zip(chosen).collect()
}

/// The share of the `j`-th choice in a softmax over the experts near it, those chosen before left out.
fn share(scores: &[f32], chosen: &[usize], j: usize, near: f32) -> f32 {
    let best = scores[chosen[j]];
    let counts = |(e, s): &(usize, &f32)| !chosen[..j].contains(e) && (best - **s) / s.abs().max(best) <= 2.0 * near;
    let sum: f32 = scores.iter().enumerate().filter(counts).map(|(_, s)| (s - best).exp()).sum();
    1.0 / sum
}

/// The indices of `scores`, largest first, equal ones in order.
fn sorted(scores: &[f32]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order
}
