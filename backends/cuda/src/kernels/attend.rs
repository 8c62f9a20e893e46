//! Attention of new tokens over a KV cache that holds them already.
//!
//! A block takes one query head of one token and a part of the positions. A few neighbouring lanes share a position, 16
//! bytes of its key and value each, so that a warp reads several whole rows of the cache at once. Each such group keeps
//! its own running maximum, sum and mean of values (the online softmax of Milakov and Gimelshein, arXiv 1805.02867),
//! and at the end the groups' are joined. For long caches the positions are split among blocks, whose results the
//! second kernel joins in the same way (Flash-Decoding).

use awqc_ir::op::Sdpa;
use cubecl::prelude::*;
use half::f16;

use super::Call;
use super::rows::tanh;
use super::tile::WARP;
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Args, Source, emit};

/// Threads of a block.
pub const THREADS: u32 = 128;
/// A score below all others.
pub(super) const LOWEST: f32 = -1e30;

/// The sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Columns of a query or key head.
    pub key: usize,
    /// Columns of a value head.
    pub value: usize,
    /// Numbers from one token's queries to the next.
    pub pitch: usize,
    /// The first of a token's queries.
    pub col: usize,
    /// The factor on scores.
    pub scale: f32,
    /// Positions that a token sees, itself included.
    pub window: Option<usize>,
    /// Scores become `c tanh(score / c)`.
    pub softcap: Option<f32>,
    /// Linear biases: the largest exponent and the factor on all slopes.
    pub alibi: Option<(f32, f32)>,
    /// Parts that the positions are cut into.
    pub splits: usize,
    /// Whether the result is f16.
    pub half: bool,
}

impl Shape {
    /// The sizes of an op with heads of these columns.
    ///
    /// # Errors
    /// A sentence that says what no kernel covers.
    pub fn of(op: &Sdpa, key: usize, value: usize, half: bool, splits: usize) -> Result<Self, String> {
        if !op.causal {
            return Err("attention that sees later positions has no kernel".into());
        }
        let shape = Self {
            heads: op.heads as usize,
            kv_heads: op.kv_heads as usize,
            key,
            value,
            pitch: op.heads as usize * key,
            col: 0,
            scale: op.scale.unwrap_or_else(|| (key as f64).sqrt().recip()) as f32,
            window: op.window.and_then(|w| usize::try_from(w).ok()),
            softcap: op.softcap.map(|c| c as f32),
            alibi: op.alibi.as_ref().map(|a| (a.max as f32, a.scale as f32)),
            splits,
            half,
        };
        if shape.lanes() > WARP {
            return Err(format!("heads of {key} and {value} columns have no kernel: at most {} do", 32 * shape.load()));
        }
        Ok(shape)
    }

    /// Columns of one load.
    fn load(&self) -> u32 {
        [8, 4, 2, 1].into_iter().find(|n| self.key.is_multiple_of(*n) && self.value.is_multiple_of(*n)).unwrap_or(1)
            as u32
    }

    /// Lanes that share a position.
    fn lanes(&self) -> u32 {
        (self.key.max(self.value) as u32).div_ceil(self.load()).next_power_of_two()
    }

