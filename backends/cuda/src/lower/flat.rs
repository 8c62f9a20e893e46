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

/// The second operand of a [`Flat::Zip`].
#[derive(Clone, Copy, Debug)]
pub(super) enum By {
    Value(Var),
    Constant(usize),
}

/// A step. Constants are indices into those of the plan.
#[derive(Clone, Debug)]
pub(super) enum Flat {
    Embed { table: usize, of: Float, ints: Ints, offset: u32, out: Var },
    Image { x: Var, out: Var },
    RmsNorm { x: Var, gain: Option<usize>, heads: usize, eps: f32, out: Var },
    LayerNorm { x: Var, gain: Option<usize>, bias: Option<usize>, heads: usize, each: bool, eps: f32, out: Var },
    Rope { x: Var, angles: usize, pairs: usize, heads: usize, interleaved: bool, out: Var },
    Map { x: Var, f: Map, out: Var },
    Zip { a: Var, f: Map, b: By, zip: Zip, out: Var },
    Packed { weight: usize, shape: Tiles, bias: Option<usize>, x: Var, out: Var },
    Dense { weight: usize, of: Float, bias: Option<usize>, x: Var, out: Var },
    Attend { op: Sdpa, q: Var, keys: Var, values: Var, out: Var },
    Repeat { x: Var, times: usize, out: Var },
    Softmax { x: Var, out: Var },
    Choose { scores: Var, bias: Option<usize>, of: Choice, out: Var },
    Combine { y: Var, w: Var, out: Var },
    Route { records: Var, stack: Stack, tile: u32, out: Var },
    Experts { weight: Matrix, stack: Stack, records: Var, route: Var, tile: u32, x: Var, out: Var },
}

impl Flat {
    /// The values that the step reads.
    pub(super) fn reads(&self) -> Vec<Var> {
        match self {
            Flat::Embed { .. } => Vec::new(),
            Flat::Image { x, .. }
            | Flat::RmsNorm { x, .. }
            | Flat::LayerNorm { x, .. }
            | Flat::Rope { x, .. }
            | Flat::Map { x, .. }
            | Flat::Packed { x, .. }
            | Flat::Dense { x, .. }
            | Flat::Repeat { x, .. }
            | Flat::Softmax { x, .. }
            | Flat::Choose { scores: x, .. }
            | Flat::Route { records: x, .. }
            | Flat::Zip { a: x, b: By::Constant(_), .. } => vec![*x],
            Flat::Combine { y, w, .. } => vec![*y, *w],
            Flat::Experts { records, route, x, .. } => vec![*x, *records, *route],
            Flat::Zip { a, b: By::Value(b), .. } => vec![*a, *b],
            Flat::Attend { q, keys, values, .. } => vec![*q, *keys, *values],
        }
    }

    /// The value that it computes.
    pub(super) fn out(&self) -> Var {
        match self {
            Flat::Embed { out, .. }
            | Flat::Image { out, .. }
            | Flat::RmsNorm { out, .. }
            | Flat::LayerNorm { out, .. }
            | Flat::Rope { out, .. }
            | Flat::Map { out, .. }
            | Flat::Zip { out, .. }
            | Flat::Packed { out, .. }
            | Flat::Dense { out, .. }
            | Flat::Attend { out, .. }
            | Flat::Repeat { out, .. }
            | Flat::Softmax { out, .. }
            | Flat::Choose { out, .. }
            | Flat::Combine { out, .. }
            | Flat::Route { out, .. }
            | Flat::Experts { out, .. } => *out,
        }
    }

    fn set_out(&mut self, var: Var) {
        match self {
            Flat::Embed { out, .. }
            | Flat::Image { out, .. }
            | Flat::RmsNorm { out, .. }
            | Flat::LayerNorm { out, .. }
            | Flat::Rope { out, .. }
            | Flat::Map { out, .. }
            | Flat::Zip { out, .. }
            | Flat::Packed { out, .. }
            | Flat::Dense { out, .. }
            | Flat::Attend { out, .. }
            | Flat::Repeat { out, .. }
            | Flat::Softmax { out, .. }
            | Flat::Choose { out, .. }
            | Flat::Combine { out, .. }
            | Flat::Route { out, .. }
            | Flat::Experts { out, .. } => *out = var,
        }
    }

