//! Kernels for steps that treat each token by itself: norms, rotations, elementwise functions, and what goes to the KV
//! cache.
//!
//! A kernel is a list of steps, run one after the other on one token's rows by the same block: what one step leaves
//! behind is still near when the next one takes it. So every fused body becomes few kernels, also one that was never seen
//! before. Steps that need nothing from other columns of the row are divided among several blocks.

mod elementwise;
mod embed;
mod norm;
mod rope;

pub(super) use elementwise::tanh;

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

/// Rows of f32 or f16 numbers, one for each token: an argument of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    /// The argument.
    pub arg: usize,
    /// Numbers from one token's row to the next.
    pub pitch: usize,
    /// The first number of the row that is meant.
    pub col: usize,
}

/// Where a step leaves its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Out {
    /// f32 rows.
    F32(Row),
    /// f16 rows, for packed linears.
    F16(Row),
    /// f16 rows of a cache, by position.
    Cache(Row),
}

/// A function of one number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Map {
    /// `x`
    Same,
    /// `x · sigmoid(x)`
    Silu,
    /// `x · Φ(x)`
    GeluErf,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`
    GeluTanh,
    /// `x · sigmoid(1.702 x)`
    GeluQuick,
    /// `max(x, 0)`
    Relu,
    /// `k x`
    Scale(f32),
    /// `c tanh(x / c)`
    Softcap(f32),
    /// `1 / (1 + e^−x)`
    Sigmoid,
    /// `x`, limited to `[−c, c]`
    Clamp(f32),
}

/// A function of two numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zip {
    /// `a + b`
    Add,
    /// `a · b`
    Mul,
}

/// One step. Arguments are given by number; `width` counts columns: of a row, or of one of `heads` heads.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(missing_docs, reason = "the formulas name the fields")]
pub enum Step {
    /// Row `index + offset` of a table `[rows, width]`.
    Embed { table: usize, of: Float, index: usize, offset: u32, width: usize, out: Out },
    /// `x / sqrt(mean(x²) + eps) · gain` for each of `heads` parts of `width` columns.
    RmsNorm { x: Row, gain: Option<usize>, heads: usize, width: usize, eps: f32, out: Out },
    /// `(x − mean) / sqrt(var + eps) · gain + bias` for each of `heads` parts of `width` columns. Gain and bias are those
    /// of each head one after the other if `each`, or else one for all.
    LayerNorm {
        x: Row,
        gain: Option<usize>,
        bias: Option<usize>,
        heads: usize,
        width: usize,
        each: bool,
        eps: f32,
        out: Out,
    },
    /// Rotation of the first `2 pairs` columns of each head by the angles of the token, `[tokens, pairs]`.
    Rope { x: Row, cos: Row, sin: Row, heads: usize, width: usize, pairs: usize, interleaved: bool, out: Out },
    /// `f(x)`.
    Map { x: Row, f: Map, width: usize, out: Out },
    /// `zip(f(a), b)`; `b` is a parameter when its pitch is 0.
    Zip { a: Row, f: Map, b: Row, zip: Zip, width: usize, out: Out },
}

/// What an argument is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// f32 rows that steps of the kernel may write.
    F32,
    /// f16 rows that steps of the kernel may write.
    F16,
    /// f32 numbers that are only read.
    Parameter,
    /// A table of an embedding.
    Table(Float),
    /// 32-bit integers, one a token.
    Ints,
}

/// A list of steps and what their arguments are. The last argument of the kernel, the call, is not among them.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// The steps, in order.
    pub steps: Vec<Step>,
    /// The arguments.
    pub args: Vec<Kind>,
}

impl Step {
    /// Word for the kernel's name.
    fn word(&self) -> &'static str {
        match self {
            Step::Embed { .. } => "embed",
            Step::RmsNorm { .. } => "rms_norm",
            Step::LayerNorm { .. } => "layer_norm",
            Step::Rope { .. } => "rope",
            Step::Map { f: Map::Same, out: Out::Cache(_), .. } => "cache",
            Step::Map { f, .. } => f.word(),
            Step::Zip { f: Map::Same, zip: Zip::Add, .. } => "add",
            Step::Zip { f: Map::Same, zip: Zip::Mul, .. } => "mul",
            Step::Zip { f, .. } => f.word(),
        }
    }

    /// Columns that the step computes.
    fn columns(&self) -> usize {
        match self {
            Step::Embed { width, .. } | Step::Map { width, .. } | Step::Zip { width, .. } => *width,
            Step::LayerNorm { heads, width, .. }
            | Step::RmsNorm { heads, width, .. }
            | Step::Rope { heads, width, .. } => heads * width,
        }
    }

    /// The columns of rows that it reads.
    fn reads(&self) -> Vec<Span> {
        let span = |row: &Row, width: usize| Span { arg: row.arg, from: row.col, to: row.col + width };
        match self {
            Step::Embed { .. } => Vec::new(),
            Step::Map { x, width, .. } => vec![span(x, *width)],
            Step::LayerNorm { x, heads, width, .. }
            | Step::RmsNorm { x, heads, width, .. }
            | Step::Rope { x, heads, width, .. } => vec![span(x, heads * width)],
            Step::Zip { a, b, width, .. } => vec![span(a, *width), span(b, *width)],
        }
    }

    /// The columns that it writes.
    fn writes(&self) -> Span {
        let row = self.out().row();
        Span { arg: row.arg, from: row.col, to: row.col + self.columns() }
    }

    fn out(&self) -> Out {
        match self {
            Step::Embed { out, .. }
            | Step::RmsNorm { out, .. }
            | Step::LayerNorm { out, .. }
            | Step::Rope { out, .. }
            | Step::Map { out, .. }
            | Step::Zip { out, .. } => *out,
        }
    }

    /// Whether column `c` of the result needs column `c` of the operands and no other.
    fn columnwise(&self) -> bool {
        match self {
            Step::Embed { .. } | Step::Map { .. } | Step::Zip { .. } => true,
            Step::RmsNorm { .. } | Step::LayerNorm { .. } | Step::Rope { .. } => false,
        }
    }
}

impl Map {
    fn word(self) -> &'static str {
        match self {
            Map::Same => "copy",
            Map::Silu => "silu",
            Map::GeluErf | Map::GeluTanh | Map::GeluQuick => "gelu",
            Map::Relu => "relu",
            Map::Scale(_) => "scale",
            Map::Softcap(_) => "softcap",
            Map::Sigmoid => "sigmoid",
            Map::Clamp(_) => "clamp",
        }
    }
}

impl Out {
    /// The rows.
    pub fn row(self) -> Row {
        match self {
            Out::F32(row) | Out::F16(row) | Out::Cache(row) => row,
        }
    }
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
        let whole = |s: &Step| matches!(s, Step::LayerNorm { heads: 1, .. } | Step::RmsNorm { heads: 1, .. });
        if self.steps.iter().any(whole) || (0..self.steps.len()).any(|i| self.waits(i)) {
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

/// Columns of an argument.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Span {
    arg: usize,
    from: usize,
    to: usize,
}

impl Span {
    fn meets(self, other: Span) -> bool {
        self.arg == other.arg && self.from < other.to && other.from < self.to
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
