//! From scores to weights: caps and biases, masks, and the running maximum and sum.

use cubecl::prelude::*;

use super::super::attend::bend;
use super::super::tile::{Pair, Sums};
use super::{HIDDEN, Spec};

/// The position of column 0 of a lane's part of product `n`; column 1 is the next.
#[cube]
fn position(base: u32, #[comptime] n: u32) -> u32 {
    base + comptime!(n / 4 * 32 + n % 4 * 2) + UNIT_POS_X % 4 * 8
}

/// Soft caps and linear biases.
#[cube]
pub(super) fn bend_all(scores: &mut Sequence<Array<Sums>>, base: u32, head: u32, #[comptime] spec: Spec) {
    if comptime!(spec.shape.softcap.is_some() || spec.shape.alibi.is_some()) {
        #[unroll]
        for n in 0..comptime!(spec.positions / 8) {
            let p = position(base, n);
            #[unroll]
            for half in 0..2usize {
                let old = scores[comptime!(n as usize)][half];
                let mut new = Sums::new(0.0f32);
                new[0usize] = bend(old[0usize], p, head, comptime!(spec.shape));
                new[1usize] = bend(old[1usize], p + 1, head, comptime!(spec.shape));
                scores.index_mut(comptime!(n as usize))[half] = new;
            }
        }
    }
}

/// Hides positions that tokens at `own` and `own + 8` do not see. `low` is the position of the block's first token.
#[cube]
pub(super) fn hide(scores: &mut Sequence<Array<Sums>>, base: u32, low: u32, own: u32, #[comptime] spec: Spec) {
    let window = comptime!(spec.window());
    // Most tiles are seen by all tokens.
    let mut some = base + comptime!(spec.positions - 1) > low;
    if comptime!(window > 0) {
        some = some || base + window < low + comptime!(spec.tokens());
    }
    if some {
        #[unroll]
        for n in 0..comptime!(spec.positions / 8) {
            #[unroll]
            for half in 0..2usize {
                let at = own + comptime!(8 * half as u32);
                let old = scores[comptime!(n as usize)][half];
                let mut new = Sums::new(0.0f32);
                #[unroll]
                for i in 0..2usize {
                    let p = position(base, n) + comptime!(i as u32);
                    let mut hidden = p > at;
                    if comptime!(window > 0) {
                        hidden = hidden || p + window <= at;
                    }
                    new[i] = select(hidden, HIDDEN, old[i]);
                }
                scores.index_mut(comptime!(n as usize))[half] = new;
            }
        }
    }
}

/// The weights of a tile, as left operands of its product with values; what was summed before is made relative to the
/// new maxima.
#[cube]
pub(super) fn weigh(
    scores: &mut Sequence<Array<Sums>>,
    sums: &mut Sequence<Array<Sums>>,
    highest: &mut Array<f32>,
    totals: &mut Array<f32>,
    #[comptime] spec: Spec,
) -> Sequence<Array<Pair>> {
    let mut weights = Sequence::<Array<Pair>>::new();
    #[unroll]
    for _ in 0..comptime!(spec.positions / 16) {
        weights.push(Array::<Pair>::new(4usize));
    }
    #[unroll]
    for half in 0..2usize {
        let mut top = highest[half];
        #[unroll]
        for n in 0..comptime!((spec.positions / 8) as usize) {
            let two = scores[n][half];
            top = max(top, max(two[0usize], two[1usize]));
        }
        top = max(top, plane_shuffle_xor(top, 1u32));
        top = max(top, plane_shuffle_xor(top, 2u32));
        let keep = (highest[half] - top).exp();
        let mut total = totals[half] * keep;
        #[unroll]
        for n in 0..comptime!((spec.positions / 8) as usize) {
            let two = (scores[n][half] - Sums::new(top)).exp();
            total += two[0usize] + two[1usize];
            weights.index_mut(comptime!(n / 2))[comptime!(n % 2 * 2 + half)] = Pair::cast_from(two);
        }
        #[unroll]
        for n in 0..comptime!(Spec::units(spec.shape.value) as usize) {
            let old = sums[n][half];
            sums.index_mut(n)[half] = old * Sums::new(keep);
        }
        highest[half] = top;
        totals[half] = total;
    }
    weights
}
