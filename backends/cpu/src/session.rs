//! A model ready to run: weights in place, caches and activations allocated, a team of threads.

mod attend;
mod experts;
mod rows;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use awqc_exec::Logits;
use awqc_exec::eye::rows_of;
use awqc_exec::host::elementwise;
use awqc_exec::interp::ops::image::places;
use awqc_ir::images::Placed;
use awqc_ir::{TensorSource, Verified};
use awqc_passes::Tensor;

use crate::CpuError;
use crate::arena::{Arena, Place};
use crate::cache::{Cache, CacheNumbers};
use crate::dense::BLOCK_ROWS;
use crate::experts::Route;
use crate::kernels::{Isa, Line, OutTile, TILE};
use crate::linear::{Activations, Operand, multiply};
use crate::lower::{Input, lower};
use crate::memory::Pages;
use crate::pool::{Member, Pool};
use crate::program::{Ints, Linear, Product, Program, Row, Stage};

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
    /// What keys and values are kept as.
    pub cache: CacheNumbers,
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
    /// What the model's eye made of the images at hand, `[images, rows, channels]`.
    images: Tensor,
    interrupt: Arc<AtomicBool>,
}

/// A program and what it works on.
struct Part<'a> {
    program: Program<'a>,
    arena: Arena,
    /// Activations by shape and tile of tokens, or run of an expert's rows.
    quantized: Vec<Vec<RwLock<Operand>>>,
    /// The rows of each expert.
    routes: Vec<RwLock<Route>>,
    scratch: Vec<Mutex<Scratch>>,
    /// What the pieces of one token's attention give: a row for each piece, see `attend.rs`.
    parts: Arena,
}

/// Memory of a member for intermediate results.
#[derive(Default)]
struct Scratch {
    attention: attend::Room,
    floats: Vec<f32>,
    weights: Vec<Line>,
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
        if !options.activations.works_with(options.isa) {
            return Err(CpuError::Bf16(options.isa.name()));
        }
        let (eye, text) = module.eye_and_text();
        let Some((last, layers)) = text.split_last() else {
            return Err(CpuError::Unsupported("the module has no regions".into()));
        };
        if !awqc_exec::rowwise(last, &module.fused) {
            return Err(CpuError::Unsupported(format!("region {} mixes positions", last.name)));
        }
        let options = Options { context: options.context.max(1), ..options };
        let images = (!eye.is_empty()).then_some(Input::Images);
        let inputs: Vec<Input> =
            images.into_iter().chain([Input::Ints(Ints::Ids), Input::Ints(Ints::Positions)]).collect();
        let (body, stream) = lower(layers, &module.fused, source, &inputs, options.pages)?;
        let (head, out) = lower(std::slice::from_ref(last), &module.fused, source, &stream, options.pages)?;
        let Some(Input::Float(vocabulary)) = out.first().copied() else {
            return Err(CpuError::Unsupported("the module returns no logits".into()));
        };
        let pool = Pool::new(options.threads);
        Ok(Self {
            caches: body
                .caches
                .iter()
                .map(|shape| Cache::new(*shape, options.cache, options.context))
                .collect::<Result<_, _>>()?,
            body: Part::new(body, CHUNK.min(options.context), pool.count(), options.context)?,
            head: Part::new(head, HEAD_CHUNK.min(options.context), pool.count(), options.context)?,
            pool,
            options,
            past: 0,
            vocabulary,
            images: Tensor::default(),
            interrupt: Arc::default(),
        })
    }

    /// Ends a pass of many tokens at the next piece of them once the flag is set.
    #[must_use]
    pub fn with_interrupt(self, flag: Arc<AtomicBool>) -> Self {
        Self { interrupt: flag, ..self }
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

    /// Begins a text with images: what the model's eye made of them, `[images, rows, channels]`; see
    /// [`awqc_exec::Eye`].
    ///
    /// # Errors
    /// When the model takes none, or others.
    pub fn see(&mut self, images: Tensor) -> Result<(), CpuError> {
        self.reset();
        rows_of(self.body.program.images, &images).map_err(CpuError::Images)?;
        self.images = images;
        Ok(())
    }

    /// Forgets all earlier positions, and the images.
    pub fn reset(&mut self) {
        self.past = 0;
        self.images = Tensor::default();
    }

    /// The logits of `ids`, which continue what the session has seen since the last reset: `[ids, vocabulary]`, or
    /// `[1, vocabulary]` for the last one.
    ///
    /// # Errors
    /// When the sequence would be longer than the caches, an id is outside the embedding table, or the text has places
    /// for more or fewer images: nothing has changed then. And when the user interrupts: some of the tokens are seen
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
        let places = self.places(ids)?;
        let length = self.past + ids.len();
        for (i, chunk) in ids.chunks(self.body.arena.capacity()).enumerate() {
            let first = i * self.body.arena.capacity();
            if first > 0 && self.interrupt.load(Ordering::Relaxed) {
                return Err(CpuError::Interrupted);
            }
            let work = Work {
                ids: chunk,
                past: self.past,
                length,
                images: &self.images,
                places: places.get(first..).unwrap_or_default(),
                caches: &self.caches,
                options: &self.options,
            };
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
                let work = Work { ids: &chunk[start..], past, ..work };
                self.head.run(&mut self.pool, &work, count);
                for t in 0..count {
                    // SAFETY: as above.
                    sink(first + start + t, unsafe { self.head.arena.row(self.head.program.results[0], t) });
                }
            }
        }
        Ok(())
    }

    /// The rows of images at the places of `ids`.
    fn places(&self, ids: &[i32]) -> Result<Vec<Option<usize>>, CpuError> {
        let Some(Placed { token, .. }) = self.body.program.images else { return Ok(Vec::new()) };
        let there = [0, 1].map(|axis| self.images.shape.get(axis).copied().unwrap_or(0));
        places(token, ids, there.into()).map_err(CpuError::Images)
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
#[derive(Clone, Copy)]
struct Work<'w> {
    ids: &'w [i32],
    /// Rows of images, and which of them stand at which token; the latter is empty if none does.
    images: &'w Tensor,
    places: &'w [Option<usize>],
    /// Position of the first token.
    past: usize,
    /// Length of the sequence when the call is done.
    length: usize,
    caches: &'w [Cache],
    options: &'w Options,
}

