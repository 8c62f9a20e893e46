//! The flat program: steps over values, before anything has a place; and the rewrites that save traffic.

use std::collections::BTreeMap;

use awqc_ir::op::Sdpa;
use awqc_ir::tiles::Tiles;

use super::constants::Matrix;
use crate::kernels::Float;
use crate::kernels::routed::Stack;
use crate::kernels::rows::{Choice, Map, Zip};
use crate::plan::Ints;

/// Index of a value.
pub(super) type Var = usize;

/// Where a value lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Home {
    /// f32 rows of its own.
    F32,
    /// f16 rows of its own, for packed products.
    F16,
    /// Columns of another value.
    View(Var, usize),
    /// Rows of a KV cache.
    Cache(usize),
}

/// A value.
#[derive(Clone, Copy, Debug)]
pub(super) struct Value {
    /// Columns.
    pub(super) width: usize,
    /// Rows of a token: several between `dispatch` and `combine`, one for each of its experts.
    pub(super) rows: usize,
    pub(super) home: Home,
}

/// The second operand of a [`RowOp::Zip`].
#[derive(Clone, Copy, Debug)]
pub(super) enum By {
    Value(Var),
    Constant(usize),
}

/// A step.
#[derive(Clone, Debug)]
pub(super) struct Flat {
    pub(super) op: FlatOp,
    /// The value that it computes.
    pub(super) out: Var,
}

/// What a step does. Constants are indices into those of the plan.
#[derive(Clone, Debug)]
pub(super) enum FlatOp {
    Row(RowOp),
    Packed { weight: usize, shape: Tiles, bias: Option<usize>, x: Var },
    Dense { weight: usize, of: Float, bias: Option<usize>, x: Var },
    Attend { op: Sdpa, q: Var, keys: Var, values: Var },
    Route { records: Var, stack: Stack, tile: u32 },
    Experts { weight: Matrix, stack: Stack, records: Var, route: Var, tile: u32, x: Var },
}

/// What treats each token by itself.
#[derive(Clone, Copy, Debug)]
pub(super) enum RowOp {
    Embed { table: usize, of: Float, ints: Ints, offset: u32 },
    Image { x: Var },
    RmsNorm { x: Var, gain: Option<usize>, heads: usize, eps: f32 },
    LayerNorm { x: Var, gain: Option<usize>, bias: Option<usize>, heads: usize, each: bool, eps: f32 },
    Rope { x: Var, angles: usize, pairs: usize, heads: usize, interleaved: bool },
    Map { x: Var, f: Map },
    Zip { a: Var, f: Map, b: By, zip: Zip },
    Repeat { x: Var, times: usize },
    Softmax { x: Var },
    Choose { scores: Var, bias: Option<usize>, of: Choice },
    Combine { y: Var, w: Var },
}

impl From<RowOp> for FlatOp {
    fn from(op: RowOp) -> Self {
        FlatOp::Row(op)
    }
}

impl FlatOp {
    /// The values that the step reads.
    pub(super) fn reads(&self) -> Vec<Var> {
        match self {
            FlatOp::Row(op) => op.reads(),
            FlatOp::Packed { x, .. } | FlatOp::Dense { x, .. } | FlatOp::Route { records: x, .. } => vec![*x],
            FlatOp::Experts { records, route, x, .. } => vec![*x, *records, *route],
            FlatOp::Attend { q, keys, values, .. } => vec![*q, *keys, *values],
        }
    }
}

impl RowOp {
    /// The values that the step reads.
    pub(super) fn reads(&self) -> Vec<Var> {
        match self {
            RowOp::Embed { .. } => Vec::new(),
            RowOp::Image { x }
            | RowOp::RmsNorm { x, .. }
            | RowOp::LayerNorm { x, .. }
            | RowOp::Rope { x, .. }
            | RowOp::Map { x, .. }
            | RowOp::Repeat { x, .. }
            | RowOp::Softmax { x }
            | RowOp::Choose { scores: x, .. }
            | RowOp::Zip { a: x, b: By::Constant(_), .. } => vec![*x],
            RowOp::Combine { y, w } => vec![*y, *w],
            RowOp::Zip { a, b: By::Value(b), .. } => vec![*a, *b],
        }
    }
}

/// The steps of a part of the module, in order.
#[derive(Debug, Default)]
pub(super) struct FlatProgram {
    pub(super) values: Vec<Value>,
    pub(super) steps: Vec<Flat>,
    /// Values that are there beforehand.
    pub(super) given: Vec<Var>,
    /// Values that somebody reads afterwards.
    pub(super) results: Vec<Var>,
    /// The runs of up to so many rows that were found for records.
    pub(super) routes: BTreeMap<(Var, u32), Var>,
}

impl FlatProgram {
    /// A new value.
    pub(super) fn value(&mut self, width: usize, home: Home) -> Var {
        self.rows(width, 1, home)
    }

    /// A new value with so many rows for each token.
    pub(super) fn rows(&mut self, width: usize, rows: usize, home: Home) -> Var {
        self.values.push(Value { width, rows, home });
        self.values.len() - 1
    }

    /// Appends a step.
    pub(super) fn push(&mut self, op: impl Into<FlatOp>, out: Var) {
        self.steps.push(Flat { op: op.into(), out });
    }

    /// Columns of a value, in each of its rows.
    pub(super) fn window(&mut self, of: Var, col: usize, width: usize) -> Var {
        self.rows(width, self.values[of].rows, Home::View(of, col))
    }

