//! From a chain of regions to a [`Program`]: fused calls are opened, ops become flat steps ([`Flat`]), values get
//! places and steps are gathered in stages ([`place`]).
//!
//! A fused call is a promise about memory traffic: what is in its body need not leave the core. Stages keep that
//! promise for every body, the ones that this crate has never seen included: consecutive steps that treat each token by
//! itself run one after the other on one token's rows, in place where the operand is dead. So bodies are simply
//! inlined.

mod place;
mod weights;

use std::collections::BTreeMap;

use awqc_exec::coverage::without_kernels;
use awqc_exec::interp::frequencies::frequencies;
use awqc_ir::images::Placed;
use awqc_ir::inline::inline_fused;
use awqc_ir::op::{GeluForm, Op};
use awqc_ir::{FusedDef, Module, Region, TensorSource, Type, ValueId, WeightId};

use self::place::{Flat, FlatProgram, Var, Way, place};
use self::weights::{Home, dense, matrix, vector};
use crate::CpuError;
use crate::arena::Place;
use crate::memory::{Memory, Pages};
use crate::program::{Ints, Map, Other, Program, Row, Zip};

/// A region's value as the flat program knows it.
#[derive(Clone, Copy)]
pub(crate) enum Entry {
    /// Given with every pass.
    Ints(Ints),
    /// Given with a text: rows of images, which are no rows of tokens.
    Images,
    /// Computed, or given as floats.
    Float(Var),
    /// For each token the rows of its experts side by side, or one row that all of them see.
    Experts(Var, Routed),
}

/// The way of a value's rows to experts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Routed {
    way: Way,
    /// Experts of a token.
    each: usize,
}

/// Lowers a chain of regions whose stream begins with `stream`; returns the program and the stream behind it.
///
/// # Errors
/// When a weight cannot be read, or an op is used in a form that this back end does not know.
pub(crate) fn lower<'a>(
    regions: &[Region],
    fused: &[FusedDef],
    source: &'a dyn TensorSource,
    inputs: &[Input],
    pages: Pages,
) -> Result<(Program<'a>, Vec<Input>), CpuError> {
    let mut builder =
        Builder { flat: FlatProgram::default(), home: Home { pages, memory: Memory::default() }, ways: Vec::new() };
    let mut stream: Vec<Entry> = inputs.iter().map(|i| builder.input(*i)).collect();
    builder.flat.given = stream.iter().filter_map(|e| e.float()).collect();
    for region in regions {
        let mut region = region.clone();
        inline_fused(&mut region, fused).map_err(|e| CpuError::Unsupported(format!("region {}: {e}", region.name)))?;
        let results = builder.region(&region, source, &stream)?;
        let behind = stream.split_off(results.len().min(stream.len()));
        stream = results.into_iter().chain(behind).collect();
    }
    let out = stream.iter().map(|e| builder.output(*e)).collect();
    builder.flat.results = stream.iter().filter_map(|e| e.float()).collect();
    Ok((Program { memory: builder.home.memory, ..place(builder.flat) }, out))
}

/// Why no kernel covers an op in this form, whatever its operands.
fn uncovered(op: &Op) -> Option<&'static str> {
    let sees_later = matches!(op, Op::Sdpa(op) if !op.causal);
    without_kernels(op).or_else(|| sees_later.then_some("tokens are taken in pieces here, so attention must be causal"))
}

/// Whether kernels cover a module, as far as can be told before its weights are packed.
///
/// # Errors
/// The first op that none covers.
pub fn check(module: &Module) -> Result<(), CpuError> {
    for region in module.eye_and_text().1 {
        let mut region = region.clone();
        inline_fused(&mut region, &module.fused)
            .map_err(|e| CpuError::Unsupported(format!("region {}: {e}", region.name)))?;
        for (_, node) in region.nodes() {
            if let Some(why) = uncovered(&node.op) {
                let op = node.op.mnemonic();
                return Err(CpuError::Unsupported(format!("region {}: {op}: {why}", region.name)));
            }
        }
    }
    Ok(())
}

/// What a program is given, or leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// Integers.
    Ints(Ints),
    /// Rows of images.
    Images,
    /// Rows of so many floats.
    Float(usize),
}

impl Entry {
    fn float(self) -> Option<Var> {
        match self {
            Entry::Float(var) | Entry::Experts(var, _) => Some(var),
            Entry::Ints(_) | Entry::Images => None,
        }
    }
}

struct Builder<'a> {
    flat: FlatProgram<'a>,
    home: Home,
    /// The ways to experts so far, each with the value that has their numbers.
    ways: Vec<Var>,
}

