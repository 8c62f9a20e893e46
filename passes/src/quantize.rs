//! `quantize`: rounds the weights of linears to few bits.

mod bits;
mod compensate;
mod error;
mod group;

use std::borrow::Cow;
use std::collections::BTreeMap;

use awqc_ir::{Elem, Group, Quant, Region, Type, WeightExpr};
use serde::{Deserialize, Serialize};

use crate::analysis::linears::{LinearUse, label, quantizable, weights};
use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::remark::{RemarkKind, counted};
use crate::rtn;
use crate::scheme::Scheme;

pub use bits::{BitsOption, Mixture};
pub use compensate::code_data;
pub use group::GroupOption;

/// See the documentation of the pass.
#[derive(Clone, Debug)]
pub struct Quantize {
    scheme: Scheme,
    /// How errors are compensated, if they are.
    compensation: Option<compensate::Plan>,
}

/// How codes are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// The nearest code.
    #[default]
    Rtn,
    /// Column by column, the columns that are left making up for what was lost.
    Gptq,
}

/// Options of [`Quantize`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantizeOptions {
    /// Bits a code: 2, 3, 4 or 8; a mean of them if widths are mixed.
    pub bits: BitsOption,
    /// Whether linears get widths of their own; a mean that is no whole number implies it.
    pub mixed: bool,
    /// For mixed widths: which; all that there are if not given.
    pub widths: Option<Vec<u8>>,
    /// Elements of a row that share a scale; `row` or 0 for one scale a row.
    pub group: GroupOption,
    /// Codes around 0, without zero points.
    pub symmetric: bool,
    /// How codes are chosen.
    pub method: Method,
    /// For `gptq`: what is added to the diagonal of the Gram matrix, as a fraction of its mean; 0.01 if not given.
    pub damp: Option<f64>,
    /// For `gptq`: columns that are worked off before the others see their errors; 128 if not given.
    pub block: Option<u32>,
    /// For `gptq`: whether columns come by falling energy of their channel; true if not given.
    #[serde(alias = "act-order")]
    pub act_order: Option<bool>,
    /// For `gptq`: whether groups keep the grids of the weight as it was; true if not given.
    #[serde(alias = "static-groups")]
    pub static_groups: Option<bool>,
}

impl QuantizeOptions {
    /// The scheme that the options describe.
    ///
    /// # Errors
    /// When the language has no codes of so many bits.
    pub fn scheme(&self) -> Result<Scheme, PassError> {
        let (symmetric, group) = (self.symmetric, self.group.0);
        if self.mixture()?.is_some() {
            return Ok(Scheme::Mixed { symmetric, group });
        }
        match self.bits.width() {
            Some(bits) => Ok(Scheme::Uniform(Quant { bits, symmetric, group })),
            None => Err(PassError::Refused(format!(
                "bits={} is not possible: use 2, 3, 4 or 8, or let widths be mixed",
                self.bits.0
            ))),
        }
    }

    /// The mean to be spread, if widths are mixed.
    ///
    /// # Errors
    /// When no such mean is possible.
    pub fn mixture(&self) -> Result<Option<Mixture>, PassError> {
        match (self.mixed || self.bits.is_fraction(), &self.widths) {
            (false, None) => Ok(None),
            (false, Some(_)) => Err(PassError::Refused("widths belong to mixed".into())),
            (true, widths) => Mixture::new(self.bits.0, widths.as_deref()).map(Some),
        }
    }

