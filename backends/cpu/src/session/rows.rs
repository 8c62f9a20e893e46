//! The steps that treat each token by itself.

use std::borrow::Cow;

use awqc_exec::host::elementwise;
use awqc_exec::host::math::{simd, softmax};
use awqc_exec::host::norm::{layer_row, rms_row};
use awqc_exec::host::rotate::turn_row;
use awqc_exec::interp::frequencies::{angles, frequencies};
use awqc_exec::interp::ops::routing::choose;

use super::{Part, Work, write};
use crate::arena::Place;
use crate::kernels::TILE;
use crate::pool::Member;
use crate::program::{Ints, Map, Other, Row, Zip};

impl Part<'_> {
    /// Each member takes whole tiles of tokens, so that it can round their activations too.
    pub(super) fn rows(&self, member: &Member<'_>, work: &Work<'_>, steps: &[Row<'_>], count: usize) {
        let own = member.share(count, TILE);
        for first in own.clone().step_by(TILE) {
            let tile = first..(first + TILE).min(own.end);
            for part in steps.split_inclusive(|s| matches!(s, Row::Quantize { .. })) {
                for t in tile.clone() {
                    part.iter().for_each(|step| self.row(work, step, t));
                }
                if let Some(Row::Quantize { x, to }) = part.last() {
                    let shape = &self.program.activations[*to].shape;
                    // SAFETY: the tile's rows are this member's in this stage.
                    let x = unsafe { self.arena.rows(*x, tile.clone()) };
                    let form = work.options.activations.of(count);
                    write(&self.quantized[*to][first / TILE]).fill(work.options.isa, form, shape, tile.len(), x);
                }
            }
        }
    }

    /// One step on one token.
    fn row(&self, work: &Work<'_>, step: &Row<'_>, t: usize) {
        // SAFETY: in this stage the token's rows belong to the calling member, and values that are used together have
        // places that do not overlap, except where a step works in place and says so.
        let (read, write) = unsafe { (|at: Place| self.arena.row(at, t), |at: Place| self.arena.row_mut(at, t)) };
        match step {
            Row::Embed { table, of, offset, out } => {
                let id = match of {
                    Ints::Ids => i64::from(work.ids[t]),
                    Ints::Positions => (work.past + t) as i64,
                };
                table.row((id + i64::from(*offset)) as usize, write(*out));
            }
            Row::Place { at } => {
                if let Some(row) = work.places.get(t).copied().flatten() {
                    let at = write(*at);
                    at.copy_from_slice(&work.images.data[row * at.len()..(row + 1) * at.len()]);
                }
            }
            Row::Angles { of, fixed, cos, sin } => {
                let (frequencies, factor) = match fixed {
                    Some((frequencies, factor)) => (Cow::Borrowed(frequencies), *factor),
                    None => {
                        let (frequencies, factor) = frequencies(of, work.length as u64);
                        (Cow::Owned(frequencies), factor)
                    }
                };
                let angles = angles(&frequencies, factor, (work.past + t) as i64);
                for ((cos, sin), angle) in write(*cos).iter_mut().zip(write(*sin)).zip(angles) {
                    (*cos, *sin) = angle;
                }
            }
            Row::Copy { from, to } => write(*to).copy_from_slice(read(*from)),
            Row::RmsNorm { at, heads, eps, gain } => {
                let row = write(*at);
                let width = (row.len() / heads).max(1);
                simd(
                    #[inline(always)]
                    || row.chunks_exact_mut(width).for_each(|part| rms_row(part, *eps, gain.as_deref())),
                );
            }
            Row::LayerNorm { at, heads, eps, gain, bias } => {
                let row = write(*at);
                let width = (row.len() / heads).max(1);
                simd(
                    #[inline(always)]
                    || {
                        for (head, part) in row.chunks_exact_mut(width).enumerate() {
                            layer_row(part, *eps, own(gain, head, width), own(bias, head, width));
                        }
                    },
                );
            }
            Row::Rope { at, cos, sin, heads, interleaved } => simd(
                #[inline(always)]
                || turn_row(write(*at), *heads, *interleaved, read(*cos), read(*sin)),
            ),
            Row::Map { at, f } => simd(
                #[inline(always)]
                || map(*f, write(*at)),
            ),
            Row::Zip { at, by, f } => {
                let by = match by {
                    Other::Value(at) => read(*at),
                    Other::Parameter(numbers) => numbers,
                };
                simd(
                    #[inline(always)]
                    || match f {
                        Zip::Add => elementwise::plus(write(*at), by),
                        Zip::Mul => elementwise::times(write(*at), by),
                    },
                );
            }
            Row::Remember { k, v, cache } => {
                let (cache, at) = (&work.caches[*cache], work.past + t);
                // SAFETY: position `at` of the cache belongs to this token.
                unsafe { cache.remember(at, read(*k), read(*v)) }
            }
            // A whole tile at a time, see `rows`.
            Row::Quantize { .. } => {}
            Row::Softmax { at } => simd(
                #[inline(always)]
                || softmax(write(*at)),
            ),
            Row::Choose { op, scores, bias, weights, chosen } => {
                let scores = read(*scores);
                let by = match bias {
                    Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
                    None => scores.to_vec(),
                };
                for ((w, e), (weight, expert)) in
                    write(*weights).iter_mut().zip(write(*chosen)).zip(choose(op, scores, by))
                {
                    (*w, *e) = (weight, expert as f32);
                }
            }
            Row::Combine { y, weights, out } => {
                let out = write(*out);
                out.fill(0.0);
                for (w, y) in read(*weights).iter().zip(read(*y).chunks_exact(out.len().max(1))) {
                    out.iter_mut().zip(y).for_each(|(out, y)| *out += w * y);
                }
            }
        }
    }
}

/// The parameters of one head, of which there are those of all heads or one set for each of them.
fn own(all: &Option<Vec<f32>>, head: usize, width: usize) -> Option<&[f32]> {
    let all = all.as_deref()?;
    Some(all.get(head * width..(head + 1) * width).unwrap_or(all))
}

#[inline(always)]
fn map(f: Map, x: &mut [f32]) {
    match f {
        Map::Silu => elementwise::silu(x),
        Map::GeluErf => elementwise::gelu_erf(x),
        Map::GeluTanh => elementwise::gelu_tanh(x),
        Map::GeluQuick => elementwise::gelu_quick(x),
        Map::Relu => elementwise::relu(x),
        Map::Sigmoid => elementwise::logistic(x),
        Map::Clamp(at) => elementwise::clamp(x, at),
        Map::Scale(by) => x.iter_mut().for_each(|v| *v *= by),
        Map::Softcap(at) => elementwise::softcap(x, at),
    }
}