    /// The value whose memory holds this one, and its first column there.
    pub(super) fn root(&self, var: Var) -> (Var, usize) {
        match self.values[var].home {
            Home::View(of, col) => {
                let (root, first) = self.root(of);
                (root, first + col)
            }
            Home::F32 | Home::F16 | Home::Cache(_) => (var, 0),
        }
    }

    /// Reads of each value, through views too.
    fn uses(&self) -> Vec<usize> {
        let mut uses = vec![0; self.values.len()];
        let mut count = |var: Var| {
            uses[var] += 1;
            let root = self.root(var).0;
            if root != var {
                uses[root] += 1;
            }
        };
        self.steps.iter().flat_map(|s| s.op.reads()).for_each(&mut count);
        self.results.iter().copied().for_each(&mut count);
        uses
    }

    /// Computes values where they are wanted: a function inside the step that uses its result, a rotation straight into
    /// the cache, a norm straight into f16.
    pub(super) fn tighten(&mut self) {
        self.merge_functions();
        self.merge_copies();
    }

    /// The step that computes `var`, if it is the only one that writes its memory.
    fn maker(&self, var: Var) -> Option<usize> {
        let mut makers = (0..self.steps.len()).filter(|i| self.root(self.steps[*i].out).0 == var);
        let first = makers.next()?;
        (makers.next().is_none() && self.steps[first].out == var).then_some(first)
    }

    fn merge_functions(&mut self) {
        let uses = self.uses();
        let mut gone = vec![false; self.steps.len()];
        for i in 0..self.steps.len() {
            let FlatOp::Row(RowOp::Zip { a, f: Map::Same, b, zip }) = self.steps[i].op else { continue };
            let merged = |var: Var| {
                let maker = self.maker(var).filter(|_| uses[var] == 1)?;
                let FlatOp::Row(RowOp::Map { x, f }) = self.steps[maker].op else { return None };
                (maker < i).then_some((maker, x, f))
            };
            let (maker, a, f, b) = match (merged(a), b) {
                (Some((maker, x, f)), b) => (maker, x, f, b),
                (None, By::Value(other)) => match merged(other) {
                    Some((maker, x, f)) => (maker, x, f, By::Value(a)),
                    None => continue,
                },
                (None, By::Constant(_)) => continue,
            };
            gone[maker] = true;
            self.steps[i].op = RowOp::Zip { a, f, b, zip }.into();
        }
        let mut gone = gone.into_iter();
        self.steps.retain(|_| !gone.next().unwrap_or(false));
    }

    fn merge_copies(&mut self) {
        let uses = self.uses();
        let mut gone = vec![false; self.steps.len()];
        for (i, gone) in gone.iter_mut().enumerate() {
            let Flat { op: FlatOp::Row(RowOp::Map { x, f: Map::Same }), out } = self.steps[i] else { continue };
            let Some(maker) = self.maker(x).filter(|m| uses[x] == 1 && *m < i) else { continue };
            let fits = match &self.steps[maker].op {
                FlatOp::Attend { .. } => self.values[out].home == Home::F16,
                FlatOp::Row(_) => self.values[out].rows == self.values[x].rows,
                FlatOp::Packed { .. } | FlatOp::Dense { .. } | FlatOp::Route { .. } | FlatOp::Experts { .. } => false,
            };
            // A result of the same kind elsewhere, and nothing that reads or writes its memory in between.
            let root = self.root(out).0;
            let quiet = self.steps[maker + 1..i]
                .iter()
                .all(|s| self.root(s.out).0 != root && s.op.reads().iter().all(|r| self.root(*r).0 != root));
            if fits && quiet {
                self.steps[maker].out = out;
                *gone = true;
            }
        }
        let mut gone = gone.into_iter();
        self.steps.retain(|_| !gone.next().unwrap_or(false));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_and_copies_disappear() {
        let mut p = FlatProgram::default();
        let (gu, x) = (p.value(8, Home::F32), p.value(4, Home::F32));
        let (g, u) = (p.value(4, Home::View(gu, 0)), p.value(4, Home::View(gu, 4)));
        let (s, m, h) = (p.value(4, Home::F32), p.value(4, Home::F32), p.value(4, Home::F16));
        p.given = vec![gu, x];
        p.push(RowOp::Map { x: g, f: Map::Silu }, s);
        p.push(RowOp::Zip { a: u, f: Map::Same, b: By::Value(s), zip: Zip::Mul }, m);
        p.push(RowOp::Map { x: m, f: Map::Same }, h);
        p.results = vec![h];
        p.tighten();
        let [Flat { op: FlatOp::Row(RowOp::Zip { a, f: Map::Silu, b: By::Value(b), .. }), out }] = p.steps[..] else {
            panic!("{:?}", p.steps)
        };
        assert_eq!((a, b, out), (g, u, h));
    }

    #[test]
    fn a_value_that_is_used_twice_stays() {
        let mut p = FlatProgram::default();
        let (x, y, h) = (p.value(4, Home::F32), p.value(4, Home::F32), p.value(4, Home::F16));
        p.given = vec![x];
        p.push(RowOp::Map { x, f: Map::Silu }, y);
        p.push(RowOp::Map { x: y, f: Map::Same }, h);
        p.results = vec![y, h];
        p.tighten();
        assert_eq!(p.steps.len(), 2);
    }
}
