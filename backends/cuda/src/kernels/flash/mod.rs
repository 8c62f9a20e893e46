//! Attention of many new tokens over a KV cache that holds them already: reading a prompt, on tensor cores.
//!
//! A block takes 16 tokens of one query head for each of its warps, and goes through the positions that they see in
//! tiles. It multiplies queries with a tile's keys, turns the scores into weights by a running maximum and sum, and
//! multiplies these with the tile's values (FlashAttention-2, arXiv 2307.08691). Scores and weights never leave the
//! registers: the product of 16 tokens and 8 positions lies in a warp as the next product wants its left operand.
//!
//! Queries and weights are rounded to f16, which keys and values are in the cache; all sums, maxima and exponentials
//! are f32. Of keys, 32 columns are taken at once: a lane holds eight neighbouring ones, which both operands of a
//! product agree upon. Positions lie in shared memory in an order that does the same for values: those of a lane are
//! eight neighbouring ones too, so that all of shared memory is read 16 bytes at a time.

mod load;
mod softmax;

use cubecl::prelude::*;
use half::f16;

use self::load::{load_keys, load_query, load_values, store_keys, store_values};
use self::softmax::{bend_all, hide, weigh};
use super::Call;
use super::attend::{LOWEST, Shape};
use super::tile::{Pair, Sums, WARP, product, zero};
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Args, Source, emit};

/// Tokens of a warp.
const ROWS: u32 = 16;
/// The most columns of a head.
const MOST: usize = 256;
/// Heads up to so many columns keep their queries in registers, and take 64 positions at a time instead of 32.
const NARROW: usize = 128;
/// The score of a position that a token does not see: so far below [`LOWEST`] that its weight is 0 in any case.
const HIDDEN: f32 = -3e38;

/// 16 bytes: eight f16 numbers.
type Eight = Vector<u32, Const<4>>;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Spec {
    shape: Shape,
    /// Steps of 32 columns in a key. Columns beyond the last are 0.
    steps: u32,
    /// Positions of a tile.
    positions: u32,
    /// Units of 16 bytes from one key to the next in shared memory.
    key_pitch: u32,
    /// Units of 16 bytes from one column of values to the next.
    value_pitch: u32,
    /// Warps of a block.
    warps: u32,
    /// Whether queries wait in shared memory, not in registers.
    stashed: bool,
}

impl Spec {
    fn of(shape: &Shape) -> Self {
        let steps = shape.key.div_ceil(32) as u32;
        let narrow = shape.key.max(shape.value) <= NARROW;
        let positions = if narrow { 64 } else { 32 };
        // Eight lanes read two rows of four units each: those of the next row must lie in the other banks.
        let pitch = |units: u32| if units % 8 == 4 { units } else { units + 4 };
        Self {
            shape: *shape,
            steps,
            positions,
            key_pitch: pitch(4 * steps),
            value_pitch: pitch(positions / 8),
            // Twice the warps share loads that would take too many registers.
            warps: if narrow { 4 } else { 8 },
            stashed: !narrow,
        }
    }

    fn threads(&self) -> u32 {
        self.warps * WARP
    }

    /// Tokens of a block.
    fn tokens(&self) -> u32 {
        self.warps * ROWS
    }

    fn kv_head(&self) -> u32 {
        (self.shape.heads / self.shape.kv_heads) as u32
    }

    /// Units of 16 bytes of a key, or a value, in the cache.
    fn units(columns: usize) -> u32 {
        columns as u32 / 8
    }

    /// Loads of a thread for the keys of a tile.
    fn key_loads(&self) -> u32 {
        if self.stashed { self.steps.div_ceil(2) } else { self.positions * 4 * self.steps / self.threads() }
    }

    /// Columns of a load of values.
    fn value_columns(&self) -> u32 {
        if self.stashed { 4 } else { 8 }
    }

    fn window(&self) -> u32 {
        // One that holds every position is none.
        self.shape.window.and_then(|w| i32::try_from(w).ok()).map_or(0, i32::unsigned_abs)
    }
}

/// Whether the kernel covers an attention.
///
/// # Errors
/// What it does not cover, to follow the word "attention".
pub fn covers(shape: &Shape) -> Result<(), String> {
    let Shape { key, value, pitch, col, .. } = *shape;
    if !key.is_multiple_of(8) || !value.is_multiple_of(8) {
        return Err(format!("with heads of {key} and {value} columns, which 8 does not divide,"));
    }
    if key.max(value) > MOST {
        return Err(format!("with heads of more than {MOST} columns"));
    }
    // Their sums alone take half of the registers.
    if value > NARROW && value > key {
        return Err(format!("with values of {value} columns and keys of {key}"));
    }
    if !pitch.is_multiple_of(4) || !col.is_multiple_of(4) {
        return Err("whose queries do not begin at multiples of 16 bytes".into());
    }
    Ok(())
}

