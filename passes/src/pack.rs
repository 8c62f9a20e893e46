//! `pack`: gives quantized weights the physical layout that kernels want.

use awqc_ir::{Layout, Op, Operand, Region, Type, WeightExpr, WeightId};
use serde::{Deserialize, Serialize};

use crate::pass::{Changed, Fidelity, Pass, PassCx, PassError};
use crate::remark::{RemarkKind, counted};

/// See the documentation of the pass.
#[derive(Clone, Debug)]
pub struct Pack {
    layout: Layout,
}

/// Options of [`Pack`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PackOptions {
    /// The layout's name.
    pub layout: String,
}

impl Default for PackOptions {
    fn default() -> Self {
        Self { layout: Layout::R16.to_string() }
    }
}

impl Pass for Pack {
    const NAME: &'static str = "pack";
    const DOC: &'static str = "\
Chooses the physical layout of quantized weights. The numbers stay as they are; the emitter writes them in that order.

# Before
`linear %x, $w` with `$w : u4g128[out,in]`.
# After
`$w : u4g128@r16[out,in]`.
# Legal when
The weight is quantized, does not have the layout yet, and only linears of the region itself use it: the parameters of a fused op
are typed by its body. Comes after every pass that changes weights.
# Fidelity
Exact.
# Options
`layout` (r16): a layout of the language; see `awqc_ir::Layout`.
# Reference
The reordering of AWQ, arXiv 2306.00978, section 4.2; the order itself is that of the layout's documentation.
";
    type Options = PackOptions;

    fn fidelity() -> Fidelity {
        Fidelity::Exact
    }

    fn new(options: Self::Options) -> Result<Self, PassError> {
        let layout = options.layout.parse().map_err(PassError::Refused)?;
        Ok(Self { layout })
    }

    fn run(&self, region: &mut Region, cx: &mut PassCx<'_>) -> Result<Changed, PassError> {
        let mut packed = 0u32;
        for weight in packable(region, self.layout) {
            if !cx.budget.allows() {
                break;
            }
            cx.budget.spend();
            let ty = Type { layout: Some(self.layout), ..region.weight(weight).ty.clone() };
            region.wrap_weight(weight, ty, WeightExpr::Pack);
            packed += 1;
        }
        if packed == 0 {
            return Ok(Changed::No);
        }
        cx.remarks.count("weights", f64::from(packed));
        cx.remarks.push(RemarkKind::Applied, format!("{} packed as {}", counted(packed.into(), "weight"), self.layout));
        Ok(Changed::Yes)
    }
}

/// Quantized weights in no layout, or in another one as a checkpoint has them, that nothing but linears uses, each
/// once.
fn packable(region: &Region, layout: Layout) -> Vec<WeightId> {
    let mut out: Vec<WeightId> = Vec::new();
    let mut refused: Vec<WeightId> = Vec::new();
    for (_, node) in region.nodes() {
        let linear = matches!(node.op, Op::Linear(_));
        for operand in &node.operands {
            let Operand::Weight(id) = operand else { continue };
            let ty = &region.weight(*id).ty;
            if ty.elem.quant().is_none() || ty.layout == Some(layout) {
                continue;
            }
            match linear {
                true if !out.contains(id) => out.push(*id),
                true => {}
                false => refused.push(*id),
            }
        }
    }
    out.retain(|id| !refused.contains(id));
    out
}