impl<'a> Part<'a> {
    fn new(program: Program<'a>, capacity: usize, members: usize, context: usize) -> Result<Self, CpuError> {
        let columns = |stage: &Stage<'_>| {
            let Stage::Attend(attend) = stage else { return 0 };
            attend::part_columns(&attend.op, program.caches[attend.cache])
        };
        let parts = program.stages.iter().map(columns).max().unwrap_or(0);
        let tiles = |route: Option<usize>| {
            let count = route.map_or(capacity.div_ceil(TILE), |r| program.routes[r].most_runs(capacity));
            (0..count).map(|_| RwLock::default()).collect()
        };
        Ok(Self {
            arena: Arena::new("the activations", program.columns, capacity)?,
            parts: Arena::new("attention", parts, attend::pieces_of(context))?,
            quantized: program.activations.iter().map(|a| tiles(a.route)).collect(),
            routes: program.routes.iter().map(|_| RwLock::default()).collect(),
            scratch: (0..members).map(|_| Mutex::default()).collect(),
            program,
        })
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
                    Stage::Attend(attend) => self.attend(member, work, attend, count, &mut scratch.attention),
                    Stage::Route { chosen, to } => self.route(member, *chosen, *to, count),
                    Stage::Gather(gather) => self.gather(member, work, gather, &mut scratch.floats),
                    Stage::Experts(experts) => self.experts(member, work, experts, &mut scratch),
                }
            }
        });
    }

    fn linear(&self, member: &Member<'_>, work: &Work<'_>, linear: &Linear<'_>, count: usize, scratch: &mut Scratch) {
        let out = linear.out;
        match &linear.product {
            Product::Packed { bytes, shape, x } => {
                let bytes = self.program.memory.get(bytes);
                let panels = member.share(shape.panels(), 1);
                let rows = shape.panel_rows(panels.clone());
                if rows.is_empty() {
                    return;
                }
                let tiles = &self.quantized[*x][..count.div_ceil(TILE)];
                // SAFETY: these channels of `out` are this member's in this stage.
                let out = unsafe { self.tile(out, 0..count, rows.clone()) };
                let isa = work.options.isa;
                if let [tile] = tiles {
                    multiply(isa, &[&read(tile)], shape, bytes, panels, &mut scratch.weights, out);
                } else {
                    let tiles: Vec<_> = tiles.iter().map(read).collect();
                    let tiles: Vec<&Operand> = tiles.iter().map(|tile| &**tile).collect();
                    multiply(isa, &tiles, shape, bytes, panels, &mut scratch.weights, out);
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
                weight.multiply(rows.clone(), x, count, &mut scratch.floats, tile);
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
}

/// A lock that a failed thread left behind still guards plain numbers.
fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
