//! `quantize-head`: rounds the output head to 8 bits.

use awqc_ir::{Elem, Quant, Region, Type, WeightExpr};
use serde::{Deserialize, Serialize};

use crate::analysis::linears::{label, linears, weights};
use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::quantize::GroupOption;
use crate::remark::RemarkKind;

/// See the documentation of the pass.
#[derive(Clone, Debug)]
pub struct QuantizeHead {
    quant: Quant,
}

/// Options of [`QuantizeHead`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct QuantizeHeadOptions {
    /// Bits a code: 8, or fewer for those who measure what they lose.
    pub bits: u8,
    /// Elements of a row that share a scale.
    pub group: GroupOption,
}

impl Default for QuantizeHeadOptions {
    fn default() -> Self {
        Self { bits: 8, group: GroupOption::default() }
    }
}

impl Pass for QuantizeHead {
    const NAME: &'static str = "quantize-head";
    const DOC: &'static str = "\
Rounds the weights of the last region's linears, the output head, to symmetric integers. A head is as wide as the
vocabulary: in a small model it is the largest matrix that a token reads.

# Before
`linear %x, $head` with `$head = \"…\" : f16[vocab,in]` in the last region.
# After
`$head = quant(\"…\") : i8g128[vocab,in]`. A table that the embedding shares stays as it is there.
# Legal when
The weight is a float matrix of the module's last region, and that region is no layer.
# Fidelity
Lossy; with 8 bits the relative error of a weight is below 0.4 % of its group's largest.
# Options
`bits` (8): 2, 3, 4 or 8. `group` (128): elements that share a scale, `row` for a whole row.
# Reference
Common practice of runtimes; AWQ itself leaves the head alone.
";
    type Options = QuantizeHeadOptions;

    fn fidelity() -> Fidelity {
        Fidelity::Lossy
    }

    fn new(options: Self::Options) -> Result<Self, PassError> {
        if !Quant::BITS.contains(&options.bits) {
            return Err(PassError::Refused(format!("bits={} is not possible: use 2, 3, 4 or 8", options.bits)));
        }
        Ok(Self { quant: Quant { bits: options.bits, symmetric: true, group: options.group.0 } })
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        if !cx.last || region.name.is_layer() {
            return Ok(Changed::No);
        }
        let heads = weights(&linears(region));
        for head in &heads {
            let ty = Type::new(Elem::Quant(self.quant), region.weight(*head).ty.shape.clone());
            cx.remarks.push(RemarkKind::Applied, format!("{} rounded to {}", label(region, *head), self.quant));
            region.wrap_weight(*head, ty, WeightExpr::Quant);
        }
        Ok(if heads.is_empty() { Changed::No } else { Changed::Yes })
    }
}
