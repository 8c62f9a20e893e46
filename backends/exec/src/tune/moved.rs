//! What tuning moves: the scales of a quantized weight's groups, or the gains of a norm. Both are moved relative to
//! where they started, by Adam (arXiv 1412.6980).

use std::sync::Arc;

use awqc_ir::{Data, DataMap, DataRef, Dim, Op, Operand, Region, TensorSource, WeightExpr, WeightId};
use awqc_passes::analysis::linears::label;
use awqc_passes::quantize::code_data;
use awqc_passes::rtn::{Codes, round_f16};
use awqc_passes::{ExecError, Tensor};
use rayon::prelude::*;

use crate::realize::{Realized, realize};

/// Decay of the mean gradient, of the mean squared gradient, and what keeps the quotient finite.
const DECAY: (f32, f32) = (0.9, 0.95);
const EPS: f32 = 1e-8;
/// How far a number may be moved from where it started, as a factor.
const LIMITS: (f32, f32) = (0.25, 4.0);

/// One weight's numbers that are moved.
pub(super) struct Moved {
    /// The weight.
    pub(super) weight: WeightId,
    /// The codes of a quantized weight; `None` for gains, which are the weight.
    codes: Option<Codes>,
    /// Where the numbers started.
    start: Vec<f32>,
    /// By how much each has been moved: it is `start · (1 + change)` now.
    change: Vec<f32>,
    mean: Vec<f32>,
    square: Vec<f32>,
    steps: i32,
}

impl Moved {
    /// Everything in a region that can be moved.
    ///
    /// # Errors
    /// As [`realize`].
    pub(super) fn of(region: &Region, source: &dyn TensorSource) -> Result<Vec<Self>, ExecError> {
        let mut out = Vec::new();
        for weight in region.used_weights() {
            let quantized = region.weight(weight).ty.elem.quant().is_some();
            if !quantized && !gains(region, weight) {
                continue;
            }
            let (codes, start) = match realize(region, weight, source)? {
                Realized::Quant(codes) => {
                    let start = codes.scales.clone();
                    (Some(codes), start)
                }
                Realized::Float { data, .. } => (None, data),
            };
            let zeros = || vec![0.0; start.len()];
            let (change, mean, square) = (zeros(), zeros(), zeros());
            out.push(Self { weight, codes, start, change, mean, square, steps: 0 });
        }
        Ok(out)
    }

    /// The numbers as they are now.
    fn now(&self) -> Vec<f32> {
        self.start.iter().zip(&self.change).map(|(s, c)| s * (1.0 + c)).collect()
    }

    /// The weight as it is now, in the shape of its type.
    pub(super) fn tensor(&self, region: &Region) -> Tensor {
        let shape = region.weight(self.weight).ty.const_shape();
        let data = match &self.codes {
            Some(codes) => codes.decode_with(&self.now()),
            None => self.now(),
        };
        Tensor { shape: shape.unwrap_or_else(|| vec![data.len()]), data }
    }

    /// The gradient at the changes, from that at the weight.
    fn gradient(&self, weight: &[f32]) -> Vec<f32> {
        let Some(codes) = &self.codes else {
            return weight.iter().zip(&self.start).map(|(g, s)| g * s).collect();
        };
        let (groups, group) = (codes.groups().max(1), codes.quant.group.len(codes.cols));
        let mut out = vec![0.0; self.start.len()];
        let rows = out.par_chunks_mut(groups).zip(weight.par_chunks(codes.cols.max(1)));
        rows.zip(codes.codes.par_chunks(codes.cols.max(1))).enumerate().for_each(|(r, ((out, grad), row))| {
            let parts = out.iter_mut().zip(grad.chunks(group).zip(row.chunks(group)));
            for (g, (out, (grad, row))) in parts.enumerate() {
                let at = r * groups + g;
                let zero = i16::from(codes.zeros[at]);
                let sum: f32 = grad.iter().zip(row).map(|(g, c)| g * f32::from(i16::from(*c) - zero)).sum();
                *out = sum * self.start[at];
            }
        });
        out
    }

