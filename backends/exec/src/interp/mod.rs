//! The interpreter: runs one region on a burn backend. What it computes is what the IR means.
//!
//! All float arithmetic happens in the backend's float type (f32 on the host), whatever element types the values
//! declare: those say what a compiled artefact stores, not how the reference computes.

pub mod backend;
mod bind;
pub mod frequencies;
pub mod ops;

use std::collections::BTreeMap;
use std::sync::Arc;

use awqc_ir::op::Op;
use awqc_ir::{Dim, Elem, FusedDef, Name, NodeId, Operand, Region, TensorSource, ValueId, WeightId};
use awqc_passes::{ExecError, Tensor};
use burn_backend::tensor::{Device, FloatTensor, IntTensor};
use burn_backend::{Backend, DType, Shape, TensorData, TensorMetadata, try_read_sync};

pub use backend::ExecBackend;
pub use bind::bind;
pub use ops::routing::{Route, Routed};

use crate::realize::tensor;

/// A value at run time: a tensor without a static rank.
#[derive(Clone, Debug)]
pub enum Val<B: Backend> {
    /// Floats.
    Float(FloatTensor<B>),
    /// Token ids or positions.
    Int(IntTensor<B>),
    /// Floats of several experts, `[E,B,S,C]`: only the rows that exist.
    Routed(Routed<B>),
}

impl<B: Backend> Val<B> {
    /// The shape.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Val::Float(t) => t.shape().to_vec(),
            Val::Int(t) => t.shape().to_vec(),
            Val::Routed(r) => r.shape(),
        }
    }

    /// Integers, row-major.
    pub fn ints(data: Vec<i32>, shape: &[usize], device: &Device<B>) -> Self {
        let data = TensorData::new(data, Shape::from(shape.to_vec()));
        Val::Int(B::int_from_data(data.convert::<B::IntElem>(), device))
    }

    /// The floats of a host tensor.
    pub fn floats(tensor: Tensor, device: &Device<B>) -> Self {
        Val::Float(upload::<B>(tensor, device))
    }

    /// A copy of the numbers as f32. Rows that experts do not have are 0.
    ///
    /// # Errors
    /// When the device fails.
    pub fn to_tensor(&self) -> Result<Tensor, ExecError> {
        let shape = self.shape();
        let data = match self {
            Val::Float(t) => try_read_sync(B::float_into_data(t.clone())),
            Val::Int(t) => try_read_sync(B::int_into_data(t.clone())),
            Val::Routed(r) => {
                let rows = Val::<B>::Float(r.rows.clone()).to_tensor()?;
                let (width, tokens) = (rows.cols(), r.route.lead.iter().product::<usize>());
                let mut data = vec![0.0; shape.iter().product()];
                for (e, range) in r.route.ranges().enumerate() {
                    for row in range {
                        let at = (e * tokens + r.route.tokens[row]) * width;
                        data[at..at + width].copy_from_slice(&rows.data[row * width..(row + 1) * width]);
                    }
                }
                return Ok(Tensor { shape, data });
            }
        };
        let data = data.ok_or_else(|| ExecError::Unavailable("the device cannot be read synchronously".into()))?;
        let data = data.map_err(|e| ExecError::Unavailable(format!("reading from the device failed: {e}")))?;
        let data = match data.dtype {
            // The vector itself, where the backend gives one.
            DType::F32 => data
                .into_vec::<f32>()
                .map_err(|e| ExecError::Unavailable(format!("reading from the device failed: {e:?}")))?,
            _ => data.iter::<f32>().collect(),
        };
        Ok(Tensor { shape, data })
    }
}

/// Moves a host tensor to the device, without a copy where the device is the host.
pub fn upload<B: Backend>(tensor: Tensor, device: &Device<B>) -> FloatTensor<B> {
    let data = TensorData::new(tensor.data, Shape::from(tensor.shape));
    B::float_from_data(data.convert::<B::FloatElem>(), device)
}

/// The weights that a region's nodes use, on the device, quantized ones decoded.
#[derive(Clone, Debug)]
pub struct Weights<B: Backend> {
    of: BTreeMap<WeightId, FloatTensor<B>>,
}

impl<B: Backend> Weights<B> {
    /// Realizes every weight that some node of `region` uses.
    ///
    /// # Errors
    /// As [`realize`].
    pub fn load(region: &Region, source: &dyn TensorSource, device: &Device<B>) -> Result<Self, ExecError> {
        let load = |id: WeightId| Ok((id, upload::<B>(tensor(region, id, source)?, device)));
        Ok(Self { of: region.used_weights().into_iter().map(load).collect::<Result<_, ExecError>>()? })
    }

    /// No weights.
    pub fn empty() -> Self {
        Self { of: BTreeMap::new() }
    }

