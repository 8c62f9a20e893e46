//! The search for clip bounds.
//!
//! A row of the rounded weight differs from the original by `d`; over all calibration tokens that costs `d G dᵀ`. The
//! bounds of group `b` change only the part `d_b`. With `p = d G` the cost, as a function of `d_b` alone, is
//! `d_b G_bb d_bᵀ + 2 d_b (p_b − d'_b G_bb)ᵀ` plus a constant, `d'` being the error before the change. `scope=group`
//! leaves the second term out: groups are then independent. `scope=row` starts from there and visits the groups in
//! turn, which takes errors of different groups of correlated channels against each other.
//!
//! The first sweep tries the whole grid for each end, later ones look around what they find: that comes within a
//! percent of trying everything every time, at a third of the cost.
//!
//! Candidates of many rows are judged by one matrix product. Tiles of rows are independent of each other and run in
//! parallel; within a tile everything happens in a fixed order.

use awqc_ir::{Elem, Quant};
use rayon::prelude::*;

use super::{Scope, Shape};
use crate::dense::{Put, View, product, quadratic};
use crate::rtn::kernel;

/// Rows of a tile.
const TILE: usize = 96;

/// Numbers in a batch of candidates: a few hundred KiB, to stay in cache.
const BATCH: usize = 1 << 16;

/// How to search.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// What the weight will be rounded to.
    pub quant: Quant,
    /// What it is now; bounds are numbers of this type, so that clipping is exact.
    pub elem: Elem,
    /// Which bounds are tried.
    pub shape: Shape,
    /// Which error they are judged by.
    pub scope: Scope,
    /// Sizes tried for each end: `1 − k · max_shrink / steps` of it.
    pub steps: u32,
    /// How much of an end is cut off at most.
    pub max_shrink: f32,
    /// Rounds through the groups of a row.
    pub sweeps: u32,
}

/// The bounds that were chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounds {
    /// Lower bounds, `[rows, groups]`.
    pub lo: Vec<f32>,
    /// Upper bounds, `[rows, groups]`.
    pub hi: Vec<f32>,
    /// The loss without clipping: by the plan's own measure, summed over rows.
    pub before: Option<f64>,
    /// The loss with these bounds.
    pub after: Option<f64>,
}

/// Chooses bounds for `w`, `[rows, cols]`, whose input has the Gram matrix `gram`, `[cols, cols]`. No row's loss, by
/// the plan's own measure, is larger than without clipping.
///
/// # Panics
/// When `w` or `gram` is not a whole number of rows of `cols`: a fault of the caller, not of data.
pub fn search(w: &[f32], cols: usize, gram: &[f32], plan: &Plan) -> Bounds {
    assert!(cols > 0 && w.len().is_multiple_of(cols) && gram.len() == cols * cols, "the shapes do not fit");
    let blocks = diagonal(gram, cols, plan.quant.group.len(cols));
    let tiles: Vec<Tile<'_>> = w
        .par_chunks(TILE * cols)
        .map(|w| {
            let mut tile = Tile::new(w, cols, gram, &blocks, plan);
            tile.run();
            tile
        })
        .collect();
    let groups = plan.quant.group.count(cols);
    let mut out = Bounds { lo: Vec::new(), hi: Vec::new(), before: None, after: None };
    let (mut before, mut after) = (0.0, 0.0);
    for tile in tiles {
        debug_assert_eq!(tile.bounds.len(), tile.rows * groups);
        out.lo.extend(tile.bounds.iter().map(|b| b.0));
        out.hi.extend(tile.bounds.iter().map(|b| b.1));
        before += tile.before.iter().sum::<f64>();
        after += tile.after.iter().sum::<f64>();
    }
    (out.before, out.after) = (Some(before), Some(after));
    out
}

/// The blocks of a Gram matrix that belong to one group each, `[n, n]`.
fn diagonal(gram: &[f32], cols: usize, group: usize) -> Vec<Vec<f32>> {
    let block = |start: usize| {
        let end = cols.min(start + group);
        (start..end).flat_map(|r| &gram[r * cols + start..r * cols + end]).copied().collect()
    };
    (0..cols).step_by(group).map(block).collect()
}

/// Lower and upper bound.
type Range = (f32, f32);

/// Some rows of the weight and what is known of them.
struct Tile<'a> {
    w: &'a [f32],
    rows: usize,
    cols: usize,
    gram: &'a [f32],
    blocks: &'a [Vec<f32>],
    plan: &'a Plan,
    /// The range of each group, widened to contain 0: the bounds that cut nothing off. `[rows, groups]`.
    full: Vec<Range>,
    /// The bounds so far, `[rows, groups]`.
    bounds: Vec<Range>,
    before: Vec<f64>,
    after: Vec<f64>,
    scratch: Scratch,
}

/// Buffers that are used again and again.
#[derive(Default)]
struct Scratch {
    delta: Vec<f32>,
    image: Vec<f32>,
    product: Vec<f32>,
}

