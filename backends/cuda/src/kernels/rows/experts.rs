//! Which experts a token goes to, and the sum of what they say.

use awqc_ir::op::{GroupScore, TopK};
use cubecl::prelude::*;

use super::norm::block_sum;
use super::{From, Grid, THREADS, first, start};
use crate::kernels::tile::WARP;
use crate::kernels::top::{from_key, to_key};

/// The most experts of a layer: a block has the scores of all in shared memory.
const MOST: u64 = 1024;
/// The most experts of a token: a thread weighs each.
const MOST_EACH: u64 = 64;

/// How experts are chosen: [`TopK`] for a number of experts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// Experts of the layer.
    pub experts: u32,
    /// Experts of a token.
    pub each: u32,
    /// Only experts of the best groups are chosen.
    pub groups: Option<Groups>,
    /// Weights are divided by their sum.
    pub normalize: bool,
    /// Weights are multiplied by this.
    pub scale: Option<f32>,
    /// Weights are shares in softmaxes over the experts near the best.
    pub near: Option<f32>,
}

/// Equal groups of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// How many.
    pub count: u32,
    /// How many of them stay.
    pub keep: u32,
    /// They are compared by the sum of their two best experts, not by the best one.
    pub two: bool,
}

impl Choice {
    /// The choice of `op` among so many experts.
    ///
    /// # Errors
    /// A sentence that says what no kernel covers.
    pub fn of(op: &TopK, experts: usize) -> Result<Self, String> {
        if experts as u64 > MOST || op.k > MOST_EACH {
            return Err(format!("no kernel chooses {} of {experts} experts: at most {MOST_EACH} of {MOST}", op.k));
        }
        let groups = op.groups.as_ref().map(|g| Groups {
            count: g.count as u32,
            keep: g.keep as u32,
            two: g.by == GroupScore::TwoBest,
        });
        Ok(Self {
            experts: experts as u32,
            each: op.k as u32,
            groups,
            normalize: op.normalize,
            scale: op.scale.map(|s| s as f32),
            near: op.near.map(|n| n as f32),
        })
    }

    fn group_count(&self) -> u32 {
        self.groups.map_or(1, |g| g.count)
    }

    fn group_keep(&self) -> u32 {
        self.groups.map_or(1, |g| g.keep)
    }

    fn group_size(&self) -> u32 {
        self.experts / self.group_count().max(1)
    }

    fn by_two(&self) -> bool {
        self.groups.is_some_and(|g| g.two)
    }
}

/// Sizes of a sum over experts, in numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sum {
    /// What experts say.
    pub(super) from: From,
    /// Their weights.
    pub(super) by: From,
    pub(super) each: u32,
    pub(super) stride: u32,
    pub(super) width: u32,
}

/// `e^x / Σ e^x` of a row, by a block.
#[cube]
pub(super) fn softmax<O: Float>(
    x: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] from: From,
    #[comptime] width: u32,
) {
    let row = start(from);
    let mut best = f32::new(-3.0e38);
    let mut c = UNIT_POS_X;
    while c < width {
        best = max(best, x[(row + c) as usize]);
        c += THREADS;
    }
    let best = block_max(best);
    let mut sum = 0.0f32;
    let mut c = UNIT_POS_X;
    while c < width {
        sum += (x[(row + c) as usize] - best).exp();
        c += THREADS;
    }
    let sum = block_sum(sum);
    let mut c = UNIT_POS_X;
    while c < width {
        out[(base + c) as usize] = O::cast_from((x[(row + c) as usize] - best).exp() / sum);
        c += THREADS;
    }
}

/// The largest value of all threads of a block, the same in each.
#[cube]
fn block_max(value: f32) -> f32 {
    let warps = comptime!((THREADS / WARP) as usize);
    let mut shared = SharedMemory::<f32>::new(warps);
    let own = plane_max(value);
    sync_cube();
    if UNIT_POS_X % WARP == 0 {
        shared[(UNIT_POS_X / WARP) as usize] = own;
    }
    sync_cube();
    let mut best = shared[0usize];
    #[unroll]
    for w in 1..warps {
        best = max(best, shared[w]);
    }
    best
}