    /// One step against the gradient at the weight.
    pub(super) fn step(&mut self, weight: &[f32], rate: f32) {
        let gradient = self.gradient(weight);
        self.steps += 1;
        let (a, b) = DECAY;
        let (warm, warm_square) = (1.0 - a.powi(self.steps), 1.0 - b.powi(self.steps));
        let state = self.change.iter_mut().zip(&mut self.mean).zip(&mut self.square);
        for (((change, mean), square), g) in state.zip(gradient) {
            *mean = a * *mean + (1.0 - a) * g;
            *square = b * *square + (1.0 - b) * g * g;
            let step = rate * (*mean / warm) / ((*square / warm_square).sqrt() + EPS);
            *change = (*change - step).clamp(LIMITS.0 - 1.0, LIMITS.1 - 1.0);
        }
    }

    /// Writes the result into the region.
    pub(super) fn finish(self, region: &mut Region) {
        if self.codes.is_none() {
            let label = format!("tuned gains of {}", label(region, self.weight));
            let factors: Arc<[f32]> = self.change.iter().map(|c| 1.0 + c).collect();
            let (name, shape) = (region.fresh_data_name("t"), vec![factors.len() as u64]);
            let id = region.add_data(Data { name, label: label.into(), shape, values: Some(factors) });
            let by = DataRef { id, map: DataMap::Whole };
            let ty = region.weight(self.weight).ty.clone();
            region.wrap_weight(self.weight, ty, |of| WeightExpr::Mul { axis: 0, of, by });
        } else if let WeightExpr::Codes { scales, .. } = region.weight(self.weight).expr {
            let now: Vec<f32> = self.now().into_iter().map(round_f16).collect();
            region.set_data_values(scales, Some(now.into()));
        }
    }
}

/// Makes `codes(w, …)` of every `quant(w)`, with the codes that rounding gives: scales that move must not change them.
///
/// # Errors
/// As [`realize`].
pub(super) fn settle(region: &mut Region, source: &dyn TensorSource) -> Result<(), ExecError> {
    for weight in region.used_weights() {
        let WeightExpr::Quant(of) = region.weight(weight).expr else { continue };
        let Realized::Quant(codes) = realize(region, weight, source)? else { continue };
        let ty = region.weight(weight).ty.clone();
        let [codes, scales, zeros] = code_data(region, &label(region, weight), codes);
        region.set_weight(weight, WeightExpr::Codes { of, codes, scales, zeros }, ty);
    }
    Ok(())
}

/// Whether a weight is the gain of norms and nothing else.
fn gains(region: &Region, weight: WeightId) -> bool {
    let vector = matches!(region.weight(weight).ty.shape[..], [Dim::Const(_)]);
    let mut uses = region.nodes().flat_map(|(_, n)| n.operands.iter().enumerate().map(move |(i, o)| (&n.op, i, o)));
    let mut used = false;
    let only = uses.by_ref().filter(|(_, _, o)| **o == Operand::Weight(weight)).all(|(op, at, _)| {
        used = true;
        at == 1 && matches!(op, Op::RmsNorm(_) | Op::LayerNorm(_))
    });
    vector && only && used && region.weight(weight).ty.elem.is_float()
}

#[cfg(test)]
impl Moved {
    /// How many numbers there are.
    pub(super) fn len(&self) -> usize {
        self.start.len()
    }

    /// Moves one number.
    pub(super) fn set(&mut self, at: usize, change: f32) {
        self.change[at] = change;
    }

    /// The gradient of the first step.
    pub(super) fn first_gradient(&self, at: usize) -> f32 {
        assert_eq!(self.steps, 1);
        self.mean[at] / (1.0 - DECAY.0)
    }
}