/// Which ends a stage of the search moves.
#[derive(Clone, Copy)]
enum Move {
    /// `[−m, m]`, m a fraction of the largest magnitude.
    Magnitude,
    /// Both by the same fraction.
    Both,
    /// The lower one.
    Low,
    /// The upper one.
    High,
    /// The lower one, around where it is.
    LowNear,
    /// The upper one, around where it is.
    HighNear,
}

/// What [`Move::LowNear`] and [`Move::HighNear`] try, in steps of the grid.
const NEAR: [f32; 6] = [-2.0, -1.0, -0.5, 0.5, 1.0, 2.0];

impl<'a> Tile<'a> {
    fn new(w: &'a [f32], cols: usize, gram: &'a [f32], blocks: &'a [Vec<f32>], plan: &'a Plan) -> Self {
        let group = plan.quant.group.len(cols);
        let range = |g: &[f32]| {
            let (lo, hi) = kernel::range(g);
            (lo.min(0.0), hi.max(0.0))
        };
        let full: Vec<Range> = w.chunks(cols).flat_map(|row| row.chunks(group)).map(range).collect();
        let rows = w.len() / cols;
        let bounds = full.clone();
        let scratch = Scratch::default();
        Self { w, rows, cols, gram, blocks, plan, full, bounds, before: Vec::new(), after: Vec::new(), scratch }
    }

    fn group(&self) -> usize {
        self.plan.quant.group.len(self.cols)
    }

    /// Number of groups in a row.
    fn groups(&self) -> usize {
        self.blocks.len()
    }

    fn run(&mut self) {
        use Move::{Both, High, HighNear, Low, LowNear, Magnitude};
        let alone = self.plan.scope == Scope::Group || self.groups() == 1;
        let (start, first, later): (&[Move], &[Move], &[Move]) = match self.plan.shape {
            Shape::Symmetric => (&[Magnitude], &[Magnitude], &[Magnitude]),
            Shape::Asymmetric if alone => (&[Both, Low, High, Low, High], &[], &[]),
            Shape::Asymmetric => (&[Both], &[Low, High], &[LowNear, HighNear]),
        };
        let mut losses = vec![(0.0, 0.0); self.rows];
        for b in 0..self.groups() {
            for (sum, (before, after)) in losses.iter_mut().zip(self.visit(b, None, start)) {
                *sum = (sum.0 + before, sum.1 + after);
            }
        }
        if alone {
            (self.before, self.after) = losses.into_iter().unzip();
            return;
        }
        let full = self.full.clone();
        self.before = self.row_losses(&full);
        self.after = self.sweep(first, later);
        // The groups one by one may be better and the row as a whole worse: then the row is not clipped.
        let groups = self.groups();
        for r in 0..self.rows {
            if self.after[r] > self.before[r] {
                self.bounds[r * groups..(r + 1) * groups].copy_from_slice(&full[r * groups..(r + 1) * groups]);
                self.after[r] = self.before[r];
            }
        }
    }

    /// Visits all groups in turn, each given the errors of the others; returns the loss of each row.
    fn sweep(&mut self, first: &[Move], later: &[Move]) -> Vec<f64> {
        let (rows, cols, group) = (self.rows, self.cols, self.group());
        let gram = View::new(self.gram, cols, cols);
        let mut d = self.error(&self.bounds.clone());
        let mut p = vec![0.0; rows * cols];
        product(View::new(&d, rows, cols), gram, &mut p, cols, Put::Replace);
        let mut change = Vec::new();
        let mut linear = Vec::new();
        for sweep in 0..self.plan.sweeps {
            let moves = if sweep == 0 { first } else { later };
            for b in 0..self.groups() {
                let start = b * group;
                let n = group.min(cols - start);
                // The gradient that the other groups' errors make: p without this group's own part.
                let own = View::new(&d, rows, cols).block(0, start, rows, n);
                linear.clear();
                linear.resize(rows * n, 0.0);
                product(own, View::new(&self.blocks[b], n, n), &mut linear, n, Put::Replace);
                for (l, p) in linear.chunks_mut(n).zip(p.chunks(cols)) {
                    l.iter_mut().zip(&p[start..start + n]).for_each(|(l, p)| *l = p - *l);
                }
                self.visit(b, Some(&linear), moves);
                change.clear();
                change.resize(rows * n, 0.0);
                for r in 0..rows {
                    let at = r * cols + start;
                    let change = &mut change[r * n..(r + 1) * n];
                    let bounds = self.bounds[r * self.groups() + b];
                    kernel::clipped_errors(&self.w[at..at + n], &[bounds], self.plan.quant, change);
                    for (c, d) in change.iter_mut().zip(&mut d[at..at + n]) {
                        let new = *c;
                        *c -= *d;
                        *d = new;
                    }
                }
                product(View::new(&change, rows, n), gram.block(start, 0, n, cols), &mut p, cols, Put::Add);
            }
        }
        d.chunks(cols).zip(p.chunks(cols)).map(|(d, p)| kernel::dot(d, p)).collect()
    }

