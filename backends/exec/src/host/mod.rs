//! The host backend: burn's `NdArray<f32>` with slice kernels for everything that matters to speed.
//!
//! burn-ndarray copies a tensor at every reshape and before every product; a product with a 100 MB weight must not.
//! The kernels here read and write plain slices. They cut the work the same way on every machine, so results do not
//! depend on the number of threads.

pub mod attention;
pub mod elementwise;
pub mod math;
pub(crate) mod matmul;
pub mod norm;
pub mod rotate;
mod view;

use std::ops::Range;

use awqc_ir::op::{Embedding, GeluForm, LayerNorm, RmsNorm, Rope, Sdpa, Split};
use burn_backend::TensorMetadata;
use burn_backend::tensor::{FloatTensor, IntTensor};
use burn_ndarray::NdArray;

pub use attention::HostCache;
pub use matmul::product_with_transposed;
pub use view::floats;
use view::shape_of;
pub(crate) use view::take;
pub(crate) use view::tensor;

use crate::interp::ExecBackend;
use crate::interp::ops::embedding;

/// The backend of the reference executor and of calibration.
pub type Host = NdArray<f32>;

/// The shape of `x` with another last axis.
fn with_last(shape: &[usize], last: usize) -> Vec<usize> {
    let mut out = shape.to_vec();
    if let Some(n) = out.last_mut() {
        *n = last;
    }
    out
}

impl ExecBackend for Host {
    type Cache = HostCache;

    fn op_embedding(
        op: &Embedding,
        table: FloatTensor<Self>,
        ids: IntTensor<Self>,
    ) -> Result<FloatTensor<Self>, String> {
        let (shape, rows) = (ids.shape().to_vec(), shape_of(&table));
        let ids = embedding::read_ints::<Self>(ids)?;
        let (count, width) = (rows.first().copied().unwrap_or(0), rows.get(1).copied().unwrap_or(0));
        embedding::check(op, &ids, count)?;
        let table = floats(&table);
        let mut out = Vec::with_capacity(ids.len() * width);
        for id in &ids {
            let row = (id + i64::from(op.offset)) as usize;
            out.extend_from_slice(&table[row * width..(row + 1) * width]);
        }
        Ok(tensor(out, shape.into_iter().chain([width]).collect()))
    }

    fn op_linear(x: FloatTensor<Self>, w: &FloatTensor<Self>, b: Option<&FloatTensor<Self>>) -> FloatTensor<Self> {
        let (shape, sides) = (shape_of(&x), shape_of(w));
        let (n, k) = (sides[0], sides[1]);
        let (x, w, b) = (floats(&x), floats(w), b.map(floats));
        let out = matmul::linear(&x, &w, b.as_deref(), n, k);
        tensor(out, with_last(&shape, n))
    }

    fn op_experts(x: FloatTensor<Self>, ranges: Vec<Range<usize>>, w: &FloatTensor<Self>) -> FloatTensor<Self> {
        let sides = shape_of(w);
        let (n, k) = (sides[1], sides[2]);
        let (x, w) = (floats(&x), floats(w));
        let mut out = Vec::with_capacity(x.len() / k.max(1) * n);
        for (rows, w) in ranges.into_iter().zip(w.chunks((n * k).max(1))).filter(|(rows, _)| !rows.is_empty()) {
            out.extend(matmul::linear(&x[rows.start * k..rows.end * k], w, None, n, k));
        }
        let rows = out.len() / n.max(1);
        tensor(out, vec![rows, n])
    }

    fn op_rms_norm(op: &RmsNorm, x: FloatTensor<Self>, g: Option<&FloatTensor<Self>>) -> FloatTensor<Self> {
        let shape = shape_of(&x);
        let width = shape.last().copied().unwrap_or(1) / (op.heads.unwrap_or(1).max(1) as usize);
        let mut data = take(x);
        norm::rms(&mut data, width, op.eps as f32, op.offset as f32, g.map(floats).as_deref());
        tensor(data, shape)
    }

