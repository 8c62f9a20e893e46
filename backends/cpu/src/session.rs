//! A model ready to run: weights in place, caches and activations allocated, a team of threads.

mod experts;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use awqc_exec::Logits;
use awqc_exec::host::attention::{Heads, ROWS, Rows};
use awqc_exec::host::elementwise;
use awqc_exec::host::math::{simd, softmax};
use awqc_exec::host::norm::{layer_row, rms_row};
use awqc_exec::host::rotate::turn_row;
use awqc_exec::interp::frequencies::{angles, frequencies};
use awqc_exec::interp::ops::routing::choose;
use awqc_ir::panels::Panels;
use awqc_ir::{TensorSource, Verified};
use awqc_passes::Tensor;

use crate::CpuError;
use crate::arena::{Arena, Place};
use crate::dense::BLOCK_ROWS;
use crate::experts::Route;
use crate::kernels::{self, Acts, FloatActs, Isa, OutTile, TILE};
use crate::lower::{Input, lower};
use crate::memory::Pages;
use crate::pool::{Member, Pool};
use crate::program::{Attend, Ints, Linear, Map, Other, Product, Program, Row, Stage, Zip};

/// How a model runs.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Positions that the caches have room for.
    pub context: usize,
    /// Threads of the team.
    pub threads: usize,
    /// The instruction set of the packed kernels.
    pub isa: Isa,
    /// What packed linears multiply.
    pub activations: Activations,
    /// Where packed weights live.
    pub pages: Pages,
}

/// What packed linears multiply.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activations {
    /// Activations rounded to 8 bits, with a scale for every 32 channels.
    #[default]
    Int8,
    /// Activations as they are.
    F32,
}

/// Tokens that go through the layers together.
const CHUNK: usize = 256;
/// Tokens that go through the head together: its results are as wide as the vocabulary.
const HEAD_CHUNK: usize = 32;

/// A model and the state of one sequence.
pub struct Session<'a> {
    body: Part<'a>,
    head: Part<'a>,
    caches: Vec<Cache>,
    pool: Pool,
    options: Options,
    past: usize,
    vocabulary: usize,
    /// Token ids and positions of the current chunk.
    ids: Vec<i32>,
}

/// A program and what it works on.
struct Part<'a> {
    program: Program<'a>,
    arena: Arena,
    /// Activations by shape and tile of tokens, or run of an expert's rows.
    quantized: Vec<Vec<RwLock<Quantized>>>,
    /// The rows of each expert.
    routes: Vec<RwLock<Route>>,
    /// Memory of each member for intermediate results.
    scratch: Vec<Mutex<Vec<f32>>>,
}

/// One tile of activations in the form that packed linears take.
#[derive(Default)]
struct Quantized {
    int8: Acts,
    float: FloatActs,
}

impl Quantized {
    /// Takes `x`, `[tokens, cols]`, for weights of this shape.
    fn fill(&mut self, options: &Options, shape: &Panels, tokens: usize, x: &[f32]) {
        match options.activations {
            Activations::Int8 => self.int8.quantize(options.isa, shape, tokens, x),
            Activations::F32 => self.float.copy(shape, tokens, x),
        }
    }

    /// The product with some panels of a weight.
    fn multiply(&self, options: &Options, shape: &Panels, bytes: &[u8], panels: Range<usize>, out: OutTile<'_>) {
        match options.activations {
            Activations::Int8 => kernels::matmul_i8(options.isa, shape, bytes, panels, &self.int8, out),
            Activations::F32 => kernels::matmul_f32(options.isa, shape, bytes, panels, &self.float, out),
        }
    }
}

/// Keys and values of all positions, `[context, channels]`.
struct Cache {
    keys: Arena,
    values: Arena,
    k: Place,
    v: Place,
}

