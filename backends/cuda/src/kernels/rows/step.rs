//! What a kernel of row steps is made of, as data.

use super::super::Float;
use super::experts::Choice;

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

/// The index of no row of an image.
pub const NO_IMAGE: u32 = u32::MAX;

/// One step. Arguments are given by number; `width` counts columns: of a row, or of one of `heads` heads.
#[derive(Clone, Copy, Debug, PartialEq)]
#[expect(missing_docs, reason = "the formulas name the fields")]
pub enum Step {
    /// Row `index + offset` of a table `[rows, width]`.
    Embed { table: usize, of: Float, index: usize, offset: u32, width: usize, out: Out },
    /// Row `index` of `images`, or `x` where that is [`NO_IMAGE`].
    Image { x: Row, images: usize, index: usize, width: usize, out: Out },
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
    /// `x` of `width` columns, so many times side by side.
    Repeat { x: Row, width: usize, times: usize, out: Out },
    /// `e^x / Σ e^x` over the columns.
    Softmax { x: Row, width: usize, out: Out },
    /// The experts of a token by their scores: f32 rows that begin with the weights, behind which are the experts'
    /// numbers, as 32-bit integers.
    Choose { scores: Row, bias: Option<usize>, of: Choice, out: Out },
    /// `Σ_j w_j · y_j`, where `y_j` begins `stride` columns behind the one before.
    Combine { y: Row, w: Row, each: usize, stride: usize, width: usize, out: Out },
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

impl Step {
    /// Word for the kernel's name.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Step::Embed { .. } => "embed",
            Step::Image { .. } => "image",
            Step::RmsNorm { .. } => "rms_norm",
            Step::LayerNorm { .. } => "layer_norm",
            Step::Rope { .. } => "rope",
            Step::Map { f: Map::Same, out: Out::Cache(_), .. } => "cache",
            Step::Map { f, .. } => f.word(),
            Step::Zip { f: Map::Same, zip: Zip::Add, .. } => "add",
            Step::Zip { f: Map::Same, zip: Zip::Mul, .. } => "mul",
            Step::Zip { f, .. } => f.word(),
            Step::Repeat { .. } => "repeat",
            Step::Softmax { .. } => "softmax",
            Step::Choose { .. } => "choose",
            Step::Combine { .. } => "combine",
        }
    }

    /// Columns that the step computes.
    pub(super) fn columns(&self) -> usize {
        match self {
            Step::Embed { width, .. }
            | Step::Image { width, .. }
            | Step::Map { width, .. }
            | Step::Zip { width, .. }
            | Step::Softmax { width, .. }
            | Step::Combine { width, .. } => *width,
            Step::LayerNorm { heads, width, .. }
            | Step::RmsNorm { heads, width, .. }
            | Step::Rope { heads, width, .. } => heads * width,
            Step::Repeat { width, times, .. } => width * times,
            Step::Choose { of, .. } => 2 * of.each as usize,
        }
    }

    /// The columns of rows that it reads.
    pub(super) fn reads(&self) -> Vec<Span> {
        let span = |row: &Row, width: usize| Span { arg: row.arg, from: row.col, to: row.col + width };
        match self {
            Step::Embed { .. } => Vec::new(),
            Step::Image { x, width, .. }
            | Step::Map { x, width, .. }
            | Step::Repeat { x, width, .. }
            | Step::Softmax { x, width, .. } => vec![span(x, *width)],
            Step::LayerNorm { x, heads, width, .. }
            | Step::RmsNorm { x, heads, width, .. }
            | Step::Rope { x, heads, width, .. } => vec![span(x, heads * width)],
            Step::Zip { a, b, width, .. } => vec![span(a, *width), span(b, *width)],
            Step::Choose { scores, of, .. } => vec![span(scores, of.experts as usize)],
            Step::Combine { y, w, each, stride, width, .. } => {
                vec![span(y, (each - 1) * stride + width), span(w, *each)]
            }
        }
    }

    /// The columns that it writes.
    pub(super) fn writes(&self) -> Span {
        let row = self.out().row();
        Span { arg: row.arg, from: row.col, to: row.col + self.columns() }
    }

    pub(super) fn out(&self) -> Out {
        match self {
            Step::Embed { out, .. }
            | Step::Image { out, .. }
            | Step::RmsNorm { out, .. }
            | Step::LayerNorm { out, .. }
            | Step::Rope { out, .. }
            | Step::Map { out, .. }
            | Step::Zip { out, .. }
            | Step::Repeat { out, .. }
            | Step::Softmax { out, .. }
            | Step::Choose { out, .. }
            | Step::Combine { out, .. } => *out,
        }
    }

    /// Whether column `c` of the result needs column `c` of the operands and no other.
    pub(super) fn columnwise(&self) -> bool {
        match self {
            Step::Embed { .. } | Step::Image { .. } | Step::Map { .. } | Step::Zip { .. } => true,
            Step::RmsNorm { .. }
            | Step::LayerNorm { .. }
            | Step::Rope { .. }
            | Step::Repeat { .. }
            | Step::Softmax { .. }
            | Step::Choose { .. }
            | Step::Combine { .. } => false,
        }
    }

    /// Whether all columns of the result need all of an operand, so that one block computes them.
    pub(super) fn whole(&self) -> bool {
        match self {
            Step::LayerNorm { heads, .. } | Step::RmsNorm { heads, .. } => *heads == 1,
            Step::Softmax { .. } | Step::Choose { .. } => true,
            Step::Embed { .. }
            | Step::Image { .. }
            | Step::Rope { .. }
            | Step::Map { .. }
            | Step::Zip { .. }
            | Step::Repeat { .. }
            | Step::Combine { .. } => false,
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

/// Columns of an argument.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) arg: usize,
    pub(super) from: usize,
    pub(super) to: usize,
}

impl Span {
    pub(super) fn meets(self, other: Span) -> bool {
        self.arg == other.arg && self.from < other.to && other.from < self.to
    }
}
