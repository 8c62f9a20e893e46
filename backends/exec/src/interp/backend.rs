//! What the interpreter needs of a burn backend: one function for each op. All have a default in burn's rank-less
//! primitives, so that `impl ExecBackend for MyBackend { type Cache = GrowingCache<Self>; }` is enough; a backend
//! overrides those for which it has a faster kernel.

use std::ops::Range;

use awqc_ir::op::{Embedding, GeluForm, LayerNorm, RmsNorm, Rope, Sdpa, Split};
use burn_backend::Backend;
use burn_backend::tensor::{FloatTensor, IntTensor};

use super::ops;

/// A burn backend that can run modules. Shapes are those of the ops' documentation in `awqc_ir::op`.
pub trait ExecBackend: Backend {
    /// Keys and values of earlier positions, for one `sdpa`.
    type Cache: Default + Send;

    /// Rows of `table: [rows,C]`.
    ///
    /// # Errors
    /// When an index, `offset` added, is outside the table.
    fn op_embedding(
        op: &Embedding,
        table: FloatTensor<Self>,
        ids: IntTensor<Self>,
    ) -> Result<FloatTensor<Self>, String> {
        ops::embedding::embed::<Self>(op, table, ids)
    }

    /// `a b` over the last two axes, the ones before them alike: what all ops here multiply matrices by. Factors and
    /// sums are f32, so that a backend whose own product rounds its factors overrides it.
    fn op_matmul(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        Self::float_matmul(a, b)
    }

    /// `x Wᵀ + b`.
    fn op_linear(x: FloatTensor<Self>, w: &FloatTensor<Self>, b: Option<&FloatTensor<Self>>) -> FloatTensor<Self> {
        ops::linear::linear::<Self>(x, w, b)
    }

    /// Each expert's rows of `x: [rows,in]` times its own matrix of `w: [E,out,in]`; `ranges` says which rows are
    /// whose.
    fn op_experts(x: FloatTensor<Self>, ranges: Vec<Range<usize>>, w: &FloatTensor<Self>) -> FloatTensor<Self> {
        ops::routing::experts::<Self>(x, ranges.into_iter(), w)
    }

    /// `x / sqrt(mean(x²) + eps) · (g + offset)`.
    fn op_rms_norm(op: &RmsNorm, x: FloatTensor<Self>, g: Option<&FloatTensor<Self>>) -> FloatTensor<Self> {
        ops::norm::rms_norm::<Self>(op, x, g)
    }

    /// `(x − mean) / sqrt(var + eps) · g + b`.
    fn op_layer_norm(
        op: &LayerNorm,
        x: FloatTensor<Self>,
        g: Option<&FloatTensor<Self>>,
        b: Option<&FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        ops::norm::layer_norm::<Self>(op, x, g, b)
    }

    /// Rotation of pairs of channels.
    fn op_rope(op: &Rope, x: FloatTensor<Self>, cos: &FloatTensor<Self>, sin: &FloatTensor<Self>) -> FloatTensor<Self> {
        ops::rope::rope::<Self>(op, x, cos, sin)
    }

    /// Attention; with a cache, `k` and `v` are appended to it and all its positions are seen.
    ///
    /// # Errors
    /// When an `sdpa` that is not causal would have to see positions that are not there yet, or the batch differs from
    /// the cache's.
    fn op_sdpa(
        op: &Sdpa,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        cache: Option<&mut Self::Cache>,
    ) -> Result<FloatTensor<Self>, String>;

    /// `x · sigmoid(x)`.
    fn op_silu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        ops::elementwise::silu::<Self>(x)
    }

    /// `1 / (1 + e^−x)`.
    fn op_sigmoid(x: FloatTensor<Self>) -> FloatTensor<Self> {
        ops::elementwise::sigmoid::<Self>(x)
    }

    /// The Gaussian error linear unit.
    fn op_gelu(form: GeluForm, x: FloatTensor<Self>) -> FloatTensor<Self> {
        ops::elementwise::gelu::<Self>(form, x)
    }

    /// `max(x, 0)`.
    fn op_relu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        ops::elementwise::relu::<Self>(x)
    }

    /// `a + b`; the shape of `b` is a suffix of that of `a`.
    fn op_add(a: FloatTensor<Self>, b: &FloatTensor<Self>) -> FloatTensor<Self> {
        ops::elementwise::add::<Self>(a, b)
    }

    /// `a · b`.
    fn op_mul(a: FloatTensor<Self>, b: &FloatTensor<Self>) -> FloatTensor<Self> {
        ops::elementwise::mul::<Self>(a, b)
    }

    /// `by · x`.
    fn op_scale(by: f64, x: FloatTensor<Self>) -> FloatTensor<Self> {
        ops::elementwise::scale::<Self>(by, x)
    }

    /// `at · tanh(x / at)`.
    fn op_softcap(at: f64, x: FloatTensor<Self>) -> FloatTensor<Self> {
        ops::elementwise::softcap::<Self>(at, x)
    }

    /// `e^x / Σ e^x` over the last axis.
    fn op_softmax(x: FloatTensor<Self>) -> FloatTensor<Self> {
        ops::elementwise::softmax::<Self>(x)
    }

    /// Each number limited to `[−at, at]`.
    fn op_clamp(at: f64, x: FloatTensor<Self>) -> FloatTensor<Self> {
        ops::elementwise::clamp::<Self>(at, x)
    }

    /// The last axis, or each of its runs, cut into parts.
    fn op_split(op: &Split, x: FloatTensor<Self>) -> Vec<FloatTensor<Self>> {
        ops::shape::split::<Self>(op, x)
    }

    /// The last axes joined, in `heads` runs.
    fn op_concat(heads: usize, parts: Vec<FloatTensor<Self>>) -> FloatTensor<Self> {
        ops::shape::concat::<Self>(heads, parts)
    }

    /// The last axis `times` over.
    fn op_repeat(times: usize, x: FloatTensor<Self>) -> FloatTensor<Self> {
        ops::shape::concat::<Self>(1, vec![x; times])
    }
}
