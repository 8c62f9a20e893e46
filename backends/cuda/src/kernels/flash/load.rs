//! From memory to registers to shared memory, in the order in which products take it.

use cubecl::prelude::*;

use super::super::tile::{Pair, Sums};
use super::{Eight, Spec};

/// Four columns of the queries of `token` and the eighth one behind it, times the scale, as left operand: those from
/// `col` on, and eight further for each next lane of four. 0 beyond the last token and the last column.
#[cube]
pub(super) fn load_query(
    q: &Array<Vector<f32, Const<4>>>,
    token: u32,
    tokens: u32,
    head: u32,
    #[comptime] col: u32,
    #[comptime] spec: Spec,
) -> Array<Pair> {
    let mut a = Array::<Pair>::new(4usize);
    let at = col + UNIT_POS_X % 4 * 8;
    #[unroll]
    for half in 0..2usize {
        let mut numbers = Vector::<f32, Const<4>>::new(0.0f32);
        let own = token + comptime!(8 * half as u32);
        if own < tokens && at < comptime!(spec.shape.key as u32) {
            let from = own * comptime!(spec.shape.pitch as u32 / 4)
                + comptime!(spec.shape.col as u32 / 4)
                + head * comptime!(spec.shape.key as u32 / 4)
                + at / 4;
            numbers = q[from as usize];
        }
        #[unroll]
        for i in 0..2usize {
            let mut two = Sums::new(0.0f32);
            two[0usize] = numbers[comptime!(2 * i)] * comptime!(spec.shape.scale);
            two[1usize] = numbers[comptime!(2 * i + 1)] * comptime!(spec.shape.scale);
            a[comptime!(2 * i + half)] = Pair::cast_from(two);
        }
    }
    a
}

/// The position in the tile, and the unit of its key, of this thread's load `i`. Of wide heads a thread stays with one
/// position, which takes fewer registers.
#[cube]
fn key_place(#[comptime] i: u32, #[comptime] spec: Spec) -> (u32, u32) {
    if comptime!(spec.stashed) {
        (UNIT_POS_X / 8, UNIT_POS_X % 8 + comptime!(8 * i))
    } else {
        let at = UNIT_POS_X + comptime!(i * spec.threads());
        (at / comptime!(4 * spec.steps), at % comptime!(4 * spec.steps))
    }
}

/// This thread's part of the keys from position `base` on: 0 from `end` on, and beyond the last column.
#[cube]
pub(super) fn load_keys(
    keys: &Array<Eight>,
    out: &mut Array<Eight>,
    base: u32,
    end: u32,
    kv: u32,
    #[comptime] spec: Spec,
) {
    let units = comptime!(Spec::units(spec.shape.key));
    #[unroll]
    for i in 0..comptime!(spec.key_loads()) {
        let (place, unit) = key_place(i, spec);
        let position = base + place;
        let mut eight = Eight::new(0u32);
        if position < end && unit < units {
            eight = keys[((position * comptime!(spec.shape.kv_heads as u32) + kv) * units + unit) as usize];
        }
        out[comptime!(i as usize)] = eight;
    }
}

/// Of 32 positions, the four times eight of a column of lanes become rows `8 t + 2 q + e` for position `8 q + 2 t + e`:
/// the products `t` of eight rows each then hold, in lane `q`, positions `8 q` to `8 q + 7`.
#[cube]
pub(super) fn store_keys(tile: &mut SharedMemory<Eight>, part: &Array<Eight>, #[comptime] spec: Spec) {
    #[unroll]
    for i in 0..comptime!(spec.key_loads()) {
        let (position, unit) = key_place(i, spec);
        let row = position / 32 * 32 + position % 8 / 2 * 8 + position % 32 / 8 * 2 + position % 2;
        if unit < comptime!(4 * spec.steps) {
            tile[(row * comptime!(spec.key_pitch) + unit) as usize] = part[comptime!(i as usize)];
        }
    }
}

/// This thread's part of the values from position `base` on: `2 N` columns of eight positions; 0 from `end` on.
#[cube]
pub(super) fn load_values<N: Size>(
    values: &Array<Vector<u32, N>>,
    out: &mut Array<Vector<u32, N>>,
    base: u32,
    end: u32,
    kv: u32,
    #[comptime] spec: Spec,
) {
    let loads = comptime!(spec.shape.value as u32 / spec.value_columns());
    let first = base + UNIT_POS_X % comptime!(spec.positions / 8) * 8;
    let load = UNIT_POS_X / comptime!(spec.positions / 8);
    #[unroll]
    for i in 0..8u32 {
        let position = first + i;
        let mut some = Vector::<u32, N>::new(0u32);
        if position < end && load < loads {
            some = values[((position * comptime!(spec.shape.kv_heads as u32) + kv) * loads + load) as usize];
        }
        out[comptime!(i as usize)] = some;
    }
}

/// Eight positions of a column side by side.
#[cube]
pub(super) fn store_values<N: Size>(
    tile: &mut SharedMemory<Eight>,
    part: &Array<Vector<u32, N>>,
    #[comptime] spec: Spec,
) {
    let group = UNIT_POS_X % comptime!(spec.positions / 8);
    let col = UNIT_POS_X / comptime!(spec.positions / 8) * comptime!(spec.value_columns());
    if col < comptime!(spec.shape.value as u32) {
        #[unroll]
        for i in 0..comptime!((spec.value_columns() / 2) as usize) {
            let mut even = Eight::new(0u32);
            let mut odd = Eight::new(0u32);
            #[unroll]
            for pair in 0..4usize {
                let (one, other) = (part[comptime!(2 * pair)][i], part[comptime!(2 * pair + 1)][i]);
                even[pair] = (one & 0xffffu32) | (other << 16u32);
                odd[pair] = (one >> 16u32) | (other & 0xffff_0000u32);
            }
            let at = (col + comptime!(2 * i as u32)) * comptime!(spec.value_pitch) + group;
            tile[at as usize] = even;
            tile[(at + comptime!(spec.value_pitch)) as usize] = odd;
        }
    }
}
