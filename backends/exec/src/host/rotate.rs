//! Rotary embedding in place.

use rayon::prelude::*;

use super::math::simd;

/// Rows of one task.
const ROWS: usize = 64;

/// The rotation of a tensor's heads by the angles of its positions.
pub(super) struct Turn<'a> {
    /// `[S,P]`.
    pub(super) cos: &'a [f32],
    /// `[S,P]`.
    pub(super) sin: &'a [f32],
    /// Heads in a row.
    pub(super) heads: usize,
    /// Pairs are neighbours.
    pub(super) interleaved: bool,
}

impl Turn<'_> {
    /// Turns `x`, `[B, seq, channels]`.
    pub(super) fn apply(&self, x: &mut [f32], seq: usize, channels: usize) {
        let (seq, channels) = (seq.max(1), channels.max(1));
        let pairs = self.cos.len() / seq;
        x.par_chunks_mut(ROWS * channels).enumerate().for_each(|(block, rows)| {
            simd(
                #[inline(always)]
                || {
                    for (r, row) in rows.chunks_exact_mut(channels).enumerate() {
                        let at = (block * ROWS + r) % seq * pairs;
                        let (cos, sin) = (&self.cos[at..at + pairs], &self.sin[at..at + pairs]);
                        turn_row(row, self.heads, self.interleaved, cos, sin);
                    }
                },
            );
        });
    }
}

/// Turns the heads of one row by the angles of its position, `[P]`.
#[inline(always)]
pub fn turn_row(row: &mut [f32], heads: usize, interleaved: bool, cos: &[f32], sin: &[f32]) {
    let width = (row.len() / heads.max(1)).max(1);
    for head in row.chunks_exact_mut(width) {
        match interleaved {
            true => neighbours(head, cos, sin),
            false => halves(head, cos, sin),
        }
    }
}

#[inline(always)]
fn neighbours(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((pair, c), s) in head.as_chunks_mut::<2>().0.iter_mut().zip(cos).zip(sin) {
        let [a, b] = *pair;
        *pair = [a * c - b * s, b * c + a * s];
    }
}

#[inline(always)]
fn halves(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, rest) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}
