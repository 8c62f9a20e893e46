//! The attention stage.
//!
//! Keys are taken in pieces of [`PIECE`] positions, wherever a sequence begins to see them. A piece gives sums that are
//! relative to its largest score, and pieces are joined in their order. So a token's result is the same whether one
//! member takes all of its pieces, as for a prompt, or each takes some.

use std::ops::Range;

use awqc_exec::host::attention::Heads;
use awqc_exec::host::math::{exp, simd};
use awqc_ir::op::Sdpa;
use awqc_ir::panels::PANEL_ROWS;

use super::{Part, Work};
use crate::arena::Place;
use crate::cache::CacheShape;
use crate::kernels::{Isa, Lines, Numbers, Stacked, times_panels, widen};
use crate::pool::Member;
use crate::program::Attend;

/// Rows of queries that are taken together, those of all heads that see the same keys.
const ROWS: usize = 96;

/// Positions of a piece.
const PIECE: usize = 128;

/// Rows from which on f16 numbers are made f32 once for all of them.
const WIDENED: usize = 8;

/// Columns in front of a head's sums: the largest score and the sum of the weights.
const FRONT: usize = PANEL_ROWS;

/// Columns of a head's part of one piece, see [`Part::parts`].
fn part_width(shape: CacheShape) -> usize {
    FRONT + shape.padded()
}

/// The same of all heads.
pub(super) fn part_columns(op: &Sdpa, shape: CacheShape) -> usize {
    op.heads as usize * part_width(shape)
}

/// Pieces of so many positions.
pub(super) fn pieces_of(positions: usize) -> usize {
    positions.div_ceil(PIECE)
}

/// Memory of a member for attention.
#[derive(Default)]
pub(super) struct Room {
    scores: Vec<f32>,
    /// What a piece gives.
    piece: Sums,
    /// What has been joined so far.
    joined: Sums,
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Weighted values of some rows.
#[derive(Default)]
struct Sums {
    /// Each row's largest score, and the sum of its weights, which are exp(score − largest).
    fronts: Vec<[f32; 2]>,
    /// Sums of the weighted values, row by row.
    values: Vec<f32>,
}

impl Sums {
    /// Columns of a row.
    fn width(&self) -> usize {
        self.values.len() / self.fronts.len().max(1)
    }
}

/// Adds what a piece gives to what earlier ones gave.
#[inline(always)]
fn join(front: &mut [f32; 2], values: &mut [f32], new_front: [f32; 2], new_values: &[f32]) {
    let ([top, sum], [new_top, new_sum]) = (*front, new_front);
    if new_sum == 0.0 {
        // The row sees nothing of the piece.
    } else if sum == 0.0 {
        *front = new_front;
        values.copy_from_slice(new_values);
    } else {
        let both = top.max(new_top);
        let (old, new) = (exp(top - both), exp(new_top - both));
        values.iter_mut().zip(new_values).for_each(|(v, n)| *v = *v * old + *n * new);
        *front = [both, sum * old + new_sum * new];
    }
}

/// The keys that some row of these tokens sees. Attention is causal here: nothing behind the last of them.
fn seen(heads: &Heads<'_>, work: &Work<'_>, tokens: &Range<usize>) -> Range<usize> {
    let first = work.past + tokens.start;
    heads.seen(first, tokens.len(), first + tokens.len())
}

/// The pieces that hold these positions.
fn pieces(seen: &Range<usize>) -> Range<usize> {
    seen.start / PIECE..seen.end.div_ceil(PIECE)
}

/// A head's columns of [`Part::parts`].
fn part_of(heads: &Heads<'_>, shape: CacheShape, h: usize) -> Place {
    let width = part_width(shape);
    Place { base: 0, stride: heads.count() * width, col: h * width, width }
}

/// The same operand in f32; `room` holds the numbers.
fn in_f32<'r>(isa: Isa, operand: Stacked<'r>, room: &'r mut Vec<f32>) -> Stacked<'r> {
    let Numbers::F16(data) = operand.data else { return operand };
    room.resize(data.len(), 0.0);
    widen(isa, data, room);
    Stacked { data: Numbers::F32(room), ..operand }
}

/// Some tokens and some heads, which see the same keys.
#[derive(Clone)]
struct Block {
    tokens: Range<usize>,
    heads: Range<usize>,
}

impl Block {
    fn rows(&self) -> usize {
        self.tokens.len() * self.heads.len()
    }
}

impl Part<'_> {
    /// One token: members take pieces, or heads if there is one piece. More: blocks of tokens.
    pub(super) fn attend(&self, member: &Member<'_>, work: &Work<'_>, attend: &Attend, count: usize, room: &mut Room) {
        let shape = work.caches[attend.cache].shape();
        let heads = Heads::new(&attend.op, shape.keys, shape.values);
        let group = (heads.count() / shape.heads.max(1)).max(1);
        let all = |kv: usize| kv * group..(kv + 1) * group;
        if count > 1 {
            // Later blocks see more keys: dealing them out one by one keeps the members equally busy.
            let tokens = (ROWS / group).max(1);
            let blocks = (0..count).step_by(tokens).flat_map(|first| (0..shape.heads).map(move |kv| (first, kv)));
            for (first, kv) in blocks.skip(member.index).step_by(member.count) {
                let block = Block { tokens: first..(first + tokens).min(count), heads: all(kv) };
                self.block(work, attend, &heads, &block, room);
            }
            return;
        }
        let pieces = pieces(&seen(&heads, work, &(0..1)));
        let own = member.share(heads.count(), 1);
        if pieces.len() == 1 {
            let mut h = own.start;
            while h < own.end {
                // Up to the last head that sees the same keys.
                let end = own.end.min((h / group + 1) * group);
                self.block(work, attend, &heads, &Block { tokens: 0..1, heads: h..end }, room);
                h = end;
            }
            return;
        }
        let dealt = pieces.clone().flat_map(|piece| (0..shape.heads).map(move |kv| (piece, kv)));
        for (piece, kv) in dealt.skip(member.index).step_by(member.count) {
            let block = Block { tokens: 0..1, heads: all(kv) };
            self.piece(work, attend, &heads, &block, piece, room);
            let rows = room.piece.fronts.iter().zip(room.piece.values.chunks_exact(shape.padded()));
            for (h, (front, values)) in block.heads.zip(rows) {
                // SAFETY: this piece of the head is this member's in this stage.
                let part = unsafe { self.parts.row_mut(part_of(&heads, shape, h), piece) };
                part[..2].copy_from_slice(front);
                part[FRONT..].copy_from_slice(values);
            }
        }
        member.wait();
        for h in own {
            let at = part_of(&heads, shape, h);
            let (mut front, joined) = ([0.0; 2], &mut room.joined.values);
            joined.resize(shape.padded(), 0.0);
            for piece in pieces.clone() {
                // SAFETY: nobody writes parts behind the barrier.
                let part = unsafe { self.parts.row(at, piece) };
                simd(
                    #[inline(always)]
                    || join(&mut front, joined, [part[0], part[1]], &part[FRONT..]),
                );
            }
            self.give(attend, &heads, front, joined, 0, h);
        }
    }

