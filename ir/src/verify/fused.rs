//! V13 and V14: fused ops.

use std::collections::BTreeSet;

use crate::diag::Diagnostic;
use crate::module::Module;
use crate::op::{Op, Operand};
use crate::text::{Entity, Form, is_sigil_name};
use crate::weight::WeightExpr;

use super::Checker;

/// V13, the module's part: names. A call that reaches forward, or back to its own definition, is found here too.
pub(super) fn names(module: &Module) -> Vec<Diagnostic> {
    let mut out = Vec::new();
    let mut seen = BTreeSet::new();
    for def in &module.fused {
        if !is_sigil_name(&def.name) {
            out.push(Diagnostic::new("V13", format!("{:?} cannot be the name of a fused op", def.name)));
        }
        for (_, node) in def.body.nodes() {
            if let Op::Fused(call) = &node.op
                && !seen.contains(&call.callee)
            {
                let message = format!("@{} calls @{}, which is not defined before it", def.name, call.callee);
                out.push(Diagnostic::new("V13", message));
            }
        }
        if !seen.insert(&def.name) {
            out.push(Diagnostic::new("V13", format!("there are two fused ops @{}", def.name)));
        }
    }
    out
}

/// V14: weight parameters belong to fused bodies, and bodies have no other weights.
pub(super) fn parameters(cx: &mut Checker<'_>) {
    let region = cx.region;
    for (i, param) in region.params().iter().enumerate() {
        if let Operand::Weight(w) = param {
            let bound = matches!(&region.weight(*w).expr, WeightExpr::Param(at) if *at == i);
            if cx.form == Form::Region || !bound {
                cx.report(Entity::Header, "V14", format!("parameter {i} is a weight; only fused bodies have such"));
            }
        }
    }
    for id in super::weights::live(cx) {
        let at = match &region.weight(id).expr {
            WeightExpr::Param(at) => Some(*at),
            WeightExpr::Source(_)
            | WeightExpr::Packed { .. }
            | WeightExpr::Mul { .. }
            | WeightExpr::Div { .. }
            | WeightExpr::Offset { .. }
            | WeightExpr::Cat { .. }
            | WeightExpr::Stack(_)
            | WeightExpr::Rows { .. }
            | WeightExpr::Transpose(_)
            | WeightExpr::Clip { .. }
            | WeightExpr::Codes { .. }
            | WeightExpr::Quant(_)
            | WeightExpr::Pack(_) => None,
        };
        match (cx.form, at) {
            (Form::Fused, None) => {
                cx.report(Entity::Weight(id), "V14", "a fused body has no weights but its parameters")
            }
            (Form::Fused, Some(at)) if region.params().get(at) == Some(&Operand::Weight(id)) => {}
            (Form::Fused, Some(at)) => cx.report(Entity::Header, "V14", format!("parameter {at} is not this weight")),
            (Form::Region, Some(_)) => {
                cx.report(Entity::Weight(id), "V14", "only a fused body has parameters that are weights")
            }
            (Form::Region, None) => {}
        }
    }
}
