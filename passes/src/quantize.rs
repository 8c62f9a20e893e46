//! `quantize`: rounds the weights of linears to few bits.

mod group;

use awqc_ir::{Elem, Quant, Region, Type, WeightExpr, WeightId};
use serde::{Deserialize, Serialize};

use crate::analysis::linears::{label, quantizable};
use crate::dense;
use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::remark::RemarkKind;
use crate::rtn;

pub use group::GroupOption;

/// See the documentation of the pass.
#[derive(Clone, Debug)]
pub struct Quantize {
    quant: Quant,
}

/// How codes are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The nearest code.
    #[default]
    Rtn,
}

/// Options of [`Quantize`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantizeOptions {
    /// Bits a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Elements of a row that share a scale; `row` or 0 for one scale a row.
    pub group: GroupOption,
    /// Codes around 0, without zero points.
    pub symmetric: bool,
    /// How codes are chosen.
    pub method: Method,
}

impl Default for QuantizeOptions {
    fn default() -> Self {
        Self { bits: 4, group: GroupOption::default(), symmetric: false, method: Method::default() }
    }
}

impl QuantizeOptions {
    /// The element type that the options describe.
    ///
    /// # Errors
    /// When the language has no codes of so many bits.
    pub fn quant(&self) -> Result<Quant, PassError> {
        if !Quant::BITS.contains(&self.bits) {
            return Err(PassError::Refused(format!("bits={} is not possible: use 2, 3, 4 or 8", self.bits)));
        }
        Ok(Quant { bits: self.bits, symmetric: self.symmetric, group: self.group.0 })
    }
}

impl Pass for Quantize {
    const NAME: &'static str = "quantize";
    const DOC: &'static str = "\
Rounds the weights of a layer's linears to group-quantized integers.

# Before
`linear %x, $w` with `$w = \"…\" : f16[out,in]`.
# After
`$w = quant(\"…\") : u4g128[out,in]`. Each run of `group` elements of a row has its own scale (f16) and zero point; the
range always contains 0, so 0 stays 0.
# Legal when
The weight is a float matrix of a layer region and only linears use it. Quantized weights are left alone.
# Fidelity
Lossy. With the statistics of `profile` at hand, the report has the relative squared error of each linear's output:
tr(ΔW G ΔWᵀ) / tr(W G Wᵀ), with W as it was before clipping.
# Options
`bits` (4): 2, 3, 4 or 8. `group` (128): elements that share a scale, `row` for a whole row. `symmetric` (false):
codes around 0, no zero points. `method` (rtn): the nearest code.
# Reference
AWQ, arXiv 2306.00978, equation 1 (the symmetric case).
";
    type Options = QuantizeOptions;

    fn fidelity() -> Fidelity {
        Fidelity::Lossy
    }

    fn new(options: Self::Options) -> Result<Self, PassError> {
        match options.method {
            Method::Rtn => Ok(Self { quant: options.quant()? }),
        }
    }

    fn scheme(&self) -> Option<Quant> {
        Some(self.quant)
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        let linears = quantizable(region);
        let mut done: Vec<WeightId> = Vec::new();
        for l in &linears {
            if done.contains(&l.weight) {
                continue;
            }
            if !cx.budget.allows() {
                break;
            }
            cx.budget.spend();
            let error = relative_error(region, l.weight, l.input, self.quant, cx)?;
            let ty = region.weight(l.weight).ty.clone();
            cx.remarks.count("weights", 1.0);
            cx.remarks.count("parameters", ty.const_len().unwrap_or(0) as f64);
            cx.remarks.record(serde_json::json!({
                "linear": label(region, l.weight),
                "from": ty.to_string(),
                "to": self.quant.to_string(),
                "relative_error": error,
            }));
            let quantized = Type::new(Elem::Quant(self.quant), ty.shape);
            region.wrap_weight(l.weight, quantized, WeightExpr::Quant);
            done.push(l.weight);
        }
        if done.is_empty() {
            return Ok(Changed::No);
        }
        cx.remarks.push(RemarkKind::Applied, format!("{} weights rounded to {}", done.len(), self.quant));
        Ok(Changed::Yes)
    }
}

/// The squared error of a linear's output relative to the output, over the calibration tokens; `None` without them.
fn relative_error(
    region: &Region,
    weight: WeightId,
    input: awqc_ir::ValueId,
    quant: Quant,
    cx: &PassCx<'_>,
) -> Result<Option<f64>, PassError> {
    let Some(stats) = cx.facts.inputs.get(&input).filter(|sets| sets.iter().any(|s| s.tokens > 0)) else {
        return Ok(None);
    };
    let rounded = cx.exec.realize(region, weight)?;
    let (rows, cols) = (rounded.rows(), rounded.cols());
    if stats.iter().any(|s| s.gram.len() != cols * cols) {
        return Ok(None);
    }
    // What a clip cut off belongs to the error.
    let mut unclipped = weight;
    while let WeightExpr::Clip { of, .. } = &region.weight(unclipped).expr {
        unclipped = *of;
    }
    let original = if unclipped == weight { None } else { Some(cx.exec.realize(region, unclipped)?) };
    let original = original.as_ref().map_or(&rounded.data, |t| &t.data);
    let mut error = rtn::quantize(&rounded.data, rows, cols, quant).decode();
    error.iter_mut().zip(original).for_each(|(e, w)| *e -= w);
    // Of a stack, each matrix meets the statistics of its expert.
    let part = (original.len() / stats.len().max(1)).max(1);
    let energy = |numbers: &[f32]| -> f64 {
        numbers.chunks(part).zip(stats).map(|(w, s)| dense::energy(w, cols, &s.gram)).sum()
    };
    let (output, lost) = (energy(original), energy(&error));
    Ok((output > 0.0).then(|| lost / output))
}
