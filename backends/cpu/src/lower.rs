//! From a chain of regions to a [`Program`]: fused calls are opened, values get places, steps are gathered in stages.
//!
//! A fused call is a promise about memory traffic: what is in its body need not leave the core. Stages keep that promise
//! for every body, the ones that this crate has never seen included: consecutive steps that treat each token by itself
//! run one after the other on one token's rows, in place where the operand is dead. So bodies are simply inlined.

use std::borrow::Cow;
use std::collections::BTreeMap;

use awqc_exec::interp::frequencies::frequencies;
use awqc_exec::layout::r16;
use awqc_exec::realize::{Realized, realize};
use awqc_ir::inline::inline_fused;
use awqc_ir::op::{GeluForm, Op, Sdpa};
use awqc_ir::panels::Panels;
use awqc_ir::{FusedDef, Layout, Region, Stored, TensorSource, ValueId, WeightExpr, WeightId};

use crate::CpuError;
use crate::arena::Place;
use crate::program::{Attend, Dense, Ints, Linear, Map, Other, Program, Row, Stage, Weight, Zip};

/// Index of a value of the flat program.
type Var = usize;

/// A region's value as the flat program knows it.
#[derive(Clone, Copy)]
pub(crate) enum Entry {
    /// Given with every pass.
    Ints(Ints),
    /// Computed, or given as floats.
    Float(Var),
}

/// A value of the flat program.
struct Info {
    width: usize,
    /// The value whose slot this one lies in, and the first column there.
    window: Option<(Var, usize)>,
    /// Reads that are still to come.
    uses: usize,
    /// Uses of this value and of all windows into it.
    alive: usize,
    /// Results stay.
    pinned: bool,
    slot: Option<Place>,
    /// Columns of the memory behind the slot, which may be more than the value's.
    columns: usize,
}

/// Makes a row step, given the places of its results.
type Made<'a> = Box<dyn FnOnce(&[Place]) -> Row<'a> + 'a>;
/// Makes a row step, given the place that it changes and those that it reads.
type Changed<'a> = Box<dyn FnOnce(Place, &[Place]) -> Row<'a> + 'a>;

/// A step before places are known.
enum Flat<'a> {
    /// A row step that makes `out` from nothing.
    Make {
        out: Vec<Var>,
        step: Made<'a>,
    },
    /// A row step that changes `from` into `out`, reading `with`.
    Change {
        from: Var,
        with: Vec<Var>,
        out: Var,
        step: Changed<'a>,
    },
    /// `out` is columns of `from`.
    Window {
        from: Var,
        col: usize,
        out: Var,
    },
    /// `out` is the parts side by side.
    Join {
        parts: Vec<Var>,
        out: Var,
    },
    Linear {
        weight: Weight<'a>,
        bias: Option<Vec<f32>>,
        x: Var,
        out: Var,
    },
    Attend {
        op: Sdpa,
        q: Var,
        k: Var,
        v: Var,
        out: Var,
    },
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
) -> Result<(Program<'a>, Vec<Input>), CpuError> {
    let mut builder = Builder { vars: Vec::new(), flat: Vec::new() };
    let mut stream: Vec<Entry> = inputs.iter().map(|i| builder.input(*i)).collect();
    let given: Vec<Var> = stream.iter().filter_map(|e| e.float()).collect();
    for region in regions {
        let mut region = region.clone();
        inline_fused(&mut region, fused).map_err(|e| CpuError::Unsupported(format!("region {}: {e}", region.name)))?;
        let results = builder.region(&region, source, &stream)?;
        let behind = stream.split_off(results.len().min(stream.len()));
        stream = results.into_iter().chain(behind).collect();
    }
    let out = stream.iter().map(|e| builder.output(*e)).collect();
    let results: Vec<Var> = stream.iter().filter_map(|e| e.float()).collect();
    Ok((builder.place(&given, &results), out))
}

/// What a program is given, or leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// Integers.
    Ints(Ints),
    /// Rows of so many floats.
    Float(usize),
}

impl Entry {
    fn float(self) -> Option<Var> {
        match self {
            Entry::Float(var) => Some(var),
            Entry::Ints(_) => None,
        }
    }
}

struct Builder<'a> {
    vars: Vec<Info>,
    flat: Vec<Flat<'a>>,
}

impl<'a> Builder<'a> {
    fn var(&mut self, width: usize) -> Var {
        self.vars.push(Info { width, window: None, uses: 0, alive: 0, pinned: false, slot: None, columns: 0 });
        self.vars.len() - 1
    }

    fn input(&mut self, input: Input) -> Entry {
        match input {
            Input::Ints(ints) => Entry::Ints(ints),
            Input::Float(width) => Entry::Float(self.var(width)),
        }
    }