    /// Sets a weight.
    pub fn insert(&mut self, id: WeightId, tensor: FloatTensor<B>) {
        self.of.insert(id, tensor);
    }

    /// A weight.
    pub fn get(&self, id: WeightId) -> Option<&FloatTensor<B>> {
        self.of.get(&id)
    }
}

/// What one region remembers of earlier positions, keyed by the path of calls that leads to a node: the keys and values
/// of each `sdpa`, the numbers of each `count`.
pub struct Caches<B: ExecBackend> {
    of: BTreeMap<Vec<NodeId>, B::Cache>,
    counts: BTreeMap<Vec<NodeId>, Vec<i32>>,
}

impl<B: ExecBackend> Caches<B> {
    /// Nothing remembered.
    pub fn new() -> Self {
        Self { of: BTreeMap::new(), counts: BTreeMap::new() }
    }
}

impl<B: ExecBackend> Default for Caches<B> {
    fn default() -> Self {
        Self::new()
    }
}

/// Runs regions of one module.
#[derive(Clone, Copy, Debug)]
pub struct Interpreter<'a, B: ExecBackend> {
    /// The module's fused ops.
    pub fused: &'a [FusedDef],
    /// Where tensors are made.
    pub device: &'a Device<B>,
}

/// What is called with every value as soon as it is computed, region parameters included; values inside fused bodies
/// are not shown.
pub type Observer<'a, B> = dyn FnMut(ValueId, &Val<B>) -> Result<(), ExecError> + 'a;

impl<B: ExecBackend> Interpreter<'_, B> {
    /// The results of `region` for `inputs`, one for each value parameter.
    ///
    /// With `caches`, every causal `sdpa` also sees the keys and values of earlier calls, and remembers the new ones.
    ///
    /// # Errors
    /// When inputs do not fit the parameters, an index is outside its table, a weight is missing or `observe` fails.
    pub fn run(
        &self,
        region: &Region,
        weights: &Weights<B>,
        inputs: Vec<Val<B>>,
        caches: Option<&mut Caches<B>>,
        observe: &mut Observer<'_, B>,
    ) -> Result<Vec<Val<B>>, ExecError> {
        let shapes: Vec<_> = inputs.iter().map(Val::shape).collect();
        let sizes = bind(region, &shapes)?;
        if !shapes.is_empty() && shapes.iter().all(|s| s.contains(&0)) {
            return self.nothing(region, &sizes);
        }
        let mut path = Vec::new();
        let mut frame = Frame { interpreter: self, caches, path: &mut path };
        frame.run(region, weights, inputs, observe)
    }

    /// The results of a region whose inputs are all empty: those of a text without images.
    fn nothing(&self, region: &Region, sizes: &BTreeMap<Name, usize>) -> Result<Vec<Val<B>>, ExecError> {
        let empty = |id: &ValueId| {
            let ty = &region.value(*id).ty;
            let size = |dim: &Dim| match dim {
                Dim::Const(n) => usize::try_from(*n).ok(),
                Dim::Sym(name) => sizes.get(name).copied(),
            };
            let shape = ty.shape.iter().map(size).collect::<Option<Vec<_>>>().filter(|s| s.contains(&0));
            let shape = shape.ok_or_else(|| {
                ExecError::Tensor(format!("region {}: nothing goes in, but {ty} should come out", region.name))
            })?;
            Ok(match ty.elem {
                Elem::I32 => Val::ints(Vec::new(), &shape, self.device),
                Elem::F32 | Elem::F16 | Elem::Bf16 | Elem::Quant(_) => {
                    Val::floats(Tensor { shape, data: Vec::new() }, self.device)
                }
            })
        };
        region.results().iter().map(empty).collect()
    }
}

struct Frame<'a, 'c, B: ExecBackend> {
    interpreter: &'a Interpreter<'a, B>,
    caches: Option<&'c mut Caches<B>>,
    path: &'a mut Vec<NodeId>,
}

/// What an op gets for an operand.
enum Arg<B: Backend> {
    Value(Val<B>),
    Weight(FloatTensor<B>),
}