    /// What rounding with these bounds does to the weight, `[rows, cols]`.
    fn error(&self, bounds: &[Range]) -> Vec<f32> {
        let group = self.group();
        let mut d = vec![0.0; self.w.len()];
        let rows = self.w.chunks(self.cols).zip(d.chunks_mut(self.cols));
        let groups = rows.flat_map(|(w, d)| w.chunks(group).zip(d.chunks_mut(group)));
        for ((w, d), bounds) in groups.zip(bounds) {
            kernel::clipped_errors(w, &[*bounds], self.plan.quant, d);
        }
        d
    }

    fn row_losses(&mut self, bounds: &[Range]) -> Vec<f64> {
        let d = self.error(bounds);
        quadratic(View::new(&d, self.rows, self.cols), self.gram, &mut self.scratch.product)
    }

    /// Improves the bounds of group `b` of every row; returns the group's loss before any clipping or, with a linear
    /// term, with the bounds that it had, and after.
    fn visit(&mut self, b: usize, linear: Option<&[f32]>, moves: &[Move]) -> Vec<(f64, f64)> {
        let incumbent: Vec<Vec<Range>> = (0..self.rows).map(|r| vec![self.bounds[r * self.groups() + b]]).collect();
        let start: Vec<f32> = self.judge(b, linear, &incumbent).into_iter().map(|l| l[0]).collect();
        let mut least = start.clone();
        for step in moves {
            let candidates: Vec<Vec<Range>> =
                (0..self.rows).map(|r| self.candidates(r * self.groups() + b, *step)).collect();
            let losses = self.judge(b, linear, &candidates);
            for (r, (ranges, losses)) in candidates.iter().zip(losses).enumerate() {
                for (range, loss) in ranges.iter().zip(losses) {
                    if loss < least[r] {
                        least[r] = loss;
                        self.bounds[r * self.blocks.len() + b] = *range;
                    }
                }
            }
        }
        start.into_iter().zip(least).map(|(a, b)| (a.into(), b.into())).collect()
    }

    /// The bounds that a stage tries for the group at `at`.
    fn candidates(&self, at: usize, step: Move) -> Vec<Range> {
        let ((lo, hi), now) = (self.full[at], self.bounds[at]);
        let size = self.plan.max_shrink / self.plan.steps as f32;
        let round = |v: f32| self.plan.elem.round(v);
        let grid = || (0..self.plan.steps).map(|k| 1.0 - k as f32 * size);
        let near = |now: f32, full: f32| {
            let part = if full == 0.0 { 1.0 } else { now / full };
            NEAR.map(|o| (part + o * size).clamp(1.0 - self.plan.max_shrink, 1.0))
        };
        match step {
            Move::Magnitude => {
                let largest = hi.max(-lo);
                grid().map(|f| round(largest * f)).map(|m| (lo.max(-m), hi.min(m))).collect()
            }
            Move::Both => grid().map(|f| (round(lo * f), round(hi * f))).collect(),
            Move::Low => grid().map(|f| (round(lo * f), now.1)).collect(),
            Move::High => grid().map(|f| (now.0, round(hi * f))).collect(),
            Move::LowNear => near(now.0, lo).map(|f| (round(lo * f), now.1)).to_vec(),
            Move::HighNear => near(now.1, hi).map(|f| (now.0, round(hi * f))).to_vec(),
        }
    }

    /// The loss of each candidate of each row for group `b`, up to a constant of the row.
    fn judge(&mut self, b: usize, linear: Option<&[f32]>, candidates: &[Vec<Range>]) -> Vec<Vec<f32>> {
        let block = &self.blocks[b];
        let start = b * self.group();
        let n = self.group().min(self.cols - start);
        let tries = candidates.first().map_or(1, Vec::len).max(1);
        let batch = (BATCH / (tries * n)).max(1);
        let mut out = Vec::with_capacity(candidates.len());
        let Scratch { delta, image, .. } = &mut self.scratch;
        for (first, candidates) in candidates.chunks(batch).enumerate().map(|(i, c)| (i * batch, c)) {
            let rows = candidates.len() * tries;
            delta.resize(rows * n, 0.0);
            image.resize(rows * n, 0.0);
            for (r, (ranges, delta)) in (first..).zip(candidates.iter().zip(delta.chunks_mut(tries * n))) {
                let at = r * self.cols + start;
                kernel::clipped_errors(&self.w[at..at + n], ranges, self.plan.quant, delta);
            }
            product(View::new(delta, rows, n), View::new(block, n, n), image, n, Put::Replace);
            for (i, (delta, image)) in
                delta.chunks(tries * n).zip(image.chunks(tries * n)).take(candidates.len()).enumerate()
            {
                let linear = linear.map_or(&[][..], |l| &l[(first + i) * n..(first + i + 1) * n]);
                let mut losses = vec![0.0; tries];
                kernel::forms(delta, image, linear, &mut losses);
                out.push(losses);
            }
        }
        out
    }
}
