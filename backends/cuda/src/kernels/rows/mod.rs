//! Kernels for steps that treat each token by itself: norms, rotations, elementwise functions, and what goes to the KV
//! cache.
//!
//! A kernel is a list of steps, run one after the other on one token's rows by the same block: what one step leaves
//! behind is still near when the next one takes it. So every fused body becomes few kernels, also one that was never
//! seen before. Steps that need nothing from other columns of the row are divided among several blocks.

mod elementwise;
mod embed;
mod experts;
mod norm;
mod rope;
mod step;

pub(super) use elementwise::tanh;
pub use experts::{Choice, Groups};
pub use step::{Kind, Map, NO_IMAGE, Out, Row, Step, Zip};

use cubecl::prelude::*;
use half::{bf16, f16};

use super::{Call, Float};
use crate::CudaError;
use crate::arch::Arch;
use crate::emit::{Args, Source, emit};

/// Threads of a block.
pub const THREADS: u32 = 256;
/// Columns that a thread takes where a row is divided among blocks.
const COLUMNS: usize = 2;

/// A list of steps and what their arguments are. The last argument of the kernel, the call, is not among them.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// The arguments.
    pub args: Vec<Kind>,
}

impl Rows {
    /// Whether step `i` must wait for all threads: it reads, or overwrites, what others may have touched.
    fn waits(&self, i: usize) -> bool {
        let step = &self.steps[i];
        self.steps[..i].iter().any(|earlier| {
            let (before, now) = (earlier.writes(), step.writes());
            let pairs = step.reads().into_iter().map(|r| (before, r));
            let pairs = pairs.chain(earlier.reads().into_iter().map(|r| (r, now))).chain([(before, now)]);
            // The same thread takes the same column in both: it needs to wait for nobody.
            let apart = earlier.columnwise() && step.columnwise();
            pairs.into_iter().any(|(a, b)| a.meets(b) && !(apart && a == b))
        })
    }

    /// Blocks that share one token's rows.
    pub fn blocks(&self) -> u32 {
        if self.steps.iter().any(Step::whole) || (0..self.steps.len()).any(|i| self.waits(i)) {
            return 1;
        }
        let widest = self.steps.iter().map(Step::columns).max().unwrap_or(1);
        widest.div_ceil(THREADS as usize * COLUMNS).max(1) as u32
    }

    /// The kernel. The grid is `[blocks, tokens]`.
    ///
    /// # Errors
    /// When the code generator refuses it.
    pub fn source(&self, arch: &Arch) -> Result<Source, CudaError> {
        let words: Vec<&str> = self.steps.iter().map(Step::word).collect();
        let grid = Grid { blocks: self.blocks() };
        emit(arch, &words.join("_"), THREADS, |args| {
            let own: Vec<Operand> =
                self.args.iter().enumerate().map(|(i, kind)| Operand::new(args, i, *kind)).collect();
            let call = args.input::<u32>("call");
            for (i, step) in self.steps.iter().enumerate() {
                if i > 0 && self.waits(i) {
                    sync_cube::expand(args.scope());
                }
                expand(args.scope(), step, &own, &call, grid);
            }
        })
    }
}

/// How the threads of one or several blocks share a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Grid {
    blocks: u32,
}

/// An argument as the kernel's code sees it.
enum Operand {
    F32(NativeExpand<Array<f32>>),
    F16(NativeExpand<Array<f16>>),
    Bf16(NativeExpand<Array<bf16>>),
    Ints(NativeExpand<Array<u32>>),
}

impl Operand {
    fn new(args: &mut Args, i: usize, kind: Kind) -> Self {
        match kind {
            Kind::F32 => Operand::F32(args.output(&format!("rows{i}"))),
            Kind::F16 => Operand::F16(args.output(&format!("halves{i}"))),
            Kind::Parameter => Operand::F32(args.input(&format!("parameter{i}"))),
            Kind::Table(Float::F32) => Operand::F32(args.input(&format!("table{i}"))),
            Kind::Table(Float::F16) => Operand::F16(args.input(&format!("table{i}"))),
            Kind::Table(Float::Bf16) => Operand::Bf16(args.input(&format!("table{i}"))),
            Kind::Ints => Operand::Ints(args.input(&format!("ints{i}"))),
        }
    }

    fn f32(&self) -> NativeExpand<Array<f32>> {
        match self {
            Operand::F32(array) => array.clone(),
            Operand::F16(_) | Operand::Bf16(_) | Operand::Ints(_) => unreachable!("an f32 argument"),
        }
    }

    fn ints(&self) -> NativeExpand<Array<u32>> {
        match self {
            Operand::Ints(array) => array.clone(),
            Operand::F32(_) | Operand::F16(_) | Operand::Bf16(_) => unreachable!("an integer argument"),
        }
    }
}

/// Where an operand's rows lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct From {
    pitch: u32,
    col: u32,
}

/// Where a thread writes: an array of numbers of one type.
struct Target<O: CubePrimitive> {
    array: NativeExpand<Array<O>>,
    /// The row of a position, not of a token.
    cache: bool,
    row: Row,
}

/// Appends one step.
fn expand(scope: &mut Scope, step: &Step, args: &[Operand], call: &NativeExpand<Array<u32>>, grid: Grid) {
    let row = step.out().row();
    let cache = matches!(step.out(), Out::Cache(_));
    match &args[row.arg] {
        Operand::F32(array) => {
            let target = Target { array: array.clone(), cache, row };
            expand_to::<f32>(scope, step, args, call, target, grid);
        }
        Operand::F16(array) => {
            let target = Target { array: array.clone(), cache, row };
            expand_to::<f16>(scope, step, args, call, target, grid);
        }
        Operand::Bf16(_) | Operand::Ints(_) => unreachable!("results are f32 or f16"),
    }
}