    fn output(&self, entry: Entry) -> Input {
        match entry {
            Entry::Ints(ints) => Input::Ints(ints),
            Entry::Float(var) => Input::Float(self.vars[var].width),
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
            let mut outs = Vec::new();
            for r in &node.results {
                let width = region.value(*r).ty.channels().and_then(|c| usize::try_from(c).ok());
                outs.push(
                    self.var(width.ok_or_else(|| unsupported(op, "the result has no fixed number of channels"))?),
                );
            }
            let weights: Vec<WeightId> = node.operands.iter().filter_map(|o| o.weight()).collect();
            let mut floats = Vec::new();
            let mut ints = None;
            for v in node.operands.iter().filter_map(|o| o.value()) {
                match known.get(&v) {
                    Some(Entry::Float(var)) => floats.push(*var),
                    Some(Entry::Ints(i)) => ints = Some(*i),
                    None => return Err(unsupported(op, "an operand is not given")),
                }
            }
            let vector = |at: usize| weights.get(at).map(|w| vector(region, *w, source)).transpose();
            let need = |at: usize| floats.get(at).copied().ok_or_else(|| unsupported(op, "an operand is missing"));
            let (width, out) = (self.vars[outs[0]].width, outs[0]);
            match op.clone() {
                Op::Embedding(e) => {
                    let of = ints.ok_or_else(|| unsupported(op, "the indices must be token ids or positions"))?;
                    let table = weights.first().ok_or_else(|| unsupported(op, "a table is missing"))?;
                    let table = dense(region, *table, source)?;
                    let step = move |out: &[Place]| Row::Embed { table, of, offset: e.offset, out: out[0] };
                    self.flat.push(Flat::Make { out: outs.clone(), step: Box::new(step) });
                }
                Op::RopeTable(of) => {
                    if ints != Some(Ints::Positions) {
                        return Err(unsupported(op, "the angles must be those of the positions"));
                    }
                    let fixed = (!of.depends_on_length()).then(|| frequencies(&of, 0));
                    let step = move |out: &[Place]| Row::Angles { of, fixed, cos: out[0], sin: out[1] };
                    self.flat.push(Flat::Make { out: outs.clone(), step: Box::new(step) });
                }
                Op::Softmax(_) | Op::TopK(_) | Op::Dispatch(_) | Op::Combine(_) => {
                    return Err(unsupported(op, "mixtures of experts have no kernels here: use the reference target"));
                }
                Op::Linear(_) => {
                    let weight = *weights.first().ok_or_else(|| unsupported(op, "a weight is missing"))?;
                    let weight = matrix(region, weight, source)?;
                    self.flat.push(Flat::Linear { weight, bias: vector(1)?, x: need(0)?, out });
                }
                Op::RmsNorm(n) => {
                    let gain = vector(0)?.map(|g| g.iter().map(|g| g + n.offset as f32).collect());
                    let heads = n.heads.map_or(1, |h| h as usize);
                    let step = move |at, _: &[Place]| Row::RmsNorm { at, heads, eps: n.eps as f32, gain };
                    self.change(need(0)?, Vec::new(), out, step);
                }
                Op::LayerNorm(n) if n.heads.is_some() => {
                    return Err(unsupported(op, "head by head it has no kernel here: use the reference target"));
                }
                Op::LayerNorm(n) => {
                    let (gain, bias) = (vector(0)?, vector(1)?);
                    let step = move |at, _: &[Place]| Row::LayerNorm { at, eps: n.eps as f32, gain, bias };
                    self.change(need(0)?, Vec::new(), out, step);
                }
                Op::Rope(r) => {
                    let (heads, interleaved) = (r.heads as usize, r.interleaved);
                    let step = move |at, by: &[Place]| Row::Rope { at, cos: by[0], sin: by[1], heads, interleaved };
                    self.change(need(0)?, vec![need(1)?, need(2)?], out, step);
                }
                Op::Sdpa(op) => self.flat.push(Flat::Attend { op, q: need(0)?, k: need(1)?, v: need(2)?, out }),
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
                Op::Sigmoid(_) | Op::Clamp(_) => {
                    return Err(unsupported(op, "it has no kernel here: use the reference target"));
                }
                Op::Relu(_) => self.map(need(0)?, out, Map::Relu),
                Op::Scale(s) => self.map(need(0)?, out, Map::Scale(s.by as f32)),
                Op::Softcap(s) => self.map(need(0)?, out, Map::Softcap(s.at as f32)),
                Op::Add(_) | Op::Mul(_) => {
                    let f = if matches!(op, Op::Add(_)) { Zip::Add } else { Zip::Mul };
                    if let Some(by) = vector(0)? {
                        if by.len() != width {
                            return Err(unsupported(op, "a parameter must have one number for each channel"));
                        }
                        let step = move |at, _: &[Place]| Row::Zip { at, by: Other::Parameter(by), f };
                        self.change(need(0)?, Vec::new(), out, step);
                    } else {
                        let (a, b) = (need(0)?, need(1)?);
                        if self.vars[b].width != width {
                            return Err(unsupported(op, "the operands must have the same channels"));
                        }
                        let step = move |at, by: &[Place]| Row::Zip { at, by: Other::Value(by[0]), f };
                        self.change(a, vec![b], out, step);
                    }
                }
                Op::Split(s) => {
                    let (from, heads) = (need(0)?, s.heads as usize);
                    let stride = self.vars[from].width / heads.max(1);
                    let mut col = 0;
                    for (out, size) in outs.iter().zip(s.sizes.iter().map(|s| *s as usize)) {
                        match heads {
                            1 => self.flat.push(Flat::Window { from, col, out: *out }),
                            _ => {
                                let parts = (0..heads).map(|h| self.window(from, h * stride + col, size)).collect();
                                self.flat.push(Flat::Join { parts, out: *out });
                            }
                        }
                        col += size;
                    }
                }
                Op::Concat(c) => {
                    let heads = c.heads as usize;
                    let mut parts = Vec::with_capacity(heads * floats.len());
                    for h in 0..heads {
                        for from in &floats {
                            let width = self.vars[*from].width / heads;
                            parts.push(if heads == 1 { *from } else { self.window(*from, h * width, width) });
                        }
                    }
                    self.flat.push(Flat::Join { parts, out });
                }
                Op::Repeat(r) => {
                    let parts = vec![need(0)?; r.times as usize];
                    self.flat.push(Flat::Join { parts, out });
                }
                Op::Fused(f) => return Err(unsupported(op, &format!("@{} is not defined", f.callee))),
            }
            known.extend(node.results.iter().copied().zip(outs.into_iter().map(Entry::Float)));
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
        self.flat.push(Flat::Window { from, col, out });
        out
    }

    fn change(&mut self, from: Var, with: Vec<Var>, out: Var, step: impl FnOnce(Place, &[Place]) -> Row<'a> + 'a) {
        self.flat.push(Flat::Change { from, with, out, step: Box::new(step) });
    }

    fn map(&mut self, from: Var, out: Var, f: Map) {
        self.change(from, Vec::new(), out, move |at, _: &[Place]| Row::Map { at, f });
    }

    /// Gives every value a place and gathers the steps in stages.
    fn place(mut self, given: &[Var], results: &[Var]) -> Program<'a> {
        for step in &self.flat {
            for var in step.reads() {
                self.vars[var].uses += 1;
            }
        }
        let mut placer = Placer {
            vars: self.vars,
            free: Vec::new(),
            pending: Vec::new(),
            program: Program {
                stages: Vec::new(),
                columns: 0,
                inputs: Vec::new(),
                results: Vec::new(),
                caches: Vec::new(),
                activations: Vec::new(),
            },
            quantized: None,
        };
        // Windows are known beforehand, so that nobody overwrites a value that one still looks into.
        for step in &self.flat {
            if let Flat::Window { from, col, out } = step {
                let (root, first) = placer.root(*from);
                placer.vars[*out].window = Some((root, first + col));
            }
        }
        for var in 0..placer.vars.len() {
            let (root, _) = placer.root(var);
            placer.vars[root].alive += placer.vars[var].uses;
        }
        for var in results.iter().chain(given) {
            let (root, _) = placer.root(*var);
            placer.vars[root].pinned = true;
        }
        for var in given {
            let place = placer.allocate(*var);
            placer.program.inputs.push(place);
        }
        for step in self.flat {
            placer.step(step);
        }
        placer.program.results = results.iter().map(|r| placer.place(*r)).collect();
        placer.program
    }
}

