//! From a compiled module to a launch plan and its kernels.
//!
//! Fused calls are opened and ops become flat steps ([`flat`]); values get memory, consecutive row steps become one
//! kernel each, and every step the kernel for its shapes ([`schedule`]). A fused body thus becomes few kernels by what
//! it does, not by what it is called.

mod constants;
mod experts;
mod flat;
mod memory;
mod product;
mod rows;
mod schedule;

use std::collections::BTreeMap;

use awqc_exec::coverage::without_kernels;
use awqc_exec::rowwise;
use awqc_ir::images::Placed;
use awqc_ir::inline::inline_fused;
use awqc_ir::op::{GeluForm, Op, RopeTable};
use awqc_ir::{FusedDef, Region, TensorSource, ValueId, Verified, WeightId};

use self::constants::{Constants, Matrix};
use self::experts::Way;
use self::flat::{By, FlatOp, FlatProgram, Home, RowOp, Var};
use self::schedule::{ALIGN, Kernels, schedule};
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::Source;
use crate::kernels::rows::{Map, Zip};
use crate::plan::{Ints, Plan, Table, VERSION};

pub use constants::check;
pub use product::{Product, product};

/// Tokens of a pass through the body.
const CHUNK: usize = 512;
/// Tokens of a pass through the head, whose results are as wide as the vocabulary.
const HEAD_CHUNK: usize = 64;

/// A plan and the kernels that it launches, in its order.
#[derive(Clone, Debug, PartialEq)]
pub struct Lowered {
    /// The plan.
    pub plan: Plan,
    /// The kernels.
    pub kernels: Vec<Source>,
    /// For people: what runs slower than it could, and what was chosen for a device of a certain size.
    pub remarks: Vec<String>,
}

/// Lowers an artefact's module for an architecture. `source` holds the stored tensors.
///
/// # Errors
/// When the module uses something that no kernel covers, or a weight is not stored as one.
pub fn lower(module: Verified<'_>, source: &dyn TensorSource, arch: &Arch) -> Result<Lowered, CudaError> {
    let module = module.module();
    let (eye, text) = module.eye_and_text();
    let Some((last, layers)) = text.split_last() else {
        return Err(CudaError::Unsupported("the module has no regions".into()));
    };
    if !rowwise(last, &module.fused) {
        return Err(CudaError::Unsupported(format!("region {} mixes positions", last.name)));
    }
    let mut cx = Builder {
        constants: Constants::new(source),
        angles: Vec::new(),
        tables: Vec::new(),
        caches: Vec::new(),
        images: None,
        flat: FlatProgram::default(),
    };
    let images = (!eye.is_empty()).then_some(Entry::Images);
    let inputs = images.into_iter().chain([Entry::Ints(Ints::Ids), Entry::Ints(Ints::Positions)]);
    let stream = cx.chain(layers, &module.fused, inputs.collect())?;
    let mut body = std::mem::take(&mut cx.flat);
    body.results = stream.iter().filter_map(|e| e.value()).collect();
    // The head sees the values that the body leaves, under new numbers.
    let stream: Vec<Entry> = stream
        .into_iter()
        .map(|e| match e {
            Entry::Value(var) => {
                let new = cx.flat.value(body.values[var].width, Home::F32);
                cx.flat.given.push(new);
                Entry::Value(new)
            }
            Entry::Ints(_) | Entry::Images | Entry::Cos(_) | Entry::Sin(_) | Entry::Chosen(_) | Entry::Experts(..) => e,
        })
        .collect();
    let out = cx.chain(std::slice::from_ref(last), &module.fused, stream)?;
    let mut head = std::mem::take(&mut cx.flat);
    let Some(logits) = out.first().and_then(|e| e.value()) else {
        return Err(CudaError::Unsupported("the module returns no logits".into()));
    };
    head.results = vec![logits];
    let vocabulary = head.values[logits].width;

    let mut kernels = Kernels::new(arch);
    body.tighten();
    head.tighten();
    let body = schedule(&body, CHUNK, 0, &[], &mut kernels)?;
    let head = schedule(&head, HEAD_CHUNK, body.bytes, &body.results, &mut kernels)?;
    let logits = head.results.first().map_or(0, |r| r.0);
    let chosen = body.bytes + head.bytes;
    let choice = kernels.choice(vocabulary, logits, chosen)?;
    let (top, arena_bytes) = kernels.top(vocabulary, logits, (chosen + 4).next_multiple_of(ALIGN))?;
    let plan = Plan {
        version: VERSION,
        arch: arch.sm,
        chunk: CHUNK,
        head_chunk: HEAD_CHUNK,
        vocabulary,
        logits,
        arena_bytes,
        bytes_per_token: body.weight_bytes + head.weight_bytes,
        kernels: kernels.list(),
        constants: cx.constants.list,
        caches: cx.caches,
        angles: cx.angles,
        tables: cx.tables,
        images: cx.images,
        body: body.part,
        head: head.part,
        choice,
        chosen,
        top,
    };
    plan.check().map_err(CudaError::Artefact)?;
    let remarks = kernels.remarks();
    Ok(Lowered { plan, kernels: kernels.sources, remarks })
}