fn expand_to<O: cubecl::prelude::Float>(
    scope: &mut Scope,
    step: &Step,
    args: &[Operand],
    call: &NativeExpand<Array<u32>>,
    to: Target<O>,
    grid: Grid,
) {
    let base = place::expand(scope, call.clone(), to.cache, to.row.pitch as u32, to.row.col as u32);
    let rows = |row: &Row| (args[row.arg].f32(), From { pitch: row.pitch as u32, col: row.col as u32 });
    // A parameter that is missing is never read.
    let parameter = |at: &Option<usize>, x: &Row| args[at.unwrap_or(x.arg)].f32();
    match *step {
        Step::Embed { table, index, offset, width, .. } => {
            let index = args[index].ints();
            let spec = embed::Spec { width: width as u32, offset };
            match &args[table] {
                Operand::F32(table) => embed::embed::expand(scope, table.clone(), index, to.array, base, spec, grid),
                Operand::F16(table) => embed::embed::expand(scope, table.clone(), index, to.array, base, spec, grid),
                Operand::Bf16(table) => embed::embed::expand(scope, table.clone(), index, to.array, base, spec, grid),
                Operand::Ints(_) => unreachable!("tables are floats"),
            }
        }
        Step::Image { x, images, index, width, .. } => {
            let (array, from) = rows(&x);
            let (images, index) = (args[images].f32(), args[index].ints());
            embed::image::expand(scope, array, images, index, to.array, base, from, width as u32, grid);
        }
        Step::RmsNorm { x, gain, heads, width, eps, .. } => {
            let spec = norm::Spec {
                width: width as u32,
                heads: heads as u32,
                from: rows(&x).1,
                eps,
                center: false,
                gain: gain.is_some(),
                bias: false,
                each: false,
            };
            norm::expand(
                scope,
                args[x.arg].f32(),
                parameter(&gain, &x),
                parameter(&None, &x),
                to.array,
                base,
                spec,
                grid,
            );
        }
        Step::LayerNorm { x, gain, bias, heads, width, each, eps, .. } => {
            let spec = norm::Spec {
                width: width as u32,
                heads: heads as u32,
                from: rows(&x).1,
                eps,
                center: true,
                gain: gain.is_some(),
                bias: bias.is_some(),
                each,
            };
            norm::expand(
                scope,
                args[x.arg].f32(),
                parameter(&gain, &x),
                parameter(&bias, &x),
                to.array,
                base,
                spec,
                grid,
            );
        }
        Step::Rope { x, cos, sin, heads, width, pairs, interleaved, .. } => {
            let (array, from) = rows(&x);
            let ((cos, angles), (sin, _)) = (rows(&cos), rows(&sin));
            let spec =
                rope::Spec { heads: heads as u32, width: width as u32, pairs: pairs as u32, interleaved, from, angles };
            rope::rope::expand(scope, array, cos, sin, to.array, base, spec, grid);
        }
        Step::Map { x, f, width, .. } => {
            let (array, from) = rows(&x);
            elementwise::map::expand(
                scope,
                array,
                to.array,
                base,
                elementwise::Spec { width: width as u32, from, by: from, f },
                grid,
            );
        }
        Step::Zip { a, f, b, zip, width, .. } => {
            let ((a, from), (b, by)) = (rows(&a), rows(&b));
            elementwise::zip::expand(
                scope,
                a,
                b,
                to.array,
                base,
                elementwise::Spec { width: width as u32, from, by, f },
                zip,
                grid,
            );
        }
        Step::Repeat { x, width, times, .. } => {
            let (array, from) = rows(&x);
            elementwise::repeat::expand(scope, array, to.array, base, from, width as u32, times as u32, grid);
        }
        Step::Softmax { x, width, .. } => {
            let (array, from) = rows(&x);
            experts::softmax::expand(scope, array, to.array, base, from, width as u32);
        }
        Step::Choose { scores, bias, of, .. } => {
            let ((array, from), has_bias) = (rows(&scores), bias.is_some());
            // Numbers of experts have 32 bits, as the weights before them.
            let out = args[to.row.arg].f32();
            experts::choose::expand(scope, array, parameter(&bias, &scores), out, base, from, of, has_bias);
        }
        Step::Combine { y, w, each, stride, width, .. } => {
            let ((y, from), (w, by)) = (rows(&y), rows(&w));
            let spec = experts::Sum { from, by, each: each as u32, stride: stride as u32, width: width as u32 };
            experts::combine::expand(scope, y, w, to.array, base, spec, grid);
        }
    }
}

/// Where the token's row begins in the target.
#[cube]
fn place(call: &Array<u32>, #[comptime] cache: bool, #[comptime] pitch: u32, #[comptime] col: u32) -> u32 {
    if comptime!(cache) {
        (call[comptime!(Call::Past as usize)] + CUBE_POS_Y) * pitch + col
    } else {
        CUBE_POS_Y * pitch + col
    }
}

/// Where the token's row begins in an operand.
#[cube]
fn start(#[comptime] from: From) -> u32 {
    CUBE_POS_Y * comptime!(from.pitch) + comptime!(from.col)
}

/// The first column, or pair, or head of this thread.
#[cube]
fn first() -> u32 {
    CUBE_POS_X * THREADS + UNIT_POS_X
}