impl Flat<'_> {
    fn reads(&self) -> Vec<Var> {
        match self {
            Flat::Make { .. } => Vec::new(),
            Flat::Change { from, with, .. } => [*from].into_iter().chain(with.iter().copied()).collect(),
            // A window reads nothing: its readers do.
            Flat::Window { .. } => Vec::new(),
            Flat::Join { parts, .. } => parts.clone(),
            Flat::Linear { x, .. } => vec![*x],
            Flat::Attend { q, k, v, .. } => vec![*q, *k, *v],
        }
    }
}

struct Placer<'a> {
    vars: Vec<Info>,
    /// Slots, `(base, columns)`, that nothing uses.
    free: Vec<(usize, usize)>,
    /// Slots that became free in the current stage. They wait for its end: another stride in the same memory would
    /// mix up the rows of different tokens, which members treat at different times.
    pending: Vec<(usize, usize)>,
    program: Program<'a>,
    /// The value whose quantized form is at hand, and where.
    quantized: Option<(Var, usize)>,
}

impl<'a> Placer<'a> {
    /// The value in whose slot `var` lies, and its first column there.
    fn root(&self, var: Var) -> (Var, usize) {
        self.vars[var].window.unwrap_or((var, 0))
    }

    fn place(&self, var: Var) -> Place {
        let (root, col) = self.root(var);
        let slot = self.vars[root].slot.unwrap_or(Place { base: 0, stride: 0, col: 0, width: 0 });
        Place { col: slot.col + col, width: self.vars[var].width, ..slot }
    }

