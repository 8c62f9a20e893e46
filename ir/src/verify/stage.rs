//! V20 to V22: what holds after quantization and packing.

use crate::diag::Diagnostics;
use crate::id::WeightId;
use crate::module::Module;
use crate::region::Region;
use crate::text::{Entity, Form};
use crate::weight::WeightExpr;

use super::{Checker, nodes};

/// How far a module has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// As imported: floats only.
    Float,
    /// After `quantize`: scales are folded in below the quantization.
    Quantized,
    /// After `pack`: every quantized weight has its layout.
    Packed,
}

/// Checks what holds at `stage` besides the invariants of [`super::verify`].
///
/// # Errors
/// All violations, in the order of the module.
pub fn verify_stage(module: &Module, stage: Stage) -> Result<(), Diagnostics> {
    let mut found = Diagnostics::default();
    for region in module.regions.iter().filter(|r| nodes::ids(r).is_ok()) {
        let mut cx = Checker::new(module, region, &module.fused, Form::Region);
        match stage {
            Stage::Float => floats(&mut cx),
            Stage::Quantized => folded(&mut cx),
            Stage::Packed => {
                folded(&mut cx);
                packed(&mut cx);
            }
        }
        cx.finish(&mut found);
    }
    if found.is_empty() { Ok(()) } else { Err(found) }
}

/// V20.
fn floats(cx: &mut Checker<'_>) {
    let region = cx.region;
    for id in super::weights::live(cx) {
        let ty = &region.weight(id).ty;
        if ty.elem.quant().is_some() {
            cx.report(Entity::Weight(id), "V20", format!("{ty} is quantized already"));
        }
    }
}

/// V21.
fn folded(cx: &mut Checker<'_>) {
    let region = cx.region;
    for id in super::weights::live(cx) {
        let changes_numbers = match &region.weight(id).expr {
            WeightExpr::Mul { .. } | WeightExpr::Div { .. } | WeightExpr::Offset { .. } | WeightExpr::Clip { .. } => {
                true
            }
            WeightExpr::Source(_)
            | WeightExpr::Packed { .. }
            | WeightExpr::Param(_)
            | WeightExpr::Cat { .. }
            | WeightExpr::Stack(_)
            | WeightExpr::Rows { .. }
            | WeightExpr::Transpose(_)
            | WeightExpr::Codes { .. }
            | WeightExpr::Quant(_)
            | WeightExpr::Pack(_) => false,
        };
        if changes_numbers && holds_quant(region, id) {
            cx.report(Entity::Weight(id), "V21", "this changes the numbers of a weight that is quantized already");
        }
    }
}

fn holds_quant(region: &Region, id: WeightId) -> bool {
    region.weight_closure(&[id]).into_iter().any(|w| region.weight(w).ty.elem.quant().is_some())
}

/// V22.
fn packed(cx: &mut Checker<'_>) {
    let region = cx.region;
    for id in region.used_weights() {
        let ty = &region.weight(id).ty;
        if ty.elem.quant().is_some() && ty.layout.is_none() {
            cx.report(Entity::Weight(id), "V22", format!("{ty} has no layout: the pass `pack` gives one"));
        }
    }
}
