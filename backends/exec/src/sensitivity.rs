//! How much a model minds errors in the outputs of its linears.
//!
//! For every channel r of a linear's output y: the mean over tokens of `(∂L/∂y_r)²`, where L is the sum over
//! calibration tokens of the negative log-likelihood of the next. It is the diagonal of the empirical Fisher matrix at
//! y, which stands for the second derivative of L there (K-FAC, arXiv 1503.05671, equation 1 and section 3). The
//! gradient goes back region by region ([`crate::gradient`]), once over all windows.
//!
//! Gradients are had at the inputs of regions, so every linear's output gets a sum with a further input that is 0: the
//! gradient at that input is the one at the output.

#[cfg(test)]
mod tests;

use awqc_ir::{Dim, FusedDef, Op, Operand, Region, TensorSource, Type, Verified, op};
use awqc_passes::allocate::covered;
use awqc_passes::analysis::linears::{LinearUse, quantizable};
use awqc_passes::{ExecError, Tensor};
use burn_backend::TensorMetadata;
use burn_backend::tensor::FloatTensor;
use rayon::prelude::*;

use crate::control::Control;
use crate::gradient::{Gradient, Stream, backward, cut, join, rejoin};
use crate::host::math::{exp, log_sum_exp, simd};
use crate::host::{Host, floats, tensor};
use crate::interp::{Interpreter, Val, Weights, bind, upload};
use crate::{chain, stream};

/// The linears of a region that `quantize` would quantize, each with one number for every channel of its output.
pub type Sensitivity = Vec<(LinearUse, Vec<f64>)>;

/// Measures every layer of a float module on some windows; other regions have none. `report` is told after each of the
/// two ways through a region how many of how many are done.
///
/// # Errors
/// When the module has linears of experts, a window has less than two tokens, a tensor cannot be read, a gradient is
/// not finite, or `control` says stop.
pub fn sensitivity(
    module: Verified<'_>,
    source: &dyn TensorSource,
    windows: &[Vec<i32>],
    control: &Control,
    report: &mut dyn FnMut(usize, usize),
) -> Result<Vec<Sensitivity>, ExecError> {
    let module = module.module();
    let refused = |e: &dyn std::fmt::Display| ExecError::Unavailable(e.to_string());
    module.regions.iter().try_for_each(|r| covered(r).map_err(|e| refused(&e)))?;
    let Some((head, body)) = module.regions.split_last() else {
        return Err(ExecError::Tensor("the module has no regions".into()));
    };
    if windows.iter().all(|w| w.len() < 2) {
        return Err(refused(&"sensitivities need a calibration window of two tokens at least"));
    }
    let tokens: usize = windows.iter().map(Vec::len).sum();
    // The embedding minds nothing that would be asked for.
    let first = body.iter().position(|r| r.name.is_layer()).unwrap_or(body.len());
    let (mut done, total) = (0, 2 * body.len() + 1 - first);
    let mut step = || {
        done += 1;
        report(done, total);
    };

    let interpreter = Interpreter::<Host> { fused: &module.fused, device: &Default::default() };
    let mut entered: Vec<Vec<Stream>> =
        stream::open(windows, &Default::default())?.into_iter().map(|s| vec![s]).collect();
    for region in body {
        control.check()?;
        let weights = Weights::load(region, source, &Default::default())?;
        entered.par_iter_mut().try_for_each(|streams| {
            let (inputs, rest) = chain::enter(streams.last().cloned().unwrap_or_default(), region)?;
            let mut next = interpreter.run(region, &weights, inputs, None, &mut |_, _| Ok(()))?;
            next.extend(rest);
            streams.push(next);
            Ok::<_, ExecError>(())
        })?;
        step();
    }

    let mut pop = || entered.iter_mut().map(|s| s.pop().unwrap_or_default()).collect::<Vec<Stream>>();
    let weights = Weights::load(head, source, &Default::default())?;
    let sequence = stream::sequence(module, head);
    let mut upstream: Vec<Gradient> = Vec::with_capacity(windows.len());
    for (at, (ids, stream)) in windows.iter().zip(pop()).enumerate() {
        control.check()?;
        let slots = stream.len();
        let (inputs, _) = chain::enter(stream, head)?;
        let part = |piece: &stream::Piece| {
            let inputs = cut(sequence.as_ref(), piece, head, &inputs);
            let next = ids.get(piece.first + 1..).unwrap_or(&[]);
            let upstream = |logits: &[Val<Host>]| Ok(vec![Some(surprise(logits, next)?)]);
            backward(head, &module.fused, &weights, &[], inputs, upstream).map(|back| back.inputs)
        };
        let pieces = stream::pieces(head, sequence.as_ref(), at, ids.len());
        let parts = pieces.par_iter().map(part).collect::<Result<Vec<_>, ExecError>>()?;
        let mut gradient = join(sequence.as_ref(), head, parts);
        gradient.resize(slots, None);
        upstream.push(gradient);
    }
    step();

    let mut out: Vec<Sensitivity> = module.regions.iter().map(|_| Vec::new()).collect();
    for at in (first..body.len()).rev() {
        control.check()?;
        let region = &body[at];
        let probed = Probed::of(region, &module.fused)?;
        let weights = Weights::load(&probed.region, source, &Default::default())?;
        let jobs: Vec<(Stream, Gradient)> = pop().into_iter().zip(upstream).collect();
        let back = |(stream, after)| probed.back(&module.fused, &weights, stream, after);
        let mut sums: Sensitivity = probed.linears.iter().map(|l| (*l, Vec::new())).collect();
        upstream = Vec::with_capacity(jobs.len());
        for (before, energies) in jobs.into_par_iter().map(back).collect::<Result<Vec<_>, ExecError>>()? {
            for ((_, sum), energy) in sums.iter_mut().zip(energies) {
                sum.resize(energy.len(), 0.0);
                sum.iter_mut().zip(energy).for_each(|(s, e)| *s += e / tokens as f64);
            }
            upstream.push(before);
        }
        if sums.iter().flat_map(|(_, s)| s).any(|s| !s.is_finite()) {
            let name = &region.name;
            return Err(ExecError::NotFinite(format!(
                "region {name}: the gradient is not finite; the model overflows on these tokens: calibrate on other text"
            )));
        }
        out[at] = sums;
        step();
    }
    Ok(out)
}