    /// A slot for a value of its own.
    fn allocate(&mut self, var: Var) -> Place {
        let width = self.vars[var].width;
        let best = (0..self.free.len()).filter(|i| self.free[*i].1 >= width).min_by_key(|i| self.free[*i].1);
        let (base, columns) = match best {
            Some(i) => self.free.swap_remove(i),
            None => {
                self.program.columns += width;
                (self.program.columns - width, width)
            }
        };
        let slot = Place { base, stride: width, col: 0, width };
        self.vars[var].slot = Some(slot);
        self.vars[var].columns = columns;
        if self.vars[var].alive == 0 && !self.vars[var].pinned {
            self.pending.push((base, columns));
        }
        slot
    }

    /// One read of `var` is done.
    fn release(&mut self, var: Var) {
        self.vars[var].uses -= 1;
        let (root, _) = self.root(var);
        self.vars[root].alive -= 1;
        let info = &self.vars[root];
        if let (0, false, Some(slot)) = (info.alive, info.pinned, info.slot) {
            self.pending.push((slot.base, info.columns));
        }
    }

    /// Whether nothing but the current read needs `var`'s columns any more.
    fn dies(&self, var: Var) -> bool {
        let (root, _) = self.root(var);
        let info = &self.vars[root];
        let others = if root == var { info.alive - 1 } else { info.uses };
        self.vars[var].uses == 1 && others == 0 && !info.pinned
    }

    fn rows(&mut self, step: Row<'a>) {
        if let Some(Stage::Rows(steps)) = self.program.stages.last_mut() {
            steps.push(step);
            return;
        }
        self.stage(Stage::Rows(vec![step]));
    }

    fn stage(&mut self, stage: Stage<'a>) {
        self.program.stages.push(stage);
    }

    /// What was freed before a barrier may be used behind it.
    fn barrier(&mut self) {
        self.free.append(&mut self.pending);
    }

    fn step(&mut self, step: Flat<'a>) {
        match step {
            Flat::Window { .. } => {}
            Flat::Make { out, step } => {
                let places: Vec<Place> = out.iter().map(|o| self.allocate(*o)).collect();
                self.rows(step(&places));
            }
            Flat::Change { from, with, out, step } => {
                let by: Vec<Place> = with.iter().map(|w| self.place(*w)).collect();
                let at = if self.dies(from) && !with.contains(&from) {
                    let window = self.root(from);
                    self.vars[out].window = Some(window);
                    // The new value's reads keep the slot alive in place of the old one's.
                    self.vars[window.0].alive += self.vars[out].alive;
                    self.place(from)
                } else {
                    let from = self.place(from);
                    let to = self.allocate(out);
                    self.rows(Row::Copy { from, to });
                    to
                };
                self.rows(step(at, &by));
                self.release(from);
                with.iter().for_each(|w| self.release(*w));
            }
            Flat::Join { parts, out } => {
                let to = self.allocate(out);
                let mut col = 0;
                for part in parts {
                    let from = self.place(part);
                    self.rows(Row::Copy { from, to: Place { col: to.col + col, width: from.width, ..to } });
                    col += from.width;
                    self.release(part);
                }
            }
            Flat::Linear { weight, bias, x, out } => {
                let place = self.whole(x);
                let quantized = match &weight {
                    Weight::Packed { shape, .. } => Some(self.quantize(x, place, shape)),
                    Weight::Dense(_) => None,
                };
                self.barrier();
                let out = self.allocate(out);
                self.stage(Stage::Linear(Linear { weight, bias, x: place, quantized, out }));
                self.barrier();
                self.release(x);
            }
            Flat::Attend { op, q, k, v, out } => {
                let cache = self.program.caches.len();
                let (k_at, v_at, q_at) = (self.place(k), self.place(v), self.place(q));
                self.program.caches.push((k_at.width, v_at.width));
                self.rows(Row::Remember { k: k_at, v: v_at, cache });
                self.barrier();
                let out = self.allocate(out);
                self.stage(Stage::Attend(Attend { op, q: q_at, cache, out }));
                self.barrier();
                [q, k, v].into_iter().for_each(|var| self.release(var));
            }
        }
    }