    /// How errors are compensated, if they are.
    fn compensation(&self) -> Result<Option<compensate::Plan>, PassError> {
        let Self { damp, block, act_order, static_groups, .. } = self;
        let given = [damp.is_some(), block.is_some(), act_order.is_some(), static_groups.is_some()];
        let refused = |message: &str| Err(PassError::Refused(message.to_owned()));
        let plan = compensate::Plan {
            damp: damp.unwrap_or(0.01),
            block: block.unwrap_or(128) as usize,
            act_order: act_order.unwrap_or(true),
            static_groups: static_groups.unwrap_or(true),
        };
        match self.method {
            Method::Rtn if given.contains(&true) => {
                refused("damp, block, act_order and static_groups belong to method=gptq")
            }
            Method::Rtn => Ok(None),
            Method::Gptq if !(0.0..=1.0).contains(&plan.damp) => refused("damp is a fraction of 0 to 1"),
            Method::Gptq if !(1..=4096).contains(&plan.block) => refused("block is not possible: use 1 to 4096"),
            Method::Gptq if plan.act_order && !plan.static_groups && self.group.0 != Group::Row => refused(
                "act_order without static_groups mixes the columns of groups, which no format holds: \
                         use static_groups, or act_order=false",
            ),
            Method::Gptq => Ok(Some(plan)),
        }
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
With `method=gptq`, `$w = codes(\"…\", #q, #s, #z) : u4g128[out,in]`: the codes, scales and zero points lie in data
entries.
# Legal when
The weight is a float matrix of a layer region and only linears use it. Quantized weights are left alone.
# Fidelity
Lossy. With the statistics of `profile` at hand, the report has the relative squared error of each linear's output:
tr(ΔW G ΔWᵀ) / tr(W G Wᵀ), with W as it was before clipping.
# Options
`bits` (4): 2, 3, 4 or 8. A number in between is a mean: linears that read one value get one width, so that the mean over
all quantized elements of the model is at most that, scales and zero points not counted. `awqc compile` spreads it over
the whole model, by how much the loss minds errors in a linear's output; the report says how. `mixed` (false) does the
same with a whole number, `widths` names the widths that are mixed, all if not given.

`group` (128): elements that share a scale, `row` for a whole row. `symmetric` (false): codes around 0, no zero points.
`method` (rtn): the nearest code. `gptq`: columns are rounded one after the other, and those that are left make up for
what was lost, by the Gram matrix of the input; a row that ends above the loss of its nearest codes gets those. With
these options: `damp` (0.01), what is added to the diagonal of the Gram matrix as a fraction of its mean, raised where the
matrix is singular; `block` (128), columns that are worked off before the others see their errors; `act_order` (true),
columns by falling energy of their channel; `static_groups` (true), grids of the weight as it was, or of the clipped
weight where there is a clip, whose error is then compensated too. Weights without statistics, with fewer than 16 tokens
or with numbers that are not finite in them are rounded; channels that are always 0 get weights of 0.
# Reference
AWQ, arXiv 2306.00978, equation 1 (the symmetric case). GPTQ, arXiv 2210.17323, section 3.3. Widths by
sensitivity: HAWQ-V2, arXiv 1911.03852; the measure of it: K-FAC, arXiv 1503.05671.
";
    type Options = QuantizeOptions;

    fn fidelity() -> Fidelity {
        Fidelity::Lossy
    }

    fn new(options: Self::Options) -> Result<Self, PassError> {
        Ok(Self { scheme: options.scheme()?, compensation: options.compensation()? })
    }

    fn scheme(&self) -> Option<Scheme> {
        Some(self.scheme)
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        let linears = quantizable(region);
        let mut done: BTreeMap<String, u64> = BTreeMap::new();
        let mut last = compensate::Last::default();
        for weight in weights(&linears) {
            if !cx.budget.allows() {
                break;
            }
            cx.budget.spend();
            let uses: Vec<LinearUse> = linears.iter().filter(|l| l.weight == weight).copied().collect();
            let quant = self.scheme.of(region, &uses, cx.facts)?;
            let codes = match self.compensation {
                None => None,
                Some(plan) => compensate::codes(region, weight, &uses, quant, plan, &mut last, cx)?,
            };
            let chosen = |w: &[f32], rows, cols| match &codes {
                None => Cow::Owned(rtn::quantize(w, rows, cols, quant)),
                Some(codes) => Cow::Borrowed(codes),
            };
            let error = match uses.first() {
                None => None,
                Some(first) => error::relative_error(region, weight, first.input, chosen, cx)?,
            };
            let ty = region.weight(weight).ty.clone();
            cx.remarks.count("weights", 1.0);
            cx.remarks.count("parameters", ty.const_len().unwrap_or(0) as f64);
            cx.remarks.record(serde_json::json!({
                "linear": label(region, weight),
                "from": ty.to_string(),
                "to": quant.to_string(),
                "relative_error": error,
            }));
            let quantized = Type::new(Elem::Quant(quant), ty.shape);
            match codes {
                None => region.wrap_weight(weight, quantized, WeightExpr::Quant),
                Some(found) => {
                    let [codes, scales, zeros] = code_data(region, &label(region, weight), found);
                    region.wrap_weight(weight, quantized, |of| WeightExpr::Codes { of, codes, scales, zeros });
                }
            }
            *done.entry(quant.to_string()).or_default() += 1;
        }
        if done.is_empty() {
            return Ok(Changed::No);
        }
        for (quant, count) in done {
            cx.remarks.push(RemarkKind::Applied, format!("{} rounded to {quant}", counted(count, "weight")));
        }
        Ok(Changed::Yes)
    }
}