impl<B: ExecBackend> Frame<'_, '_, B> {
    fn run(
        &mut self,
        region: &Region,
        weights: &Weights<B>,
        inputs: Vec<Val<B>>,
        observe: &mut Observer<'_, B>,
    ) -> Result<Vec<Val<B>>, ExecError> {
        let mut values: Vec<Option<Val<B>>> = region.value_ids().map(|_| None).collect();
        for (id, val) in region.value_params().zip(inputs) {
            observe(id, &val)?;
            values[id.index()] = Some(val);
        }
        let last = last_uses(region);
        for (id, node) in region.nodes() {
            let mut args = Vec::with_capacity(node.operands.len());
            for (i, operand) in node.operands.iter().enumerate() {
                args.push(
                    match *operand {
                        // The last use takes the value, so that the kernel may reuse its memory.
                        Operand::Value(v) if last[v.index()] == Some((id, i)) => {
                            values[v.index()].take().map(Arg::Value)
                        }
                        Operand::Value(v) => values[v.index()].clone().map(Arg::Value),
                        Operand::Weight(w) => weights.get(w).cloned().map(Arg::Weight),
                    }
                    .ok_or_else(|| self.error(region, &node.op, "an operand has no value"))?,
                );
            }
            let results = self.apply(region, id, &node.op, args)?;
            for (r, val) in node.results.iter().zip(results) {
                observe(*r, &val)?;
                // A result that nobody uses is dropped at once.
                if last[r.index()].is_some() || region.results().contains(r) {
                    values[r.index()] = Some(val);
                }
            }
        }
        let result = |r: &ValueId| {
            values[r.index()]
                .clone()
                .ok_or_else(|| ExecError::Tensor(format!("region {}: a result was never computed", region.name)))
        };
        region.results().iter().map(result).collect()
    }

    fn error(&self, region: &Region, op: &Op, message: impl std::fmt::Display) -> ExecError {
        ExecError::Tensor(format!("region {}: {}: {message}", region.name, op.mnemonic()))
    }

    fn apply(&mut self, region: &Region, id: NodeId, op: &Op, args: Vec<Arg<B>>) -> Result<Vec<Val<B>>, ExecError> {
        if let Op::Fused(call) = op {
            return self.call(region, id, op, &call.callee, args);
        }
        let mut floats = Vec::new();
        let mut ints = Vec::new();
        let mut route: Option<Arc<Route>> = None;
        for arg in args {
            match arg {
                Arg::Value(Val::Int(t)) => ints.push(t),
                Arg::Value(Val::Float(t)) | Arg::Weight(t) => floats.push(t),
                Arg::Value(Val::Routed(r)) => {
                    if route.as_ref().is_some_and(|known| **known != *r.route) {
                        return Err(self.error(region, op, "the operands hold rows of different experts"));
                    }
                    floats.push(r.rows);
                    route = Some(r.route);
                }
            }
        }
        let (mut floats, mut ints) = (floats.into_iter(), ints.into_iter());
        let mut float = || {
            floats.next().ok_or_else(|| {
                ExecError::Tensor(format!("region {}: {} misses an operand", region.name, op.mnemonic()))
            })
        };
        let mut int = || {
            ints.next().ok_or_else(|| {
                ExecError::Tensor(format!("region {}: {} misses an operand", region.name, op.mnemonic()))
            })
        };
        let out = match op {
            Op::Embedding(e) => B::op_embedding(e, float()?, int()?).map_err(|e| self.error(region, op, e))?,
            Op::Linear(_) => {
                let (x, w) = (float()?, float()?);
                match &route {
                    Some(route) => B::op_experts(x, route.ranges().collect(), &w),
                    None if w.shape().num_dims() == 3 => ops::routing::all_experts::<B>(x, &w),
                    None => B::op_linear(x, &w, floats.next().as_ref()),
                }
            }
            Op::RmsNorm(n) => B::op_rms_norm(n, float()?, floats.next().as_ref()),
            Op::LayerNorm(n) => B::op_layer_norm(n, float()?, floats.next().as_ref(), floats.next().as_ref()),
            Op::RopeTable(t) => {
                let (cos, sin) = ops::rope::table::<B>(t, int()?, self.interpreter.device)?;
                return Ok(vec![Val::Float(cos), Val::Float(sin)]);
            }
            Op::Rope(r) => B::op_rope(r, float()?, &float()?, &float()?),
            Op::Sdpa(s) => {
                let (q, k, v) = (float()?, float()?, float()?);
                let key: Vec<NodeId> = self.path.iter().copied().chain([id]).collect();
                let cache = self.caches.as_deref_mut().map(|c| c.of.entry(key).or_default());
                B::op_sdpa(s, q, k, v, cache).map_err(|e| self.error(region, op, e))?
            }
            Op::Silu(_) => B::op_silu(float()?),
            Op::Sigmoid(_) => B::op_sigmoid(float()?),
            Op::Gelu(g) => B::op_gelu(g.form, float()?),
            Op::Relu(_) => B::op_relu(float()?),
            Op::Add(_) => B::op_add(float()?, &float()?),
            Op::Mul(_) => B::op_mul(float()?, &float()?),
            Op::Scale(s) => B::op_scale(s.by, float()?),
            Op::Softcap(s) => B::op_softcap(s.at, float()?),
            Op::Clamp(c) => B::op_clamp(c.at, float()?),
            Op::Split(s) => {
                return Ok(B::op_split(s, float()?).into_iter().map(|part| rejoin(part, route.clone())).collect());
            }
            Op::Softmax(_) => B::op_softmax(float()?),
            Op::TopK(t) => {
                let device = self.interpreter.device;
                let (weights, experts) = ops::routing::top_k::<B>(t, float()?, floats.next(), device)?;
                return Ok(vec![Val::Float(weights), Val::Int(experts)]);
            }
            Op::Dispatch(d) => {
                let routed = ops::routing::dispatch::<B>(d.experts as usize, float()?, int()?, self.interpreter.device);
                return Ok(vec![Val::Routed(routed.map_err(|e| self.error(region, op, e))?)]);
            }
            Op::Combine(_) => {
                let rows = rejoin(float()?, route.take());
                let out = ops::routing::combine::<B>(rows, float()?, int()?, self.interpreter.device);
                out.map_err(|e| self.error(region, op, e))?
            }
            Op::Concat(c) => B::op_concat(c.heads as usize, floats.collect()),
            Op::Repeat(r) => B::op_repeat(r.times as usize, float()?),
            Op::Patches(p) => ops::image::patches::<B>(p, float()?),
            Op::Merge(m) => ops::image::merge::<B>(m, float()?),
            Op::Place(p) => {
                let (x, rows) = (float()?, float()?);
                ops::image::place::<B>(p, x, int()?, rows).map_err(|e| self.error(region, op, e))?
            }
            Op::Learned(_) => {
                let sequences = Val::<B>::Float(float()?).shape().first().copied().unwrap_or(0);
                ops::rows::learned::<B>(sequences, float()?)
            }
            Op::Append(_) => ops::rows::append::<B>(float()?, float()?),
            Op::Cut(c) => ops::rows::cut::<B>(c, float()?),
            Op::Count(c) => {
                let key: Vec<NodeId> = self.path.iter().copied().chain([id]).collect();
                let seen = self.caches.as_deref_mut().map(|c| c.counts.entry(key).or_default());
                let out = ops::memory::count::<B>(c, int()?, seen, self.interpreter.device);
                return Ok(vec![out.map_err(|e| self.error(region, op, e))?]);
            }
            Op::CrossSdpa(c) => {
                let (q, k, v) = (float()?, float()?, float()?);
                ops::memory::cross_sdpa::<B>(c, q, k, v, int()?).map_err(|e| self.error(region, op, e))?
            }
            Op::Gate(_) => ops::memory::gate::<B>(float()?, float()?),
            Op::Foreign(f) => return Err(self.error(region, op, format!("{} has no meaning here", f.op))),
            Op::Fused(_) => return Err(self.error(region, op, "handled above")),
        };
        Ok(vec![rejoin(out, route)])
    }

