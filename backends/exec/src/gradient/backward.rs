//! The way back through one region: from the gradient at its results to those at its inputs and weights.

use std::collections::BTreeMap;

use awqc_ir::{FusedDef, Region, WeightId};
use awqc_passes::ExecError;
use burn_autodiff::grads::Gradients;
use burn_backend::AutodiffBackend;
use burn_backend::ops::FloatTensorOps;
use burn_backend::tensor::FloatTensor;

use super::tracked::Tracked;
use crate::host::{Host, take};
use crate::interp::{Interpreter, Routed, Val, Weights};

/// A gradient at each of a region's inputs or results; `None` for integers, and where it is 0.
pub(crate) type Gradient = Vec<Option<FloatTensor<Host>>>;

/// What comes back from a region.
pub(crate) struct Back {
    /// At its inputs.
    pub(crate) inputs: Gradient,
    /// At the weights that were asked for, row-major.
    pub(crate) weights: BTreeMap<WeightId, Vec<f32>>,
}

/// Runs `region` on one window and takes the gradient `upstream` at its results back through it. `upstream` is given
/// the results.
///
/// # Errors
/// As [`Interpreter::run`], and those of `upstream`.
pub(crate) fn backward(
    region: &Region,
    fused: &[FusedDef],
    weights: &Weights<Host>,
    wanted: &[WeightId],
    inputs: Vec<Val<Host>>,
    upstream: impl FnOnce(&[Val<Host>]) -> Result<Gradient, ExecError>,
) -> Result<Back, ExecError> {
    let mut tracked = Weights::<Tracked>::empty();
    for id in region.used_weights() {
        let Some(weight) = weights.get(id) else { continue };
        tracked.insert(id, leaf(weight.clone(), wanted.contains(&id)));
    }
    let inputs: Vec<Val<Tracked>> = inputs.into_iter().map(lift).collect();
    let leaves = inputs.clone();
    let interpreter = Interpreter::<Tracked> { fused, device: &Default::default() };
    let results = interpreter.run(region, &tracked, inputs, None, &mut |_, _| Ok(()))?;
    let plain: Vec<Val<Host>> = results.iter().map(lower).collect();
    let mut loss: Option<FloatTensor<Tracked>> = None;
    for (result, gradient) in results.into_iter().zip(upstream(&plain)?) {
        let (Val::Float(result), Some(gradient)) = (result, gradient) else { continue };
        let part = Tracked::float_sum(Tracked::float_mul(result, Tracked::from_inner(gradient)));
        loss = Some(match loss {
            Some(loss) => Tracked::float_add(loss, part),
            None => part,
        });
    }
    let Some(loss) = loss else {
        return Ok(Back { inputs: leaves.iter().map(|_| None).collect(), weights: BTreeMap::new() });
    };
    let mut grads: Gradients = Tracked::backward(loss);
    let inputs = leaves.iter().map(|leaf| match leaf {
        Val::Float(leaf) => Tracked::grad_remove(leaf, &mut grads),
        Val::Int(_) | Val::Routed(_) => None,
    });
    let inputs = inputs.collect();
    let of = |id: &WeightId| Some((*id, take(Tracked::grad_remove(tracked.get(*id)?, &mut grads)?)));
    let weights = wanted.iter().filter_map(of).collect();
    Ok(Back { inputs, weights })
}

fn leaf(tensor: FloatTensor<Host>, wanted: bool) -> FloatTensor<Tracked> {
    let leaf = Tracked::from_inner(tensor);
    if wanted { Tracked::float_set_require_grad(leaf, true) } else { leaf }
}

fn lift(value: Val<Host>) -> Val<Tracked> {
    match value {
        Val::Float(t) => Val::Float(leaf(t, true)),
        Val::Int(t) => Val::Int(t),
        Val::Routed(r) => Val::Routed(Routed { rows: leaf(r.rows, false), route: r.route }),
    }
}

fn lower(value: &Val<Tracked>) -> Val<Host> {
    match value {
        Val::Float(t) => Val::Float(t.primitive.clone()),
        Val::Int(t) => Val::Int(t.clone()),
        Val::Routed(r) => Val::Routed(Routed { rows: r.rows.primitive.clone(), route: r.route.clone() }),
    }
}

/// The sum of two gradients.
pub(crate) fn add(a: Option<FloatTensor<Host>>, b: Option<FloatTensor<Host>>) -> Option<FloatTensor<Host>> {
    match (a, b) {
        (Some(a), Some(b)) => Some(Host::float_add(a, b)),
        (a, None) => a,
        (None, b) => b,
    }
}