impl<'a> Builder<'a> {
    fn var(&mut self, width: usize) -> Var {
        self.flat.widths.push(width);
        self.flat.widths.len() - 1
    }

    fn input(&mut self, input: Input) -> Entry {
        match input {
            Input::Ints(ints) => Entry::Ints(ints),
            Input::Images => Entry::Images,
            Input::Float(width) => Entry::Float(self.var(width)),
        }
    }

    fn output(&self, entry: Entry) -> Input {
        match entry {
            Entry::Ints(ints) => Input::Ints(ints),
            Entry::Images => Input::Images,
            Entry::Float(var) | Entry::Experts(var, _) => Input::Float(self.flat.widths[var]),
        }
    }

    /// Appends the steps of a region without fused calls; returns its results.
    fn region(
        &mut self,
        region: &Region,
        source: &'a dyn TensorSource,
        stream: &[Entry],
    ) -> Result<Vec<Entry>, CpuError> {
        let mut known: BTreeMap<ValueId, Entry> = region.value_params().zip(stream.iter().copied()).collect();
        let unsupported =
            |op: &Op, why: &str| CpuError::Unsupported(format!("region {}: {}: {why}", region.name, op.mnemonic()));
        for (_, node) in region.nodes() {
            let op = &node.op;
            if let Some(why) = uncovered(op) {
                return Err(unsupported(op, why));
            }
            let weights: Vec<WeightId> = node.operands.iter().filter_map(|o| o.weight()).collect();
            let mut floats = Vec::new();
            let (mut ints, mut images, mut routed) = (None, false, None);
            for v in node.operands.iter().filter_map(|o| o.value()) {
                match known.get(&v) {
                    Some(Entry::Float(var)) => floats.push(*var),
                    Some(Entry::Ints(i)) => ints = Some(*i),
                    Some(Entry::Images) => images = true,
                    Some(Entry::Experts(_, of)) if routed.is_some_and(|r| r != *of) => {
                        return Err(unsupported(op, "the operands go to experts by different choices"));
                    }
                    Some(Entry::Experts(var, of)) => {
                        routed = Some(*of);
                        let channels = channels(&region.value(v).ty).unwrap_or(0);
                        // A product can read one row for all experts, other ops change the row of each.
                        let shared = of.each > 1 && self.flat.widths[*var] == channels && !matches!(op, Op::Linear(_));
                        floats.push(if shared { self.copies(*var, of.each) } else { *var });
                    }
                    None => return Err(unsupported(op, "an operand is not given")),
                }
            }
            // The rows of a token's experts lie side by side.
            let rows = if matches!(op, Op::Combine(_)) { 1 } else { routed.map_or(1, |r: Routed| r.each) };
            let mut outs = Vec::new();
            for r in &node.results {
                let width = channels(&region.value(*r).ty).map(|c| c * rows);
                outs.push(
                    self.var(width.ok_or_else(|| unsupported(op, "the result has no fixed number of channels"))?),
                );
            }
            let vector = |at: usize| weights.get(at).map(|w| vector(region, *w, source)).transpose();
            let need = |at: usize| floats.get(at).copied().ok_or_else(|| unsupported(op, "an operand is missing"));
            let (width, out) = (self.flat.widths[outs[0]], outs[0]);
            match op.clone() {
                Op::Embedding(e) => {
                    let of = ints.ok_or_else(|| unsupported(op, "the indices must be token ids or positions"))?;
                    let table = weights.first().ok_or_else(|| unsupported(op, "a table is missing"))?;
                    let table = dense(region, *table, source)?;
                    self.make(Vec::new(), &outs, move |_, out| Row::Embed { table, of, offset: e.offset, out: out[0] });
                }
                Op::Place(p) => {
                    if ints != Some(Ints::Ids) || !images {
                        return Err(unsupported(op, "it must put images at the tokens of the text"));
                    }
                    let these = Placed { token: p.token, width };
                    if self.flat.images.replace(these).is_some_and(|others| others != these) {
                        return Err(unsupported(op, "one token stands for images, not several"));
                    }
                    self.change(need(0)?, Vec::new(), out, |at, _: &[Place]| Row::Place { at });
                }
                Op::RopeTable(of) => {
                    if ints != Some(Ints::Positions) {
                        return Err(unsupported(op, "the angles must be those of the positions"));
                    }
                    let fixed = (!of.depends_on_length()).then(|| frequencies(&of, 0));
                    self.make(Vec::new(), &outs, move |_, out| Row::Angles { of, fixed, cos: out[0], sin: out[1] });
                }
                Op::Softmax(_) => self.change(need(0)?, Vec::new(), out, |at, _: &[Place]| Row::Softmax { at }),
                Op::TopK(op) => {
                    let bias = vector(0)?;
                    self.make(vec![need(0)?], &outs, move |of, out| Row::Choose {
                        op,
                        scores: of[0],
                        bias,
                        weights: out[0],
                        chosen: out[1],
                    });
                }
                Op::Dispatch(d) => {
                    let (x, chosen) = (need(0)?, need(1)?);
                    let experts =
                        usize::try_from(d.experts).map_err(|_| unsupported(op, "there are too many experts"))?;
                    let way = self.way(chosen, experts);
                    let routed = Routed { way, each: self.flat.widths[chosen] };
                    known.extend(node.results.iter().map(|r| (*r, Entry::Experts(x, routed))));
                    continue;
                }
                Op::Combine(_) => {
                    let same = |r: Routed| Some(&self.ways[r.way]) == floats.get(2);
                    if !routed.is_some_and(same) {
                        return Err(unsupported(op, "its rows must be those of the experts that it names"));
                    }
                    let by = vec![need(0)?, need(1)?];
                    self.make(by, &outs, |of, out| Row::Combine { y: of[0], weights: of[1], out: out[0] });
                }
                Op::Patches(_)
                | Op::Merge(_)
                | Op::Learned(_)
                | Op::Append(_)
                | Op::Cut(_)
                | Op::Count(_)
                | Op::CrossSdpa(_)
                | Op::Gate(_)
                | Op::Foreign(_) => return Err(unsupported(op, "no kernel covers it")),
                Op::Linear(_) => {
                    let weight = *weights.first().ok_or_else(|| unsupported(op, "a weight is missing"))?;
                    let (weight, x) = (matrix(region, weight, source, &mut self.home)?, need(0)?);
                    self.flat.steps.push(match routed {
                        None => Flat::Linear { weight, bias: vector(1)?, x, out },
                        Some(Routed { way, .. }) => Flat::Experts { weight, route: way, x, out },
                    });
                }
                Op::RmsNorm(n) => {
                    let gain = vector(0)?.map(|g| g.iter().map(|g| g + n.offset as f32).collect());
                    let heads = rows * n.heads.map_or(1, |h| h as usize);
                    let step = move |at, _: &[Place]| Row::RmsNorm { at, heads, eps: n.eps as f32, gain };
                    self.change(need(0)?, Vec::new(), out, step);
                }
                Op::LayerNorm(n) => {
                    let (gain, bias) = (vector(0)?, vector(1)?);
                    if n.heads.is_some() && routed.is_some() {
                        return Err(unsupported(op, "heads of rows of experts have no kernel"));
                    }
                    let heads = rows * n.heads.map_or(1, |h| h as usize);
                    let step = move |at, _: &[Place]| Row::LayerNorm { at, heads, eps: n.eps as f32, gain, bias };
                    self.change(need(0)?, Vec::new(), out, step);
                }
                Op::Rope(_) | Op::Sdpa(_) | Op::Repeat(_) if routed.is_some() => {
                    return Err(unsupported(op, "rows of experts have no kernel for it"));
                }
                Op::Rope(r) => {
                    let (heads, interleaved) = (r.heads as usize, r.interleaved);
                    let step = move |at, by: &[Place]| Row::Rope { at, cos: by[0], sin: by[1], heads, interleaved };
                    self.change(need(0)?, vec![need(1)?, need(2)?], out, step);
                }
                Op::Sdpa(op) => self.flat.steps.push(Flat::Attend { op, q: need(0)?, k: need(1)?, v: need(2)?, out }),
                Op::Silu(_) => self.map(need(0)?, out, Map::Silu),
                Op::Gelu(g) => self.map(
                    need(0)?,
                    out,
                    match g.form {
                        GeluForm::Erf => Map::GeluErf,
                        GeluForm::Tanh => Map::GeluTanh,
                        GeluForm::Quick => Map::GeluQuick,
                    },
                ),
                Op::Sigmoid(_) => self.map(need(0)?, out, Map::Sigmoid),
                Op::Clamp(c) => self.map(need(0)?, out, Map::Clamp(c.at as f32)),
                Op::Relu(_) => self.map(need(0)?, out, Map::Relu),
                Op::Scale(s) => self.map(need(0)?, out, Map::Scale(s.by as f32)),
                Op::Softcap(s) => self.map(need(0)?, out, Map::Softcap(s.at as f32)),
                Op::Add(_) | Op::Mul(_) => {
                    let f = if matches!(op, Op::Add(_)) { Zip::Add } else { Zip::Mul };
                    if let Some(by) = vector(0)? {
                        let by = by.repeat(rows);
                        if by.len() != width {
                            return Err(unsupported(op, "a parameter must have one number for each channel"));
                        }
                        let step = move |at, _: &[Place]| Row::Zip { at, by: Other::Parameter(by), f };
                        self.change(need(0)?, Vec::new(), out, step);
                    } else {
                        let (a, b) = (need(0)?, need(1)?);
                        if self.flat.widths[b] != width {
                            return Err(unsupported(op, "the operands must have the same channels"));
                        }
                        let step = move |at, by: &[Place]| Row::Zip { at, by: Other::Value(by[0]), f };
                        self.change(a, vec![b], out, step);
                    }
                }
                Op::Split(s) => {
                    let (from, heads) = (need(0)?, rows * s.heads as usize);
                    let stride = self.flat.widths[from] / heads.max(1);
                    let mut col = 0;
                    for (out, size) in outs.iter().zip(s.sizes.iter().map(|s| *s as usize)) {
                        match heads {
                            1 => self.flat.steps.push(Flat::Window { from, col, out: *out }),
                            _ => {
                                let parts = (0..heads).map(|h| self.window(from, h * stride + col, size)).collect();
                                self.flat.steps.push(Flat::Join { parts, out: *out });
                            }
                        }
                        col += size;
                    }
                }
                Op::Concat(c) => {
                    let heads = rows * c.heads as usize;
                    let mut parts = Vec::with_capacity(heads * floats.len());
                    for h in 0..heads {
                        for from in &floats {
                            let width = self.flat.widths[*from] / heads;
                            parts.push(if heads == 1 { *from } else { self.window(*from, h * width, width) });
                        }
                    }
                    self.flat.steps.push(Flat::Join { parts, out });
                }
                Op::Repeat(r) => {
                    let parts = vec![need(0)?; r.times as usize];
                    self.flat.steps.push(Flat::Join { parts, out });
                }
                Op::Fused(f) => return Err(unsupported(op, &format!("@{} is not defined", f.callee))),
            }
            let behind = routed.filter(|_| !matches!(op, Op::Combine(_)));
            let entry = |var| behind.map_or(Entry::Float(var), |of| Entry::Experts(var, of));
            known.extend(node.results.iter().copied().zip(outs.into_iter().map(entry)));
        }
        let result = |r: &ValueId| {
            known
                .get(r)
                .copied()
                .ok_or_else(|| CpuError::Unsupported(format!("region {}: a result is not computed", region.name)))
        };
        region.results().iter().map(result).collect()
    }