    /// f32 numbers between the two kernels, for each token.
    pub fn partials(&self) -> usize {
        if self.splits == 1 { 0 } else { self.heads * self.splits * (self.value + 2) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Spec {
    heads: u32,
    kv_heads: u32,
    key: u32,
    value: u32,
    pitch: u32,
    col: u32,
    scale: f32,
    window: u32,
    shape: Shape,
    splits: u32,
    load: u32,
    lanes: u32,
    /// Groups of lanes in a block.
    groups: u32,
}

impl Spec {
    fn of(s: &Shape) -> Self {
        Self {
            heads: s.heads as u32,
            kv_heads: s.kv_heads as u32,
            key: s.key as u32,
            value: s.value as u32,
            pitch: s.pitch as u32,
            col: s.col as u32,
            scale: s.scale,
            window: s.window.map_or(0, |w| u32::try_from(w).unwrap_or(0)),
            shape: *s,
            splits: s.splits as u32,
            load: s.load(),
            lanes: s.lanes(),
            groups: THREADS / s.lanes(),
        }
    }
}

/// The kernel. The grid is `[heads, tokens, splits]`.
///
/// Arguments: queries, f32 `[tokens, pitch]`; keys, f16 `[positions, kv_heads · key]`; values, f16 `[positions,
/// kv_heads · value]`; the result `[tokens, heads · value]`, or, of several splits, f32 `[tokens, heads, splits,
/// value + 2]`; the call.
///
/// # Errors
/// When the code generator refuses it.
pub fn source(arch: &Arch, shape: &Shape) -> Result<Source, CudaError> {
    let spec = Spec::of(shape);
    let name = format!("attend_{}x{}_{}", shape.heads, shape.kv_heads, shape.key);
    emit(arch, &name, THREADS, |args| match (spec.load, shape.half && shape.splits == 1) {
        (8, true) => body::<f16, Const<8>>(args, spec),
        (8, false) => body::<f32, Const<8>>(args, spec),
        (4, true) => body::<f16, Const<4>>(args, spec),
        (4, false) => body::<f32, Const<4>>(args, spec),
        (2, true) => body::<f16, Const<2>>(args, spec),
        (2, false) => body::<f32, Const<2>>(args, spec),
        (_, true) => body::<f16, Const<1>>(args, spec),
        (_, false) => body::<f32, Const<1>>(args, spec),
    })
}

fn body<O: Float, N: Size>(args: &mut Args, spec: Spec) {
    let q = args.input::<f32>("queries");
    let keys = args.input::<Vector<f16, N>>("keys");
    let values = args.input::<Vector<f16, N>>("values");
    let out = args.output::<O>("out");
    let call = args.input::<u32>("call");
    attend::expand::<O, N>(args.scope(), q, keys, values, out, call, spec);
}

#[cube]
fn attend<O: Float, N: Size>(
    q: &Array<f32>,
    keys: &Array<Vector<f16, N>>,
    values: &Array<Vector<f16, N>>,
    out: &mut Array<O>,
    call: &Array<u32>,
    #[comptime] spec: Spec,
) {
    let head = CUBE_POS_X;
    let token = CUBE_POS_Y;
    let kv = head / comptime!(spec.heads / spec.kv_heads);
    let group = UNIT_POS_X / comptime!(spec.lanes);
    let part = UNIT_POS_X % comptime!(spec.lanes);
    let load = comptime!(spec.load);
    let (key_loads, value_loads) = comptime!((spec.key / spec.load, spec.value / spec.load));

    // Positions of this block.
    let end = call[comptime!(Call::Past as usize)] + token + 1;
    let begin = if comptime!(spec.window > 0) {
        max(end, comptime!(spec.window)) - comptime!(spec.window)
    } else {
        0u32.runtime()
    };
    let each = (end - begin + comptime!(spec.splits - 1)) / comptime!(spec.splits);
    let low = begin + CUBE_POS_Z * each;
    let high = min(end, low + each);

    let mut query = Array::<f32>::new(comptime!(load as usize));
    let mut sums = Array::<f32>::new(comptime!(load as usize));
    #[unroll]
    for i in 0..load {
        query[comptime!(i as usize)] = 0.0f32;
        sums[comptime!(i as usize)] = 0.0f32;
        if part < key_loads {
            let at = token * comptime!(spec.pitch) + comptime!(spec.col) + head * comptime!(spec.key) + part * load + i;
            query[comptime!(i as usize)] = q[at as usize] * comptime!(spec.scale);
        }
    }
    let mut highest = LOWEST.runtime();
    let mut weight = 0.0f32;
    let mut base = low;
    // All lanes of a warp go round together: they exchange scores.
    while base < high {
        let p = base + group;
        let there = p < high;
        let mut score = 0.0f32;
        if there && part < key_loads {
            let k = keys[((p * comptime!(spec.kv_heads) + kv) * key_loads + part) as usize];
            #[unroll]
            for i in 0..load {
                score += query[comptime!(i as usize)] * f32::cast_from(k[comptime!(i as usize)]);
            }
        }
        #[unroll]
        for step in 0..comptime!(spec.lanes.ilog2()) {
            score += plane_shuffle_xor(score, comptime!(1u32 << step));
        }
        score = bend(score, p, head, comptime!(spec.shape));
        let next = select(there, max(highest, score), highest);
        let keep = (highest - next).exp();
        let own = select(there, (score - next).exp(), 0.0f32);
        weight = weight * keep + own;
        highest = next;
        if there && part < value_loads {
            let v = values[((p * comptime!(spec.kv_heads) + kv) * value_loads + part) as usize];
            #[unroll]
            for i in 0..load {
                sums[comptime!(i as usize)] =
                    sums[comptime!(i as usize)] * keep + own * f32::cast_from(v[comptime!(i as usize)]);
            }
        }
        base += comptime!(spec.groups);
    }

    let mut all_highest = SharedMemory::<f32>::new(comptime!(spec.groups as usize));
    let mut all_weights = SharedMemory::<f32>::new(comptime!(spec.groups as usize));
    let mut all_sums = SharedMemory::<f32>::new(comptime!((spec.groups * spec.value) as usize));
    if part == 0 {
        all_highest[group as usize] = highest;
        all_weights[group as usize] = weight;
    }
    if part < value_loads {
        #[unroll]
        for i in 0..load {
            all_sums[(group * comptime!(spec.value) + part * load + i) as usize] = sums[comptime!(i as usize)];
        }
    }
    sync_cube();
    let mut top = LOWEST.runtime();
    for g in 0..comptime!(spec.groups) {
        top = max(top, all_highest[g as usize]);
    }
    let mut total = 0.0f32;
    for g in 0..comptime!(spec.groups) {
        total += all_weights[g as usize] * (all_highest[g as usize] - top).exp();
    }
    let row = (token * comptime!(spec.heads) + head) * comptime!(spec.splits) + CUBE_POS_Z;
    let mut c = UNIT_POS_X;
    while c < comptime!(spec.value) {
        let mut sum = 0.0f32;
        for g in 0..comptime!(spec.groups) {
            let factor = (all_highest[g as usize] - top).exp();
            sum += all_sums[(g * comptime!(spec.value) + c) as usize] * factor;
        }
        if comptime!(spec.splits == 1) {
            out[(row * comptime!(spec.value) + c) as usize] = O::cast_from(sum / total);
        } else {
            out[(row * comptime!(spec.value + 2) + 2 + c) as usize] = O::cast_from(sum);
        }
        c += THREADS;
    }
    if comptime!(spec.splits > 1) {
        if UNIT_POS_X == 0 {
            out[(row * comptime!(spec.value + 2)) as usize] = O::cast_from(top);
            out[(row * comptime!(spec.value + 2) + 1) as usize] = O::cast_from(total);
        }
    }
}

/// The score with position `p`, capped and biased.
#[cube]
pub(super) fn bend(score: f32, p: u32, head: u32, #[comptime] shape: Shape) -> f32 {
    let mut score = score;
    if comptime!(shape.softcap.is_some()) {
        let cap = comptime!(shape.softcap.unwrap_or(1.0));
        score = cap * tanh(score / cap);
    }
    if comptime!(shape.alibi.is_some()) {
        score += slope(head, shape) * f32::cast_from(p);
    }
    score
}

/// The slope of a head's linear bias: see [`awqc_ir::op::sdpa::Alibi`].
#[cube]
fn slope(head: u32, #[comptime] shape: Shape) -> f32 {
    let (most, scale) = comptime!(shape.alibi.unwrap_or((0.0, 0.0)));
    let heads = comptime!(shape.heads as u32);
    let whole = comptime!(if heads.is_power_of_two() { heads } else { heads.next_power_of_two() / 2 });
    let exponent = select(
        head < whole,
        f32::cast_from(head + 1) * comptime!(most / whole as f32),
        f32::cast_from(2 * head + 1 - 2 * clamp_max(head, whole)) * comptime!(most / (2 * whole) as f32),
    );
    comptime!(scale) * (0.0f32 - exponent * comptime!(std::f32::consts::LN_2)).exp()
}

/// The kernel that joins the splits. The grid is `[heads, tokens]`.
///
/// Arguments: the partial results of [`source`]; the result `[tokens, heads · value]`.
///
/// # Errors
/// When the code generator refuses it.
pub fn join_source(arch: &Arch, shape: &Shape) -> Result<Source, CudaError> {
    let spec = Spec::of(shape);
    let name = format!("attend_join_{}x{}_{}", shape.heads, shape.splits, shape.value);
    emit(arch, &name, THREADS, |args| {
        let partial = args.input::<f32>("partials");
        if shape.half {
            let out = args.output::<f16>("out");
            join::expand(args.scope(), partial, out, spec);
        } else {
            let out = args.output::<f32>("out");
            join::expand(args.scope(), partial, out, spec);
        }
    })
}

#[cube]
fn join<O: Float>(partial: &Array<f32>, out: &mut Array<O>, #[comptime] spec: Spec) {
    let row = CUBE_POS_Y * comptime!(spec.heads) + CUBE_POS_X;
    let first = row * comptime!(spec.splits * (spec.value + 2));
    let mut top = LOWEST.runtime();
    #[unroll]
    for s in 0..comptime!(spec.splits) {
        top = max(top, partial[(first + comptime!(s * (spec.value + 2))) as usize]);
    }
    let mut c = UNIT_POS_X;
    while c < comptime!(spec.value) {
        let mut sum = 0.0f32;
        let mut total = 0.0f32;
        #[unroll]
        for s in 0..comptime!(spec.splits) {
            let at = first + comptime!(s * (spec.value + 2));
            let factor = (partial[at as usize] - top).exp();
            total += partial[(at + 1) as usize] * factor;
            sum += partial[(at + 2 + c) as usize] * factor;
        }
        out[(row * comptime!(spec.value) + c) as usize] = O::cast_from(sum / total);
        c += THREADS;
    }
}
