//! The attention stage.

use std::ops::Range;

use awqc_exec::host::attention::Heads;
use awqc_exec::host::math::simd;
use awqc_ir::panels::PANEL_ROWS;

use super::{Part, Work};
use crate::arena::Place;
use crate::kernels::{Lines, times_panels};
use crate::pool::Member;
use crate::program::Attend;

/// Rows of queries that are taken together, those of all heads that see the same keys.
const ROWS: usize = 48;

impl Part<'_> {
    /// One token: members take heads. More: blocks of tokens.
    pub(super) fn attend(
        &self,
        member: &Member<'_>,
        work: &Work<'_>,
        attend: &Attend,
        count: usize,
        scratch: &mut Vec<f32>,
    ) {
        let shape = work.caches[attend.cache].shape();
        let heads = Heads::new(&attend.op, shape.keys, shape.values);
        let group = (heads.count() / shape.heads.max(1)).max(1);
        if count == 1 {
            let own = member.share(heads.count(), 1);
            let mut h = own.start;
            while h < own.end {
                // Up to the last head that sees the same keys.
                let end = own.end.min((h / group + 1) * group);
                self.block(work, attend, &heads, 0..1, h..end, scratch);
                h = end;
            }
            return;
        }
        // Later blocks see more keys: dealing them out one by one keeps the members equally busy.
        let tokens = (ROWS / group).max(1);
        let blocks = (0..count).step_by(tokens).flat_map(|first| (0..shape.heads).map(move |kv| (first, kv)));
        for (first, kv) in blocks.skip(member.index).step_by(member.count) {
            let heads_of = kv * group..(kv + 1) * group;
            self.block(work, attend, &heads, first..(first + tokens).min(count), heads_of, scratch);
        }
    }

    /// Some tokens and the heads `own`, which see the same keys.
    fn block(
        &self,
        work: &Work<'_>,
        attend: &Attend,
        heads: &Heads<'_>,
        tokens: Range<usize>,
        own: Range<usize>,
        scratch: &mut Vec<f32>,
    ) {
        let Attend { q, cache, out, .. } = attend;
        let cache = &work.caches[*cache];
        let kv = own.start / (heads.count() / cache.shape().heads).max(1);
        let (rows, first) = (tokens.len() * own.len(), work.past + tokens.start);
        // Attention is causal here: nothing behind the last row is seen.
        let seen = heads.seen(first, tokens.len(), first + tokens.len());
        let panels = seen.start / PANEL_ROWS..seen.end.div_ceil(PANEL_ROWS);
        let start = panels.start * PANEL_ROWS;
        // SAFETY: nobody writes the caches or `q` in this stage.
        let (keys, values) = unsafe { (cache.keys(kv, panels), cache.values(kv, start..seen.end)) };
        let (span, wide) = (keys.panels * PANEL_ROWS, values.panels * PANEL_ROWS);
        scratch.resize(rows * (span + wide), 0.0);
        let (scores, mixed) = scratch.split_at_mut(rows * span);
        let of = Place { col: q.col + own.start * heads.width, width: own.len() * heads.width, ..*q };
        // SAFETY: as above.
        let data = unsafe { self.arena.rows(of, tokens.clone()) };
        let queries = Lines { data, heads: own.len(), token: q.stride, head: heads.width };
        times_panels(work.options.isa, rows, queries, &keys, heads.scale, scores);
        simd(
            #[inline(always)]
            || {
                for (r, line) in scores.chunks_exact_mut(span).enumerate() {
                    let (token, h) = (r / own.len(), own.start + r % own.len());
                    heads.probabilities(h, &mut line[..seen.end - start], first + token, start);
                }
            },
        );
        let weights = Lines { data: scores, heads: 1, token: span, head: 0 };
        times_panels(work.options.isa, rows, weights, &values, 1.0, mixed);
        for (r, line) in mixed.chunks_exact(wide).enumerate() {
            let (token, h) = (tokens.start + r / own.len(), own.start + r % own.len());
            let to = Place { col: out.col + h * heads.out, width: heads.out, ..*out };
            // SAFETY: this head's channels of the token are this member's in this stage.
            unsafe { self.arena.row_mut(to, token) }.copy_from_slice(&line[..heads.out]);
        }
    }
}