    /// All pieces of a block.
    fn block(&self, work: &Work<'_>, attend: &Attend, heads: &Heads<'_>, block: &Block, room: &mut Room) {
        for (i, piece) in pieces(&seen(heads, work, &block.tokens)).enumerate() {
            self.piece(work, attend, heads, block, piece, room);
            if i == 0 {
                std::mem::swap(&mut room.piece, &mut room.joined);
                continue;
            }
            let (width, to) = (room.piece.width(), &mut room.joined);
            let new = room.piece.fronts.iter().zip(room.piece.values.chunks_exact(width));
            simd(
                #[inline(always)]
                || {
                    for ((front, values), (new_front, new)) in
                        to.fronts.iter_mut().zip(to.values.chunks_exact_mut(width)).zip(new)
                    {
                        join(front, values, *new_front, new);
                    }
                },
            );
        }
        let lines = room.joined.values.chunks_exact(room.joined.width());
        for (r, (front, line)) in room.joined.fronts.iter().zip(lines).enumerate() {
            let (token, h) = (r / block.heads.len(), r % block.heads.len());
            self.give(attend, heads, *front, line, block.tokens.start + token, block.heads.start + h);
        }
    }

    /// One piece of a block, to `room.piece`.
    fn piece(&self, work: &Work<'_>, attend: &Attend, heads: &Heads<'_>, block: &Block, piece: usize, room: &mut Room) {
        let cache = &work.caches[attend.cache];
        let (kv, rows) = (block.heads.start / (heads.count() / cache.shape().heads).max(1), block.rows());
        let seen = seen(heads, work, &block.tokens);
        let (start, end) =
            ((piece * PIECE).max(seen.start / PANEL_ROWS * PANEL_ROWS), ((piece + 1) * PIECE).min(seen.end));
        // SAFETY: nobody writes the caches or `q` in this stage.
        let (keys, values) =
            unsafe { (cache.keys(kv, start / PANEL_ROWS..end.div_ceil(PANEL_ROWS)), cache.values(kv, start..end)) };
        let isa = work.options.isa;
        let widened = rows >= WIDENED;
        let keys = if widened { in_f32(isa, keys, &mut room.keys) } else { keys };
        let values = if widened { in_f32(isa, values, &mut room.values) } else { values };
        let (span, wide) = (keys.panels * PANEL_ROWS, values.panels * PANEL_ROWS);
        room.scores.resize(rows * span, 0.0);
        room.piece.values.resize(rows * wide, 0.0);
        room.piece.fronts.resize(rows, [0.0; 2]);
        let scores = &mut room.scores[..];
        let at = Place {
            col: attend.q.col + block.heads.start * heads.width,
            width: block.heads.len() * heads.width,
            ..attend.q
        };
        // SAFETY: as above.
        let data = unsafe { self.arena.rows(at, block.tokens.clone()) };
        let queries = Lines { data, heads: block.heads.len(), token: attend.q.stride, head: heads.width };
        times_panels(isa, rows, queries, &keys, heads.scale, scores);
        let (first, fronts) = (work.past + block.tokens.start, &mut room.piece.fronts);
        simd(
            #[inline(always)]
            || {
                for ((r, line), front) in scores.chunks_exact_mut(span).enumerate().zip(fronts) {
                    let (token, h) = (r / block.heads.len(), block.heads.start + r % block.heads.len());
                    let (top, sum) = heads.exponentials(h, &mut line[..end - start], first + token, start);
                    *front = [top, sum];
                }
            },
        );
        let weights = Lines { data: scores, heads: 1, token: span, head: 0 };
        times_panels(isa, rows, weights, &values, 1.0, &mut room.piece.values);
    }

    /// The result of head `h` of a token.
    fn give(&self, attend: &Attend, heads: &Heads<'_>, front: [f32; 2], line: &[f32], token: usize, h: usize) {
        let to = Place { col: attend.out.col + h * heads.out, width: heads.out, ..attend.out };
        let inverse = if front[1] > 0.0 { 1.0 / front[1] } else { front[1] };
        // SAFETY: this head's channels of the token are this member's in this stage.
        for (out, x) in unsafe { self.arena.row_mut(to, token) }.iter_mut().zip(line) {
            *out = x * inverse;
        }
    }
}