    /// The place of a value whose rows follow each other without a gap: a window is copied out of its slot.
    fn whole(&mut self, var: Var) -> Place {
        let from = self.place(var);
        if from.stride == from.width {
            return from;
        }
        let (base, width) = (self.program.columns, from.width);
        self.program.columns += width;
        self.pending.push((base, width));
        let to = Place { base, stride: width, col: 0, width };
        self.rows(Row::Copy { from, to });
        to
    }

    /// The quantized form of `x` for weights of this shape: the one at hand if `x` was quantized last.
    fn quantize(&mut self, x: Var, place: Place, shape: &Panels) -> usize {
        let fits = |have: &Panels| have.same_columns(shape);
        if let Some((var, at)) = self.quantized
            && var == x
            && fits(&self.program.activations[at])
        {
            return at;
        }
        let at = self.program.activations.iter().position(fits).unwrap_or_else(|| {
            self.program.activations.push(*shape);
            self.program.activations.len() - 1
        });
        self.rows(Row::Quantize { x: place, to: at });
        self.quantized = Some((x, at));
        at
    }
}

fn bytes<'a>(region: &Region, id: WeightId, source: &'a dyn TensorSource) -> Option<(Cow<'a, [u8]>, Stored)> {
    let WeightExpr::Source(name) = &region.weight(id).expr else { return None };
    let name = region.tensor_name(name);
    let stored = source.info(&name)?.stored;
    match stored {
        Stored::F32 | Stored::F16 | Stored::Bf16 => Some((Cow::Borrowed(source.mapped(&name)?), stored)),
        Stored::F64 | Stored::U8 | Stored::I32 | Stored::I64 => None,
    }
}

/// A small parameter as f32.
fn vector(region: &Region, id: WeightId, source: &dyn TensorSource) -> Result<Vec<f32>, CpuError> {
    Ok(realize(region, id, source)?.into_tensor().data)
}

/// A float matrix: as it lies in a mapped file, or else realized.
fn dense<'a>(region: &Region, id: WeightId, source: &'a dyn TensorSource) -> Result<Dense<'a>, CpuError> {
    let shape = region.weight(id).ty.const_shape();
    let Some(&[rows, cols]) = shape.as_deref() else {
        return Err(CpuError::Unsupported(format!("region {}: {} is no matrix", region.name, region.weight(id).ty)));
    };
    if let Some((bytes, stored)) = bytes(region, id, source) {
        return Ok(Dense { bytes, stored, rows, cols });
    }
    let data = realize(region, id, source)?.into_tensor().data;
    let bytes = Cow::Owned(data.iter().flat_map(|v| v.to_le_bytes()).collect());
    Ok(Dense { bytes, stored: Stored::F32, rows, cols })
}

/// The matrix of a linear: panels as they lie in a mapped file, or packed now.
fn matrix<'a>(region: &Region, id: WeightId, source: &'a dyn TensorSource) -> Result<Weight<'a>, CpuError> {
    let weight = region.weight(id);
    let (Some(quant), Some(&[rows, cols])) = (weight.ty.elem.quant(), weight.ty.const_shape().as_deref()) else {
        return Ok(Weight::Dense(dense(region, id, source)?));
    };
    let shape = Panels::of(quant, rows, cols)
        .ok_or_else(|| CpuError::Unsupported(format!("region {}: {} is too large", region.name, weight.ty)))?;
    if let WeightExpr::Packed { tensor, layout: Layout::R16 } = &weight.expr
        && let Some(bytes) = source.mapped(&format!("{}{}", region.tensor_name(tensor), r16::SUFFIX))
        && bytes.len() == shape.total_bytes()
    {
        return Ok(Weight::Packed { bytes: Cow::Borrowed(bytes), shape });
    }
    match realize(region, id, source)? {
        Realized::Quant(codes) => {
            let bytes = r16::panels(&codes).map_err(|e| CpuError::Unsupported(e.0))?;
            Ok(Weight::Packed { bytes: Cow::Owned(bytes), shape })
        }
        Realized::Float { .. } => {
            Err(CpuError::Unsupported(format!("region {}: {} is not quantized", region.name, weight.ty)))
        }
    }
}