impl<'a> Session<'a> {
    /// Prepares a module: weights in the kernels' layout stay where `source` has mapped them, others are decoded or
    /// packed now.
    ///
    /// # Errors
    /// When a weight cannot be read, the machine lacks the instruction set, or the module uses an op in a form that
    /// this back end does not know.
    pub fn new(module: Verified<'_>, source: &'a dyn TensorSource, options: Options) -> Result<Self, CpuError> {
        let module = module.module();
        if !options.isa.is_available() {
            return Err(CpuError::Feature(options.isa.name()));
        }
        let Some((last, layers)) = module.regions.split_last() else {
            return Err(CpuError::Unsupported("the module has no regions".into()));
        };
        if !awqc_exec::rowwise(last, &module.fused) {
            return Err(CpuError::Unsupported(format!("region {} mixes positions", last.name)));
        }
        let options = Options { context: options.context.max(1), ..options };
        let inputs = [Input::Ints(Ints::Ids), Input::Ints(Ints::Positions)];
        let (body, stream) = lower(layers, &module.fused, source, &inputs, options.pages)?;
        let (head, out) = lower(std::slice::from_ref(last), &module.fused, source, &stream, options.pages)?;
        let Some(Input::Float(vocabulary)) = out.first().copied() else {
            return Err(CpuError::Unsupported("the module returns no logits".into()));
        };
        let cache = |(k, v): &(usize, usize)| {
            let place = |width| Place { base: 0, stride: width, col: 0, width };
            Cache {
                keys: Arena::new(*k, options.context),
                values: Arena::new(*v, options.context),
                k: place(*k),
                v: place(*v),
            }
        };
        let pool = Pool::new(options.threads);
        Ok(Self {
            caches: body.caches.iter().map(cache).collect(),
            body: Part::new(body, CHUNK.min(options.context), pool.count()),
            head: Part::new(head, HEAD_CHUNK.min(options.context), pool.count()),
            pool,
            options,
            past: 0,
            vocabulary,
            ids: Vec::new(),
        })
    }

    /// Positions that have been seen since the last reset.
    pub fn position(&self) -> usize {
        self.past
    }

    /// How it runs.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Bytes of weights that are read for every token: all matrices but the embedding's, and of experts those that a
    /// token goes to.
    pub fn bytes_per_token(&self) -> usize {
        let bytes = |product: &Product<'_>| match product {
            Product::Packed { shape, .. } => shape.total_bytes(),
            Product::Dense { weight, .. } => weight.bytes.len(),
        };
        let of = |part: &Part<'_>| {
            let stages = part.program.stages.iter().map(|stage| match stage {
                Stage::Linear(linear) => bytes(&linear.product),
                Stage::Experts(all) => {
                    let choice = part.program.routes[all.route];
                    bytes(&all.product) / choice.experts.max(1) * choice.each
                }
                Stage::Rows(_) | Stage::Attend(_) | Stage::Route { .. } | Stage::Gather(_) => 0,
            });
            stages.sum::<usize>()
        };
        of(&self.body) + of(&self.head)
    }

    /// Whether any product is one with low-bit codes.
    pub fn has_packed_weights(&self) -> bool {
        !self.body.program.activations.is_empty() || !self.head.program.activations.is_empty()
    }

    /// Tokens that the model knows.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Forgets all earlier positions.
    pub fn reset(&mut self) {
        self.past = 0;
    }

    /// The logits of `ids`, which continue what the session has seen since the last reset: `[ids, vocabulary]`, or
    /// `[1, vocabulary]` for the last one.
    ///
    /// # Errors
    /// When the sequence would be longer than the caches, or an id is outside the embedding table: nothing has changed
    /// then.
    pub fn forward(&mut self, ids: &[i32], logits: Logits) -> Result<Tensor, CpuError> {
        let mut data = Vec::new();
        self.forward_each(ids, logits, &mut |_, row| data.extend_from_slice(row))?;
        Ok(Tensor { shape: vec![data.len() / self.vocabulary.max(1), self.vocabulary], data })
    }

    /// As [`Session::forward`]; gives every row of logits, with its index in `ids`, to `sink`.
    ///
    /// # Errors
    /// As there.
    pub fn forward_each(
        &mut self,
        ids: &[i32],
        logits: Logits,
        sink: &mut dyn FnMut(usize, &[f32]),
    ) -> Result<(), CpuError> {
        self.check(ids)?;
        let length = self.past + ids.len();
        for (i, chunk) in ids.chunks(self.body.arena.capacity()).enumerate() {
            let first = i * self.body.arena.capacity();
            self.ids.clear();
            self.ids.extend_from_slice(chunk);
            let work = Work { ids: &self.ids, past: self.past, length, caches: &self.caches, options: &self.options };
            self.body.run(&mut self.pool, &work, chunk.len());
            self.past += chunk.len();
            let from = match logits {
                Logits::All => 0,
                Logits::Last if first + chunk.len() == ids.len() => chunk.len() - 1,
                Logits::Last => continue,
            };
            for start in (from..chunk.len()).step_by(self.head.arena.capacity()) {
                let count = self.head.arena.capacity().min(chunk.len() - start);
                for (from, to) in self.body.program.results.iter().zip(&self.head.program.inputs) {
                    for t in 0..count {
                        // SAFETY: the team is idle: this thread alone uses the arenas, which are two.
                        unsafe {
                            self.head.arena.row_mut(*to, t).copy_from_slice(self.body.arena.row(*from, start + t))
                        }
                    }
                }
                let past = self.past - chunk.len() + start;
                let work = Work { ids: &self.ids[start..], past, length, caches: &self.caches, options: &self.options };
                self.head.run(&mut self.pool, &work, count);
                for t in 0..count {
                    // SAFETY: as above.
                    sink(first + start + t, unsafe { self.head.arena.row(self.head.program.results[0], t) });
                }
            }
        }
        Ok(())
    }

    fn check(&self, ids: &[i32]) -> Result<(), CpuError> {
        if ids.is_empty() {
            return Err(CpuError::Empty);
        }
        if self.past + ids.len() > self.options.context {
            return Err(CpuError::Context { needed: self.past + ids.len(), room: self.options.context });
        }
        for stage in &self.body.program.stages {
            let Stage::Rows(steps) = stage else { continue };
            for step in steps {
                let Row::Embed { table, of, offset, .. } = step else { continue };
                let row = |id: i64| usize::try_from(id + i64::from(*offset)).is_ok_and(|row| row < table.rows);
                let bad = match of {
                    Ints::Ids => ids.iter().map(|id| i64::from(*id)).find(|id| !row(*id)),
                    Ints::Positions => Some((self.past + ids.len()) as i64 - 1).filter(|last| !row(*last)),
                };
                if let Some(id) = bad {
                    return Err(CpuError::Index { id, rows: table.rows });
                }
            }
        }
        Ok(())
    }
}

