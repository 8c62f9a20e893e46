//! The stream of values that runs through a module's regions, and what can be said of a region as a link of it.

use awqc_ir::images::takes_pixels;
use awqc_ir::{Dim, FusedDef, Module, Name, Op, Operand, Region, ValueId};
use awqc_passes::{ExecError, Tensor};
use burn_backend::tensor::Device;
use burn_backend::{Backend, Slice};

use crate::interp::Val;
use crate::interp::ops::shape::narrow;

/// A module's inputs for `ids`, `[batch, ids.len()/batch]`, at positions from `past`.
pub(crate) fn start<B: Backend>(
    ids: Vec<i32>,
    batch: usize,
    past: usize,
    device: &Device<B>,
) -> Result<Vec<Val<B>>, ExecError> {
    let seq = ids.len() / batch.max(1);
    let end = past.checked_add(seq).and_then(|e| i32::try_from(e).ok());
    let Some(end) = end else {
        return Err(ExecError::Unavailable(format!("positions beyond 2^31 are not supported ({past} + {seq})")));
    };
    let positions = (end - seq as i32..end).collect();
    Ok(vec![Val::ints(ids, &[batch, seq], device), Val::ints(positions, &[seq], device)])
}

/// The inputs of a region, and what stays behind its results.
type Entered<B> = (Vec<Val<B>>, Vec<Val<B>>);

/// Splits the stream into the inputs of `region` and what stays behind its results. Inputs that the results replace
/// are handed over, so that kernels may reuse their memory. Where the region takes pixels, a stream that begins with a
/// text gets no images.
pub(crate) fn enter<B: Backend>(mut stream: Vec<Val<B>>, region: &Region) -> Result<Entered<B>, ExecError> {
    if let (Some(pixels), Some(Val::Int(_))) = (takes_pixels(region), stream.first()) {
        stream.insert(0, no_images(pixels));
    }
    let (params, results) = (region.value_params().count(), region.results().len());
    if params > stream.len() {
        return Err(ExecError::Tensor(format!(
            "region {} takes {params} values, the stream has {}",
            region.name,
            stream.len()
        )));
    }
    let rest = stream.split_off(results.min(stream.len()));
    let missing = params.saturating_sub(stream.len());
    stream.truncate(params);
    stream.extend(rest.iter().take(missing).cloned());
    Ok((stream, rest))
}

/// Pixels of no image.
pub(crate) fn no_images<B: Backend>(pixels: [u64; 3]) -> Val<B> {
    let size = |n: u64| usize::try_from(n).unwrap_or(usize::MAX);
    let shape = [0].into_iter().chain(pixels.map(size)).collect();
    Val::floats(Tensor { shape, data: Vec::new() }, &Default::default())
}

/// The symbolic dimension that counts positions: the axis of the positions, or the last of the ids. What was made of
/// images stands before these.
pub(crate) fn sequence(module: &Module) -> Option<Name> {
    let eye = module.eye();
    let first = module.regions.get(eye)?;
    let mut params = first.value_params().skip(usize::from(eye > 0)).map(|v| &first.value(v).ty.shape);
    let (ids, positions) = (params.next()?, params.next());
    match positions.and_then(|s| s.first()).or(ids.last())? {
        Dim::Sym(name) => Some(name.clone()),
        Dim::Const(_) => None,
    }
}

/// Whether every row of the region's results depends on the same row of its inputs alone, so that rows can be computed
/// apart.
pub fn rowwise(region: &Region, fused: &[FusedDef]) -> bool {
    region.nodes().all(|(_, node)| match &node.op {
        Op::Sdpa(_) | Op::RopeTable(_) | Op::Foreign(_) => false,
        // Rows that are no positions, or depend on several.
        Op::Patches(_)
        | Op::Merge(_)
        | Op::Place(_)
        | Op::Learned(_)
        | Op::Append(_)
        | Op::Cut(_)
        | Op::Count(_)
        | Op::CrossSdpa(_) => false,
        Op::Fused(call) => fused.iter().find(|d| d.name == call.callee).is_some_and(|d| rowwise(&d.body, fused)),
        Op::Embedding(_)
        | Op::Linear(_)
        | Op::RmsNorm(_)
        | Op::LayerNorm(_)
        | Op::Rope(_)
        | Op::Silu(_)
        | Op::Sigmoid(_)
        | Op::Gelu(_)
        | Op::Relu(_)
        | Op::Add(_)
        | Op::Mul(_)
        | Op::Scale(_)
        | Op::Softcap(_)
        | Op::Clamp(_)
        | Op::Split(_)
        | Op::Concat(_)
        | Op::Repeat(_)
        | Op::Softmax(_)
        | Op::TopK(_)
        | Op::Dispatch(_)
        | Op::Combine(_)
        | Op::Gate(_) => true,
    })
}

/// The axis of a value that counts positions.
pub(crate) fn axis(region: &Region, value: ValueId, sequence: &Name) -> Option<usize> {
    region.value(value).ty.shape.iter().position(|d| *d == Dim::Sym(sequence.clone()))
}

/// Positions `start..start+len` of a region's inputs.
pub(crate) fn positions<B: Backend>(
    region: &Region,
    inputs: &[Val<B>],
    sequence: &Name,
    start: usize,
    len: usize,
) -> Vec<Val<B>> {
    let cut = |(id, val): (ValueId, &Val<B>)| {
        let axis = axis(region, id, sequence);
        match (axis, val) {
            // Regions hand over no rows of experts.
            (None, val) | (Some(_), val @ Val::Routed(_)) => val.clone(),
            (Some(axis), Val::Float(t)) => Val::Float(narrow::<B>(t.clone(), axis, start, len)),
            (Some(axis), Val::Int(t)) => {
                let slices: Vec<Slice> = (val.shape().into_iter().enumerate())
                    .map(|(i, n)| if i == axis { Slice::from(start..start + len) } else { Slice::from(0..n) })
                    .collect();
                Val::Int(B::int_slice(t.clone(), &slices))
            }
        }
    };
    region.value_params().zip(inputs).map(cut).collect()
}

/// `region` with the results `keep` and without the nodes that these do not need.
pub(crate) fn prune(region: &Region, keep: &[ValueId]) -> Region {
    let mut out = region.clone();
    out.set_results(keep.to_vec());
    let mut needed: Vec<bool> = region.value_ids().map(|_| false).collect();
    keep.iter().for_each(|v| needed[v.index()] = true);
    let nodes: Vec<_> = region.nodes().rev().collect();
    for (id, node) in nodes {
        if node.results.iter().any(|r| needed[r.index()]) {
            for operand in &node.operands {
                if let Operand::Value(v) = operand {
                    needed[v.index()] = true;
                }
            }
        } else {
            out.remove(id);
        }
    }
    out
}
