//! V12: dimensions and the types of values.

use std::collections::BTreeSet;

use crate::diag::Diagnostic;
use crate::module::Module;
use crate::op::Operand;
use crate::text::{Entity, LONGEST, is_word};
use crate::ty::{Dim, Elem, Name, Type};

use super::Checker;

/// V12, the module's part: dimensions are different words, and the element type is a float.
pub(super) fn declarations(module: &Module) -> Vec<Diagnostic> {
    let mut seen = BTreeSet::new();
    let wrong = module.dims.iter().filter(|d| !is_word(d) || ***d == *"none" || !seen.insert(*d));
    let mut out: Vec<_> = wrong
        .map(|d| Diagnostic::new("V12", format!("{d:?} cannot be declared as a dimension, or is declared twice")))
        .collect();
    if !module.dtype.is_float() {
        out.push(Diagnostic::new("V12", format!("the element type of a model is a float, not {}", module.dtype)));
    }
    out
}

/// Whether a constant axis is longer than the language knows.
pub(super) fn too_long(ty: &Type) -> bool {
    ty.shape.iter().filter_map(Dim::as_const).any(|n| n > LONGEST)
}

fn dims(ty: &Type, declared: &[Name]) -> Option<String> {
    ty.shape.iter().find_map(|dim| match dim {
        Dim::Const(0) => Some(format!("{ty} has an axis of length 0")),
        Dim::Const(n) if *n > LONGEST => Some(format!("{ty} has an axis longer than {LONGEST}")),
        Dim::Const(_) => None,
        Dim::Sym(s) if declared.contains(s) => None,
        Dim::Sym(s) => Some(format!("the dimension {s} of {ty} is not declared")),
    })
}

/// V12: types of values and weights.
pub(super) fn values(cx: &mut Checker<'_>) {
    let region = cx.region;
    let params = region.params().iter().filter_map(|p| match p {
        Operand::Value(v) => Some((Entity::Header, &region.value(*v).ty)),
        Operand::Weight(_) => None,
    });
    let results =
        region.nodes().flat_map(|(id, n)| n.results.iter().map(move |r| (Entity::Node(id), &region.value(*r).ty)));
    let found: Vec<_> = params.chain(results).collect();
    for (entity, ty) in found {
        match ty.elem {
            Elem::Quant(_) => cx.report(entity, "V12", format!("only weights are quantized, a value cannot be {ty}")),
            Elem::F32 | Elem::F16 | Elem::Bf16 | Elem::I32 if ty.layout.is_some() => {
                cx.report(entity, "V12", format!("only weights have a layout, a value cannot be {ty}"));
            }
            Elem::F32 | Elem::F16 | Elem::Bf16 | Elem::I32 => {}
        }
        if let Some(message) = dims(ty, &cx.module.dims) {
            cx.report(entity, "V12", message);
        }
    }
    for id in super::weights::live(cx) {
        if let Some(message) = dims(&region.weight(id).ty, &cx.module.dims) {
            cx.report(Entity::Weight(id), "V12", message);
        }
    }
}
