//! Mixtures of experts: the rows of tokens in the order of the experts that they go to.
//!
//! Between `dispatch` and `combine` a value keeps, for each token, the rows of its `k` choices side by side, `k · C`
//! columns of the arena: whatever treats a row by itself works on it as on any other value. A product gathers the rows
//! that chose an expert, in *runs* that are as long as a tile at most, and scatters what comes out.

use std::ops::Range;

use crate::arena::Place;
use crate::kernels::TILE;

/// How tokens choose experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Experts of the layer.
    pub(crate) experts: usize,
    /// Experts of a token.
    pub(crate) each: usize,
}

impl Choice {
    /// The most runs that so many tokens can make.
    pub(crate) fn most_runs(&self, tokens: usize) -> usize {
        let rows = tokens * self.each;
        self.experts.min(rows) + rows / TILE
    }
}

/// The row of one token for one of its choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chosen {
    pub(crate) token: usize,
    /// Which of the token's choices, from 0.
    pub(crate) choice: usize,
}

impl Chosen {
    /// Its columns in a value that has the rows of all choices side by side, or one row for all of them.
    pub(crate) fn columns(self, value: Place, width: usize) -> Place {
        let step = if value.width == width { 0 } else { width };
        Place { col: value.col + self.choice * step, width, ..value }
    }
}

/// Rows of one expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) expert: usize,
    /// Which of [`Route::rows`].
    pub(crate) rows: Range<usize>,
}

/// The rows of a pass. Memory is reused.
#[derive(Debug, Default)]
pub(crate) struct Route {
    rows: Vec<Chosen>,
    runs: Vec<Run>,
    /// Where each expert's next row goes.
    next: Vec<usize>,
}

impl Route {
    /// Sorts the rows of tokens by expert; `chosen` are the experts, token by token.
    pub(crate) fn fill(&mut self, choice: Choice, chosen: impl Iterator<Item = usize> + Clone) {
        let Choice { experts, each } = choice;
        self.next.clear();
        self.next.resize(experts, 0);
        chosen.clone().for_each(|e| self.next[e] += 1);
        self.runs.clear();
        let mut total = 0;
        for (expert, next) in self.next.iter_mut().enumerate() {
            let rows = total..total + *next;
            *next = rows.start;
            total = rows.end;
            let runs = rows.clone().step_by(TILE).map(|first| first..(first + TILE).min(rows.end));
            self.runs.extend(runs.map(|rows| Run { expert, rows }));
        }
        self.rows.clear();
        self.rows.resize(total, Chosen { token: 0, choice: 0 });
        for (i, expert) in chosen.enumerate() {
            self.rows[self.next[expert]] = Chosen { token: i / each.max(1), choice: i % each.max(1) };
            self.next[expert] += 1;
        }
    }

    /// All runs, expert by expert.
    pub(crate) fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// The rows of a run.
    pub(crate) fn of(&self, run: &Run) -> &[Chosen] {
        &self.rows[run.rows.clone()]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_expert_and_every_one_is_there() {
        let (experts, each, tokens) = (5, 2, 150);
        // Expert 3 is chosen by every token, expert 1 by none.
        let chosen: Vec<usize> = (0..tokens).flat_map(|t| [3, [0, 2, 4][t * t / 7 % 3]]).collect();
        let choice = Choice { experts, each };
        let mut route = Route::default();
        for _ in 0..2 {
            route.fill(choice, chosen.iter().copied());
            let mut seen = vec![false; chosen.len()];
            for run in route.runs() {
                assert!((1..=TILE).contains(&run.rows.len()));
                for row in route.of(run) {
                    let at = row.token * each + row.choice;
                    assert_eq!(chosen[at], run.expert);
                    assert!(!std::mem::replace(&mut seen[at], true), "row {at} comes twice");
                }
            }
            assert!(seen.iter().all(|s| *s));
            assert!(route.runs().len() <= choice.most_runs(tokens));
            assert!(route.runs().is_sorted_by_key(|r| r.expert));
        }
    }

    #[test]
    fn choices_lie_side_by_side_or_share_a_row() {
        let row = Chosen { token: 7, choice: 2 };
        let value = |width| Place { base: 3, stride: 40, col: 4, width };
        assert_eq!(row.columns(value(24), 8), Place { col: 20, ..value(8) });
        assert_eq!(row.columns(value(8), 8), value(8));
    }
}