/// Tokens of a block.
pub fn tokens(shape: &Shape) -> u32 {
    Spec::of(shape).tokens()
}

/// The kernel. The grid is `[heads, tokens / n]`, rounded up, with `n` from [`tokens`]; [`Shape::splits`] must be 1,
/// and [`covers`] hold.
///
/// Arguments: as those of [`super::attend::source`].
///
/// # Errors
/// When the code generator refuses it.
pub fn source(arch: &Arch, shape: &Shape) -> Result<Source, CudaError> {
    let spec = Spec::of(shape);
    let name = format!("flash_{}x{}_{}", shape.heads, shape.kv_heads, shape.key);
    emit(arch, &name, spec.threads(), |args| match (shape.half, spec.stashed) {
        (true, false) => body::<f16, Const<4>>(args, spec),
        (true, true) => body::<f16, Const<2>>(args, spec),
        (false, false) => body::<f32, Const<4>>(args, spec),
        (false, true) => body::<f32, Const<2>>(args, spec),
    })
}

/// The kernel whose threads load `N` words of a value at a time, and write `O`.
fn body<O: Float, N: Size>(args: &mut Args, spec: Spec) {
    let q = args.input::<Vector<f32, Const<4>>>("queries");
    let keys = args.input::<Eight>("keys");
    let values = args.input::<Vector<u32, N>>("values");
    let out = args.output::<Vector<O, Const<2>>>("out");
    let call = args.input::<u32>("call");
    flash::expand::<O, N>(args.scope(), q, keys, values, out, call, spec);
}