/// The gradient at the logits of the sum over rows of the negative log-likelihood of `next`; rows behind its end have
/// none.
fn surprise(results: &[Val<Host>], next: &[i32]) -> Result<FloatTensor<Host>, ExecError> {
    let Some(Val::Float(logits)) = results.first() else { return Err(ExecError::Tensor("there are no logits".into())) };
    let shape = logits.shape().to_vec();
    let logits = floats(logits);
    let vocab = shape.last().copied().unwrap_or(1).max(1);
    let mut gradient = vec![0.0f32; logits.len()];
    for ((row, out), id) in logits.chunks(vocab).zip(gradient.chunks_mut(vocab)).zip(next) {
        let sum = log_sum_exp(row) as f32;
        simd(
            #[inline(always)]
            || row.iter().zip(&mut *out).for_each(|(z, o)| *o = exp(z - sum)),
        );
        let target = usize::try_from(*id).ok().and_then(|id| out.get_mut(id));
        *target.ok_or_else(|| ExecError::Tensor(format!("token {id} has no logit")))? -= 1.0;
    }
    Ok(tensor(gradient, shape))
}

/// A region with a further input of zeros for each linear, which is added to its output.
struct Probed<'a> {
    /// The region as it was.
    plain: &'a Region,
    region: Region,
    /// Its linears, and the types of their outputs.
    linears: Vec<LinearUse>,
    types: Vec<Type>,
}

impl<'a> Probed<'a> {
    fn of(region: &'a Region, fused: &[FusedDef]) -> Result<Self, ExecError> {
        let linears = quantizable(region);
        let mut probed = region.clone();
        let types: Vec<Type> = linears.iter().map(|l| region.value(l.output).ty.clone()).collect();
        for (linear, ty) in linears.iter().zip(&types) {
            let name = probed.fresh_value_name("zero");
            let zero = probed.add_param(name, ty.clone());
            let operands = vec![Operand::Value(linear.output), Operand::Value(zero)];
            let next = probed.order().get(probed.position(linear.node) + 1).copied();
            let add = Op::Add(op::Add {});
            let sum = match next {
                Some(next) => probed.insert_before(next, add, operands, &["sum"], fused),
                None => probed.append(add, operands, &["sum"], fused),
            };
            let failed = |e: &dyn std::fmt::Display| ExecError::Tensor(format!("region {}: {e}", region.name));
            let sum = sum.map_err(|e| failed(&e))?;
            let Some(result) = probed.node(sum).results.first().copied() else { return Err(failed(&"no sum")) };
            probed.replace_value(linear.output, result);
            probed.set_operand(sum, 0, Operand::Value(linear.output));
        }
        Ok(Self { plain: region, region: probed, linears, types })
    }

    /// The inputs that are 0 when the region's own are `inputs`.
    fn zeros(&self, inputs: &[Val<Host>]) -> Result<Vec<Tensor>, ExecError> {
        let dims = bind(self.plain, &inputs.iter().map(Val::shape).collect::<Vec<_>>())?;
        let size = |dim: &Dim| match dim {
            Dim::Const(n) => usize::try_from(*n).ok(),
            Dim::Sym(name) => dims.get(name).copied(),
        };
        let zeros = |ty: &Type| {
            let shape: Option<Vec<usize>> = ty.shape.iter().map(size).collect();
            let shape = shape.ok_or_else(|| ExecError::Tensor(format!("{ty} has a size that no input gives")))?;
            Ok(Tensor { data: vec![0.0; shape.iter().product()], shape })
        };
        self.types.iter().map(zeros).collect()
    }

    /// From the gradient at what left the region to that at what entered it, and for each linear the squares of that at
    /// its output, summed over tokens.
    fn back(
        &self,
        fused: &[FusedDef],
        weights: &Weights<Host>,
        stream: Stream,
        mut after: Gradient,
    ) -> Result<(Gradient, Vec<Vec<f64>>), ExecError> {
        let results = self.region.results().len();
        let (mut inputs, _) = chain::enter(stream, self.plain)?;
        let own = inputs.len();
        let zeros = self.zeros(&inputs)?;
        inputs.extend(zeros.into_iter().map(|z| Val::Float(upload::<Host>(z, &Default::default()))));
        let by = after.split_off(results.min(after.len()));
        let mut before = backward(&self.region, fused, weights, &[], inputs, |_| Ok(after))?.inputs;
        let probes = before.split_off(own.min(before.len()));
        let energy = |(gradient, ty): (Option<FloatTensor<Host>>, &Type)| {
            let channels = ty.channels().and_then(|c| usize::try_from(c).ok()).unwrap_or(0);
            let mut sums = vec![0.0f64; channels];
            if let Some(gradient) = &gradient {
                for row in floats(gradient).chunks(channels.max(1)) {
                    sums.iter_mut().zip(row).for_each(|(s, g)| *s += f64::from(*g).powi(2));
                }
            }
            sums
        };
        let energies = probes.into_iter().zip(&self.types).map(energy).collect();
        Ok((rejoin(before, results, by), energies))
    }
}