    /// Runs the body of a fused op.
    fn call(
        &mut self,
        region: &Region,
        id: NodeId,
        op: &Op,
        callee: &str,
        args: Vec<Arg<B>>,
    ) -> Result<Vec<Val<B>>, ExecError> {
        let Some(def) = self.interpreter.fused.iter().find(|d| &*d.name == callee) else {
            return Err(self.error(region, op, format!("@{callee} is not defined in this module")));
        };
        let mut weights = Weights::empty();
        let mut inputs = Vec::new();
        for (param, arg) in def.body.params().iter().zip(args) {
            match (param, arg) {
                (Operand::Weight(w), Arg::Weight(t)) => weights.insert(*w, t),
                (Operand::Value(_), Arg::Value(v)) => inputs.push(v),
                (Operand::Weight(_), Arg::Value(_)) | (Operand::Value(_), Arg::Weight(_)) => {
                    return Err(self.error(region, op, format!("an operand of @{callee} is of the wrong kind")));
                }
            }
        }
        self.path.push(id);
        let out = self.run(&def.body, &weights, inputs, &mut |_, _| Ok(()));
        self.path.pop();
        out
    }
}

/// Rows with the experts that they belong to, if they belong to any.
fn rejoin<B: Backend>(rows: FloatTensor<B>, route: Option<Arc<Route>>) -> Val<B> {
    match route {
        Some(route) => Val::Routed(Routed { rows, route }),
        None => Val::Float(rows),
    }
}

/// For each value the node and operand position that reads it last; `None` if nothing does or the region returns it.
fn last_uses(region: &Region) -> Vec<Option<(NodeId, usize)>> {
    let mut last = vec![None; region.value_ids().count()];
    for (id, node) in region.nodes() {
        for (i, operand) in node.operands.iter().enumerate() {
            if let Operand::Value(v) = operand {
                last[v.index()] = Some((id, i));
            }
        }
    }
    for r in region.results() {
        last[r.index()] = None;
    }
    last
}