    fn op_layer_norm(
        op: &LayerNorm,
        x: FloatTensor<Self>,
        g: Option<&FloatTensor<Self>>,
        b: Option<&FloatTensor<Self>>,
    ) -> FloatTensor<Self> {
        let shape = shape_of(&x);
        let mut data = take(x);
        norm::layer(
            &mut data,
            shape.last().copied().unwrap_or(1) / (op.heads.unwrap_or(1).max(1) as usize),
            op.eps as f32,
            g.map(floats).as_deref(),
            b.map(floats).as_deref(),
        );
        tensor(data, shape)
    }

    fn op_rope(op: &Rope, x: FloatTensor<Self>, cos: &FloatTensor<Self>, sin: &FloatTensor<Self>) -> FloatTensor<Self> {
        let shape = shape_of(&x);
        let mut data = take(x);
        let turn = rotate::Turn {
            cos: &floats(cos),
            sin: &floats(sin),
            heads: op.heads as usize,
            interleaved: op.interleaved,
        };
        turn.apply(&mut data, shape[1], shape[2]);
        tensor(data, shape)
    }

    fn op_sdpa(
        op: &Sdpa,
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        cache: Option<&mut HostCache>,
    ) -> Result<FloatTensor<Self>, String> {
        attention::sdpa(op, q, k, v, cache)
    }

    fn op_silu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::map(x, elementwise::silu)
    }

    fn op_sigmoid(x: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::map(x, elementwise::logistic)
    }

    fn op_gelu(form: GeluForm, x: FloatTensor<Self>) -> FloatTensor<Self> {
        match form {
            GeluForm::Erf => elementwise::map(x, elementwise::gelu_erf),
            GeluForm::Tanh => elementwise::map(x, elementwise::gelu_tanh),
            GeluForm::Quick => elementwise::map(x, elementwise::gelu_quick),
        }
    }

    fn op_relu(x: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::map(x, elementwise::relu)
    }

    fn op_add(a: FloatTensor<Self>, b: &FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::zip(a, b, elementwise::plus)
    }

    fn op_mul(a: FloatTensor<Self>, b: &FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::zip(a, b, elementwise::times)
    }

    fn op_scale(by: f64, x: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::map(x, move |part| part.iter_mut().for_each(|v| *v *= by as f32))
    }

    fn op_softcap(at: f64, x: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::map(x, move |part| elementwise::softcap(part, at as f32))
    }

    fn op_clamp(at: f64, x: FloatTensor<Self>) -> FloatTensor<Self> {
        elementwise::map(x, move |part| elementwise::clamp(part, at as f32))
    }

    fn op_split(op: &Split, x: FloatTensor<Self>) -> Vec<FloatTensor<Self>> {
        let shape = shape_of(&x);
        // A run is cut like a row.
        let width = op.sizes.iter().sum::<u64>() as usize;
        let data = floats(&x);
        let mut start = 0;
        let mut part = |size: usize| {
            let rows = data.chunks(width.max(1)).flat_map(|row| &row[start..start + size]);
            let out = tensor(rows.copied().collect(), with_last(&shape, size * op.heads as usize));
            start += size;
            out
        };
        op.sizes.iter().map(|s| part(*s as usize)).collect()
    }

    fn op_concat(heads: usize, parts: Vec<FloatTensor<Self>>) -> FloatTensor<Self> {
        let shapes: Vec<Vec<usize>> = parts.iter().map(shape_of).collect();
        let widths: Vec<usize> = shapes.iter().map(|s| s.last().copied().unwrap_or(1) / heads.max(1)).collect();
        let width: usize = widths.iter().sum();
        let shape = with_last(shapes.first().map_or(&[], Vec::as_slice), width * heads);
        let data: Vec<_> = parts.iter().map(floats).collect();
        // A run is joined like a row.
        let rows = shape.iter().product::<usize>() / width.max(1);
        let mut out = Vec::with_capacity(rows * width);
        for r in 0..rows {
            for (part, w) in data.iter().zip(&widths) {
                out.extend_from_slice(&part[r * w..(r + 1) * w]);
            }
        }
        tensor(out, shape)
    }
}