/// What a region's value is in the flat program.
#[derive(Clone, Copy, Debug)]
enum Entry {
    Ints(Ints),
    /// Rows of images, which are no rows of tokens.
    Images,
    Cos(usize),
    Sin(usize),
    Value(Var),
    /// The numbers of experts in the records of tokens.
    Chosen(Var),
    /// The rows of experts, or one row of a token that all of its experts see.
    Experts(Var, Way),
}

impl Entry {
    fn value(self) -> Option<Var> {
        match self {
            Entry::Value(var) | Entry::Experts(var, _) => Some(var),
            Entry::Ints(_) | Entry::Images | Entry::Cos(_) | Entry::Sin(_) | Entry::Chosen(_) => None,
        }
    }
}

/// What lowering collects.
struct Builder<'a> {
    constants: Constants<'a>,
    angles: Vec<RopeTable>,
    tables: Vec<Table>,
    /// Bytes of a position in each cache.
    caches: Vec<usize>,
    images: Option<Placed>,
    flat: FlatProgram,
}

impl Builder<'_> {
    /// Lowers regions whose stream begins with `stream`; returns the stream behind them.
    fn chain(
        &mut self,
        regions: &[Region],
        fused: &[FusedDef],
        mut stream: Vec<Entry>,
    ) -> Result<Vec<Entry>, CudaError> {
        for region in regions {
            let mut region = region.clone();
            inline_fused(&mut region, fused)
                .map_err(|e| CudaError::Unsupported(format!("region {}: {e}", region.name)))?;
            let results = self.region(&region, &stream)?;
            let behind = stream.split_off(results.len().min(stream.len()));
            stream = results.into_iter().chain(behind).collect();
        }
        Ok(stream)
    }

    /// Appends the steps of a region without fused calls; returns its results.
    fn region(&mut self, region: &Region, stream: &[Entry]) -> Result<Vec<Entry>, CudaError> {
        let mut known: BTreeMap<ValueId, Entry> = region.value_params().zip(stream.iter().copied()).collect();
        // f16 forms of values, for packed products.
        let mut halves: BTreeMap<Var, Var> = BTreeMap::new();
        for (_, node) in region.nodes() {
            let op = &node.op;
            let unsupported =
                |why: &str| CudaError::Unsupported(format!("region {}: {}: {why}", region.name, op.mnemonic()));
            if let Some(why) = without_kernels(op) {
                return Err(unsupported(why));
            }
            let weights: Vec<WeightId> = node.operands.iter().filter_map(|o| o.weight()).collect();
            let mut operands = Vec::new();
            for v in node.operands.iter().filter_map(|o| o.value()) {
                operands.push(*known.get(&v).ok_or_else(|| unsupported("an operand is not given"))?);
            }
            if let Op::RopeTable(of) = op {
                if !matches!(operands.first(), Some(Entry::Ints(Ints::Positions))) {
                    return Err(unsupported("the angles must be those of the positions"));
                }
                let at = self.angles.iter().position(|a| a == of).unwrap_or_else(|| {
                    self.angles.push(of.clone());
                    self.angles.len() - 1
                });
                known.extend(node.results.iter().copied().zip([Entry::Cos(at), Entry::Sin(at)]));
                continue;
            }
            let way = self.apart(op, &mut operands).map_err(|why| unsupported(&why))?;
            let value = |at: usize| {
                operands.get(at).and_then(|e| e.value()).ok_or_else(|| unsupported("an operand is no row of floats"))
            };
            if let Op::Dispatch(d) = op {
                let x = value(0)?;
                let way = self.dispatch(d, operands.get(1)).map_err(|why| unsupported(&why))?;
                known.extend(node.results.iter().map(|r| (*r, Entry::Experts(x, way))));
                continue;
            }
            // What experts say is added up to one row again.
            let way = way.filter(|_| !matches!(op, Op::Combine(_)));
            let rows = way.map_or(1, |way| way.stack.each as usize);
            let mut outs = Vec::new();
            for r in &node.results {
                let width = region.value(*r).ty.channels().and_then(|c| usize::try_from(c).ok());
                let width = width.ok_or_else(|| unsupported("the result has no fixed number of channels"))?;
                outs.push(self.flat.rows(width, rows, Home::F32));
            }
            let Some(out) = outs.first().copied() else { continue };
            let width = self.flat.values[out].width;
            match op.clone() {
                // The angles are a table, and no row moves to its experts.
                Op::RopeTable(_) | Op::Dispatch(_) => {}
                Op::Softmax(_) => self.flat.push(RowOp::Softmax { x: value(0)? }, out),
                Op::TopK(op) => {
                    let bias = self.constants.vector(region, weights.first().copied(), 0.0)?;
                    let records = self.choose(&op, value(0)?, bias, &outs).map_err(|why| unsupported(&why))?;
                    let entries = [Entry::Value(out), Entry::Chosen(records)];
                    known.extend(node.results.iter().copied().zip(entries));
                    continue;
                }
                Op::Combine(_) => self.combine(&operands, out).map_err(|why| unsupported(&why))?,
                Op::Patches(_)
                | Op::Merge(_)
                | Op::Learned(_)
                | Op::Append(_)
                | Op::Cut(_)
                | Op::Count(_)
                | Op::CrossSdpa(_)
                | Op::Gate(_)
                | Op::Foreign(_) => return Err(unsupported("no kernel covers it")),
                Op::Place(p) => {
                    let (Some(Entry::Ints(Ints::Ids)), Some(Entry::Images)) = (operands.get(1), operands.get(2)) else {
                        return Err(unsupported("it must put images at the tokens of the text"));
                    };
                    let these = Placed { token: p.token, width };
                    if self.images.replace(these).is_some_and(|others| others != these) {
                        return Err(unsupported("one token stands for images, not several"));
                    }
                    self.flat.push(RowOp::Image { x: value(0)? }, out);
                }
                Op::Embedding(e) => {
                    let Some(Entry::Ints(ints)) = operands.first().copied() else {
                        return Err(unsupported("the indices must be token ids or positions"));
                    };
                    let table = *weights.first().ok_or_else(|| unsupported("a table is missing"))?;
                    let (table, of, rows, _) = self.constants.float_matrix(region, table)?;
                    self.tables.push(Table { of: ints, rows, offset: e.offset });
                    self.flat.push(RowOp::Embed { table, of, ints, offset: e.offset }, out);
                }
                Op::Linear(_) => {
                    let weight = *weights.first().ok_or_else(|| unsupported("a weight is missing"))?;
                    let bias = self.constants.vector(region, weights.get(1).copied(), 0.0)?;
                    let x = value(0)?;
                    match self.constants.matrix(region, weight)? {
                        matrix if let Some(way) = way => self.stacked(matrix, way, &mut halves, x, out),
                        Matrix::Packed { weight, shape } => {
                            let x = self.half(&mut halves, x);
                            self.flat.push(FlatOp::Packed { weight, shape, bias, x }, out);
                        }
                        Matrix::Dense { weight, of } => {
                            let x = self.whole(x);
                            self.flat.push(FlatOp::Dense { weight, of, bias, x }, out);
                        }
                    }
                }
                Op::RmsNorm(n) => {
                    let gain = self.constants.vector(region, weights.first().copied(), n.offset as f32)?;
                    let heads = n.heads.map_or(1, |h| h as usize);
                    self.flat.push(RowOp::RmsNorm { x: value(0)?, gain, heads, eps: n.eps as f32 }, out);
                }
                Op::LayerNorm(n) => {
                    let gain = self.constants.vector(region, weights.first().copied(), 0.0)?;
                    let bias = self.constants.vector(region, weights.get(1).copied(), 0.0)?;
                    let heads = n.heads.map_or(1, |h| h as usize);
                    let numbers = weights.first().map_or(0, |w| self.constants.len(region, *w));
                    let each = heads > 1 && numbers == width;
                    let eps = n.eps as f32;
                    self.flat.push(RowOp::LayerNorm { x: value(0)?, gain, bias, heads, each, eps }, out);
                }
                Op::Rope(r) => {
                    let (Some(Entry::Cos(angles)), Some(Entry::Sin(sin))) = (operands.get(1), operands.get(2)) else {
                        return Err(unsupported("the angles must come from rope_table"));
                    };
                    if angles != sin {
                        return Err(unsupported("cosines and sines must be of one table"));
                    }
                    let pairs = self.angles[*angles].dim as usize / 2;
                    let (x, angles) = (value(0)?, *angles);
                    let (heads, interleaved) = (r.heads as usize, r.interleaved);
                    self.flat.push(RowOp::Rope { x, angles, pairs, heads, interleaved }, out);
                }
                Op::Sdpa(op) => {
                    let (q, k, v) = (value(0)?, value(1)?, value(2)?);
                    let (keys, values) = (self.cache(k), self.cache(v));
                    self.flat.push(FlatOp::Attend { op, q, keys, values }, out);
                }
                Op::Silu(_) => self.map(value(0)?, Map::Silu, out),
                Op::Gelu(g) => {
                    let f = match g.form {
                        GeluForm::Erf => Map::GeluErf,
                        GeluForm::Tanh => Map::GeluTanh,
                        GeluForm::Quick => Map::GeluQuick,
                    };
                    self.map(value(0)?, f, out);
                }
                Op::Sigmoid(_) => self.map(value(0)?, Map::Sigmoid, out),
                Op::Clamp(c) => self.map(value(0)?, Map::Clamp(c.at as f32), out),
                Op::Relu(_) => self.map(value(0)?, Map::Relu, out),
                Op::Scale(s) => self.map(value(0)?, Map::Scale(s.by as f32), out),
                Op::Softcap(s) => self.map(value(0)?, Map::Softcap(s.at as f32), out),
                Op::Add(_) | Op::Mul(_) => {
                    let zip = if matches!(op, Op::Add(_)) { Zip::Add } else { Zip::Mul };
                    let (by, other) = match weights.first() {
                        Some(_) => {
                            let at = self.constants.vector(region, weights.first().copied(), 0.0)?;
                            let at = at.ok_or_else(|| unsupported("a parameter is missing"))?;
                            (By::Constant(at), self.constants.len(region, weights[0]))
                        }
                        None => (By::Value(value(1)?), self.flat.values[value(1)?].width),
                    };
                    if other != width {
                        return Err(unsupported("both sides must have the same channels"));
                    }
                    self.flat.push(RowOp::Zip { a: value(0)?, f: Map::Same, b: by, zip }, out);
                }
                Op::Split(s) => {
                    let (from, heads) = (value(0)?, s.heads.max(1) as usize);
                    let run = self.flat.values[from].width / heads;
                    let mut col = 0;
                    for (out, size) in outs.iter().zip(s.sizes.iter().map(|s| *s as usize)) {
                        if heads == 1 {
                            self.flat.values[*out].home = Home::View(from, col);
                        }
                        for h in (0..heads).filter(|_| heads > 1) {
                            let part = self.flat.window(from, h * run + col, size);
                            self.part(part, *out, h * size);
                        }
                        col += size;
                    }
                }
                Op::Concat(c) => {
                    let (heads, mut at) = (c.heads.max(1) as usize, 0);
                    for h in 0..heads {
                        for from in 0..operands.len() {
                            let from = value(from)?;
                            let size = self.flat.values[from].width / heads;
                            let part = if heads == 1 { from } else { self.flat.window(from, h * size, size) };
                            self.part(part, out, at);
                            at += size;
                        }
                    }
                }
                Op::Repeat(r) => {
                    self.flat.push(RowOp::Repeat { x: value(0)?, times: r.times as usize }, out);
                }
                Op::Fused(f) => return Err(unsupported(&format!("@{} is not defined", f.callee))),
            }
            let entry = |var| way.map_or(Entry::Value(var), |way| Entry::Experts(var, way));
            known.extend(node.results.iter().copied().zip(outs.into_iter().map(entry)));
        }
        let result = |r: &ValueId| {
            let fail = |why: &str| CudaError::Unsupported(format!("region {}: a result is {why}", region.name));
            match known.get(r).copied().ok_or_else(|| fail("not computed"))? {
                Entry::Chosen(_) | Entry::Experts(..) => Err(fail("of experts, which must not leave the region")),
                entry @ (Entry::Ints(_) | Entry::Images | Entry::Cos(_) | Entry::Sin(_) | Entry::Value(_)) => Ok(entry),
            }
        };
        region.results().iter().map(result).collect()
    }

    fn map(&mut self, x: Var, f: Map, out: Var) {
        self.flat.push(RowOp::Map { x, f }, out);
    }

    /// Copies a value into columns of another.
    fn part(&mut self, from: Var, to: Var, col: usize) {
        let window = self.flat.window(to, col, self.flat.values[from].width);
        self.map(from, Map::Same, window);
    }

    /// The value as f16.
    fn half(&mut self, halves: &mut BTreeMap<Var, Var>, x: Var) -> Var {
        if let Some(half) = halves.get(&x) {
            return *half;
        }
        let half = self.flat.rows(self.flat.values[x].width, self.flat.values[x].rows, Home::F16);
        self.map(x, Map::Same, half);
        halves.insert(x, half);
        half
    }

    /// The value in rows that follow each other without a gap.
    fn whole(&mut self, x: Var) -> Var {
        if !matches!(self.flat.values[x].home, Home::View(..)) {
            return x;
        }
        let copy = self.flat.rows(self.flat.values[x].width, self.flat.values[x].rows, Home::F32);
        self.map(x, Map::Same, copy);
        copy
    }

    /// The value in a cache of its own.
    fn cache(&mut self, x: Var) -> Var {
        let width = self.flat.values[x].width;
        self.caches.push(2 * width);
        let cached = self.flat.value(width, Home::Cache(self.caches.len() - 1));
        self.map(x, Map::Same, cached);
        cached
    }
}