/// A token's experts, largest score first and of equals the one with the smaller number, and their weights.
///
/// Each thread counts for its experts how many come before: that is their place. So there is no order to keep, and
/// every choice is one of different experts, whatever the scores are.
#[cube]
pub(super) fn choose(
    scores: &Array<f32>,
    bias: &Array<f32>,
    out: &mut Array<f32>,
    base: u32,
    #[comptime] from: From,
    #[comptime] of: Choice,
    #[comptime] has_bias: bool,
) {
    let row = start(from);
    let mut keys = SharedMemory::<u32>::new(comptime!(of.experts as usize));
    let mut places = SharedMemory::<u32>::new(comptime!(of.experts as usize));
    let mut weights = SharedMemory::<f32>::new(comptime!(of.each as usize));
    let mut e = UNIT_POS_X;
    while e < comptime!(of.experts) {
        let mut score = scores[(row + e) as usize];
        if comptime!(has_bias) {
            score += bias[e as usize];
        }
        keys[e as usize] = to_key(score);
        e += THREADS;
    }
    sync_cube();
    if comptime!(of.groups.is_some()) {
        keep_groups(&mut keys, of);
    }
    let mut e = UNIT_POS_X;
    while e < comptime!(of.experts) {
        let place = before(&keys, e, comptime!(of.experts));
        places[e as usize] = place;
        if place < comptime!(of.each) {
            weights[place as usize] = scores[(row + e) as usize];
            out[(base + comptime!(of.each) + place) as usize] = f32::reinterpret(e);
        }
        e += THREADS;
    }
    sync_cube();
    let own = clamp_max(UNIT_POS_X, comptime!(of.each - 1));
    let mut weight = weights[own as usize];
    if comptime!(of.near.is_some()) {
        weight = share(scores, &places, row, own, weight, of);
        sync_cube();
        if UNIT_POS_X < comptime!(of.each) {
            weights[own as usize] = weight;
        }
        sync_cube();
    }
    if comptime!(of.normalize) {
        let mut sum = 0.0f32;
        for j in 0..comptime!(of.each) {
            sum += weights[j as usize];
        }
        weight /= sum + 1.0e-20f32;
    }
    if comptime!(of.scale.is_some()) {
        weight *= comptime!(of.scale.unwrap_or(1.0));
    }
    if UNIT_POS_X < comptime!(of.each) {
        out[(base + own) as usize] = weight;
    }
    // A step behind this one may use the same shared memory.
    sync_cube();
}

/// How many of the keys come before that of `own`.
#[cube]
fn before(keys: &SharedMemory<u32>, own: u32, #[comptime] count: u32) -> u32 {
    let key = keys[own as usize];
    let mut before = 0u32;
    for other in 0..count {
        let its = keys[other as usize];
        if its > key || (its == key && other < own) {
            before += 1;
        }
    }
    before
}

/// Makes the scores of all experts −∞ that are not in the best groups.
#[cube]
fn keep_groups(keys: &mut SharedMemory<u32>, #[comptime] of: Choice) {
    let mut groups = SharedMemory::<u32>::new(comptime!(of.group_count() as usize));
    let mut g = UNIT_POS_X;
    while g < comptime!(of.group_count()) {
        let mut best = 0u32;
        let mut second = 0u32;
        for i in 0..comptime!(of.group_size()) {
            let key = keys[(g * comptime!(of.group_size()) + i) as usize];
            second = max(second, min(best, key));
            best = max(best, key);
        }
        if comptime!(of.by_two()) {
            best = to_key(from_key(best) + from_key(second));
        }
        groups[g as usize] = best;
        g += THREADS;
    }
    sync_cube();
    let mut e = UNIT_POS_X;
    while e < comptime!(of.experts) {
        let place = before(&groups, e / comptime!(of.group_size()), comptime!(of.group_count()));
        if place >= comptime!(of.group_keep()) {
            keys[e as usize] = 0x007f_ffffu32;
        }
        e += THREADS;
    }
    sync_cube();
}

/// The share of the choice `own` in a softmax over the experts near it, those chosen before left out.
#[cube]
fn share(
    scores: &Array<f32>,
    places: &SharedMemory<u32>,
    row: u32,
    own: u32,
    best: f32,
    #[comptime] of: Choice,
) -> f32 {
    let mut sum = 0.0f32;
    for e in 0..comptime!(of.experts) {
        let score = scores[(row + e) as usize];
        let far = (best - score) / max(score.abs(), best);
        if places[e as usize] >= own && far <= comptime!(2.0 * of.near.unwrap_or(0.0)) {
            sum += (score - best).exp();
        }
    }
    1.0f32 / sum
}

/// `Σ_j w_j · y_j`, in the order of the choices.
#[cube]
pub(super) fn combine<O: Float>(
    y: &Array<f32>,
    w: &Array<f32>,
    out: &mut Array<O>,
    base: u32,
    #[comptime] of: Sum,
    #[comptime] grid: Grid,
) {
    let mut c = first();
    while c < comptime!(of.width) {
        let mut sum = 0.0f32;
        for j in 0..comptime!(of.each) {
            let at = start(of.from) + j * comptime!(of.stride) + c;
            sum += w[(start(of.by) + j) as usize] * y[at as usize];
        }
        out[(base + c) as usize] = O::cast_from(sum);
        c += comptime!(THREADS * grid.blocks);
    }
}