/// What a pass of a program is given.
struct Work<'w> {
    ids: &'w [i32],
    /// Position of the first token.
    past: usize,
    /// Length of the sequence when the call is done.
    length: usize,
    caches: &'w [Cache],
    options: &'w Options,
}

impl<'a> Part<'a> {
    fn new(program: Program<'a>, capacity: usize, members: usize) -> Self {
        let tiles = |route: Option<usize>| {
            let count = route.map_or(capacity.div_ceil(TILE), |r| program.routes[r].most_runs(capacity));
            (0..count).map(|_| RwLock::default()).collect()
        };
        Self {
            arena: Arena::new(program.columns, capacity),
            quantized: program.activations.iter().map(|a| tiles(a.route)).collect(),
            routes: program.routes.iter().map(|_| RwLock::default()).collect(),
            scratch: (0..members).map(|_| Mutex::default()).collect(),
            program,
        }
    }

    /// Runs all stages for `count` tokens.
    fn run(&self, pool: &mut Pool, work: &Work<'_>, count: usize) {
        pool.run(&|member| {
            let mut scratch = self.scratch[member.index].lock().unwrap_or_else(PoisonError::into_inner);
            for (i, stage) in self.program.stages.iter().enumerate() {
                if i > 0 {
                    member.wait();
                }
                match stage {
                    Stage::Rows(steps) => self.rows(member, work, steps, count),
                    Stage::Linear(linear) => self.linear(member, work, linear, count, &mut scratch),
                    Stage::Attend(attend) => self.attend(member, work, attend, count, &mut scratch),
                    Stage::Route { chosen, to } => self.route(member, *chosen, *to, count),
                    Stage::Gather(gather) => self.gather(member, work, gather, &mut scratch),
                    Stage::Experts(experts) => self.experts(member, work, experts, &mut scratch),
                }
            }
        });
    }

