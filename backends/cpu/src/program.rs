//! What a lowered module consists of: stages over one arena.

use std::borrow::Cow;

use awqc_ir::Stored;
use awqc_ir::images::Placed;
use awqc_ir::op::{RopeTable, Sdpa, TopK};
use awqc_ir::panels::Panels;

use crate::arena::Place;
use crate::cache::CacheShape;
use crate::experts::Choice;
use crate::memory::{Bytes, Memory};

/// The stages of a part of a module, in order. All members of the team are done with a stage before the next begins.
#[derive(Default)]
pub(crate) struct Program<'a> {
    pub(crate) stages: Vec<Stage<'a>>,
    /// Columns of the arena.
    pub(crate) columns: usize,
    /// Where the caller puts the float inputs.
    pub(crate) inputs: Vec<Place>,
    /// Where the results are.
    pub(crate) results: Vec<Place>,
    /// Channels of keys and values of each KV cache.
    pub(crate) caches: Vec<CacheShape>,
    /// What holds the packed weights that are not where they came from.
    pub(crate) memory: Memory,
    /// The activations of packed linears.
    pub(crate) activations: Vec<Rounded>,
    /// The images that it takes.
    pub(crate) images: Option<Placed>,
    /// The ways of tokens to experts; layers that choose in the same manner share one.
    pub(crate) routes: Vec<Choice>,
}

/// Activations that are quantized once for all products that read them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounded {
    /// The shape that they are quantized for.
    pub(crate) shape: Panels,
    /// Which of [`Program::routes`] their rows follow; those of tokens follow none.
    pub(crate) route: Option<usize>,
}

/// What the team does between two barriers.
pub(crate) enum Stage<'a> {
    /// Steps that treat each token by itself. Members take tokens.
    Rows(Vec<Row<'a>>),
    /// A matrix product. Members take output channels.
    Linear(Linear<'a>),
    /// Attention. Members take heads and blocks of tokens.
    Attend(Attend),
    /// Finds which rows each expert gets. One member does.
    Route {
        /// The numbers of the experts of each token.
        chosen: Place,
        /// Which of [`Program::routes`].
        to: usize,
    },
    /// Gathers and quantizes the rows of each expert. Members take runs of rows.
    Gather(Gather),
    /// The products of each expert. Members take output channels.
    Experts(Experts<'a>),
}

/// Integers that are given with every pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ints {
    /// Token ids.
    Ids,
    /// Positions in the sequence.
    Positions,
}

/// A step on one token's row. Steps with `at` change it in place.
pub(crate) enum Row<'a> {
    /// A row of a table.
    Embed { table: Dense<'a>, of: Ints, offset: u32, out: Place },
    /// The row of the image that stands at this token, if one does.
    Place { at: Place },
    /// The angles of the token's position.
    Angles {
        of: RopeTable,
        /// Frequencies and factor, if they do not depend on the length of the sequence.
        fixed: Option<(Vec<f64>, f64)>,
        cos: Place,
        sin: Place,
    },
    /// `to = from`.
    Copy { from: Place, to: Place },
    /// `x / sqrt(mean(x²) + eps) · gain` for each of `heads` parts; an offset is in the gain already.
    RmsNorm { at: Place, heads: usize, eps: f32, gain: Option<Vec<f32>> },
    /// `(x − mean) / sqrt(var + eps) · gain + bias` for each of `heads` parts, with parameters for one of them or for all.
    LayerNorm { at: Place, heads: usize, eps: f32, gain: Option<Vec<f32>>, bias: Option<Vec<f32>> },
    /// Rotation of the heads.
    Rope { at: Place, cos: Place, sin: Place, heads: usize, interleaved: bool },
    /// A function of each element.
    Map { at: Place, f: Map },
    /// `at = f(at, by)`.
    Zip { at: Place, by: Other, f: Zip },
    /// The token's key and value go to a cache.
    Remember { k: Place, v: Place, cache: usize },
    /// The row as 8-bit activations.
    Quantize { x: Place, to: usize },
    /// `e^x / Σ e^x`.
    Softmax { at: Place },
    /// The experts of the token, as numbers, and their weights.
    Choose { op: TopK, scores: Place, bias: Option<Vec<f32>>, weights: Place, chosen: Place },
    /// `Σ_j weights[j] · y[j]` over the rows of the token's experts.
    Combine { y: Place, weights: Place, out: Place },
}

/// Elementwise functions.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Map {
    Silu,
    GeluErf,
    GeluTanh,
    GeluQuick,
    Relu,
    Sigmoid,
    /// To `-at..=at`.
    Clamp(f32),
    Scale(f32),
    Softcap(f32),
}

/// Elementwise functions of two operands.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Zip {
    Add,
    Mul,
}

/// The second operand of a [`Zip`].
pub(crate) enum Other {
    /// Another value.
    Value(Place),
    /// A parameter.
    Parameter(Vec<f32>),
}

/// `out = x Wᵀ + bias`.
pub(crate) struct Linear<'a> {
    pub(crate) product: Product<'a>,
    pub(crate) bias: Option<Vec<f32>>,
    pub(crate) out: Place,
}

/// `x Wᵀ`.
pub(crate) enum Product<'a> {
    /// Of low-bit codes.
    Packed {
        /// The panels, see [`Program::memory`].
        bytes: Bytes<'a>,
        /// Their shape.
        shape: Panels,
        /// Which of [`Program::activations`].
        x: usize,
    },
    /// Of floats.
    Dense { weight: Dense<'a>, x: Place },
}

/// The rows of each expert in the order of a route, quantized.
pub(crate) struct Gather {
    pub(crate) route: usize,
    /// The rows of all choices side by side, or one row for all of them.
    pub(crate) x: Place,
    /// Which of [`Program::activations`].
    pub(crate) to: usize,
}

/// For each token and choice `out = x Wᵀ` with the matrix of the expert that is chosen.
pub(crate) struct Experts<'a> {
    pub(crate) route: usize,
    /// With the matrices of all experts one below the other.
    pub(crate) product: Product<'a>,
    /// Output channels of one expert.
    pub(crate) rows: usize,
    /// Of all choices side by side.
    pub(crate) out: Place,
}

/// A float matrix, row-major, as it is stored.
pub(crate) struct Dense<'a> {
    pub(crate) bytes: Cow<'a, [u8]>,
    pub(crate) stored: Stored,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

/// Attention of the new tokens over a cache that holds them already.
pub(crate) struct Attend {
    pub(crate) op: Sdpa,
    pub(crate) q: Place,
    pub(crate) cache: usize,
    pub(crate) out: Place,
}