    /// Columns of a value.
    fn window(&mut self, from: Var, col: usize, width: usize) -> Var {
        let out = self.var(width);
        self.flat.steps.push(Flat::Window { from, col, out });
        out
    }

    /// A value side by side with itself.
    fn copies(&mut self, from: Var, count: usize) -> Var {
        let out = self.var(self.flat.widths[from] * count);
        self.flat.steps.push(Flat::Join { parts: vec![from; count], out });
        out
    }

    /// The way of tokens to the experts whose numbers `chosen` has.
    fn way(&mut self, chosen: Var, experts: usize) -> Way {
        self.ways.iter().position(|c| *c == chosen).unwrap_or_else(|| {
            let route = self.ways.len();
            self.ways.push(chosen);
            self.flat.steps.push(Flat::Route { chosen, experts, route });
            route
        })
    }

    fn make(&mut self, with: Vec<Var>, out: &[Var], step: impl FnOnce(&[Place], &[Place]) -> Row<'a> + 'a) {
        self.flat.steps.push(Flat::Make { with, out: out.to_vec(), step: Box::new(step) });
    }

    fn change(&mut self, from: Var, with: Vec<Var>, out: Var, step: impl FnOnce(Place, &[Place]) -> Row<'a> + 'a) {
        self.flat.steps.push(Flat::Change { from, with, out, step: Box::new(step) });
    }

    fn map(&mut self, from: Var, out: Var, f: Map) {
        self.change(from, Vec::new(), out, move |at, _: &[Place]| Row::Map { at, f });
    }
}

/// The channels of a value, if they are a number of this machine.
fn channels(ty: &Type) -> Option<usize> {
    usize::try_from(ty.channels()?).ok()
}