    /// Each member takes whole tiles of tokens, so that it can round their activations too.
    fn rows(&self, member: &Member<'_>, work: &Work<'_>, steps: &[Row<'_>], count: usize) {
        let own = member.share(count, TILE);
        for first in own.clone().step_by(TILE) {
            let tile = first..(first + TILE).min(own.end);
            for part in steps.split_inclusive(|s| matches!(s, Row::Quantize { .. })) {
                for t in tile.clone() {
                    part.iter().for_each(|step| self.row(work, step, t));
                }
                if let Some(Row::Quantize { x, to }) = part.last() {
                    let shape = &self.program.activations[*to].shape;
                    // SAFETY: the tile's rows are this member's in this stage.
                    let x = unsafe { self.arena.rows(*x, tile.clone()) };
                    write(&self.quantized[*to][first / TILE]).fill(work.options, shape, tile.len(), x);
                }
            }
        }
    }

    /// One step on one token.
    fn row(&self, work: &Work<'_>, step: &Row<'_>, t: usize) {
        // SAFETY: in this stage the token's rows belong to the calling member, and values that are used together have
        // places that do not overlap, except where a step works in place and says so.
        let (read, write) = unsafe { (|at: Place| self.arena.row(at, t), |at: Place| self.arena.row_mut(at, t)) };
        match step {
            Row::Embed { table, of, offset, out } => {
                let id = match of {
                    Ints::Ids => i64::from(work.ids[t]),
                    Ints::Positions => (work.past + t) as i64,
                };
                table.row((id + i64::from(*offset)) as usize, write(*out));
            }
            Row::Angles { of, fixed, cos, sin } => {
                let (frequencies, factor) = match fixed {
                    Some((frequencies, factor)) => (Cow::Borrowed(frequencies), *factor),
                    None => {
                        let (frequencies, factor) = frequencies(of, work.length as u64);
                        (Cow::Owned(frequencies), factor)
                    }
                };
                let angles = angles(&frequencies, factor, (work.past + t) as i64);
                for ((cos, sin), angle) in write(*cos).iter_mut().zip(write(*sin)).zip(angles) {
                    (*cos, *sin) = angle;
                }
            }
            Row::Copy { from, to } => write(*to).copy_from_slice(read(*from)),
            Row::RmsNorm { at, heads, eps, gain } => {
                let row = write(*at);
                let width = (row.len() / heads).max(1);
                simd(
                    #[inline(always)]
                    || row.chunks_exact_mut(width).for_each(|part| rms_row(part, *eps, gain.as_deref())),
                );
            }
            Row::LayerNorm { at, heads, eps, gain, bias } => {
                let row = write(*at);
                let width = (row.len() / heads).max(1);
                simd(
                    #[inline(always)]
                    || {
                        for (head, part) in row.chunks_exact_mut(width).enumerate() {
                            layer_row(part, *eps, own(gain, head, width), own(bias, head, width));
                        }
                    },
                );
            }
            Row::Rope { at, cos, sin, heads, interleaved } => simd(
                #[inline(always)]
                || turn_row(write(*at), *heads, *interleaved, read(*cos), read(*sin)),
            ),
            Row::Map { at, f } => simd(
                #[inline(always)]
                || map(*f, write(*at)),
            ),
            Row::Zip { at, by, f } => {
                let by = match by {
                    Other::Value(at) => read(*at),
                    Other::Parameter(numbers) => numbers,
                };
                simd(
                    #[inline(always)]
                    || match f {
                        Zip::Add => elementwise::plus(write(*at), by),
                        Zip::Mul => elementwise::times(write(*at), by),
                    },
                );
            }
            Row::Remember { k, v, cache } => {
                let (cache, at) = (&work.caches[*cache], work.past + t);
                // SAFETY: position `at` of the cache belongs to this token.
                unsafe {
                    cache.keys.row_mut(cache.k, at).copy_from_slice(read(*k));
                    cache.values.row_mut(cache.v, at).copy_from_slice(read(*v));
                }
            }
            // A whole tile at a time, see `rows`.
            Row::Quantize { .. } => {}
            Row::Softmax { at } => simd(
                #[inline(always)]
                || softmax(write(*at)),
            ),
            Row::Choose { op, scores, bias, weights, chosen } => {
                let scores = read(*scores);
                let by = match bias {
                    Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
                    None => scores.to_vec(),
                };
                for ((w, e), (weight, expert)) in
                    write(*weights).iter_mut().zip(write(*chosen)).zip(choose(op, scores, by))
                {
                    (*w, *e) = (weight, expert as f32);
                }
            }
            Row::Combine { y, weights, out } => {
                let out = write(*out);
                out.fill(0.0);
                for (w, y) in read(*weights).iter().zip(read(*y).chunks_exact(out.len().max(1))) {
                    out.iter_mut().zip(y).for_each(|(out, y)| *out += w * y);
                }
            }
        }
    }

    fn linear(&self, member: &Member<'_>, work: &Work<'_>, linear: &Linear<'_>, count: usize, scratch: &mut Vec<f32>) {
        let out = linear.out;
        match &linear.product {
            Product::Packed { bytes, shape, x } => {
                let bytes = self.program.memory.get(bytes);
                let panels = member.share(shape.panels(), 1);
                let rows = shape.panel_rows(panels.clone());
                if rows.is_empty() {
                    return;
                }
                for (i, first) in (0..count).step_by(TILE).enumerate() {
                    let tile = first..(first + TILE).min(count);
                    let quantized = read(&self.quantized[*x][i]);
                    // SAFETY: these channels of `out` are this member's in this stage.
                    let out = unsafe { self.tile(out, tile, rows.clone()) };
                    quantized.multiply(work.options, shape, bytes, panels.clone(), out);
                }
                self.bias(linear, rows, count);
            }
            Product::Dense { weight, x } => {
                let rows = member.share(weight.rows, BLOCK_ROWS);
                if rows.is_empty() {
                    return;
                }
                // SAFETY: nobody writes `x` in this stage, and these channels of `out` are this member's.
                let (x, tile) = unsafe { (self.arena.rows(*x, 0..count), self.tile(out, 0..count, rows.clone())) };
                weight.multiply(rows.clone(), x, count, scratch, tile);
                self.bias(linear, rows, count);
            }
        }
    }

    /// Some channels of some tokens of a value.
    ///
    /// # Safety
    /// Nothing else may read or write them while the tile lives.
    unsafe fn tile(&self, at: Place, tokens: Range<usize>, rows: Range<usize>) -> OutTile<'_> {
        let at = Place { col: at.col + rows.start, width: rows.len(), ..at };
        // SAFETY: `pointer` checks the bounds of the first and last token; the caller excludes all others.
        unsafe { OutTile::from_raw(self.arena.pointer(at, tokens.clone()), tokens.len(), at.stride, rows.len()) }
    }