    /// Whether it treats each token by itself.
    pub(super) fn is_row(&self) -> bool {
        match self {
            Flat::Embed { .. }
            | Flat::Image { .. }
            | Flat::RmsNorm { .. }
            | Flat::LayerNorm { .. }
            | Flat::Rope { .. }
            | Flat::Map { .. }
            | Flat::Zip { .. }
            | Flat::Repeat { .. }
            | Flat::Softmax { .. }
            | Flat::Choose { .. }
            | Flat::Combine { .. } => true,
            Flat::Packed { .. }
            | Flat::Dense { .. }
            | Flat::Attend { .. }
            | Flat::Route { .. }
            | Flat::Experts { .. } => false,
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
        self.steps.iter().flat_map(Flat::reads).for_each(&mut count);
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
        let mut makers = (0..self.steps.len()).filter(|i| self.root(self.steps[*i].out()).0 == var);
        let first = makers.next()?;
        (makers.next().is_none() && self.steps[first].out() == var).then_some(first)
    }

    fn merge_functions(&mut self) {
        let uses = self.uses();
        let mut gone = vec![false; self.steps.len()];
        for i in 0..self.steps.len() {
            let Flat::Zip { a, f: Map::Same, b, zip, out } = self.steps[i] else { continue };
            let merged = |var: Var| {
                let maker = self.maker(var).filter(|_| uses[var] == 1)?;
                let Flat::Map { x, f, .. } = self.steps[maker] else { return None };
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
            self.steps[i] = Flat::Zip { a, f, b, zip, out };
        }
        let mut gone = gone.into_iter();
        self.steps.retain(|_| !gone.next().unwrap_or(false));
    }

    fn merge_copies(&mut self) {
        let uses = self.uses();
        let mut gone = vec![false; self.steps.len()];
        for (i, gone) in gone.iter_mut().enumerate() {
            let Flat::Map { x, f: Map::Same, out } = self.steps[i] else { continue };
            let Some(maker) = self.maker(x).filter(|m| uses[x] == 1 && *m < i) else { continue };
            let fits = match (&self.steps[maker], self.values[out].home) {
                (Flat::Attend { .. }, home) => home == Home::F16,
                (step, _) => step.is_row() && self.values[out].rows == self.values[x].rows,
            };
            // A result of the same kind elsewhere, and nothing that reads or writes its memory in between.
            let root = self.root(out).0;
            let quiet = self.steps[maker + 1..i]
                .iter()
                .all(|s| self.root(s.out()).0 != root && s.reads().iter().all(|r| self.root(*r).0 != root));
            if fits && quiet {
                self.steps[maker].set_out(out);
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
        p.steps = vec![
            Flat::Map { x: g, f: Map::Silu, out: s },
            Flat::Zip { a: u, f: Map::Same, b: By::Value(s), zip: Zip::Mul, out: m },
            Flat::Map { x: m, f: Map::Same, out: h },
        ];
        p.results = vec![h];
        p.tighten();
        assert!(
            matches!(p.steps[..], [Flat::Zip { a, f: Map::Silu, b: By::Value(b), out, .. }] if (a, b, out) == (g, u, h))
        );
    }

    #[test]
    fn a_value_that_is_used_twice_stays() {
        let mut p = FlatProgram::default();
        let (x, y, h) = (p.value(4, Home::F32), p.value(4, Home::F32), p.value(4, Home::F16));
        p.given = vec![x];
        p.steps = vec![Flat::Map { x, f: Map::Silu, out: y }, Flat::Map { x: y, f: Map::Same, out: h }];
        p.results = vec![y, h];
        p.tighten();
        assert_eq!(p.steps.len(), 2);
    }
}