#[cube]
fn flash<O: Float, N: Size>(
    q: &Array<Vector<f32, Const<4>>>,
    keys: &Array<Eight>,
    values: &Array<Vector<u32, N>>,
    out: &mut Array<Vector<O, Const<2>>>,
    call: &Array<u32>,
    #[comptime] spec: Spec,
) {
    let lane = UNIT_POS_X % WARP;
    let row = lane / 4;
    let quarter = lane % 4;
    let head = CUBE_POS_X;
    let kv = head / comptime!(spec.kv_head());
    let tokens = call[comptime!(Call::Tokens as usize)];
    let past = call[comptime!(Call::Past as usize)];
    // The last tokens see most positions: they begin first.
    let first = ((tokens - 1) / comptime!(spec.tokens()) - CUBE_POS_Y) * comptime!(spec.tokens());
    let token = first + UNIT_POS_X / WARP * ROWS + row;
    let end = past + min(first + comptime!(spec.tokens()), tokens);
    let window = comptime!(spec.window());
    let begin = if comptime!(window > 0) { max(past + first + 1, window) - window } else { 0u32.runtime() };

    let mut key_tile = SharedMemory::<Eight>::new(comptime!((spec.positions * spec.key_pitch) as usize));
    let mut value_tile = SharedMemory::<Eight>::new(comptime!((spec.shape.value as u32 * spec.value_pitch) as usize));
    let mut stash = SharedMemory::<Eight>::new(comptime!(if spec.stashed {
        (2 * spec.steps * spec.threads()) as usize
    } else {
        1
    }));
    let mut queries = Sequence::<Array<Pair>>::new();
    #[unroll]
    for step in 0..comptime!(spec.steps) {
        #[unroll]
        for half in 0..2u32 {
            let part = load_query(q, token, tokens, head, comptime!(32 * step + 4 * half), spec);
            if comptime!(spec.stashed) {
                let mut unit = Eight::new(0u32);
                #[unroll]
                for i in 0..4usize {
                    unit[i] = u32::reinterpret(part[i]);
                }
                stash[(comptime!((2 * step + half) * spec.threads()) + UNIT_POS_X) as usize] = unit;
            } else {
                queries.push(part);
            }
        }
    }

    let mut sums = Sequence::<Array<Sums>>::new();
    #[unroll]
    for _ in 0..comptime!(Spec::units(spec.shape.value)) {
        sums.push(zero());
    }
    // Of rows `row` and `row + 8`; totals are those of this lane alone until the end.
    let mut highest = Array::<f32>::new(2usize);
    let mut totals = Array::<f32>::new(2usize);
    #[unroll]
    for half in 0..2usize {
        highest[half] = LOWEST.runtime();
        totals[half] = 0.0f32.runtime();
    }

    let mut next_keys = Array::<Eight>::new(comptime!(spec.key_loads() as usize));
    let mut next_values = Array::<Vector<u32, N>>::new(8usize);
    load_keys(keys, &mut next_keys, begin, end, kv, spec);
    store_keys(&mut key_tile, &next_keys, spec);
    sync_cube();
    let mut base = begin;
    while base < end {
        // These arrive while scores are computed.
        load_values::<N>(values, &mut next_values, base, end, kv, spec);
        let mut scores = Sequence::<Array<Sums>>::new();
        #[unroll]
        for _ in 0..comptime!(spec.positions / 8) {
            scores.push(zero());
        }
        #[unroll]
        for step in 0..comptime!(spec.steps) {
            if comptime!(spec.stashed) {
                let at = comptime!(2 * step * spec.threads()) + UNIT_POS_X;
                let (low, high) = (left(stash[at as usize]), left(stash[(at + comptime!(spec.threads())) as usize]));
                multiply_keys(&low, &high, &key_tile, &mut scores, step, spec);
            } else {
                let low = &queries[comptime!(2 * step as usize)];
                let high = &queries[comptime!(2 * step as usize + 1)];
                multiply_keys(low, high, &key_tile, &mut scores, step, spec);
            }
        }
        bend_all(&mut scores, base, head, spec);
        hide(&mut scores, base, past + first, past + token, spec);
        let weights = weigh(&mut scores, &mut sums, &mut highest, &mut totals, spec);
        store_values::<N>(&mut value_tile, &next_values, spec);
        // Values are there, and nobody reads keys any more.
        sync_cube();
        load_keys(keys, &mut next_keys, base + comptime!(spec.positions), end, kv, spec);
        #[unroll]
        for part in 0..comptime!(spec.positions / 32) {
            #[unroll]
            for n in 0..comptime!(Spec::units(spec.shape.value)) {
                let unit = value_tile
                    [((comptime!(n * 8) + row) * comptime!(spec.value_pitch) + comptime!(4 * part) + quarter) as usize];
                #[unroll]
                for half in 0..2usize {
                    let a = &weights[comptime!(2 * part as usize + half)];
                    product(a, &right(unit, half), sums.index_mut(comptime!(n as usize)));
                }
            }
        }
        store_keys(&mut key_tile, &next_keys, spec);
        sync_cube();
        base += comptime!(spec.positions);
    }

    #[unroll]
    for half in 0..2usize {
        let mut total = totals[half];
        total += plane_shuffle_xor(total, 1u32);
        total += plane_shuffle_xor(total, 2u32);
        // Totals are at least 1. A division has a path for others, which takes registers that wide heads do not have;
        // a step of Newton's method makes up for the approximate root.
        let root = total.inverse_sqrt();
        let near = root * root;
        let factor = near * (2.0f32 - total * near);
        let at = token + comptime!(8 * half as u32);
        if at < tokens {
            #[unroll]
            for n in 0..comptime!(Spec::units(spec.shape.value)) {
                let mean = sums[comptime!(n as usize)][half] * Sums::new(factor);
                let col = (at * comptime!(spec.shape.heads as u32) + head) * comptime!(spec.shape.value as u32 / 2)
                    + comptime!(n * 4)
                    + quarter;
                out[col as usize] = Vector::<O, Const<2>>::cast_from(mean);
            }
        }
    }
}

/// `scores +=` the products of 32 columns of queries with those of all keys of the tile.
#[cube]
fn multiply_keys(
    low: &Array<Pair>,
    high: &Array<Pair>,
    tile: &SharedMemory<Eight>,
    scores: &mut Sequence<Array<Sums>>,
    #[comptime] step: u32,
    #[comptime] spec: Spec,
) {
    let at = UNIT_POS_X % WARP / 4 * comptime!(spec.key_pitch) + comptime!(4 * step) + UNIT_POS_X % 4;
    #[unroll]
    for n in 0..comptime!(spec.positions / 8) {
        let unit = tile[(at + comptime!(n * 8 * spec.key_pitch)) as usize];
        product(low, &right(unit, 0usize), scores.index_mut(comptime!(n as usize)));
        product(high, &right(unit, 1usize), scores.index_mut(comptime!(n as usize)));
    }
}

/// A unit of 16 bytes as left operand.
#[cube]
fn left(unit: Eight) -> Array<Pair> {
    let mut a = Array::<Pair>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        a[i] = Pair::reinterpret(unit[i]);
    }
    a
}

/// A half of a unit of 16 bytes as right operand.
#[cube]
fn right(unit: Eight, #[comptime] half: usize) -> Array<Pair> {
    let mut b = Array::<Pair>::new(2usize);
    #[unroll]
    for i in 0..2usize {
        b[i] = Pair::reinterpret(unit[comptime!(2 * half + i)]);
    }
    b
}