    fn bias(&self, linear: &Linear<'_>, rows: Range<usize>, count: usize) {
        let Some(bias) = &linear.bias else { return };
        let at = Place { col: linear.out.col + rows.start, width: rows.len(), ..linear.out };
        for t in 0..count {
            // SAFETY: these channels are this member's in this stage.
            elementwise::plus(unsafe { self.arena.row_mut(at, t) }, &bias[rows.clone()]);
        }
    }

    /// One token: members take heads. More: blocks of tokens.
    fn attend(&self, member: &Member<'_>, work: &Work<'_>, attend: &Attend, count: usize, scratch: &mut Vec<f32>) {
        let Attend { op, q, cache, out } = attend;
        let cache = &work.caches[*cache];
        let heads = Heads::new(op, cache.k.width, cache.v.width);
        let all = work.past + count;
        // SAFETY: nobody writes the caches or `q` in this stage.
        let (keys, values) = unsafe { (cache.keys.rows(cache.k, 0..all), cache.values.rows(cache.v, 0..all)) };
        let mut block = |first: usize, n: usize, h: usize| {
            let head = Place { col: q.col + h * heads.width, width: heads.width, ..*q };
            let to = Place { col: out.col + h * heads.out, width: heads.out, ..*out };
            // SAFETY: as above; the head's channels of these tokens of `out` are this member's.
            let (q, out) =
                unsafe { (self.arena.rows(head, first..first + n), self.arena.rows_mut(to, first..first + n)) };
            let rows = Rows { first: work.past + first, count: n, q, q_stride: head.stride, out_stride: to.stride };
            heads.attend(h, &rows, keys, values, scratch, out);
        };
        if count == 1 {
            member.share(heads.count(), 1).for_each(|h| block(0, 1, h));
            return;
        }
        // Later blocks see more keys: dealing them out one by one keeps the members equally busy.
        for first in (0..count).step_by(ROWS).skip(member.index).step_by(member.count) {
            (0..heads.count()).for_each(|h| block(first, ROWS.min(count - first), h));
        }
    }
}

/// The parameters of one head, of which there are those of all heads or one set for each of them.
fn own(all: &Option<Vec<f32>>, head: usize, width: usize) -> Option<&[f32]> {
    let all = all.as_deref()?;
    Some(all.get(head * width..(head + 1) * width).unwrap_or(all))
}

#[inline(always)]
fn map(f: Map, x: &mut [f32]) {
    match f {
        Map::Silu => elementwise::silu(x),
        Map::GeluErf => elementwise::gelu_erf(x),
        Map::GeluTanh => elementwise::gelu_tanh(x),
        Map::GeluQuick => elementwise::gelu_quick(x),
        Map::Relu => elementwise::relu(x),
        Map::Sigmoid => elementwise::logistic(x),
        Map::Clamp(at) => elementwise::clamp(x, at),
        Map::Scale(by) => x.iter_mut().for_each(|v| *v *= by),
        Map::Softcap(at) => elementwise::softcap(x, at),
    }
}

/// A lock that a failed thread left behind still guards plain numbers.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
