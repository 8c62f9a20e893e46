//! Products with the matrices of several experts, one below the other: which matrix a block takes, and which rows.
//!
//! A token's *record* is what [`super::rows::Step::Choose`] leaves: weights, and behind them the numbers of its
//! experts. Row `k t + j` of a routed product is that of token `t` and its choice `j`.
//!
//! Of few tokens ([`Routed::Few`]) there is a block for each row, and the first one that goes to an expert takes all
//! tokens that do: each token has an expert once at most, so a column of the tensor cores is a token, and nothing needs
//! to be sorted. Of many tokens ([`Routed::Many`]) blocks take *runs*, rows of one expert, which the kernel of
//! [`super::route`] found before.

use cubecl::prelude::*;

/// A row that does not exist.
pub(crate) const NONE: u32 = u32::MAX;

/// How rows find their experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stack {
    /// Experts of the layer: matrices of the stack.
    pub experts: u32,
    /// Experts of a token.
    pub each: u32,
    /// All experts of a token read the same row.
    pub shared: bool,
}

/// Where a routed product finds its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Routed {
    /// In the records of up to eight tokens. The grid has a block for each row.
    Few(Stack),
    /// In the runs that [`super::route`] found. The grid has a block for each run, and may have more.
    Many(Stack),
}

impl Routed {
    /// The experts.
    pub fn stack(self) -> Stack {
        match self {
            Routed::Few(stack) | Routed::Many(stack) => stack,
        }
    }

    /// For names of kernels.
    pub(crate) fn label(self) -> String {
        let Stack { experts, each, shared } = self.stack();
        let runs = if matches!(self, Routed::Many(_)) { "_runs" } else { "" };
        format!("_{each}of{experts}{}{runs}", if shared { "_shared" } else { "" })
    }
}

impl Stack {
    /// The most panels of 16 rows in which one matrix of `rows` rows has a part: where 16 does not divide `rows`, a
    /// panel may hold the last rows of one and the first of the next.
    pub fn span(&self, rows: usize) -> usize {
        if rows.is_multiple_of(16) { rows / 16 } else { (rows + 15).div_ceil(16) }
    }
}

/// The rows of a block, all of one expert.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Run {
    pub(crate) expert: u32,
    /// Where they begin in the order of [`super::route`].
    pub(crate) first: u32,
    pub(crate) end: u32,
    /// Whether there is anything to do.
    pub(crate) works: bool,
}

/// The rows of this block.
#[cube]
pub(crate) fn run_of(route: &Array<u32>, tokens: u32, #[comptime] routed: Routed) -> Run {
    let each = comptime!(routed.stack().each);
    if comptime!(matches!(routed, Routed::Few(_))) {
        let expert = expert_of(route, CUBE_POS_Y, each);
        // An earlier token's block takes all rows of the expert.
        let mut earlier: u32 = 0u32;
        for row in 0..CUBE_POS_Y {
            if expert_of(route, row, each) == expert {
                earlier += 1u32;
            }
        }
        Run { expert, first: 0u32, end: tokens, works: earlier == 0u32 }
    } else {
        let at = 1 + tokens * each + 3 * CUBE_POS_Y;
        let works = CUBE_POS_Y < route[0usize];
        let mut expert = 0u32;
        let mut first = 0u32;
        let mut end = 0u32;
        if works {
            expert = route[at as usize];
            first = route[(at + 1) as usize];
            end = route[(at + 2) as usize];
        }
        Run { expert, first, end, works }
    }
}

/// The row in place `slot` of a run, or [`NONE`].
#[cube]
fn row_of(route: &Array<u32>, run: Run, slot: u32, #[comptime] routed: Routed) -> u32 {
    let each = comptime!(routed.stack().each);
    let at = run.first + slot;
    let mut row = NONE.runtime();
    if at < run.end {
        if comptime!(matches!(routed, Routed::Few(_))) {
            for j in 0..each {
                let candidate = at * each + j;
                if expert_of(route, candidate, each) == run.expert {
                    row = candidate;
                }
            }
        } else {
            row = route[(1 + at) as usize];
        }
    }
    row
}

/// The row in place `slot` of a block's rows, which follow each other where they need not find experts.
#[cube]
pub(crate) fn row_at(route: &Array<u32>, run: Run, slot: u32, #[comptime] routed: Option<Routed>) -> u32 {
    if let Some(routed) = comptime!(routed) { row_of(route, run, slot, routed) } else { run.first + slot }
}

/// Rows before this one exist.
#[cube]
pub(crate) fn limit_of(run: Run, #[comptime] routed: Option<Routed>) -> u32 {
    if comptime!(routed.is_some()) { NONE.runtime() } else { run.end }
}

/// Which row of the right operand a row reads.
#[cube]
pub(crate) fn source_at(row: u32, #[comptime] routed: Option<Routed>) -> u32 {
    if comptime!(routed.is_some_and(|r| r.stack().shared)) {
        row / comptime!(routed.map_or(1, |r| r.stack().each))
    } else {
        row
    }
}

/// The expert of a row, from the records.
#[cube]
pub(crate) fn expert_of(records: &Array<u32>, row: u32, #[comptime] each: u32) -> u32 {
    records[(row / each * (2 * each) + each + row % each) as usize]
}
