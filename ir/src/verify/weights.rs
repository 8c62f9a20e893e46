//! V09 to V11: weight terms and data.

use std::collections::BTreeSet;

use crate::id::WeightId;
use crate::text::Entity;
use crate::tiles::Tiles;
use crate::ty::{Dim, Elem, Layout, Type};
use crate::weight::WeightExpr;

use super::Checker;

/// The weights that matter: those that nodes use, and what is below them.
pub(super) fn live(cx: &Checker<'_>) -> Vec<WeightId> {
    let params = cx.region.params().iter().filter_map(|p| p.weight());
    cx.region.weight_closure(&cx.region.used_weights().into_iter().chain(params).collect::<Vec<_>>())
}

/// V09: shapes follow from the children.
pub(super) fn shapes(cx: &mut Checker<'_>) {
    let region = cx.region;
    for id in live(cx) {
        let weight = region.weight(id);
        // Such data was reported (V11); counting it would overflow.
        if weight.expr.data().iter().any(|d| entries(&region.data(*d).shape).is_none()) {
            continue;
        }
        let inferred = weight.expr.infer_shape(|w| region.weight(w).ty.clone(), |d| region.data(d).shape.clone());
        match inferred {
            Err(message) => cx.report(Entity::Weight(id), "V09", message),
            Ok(Some(shape)) if shape != weight.ty.shape => {
                let follows = Type::new(weight.ty.elem, shape);
                cx.report(
                    Entity::Weight(id),
                    "V09",
                    format!("the type is {}, the term has the shape of {follows}", weight.ty),
                );
            }
            Ok(_) => {}
        }
    }
}

/// V10: element types and layouts.
pub(super) fn elements(cx: &mut Checker<'_>) {
    let region = cx.region;
    for id in live(cx) {
        let weight = region.weight(id);
        let ty = &weight.ty;
        let child = |w: &WeightId| &region.weight(*w).ty;
        let wrong = match &weight.expr {
            WeightExpr::Param(_) => weight_type(ty),
            WeightExpr::Source(_)
            | WeightExpr::Mul { .. }
            | WeightExpr::Div { .. }
            | WeightExpr::Transpose(_)
            | WeightExpr::Clip { .. } => float(ty),
            WeightExpr::Offset { by, .. } if !by.is_finite() => Some(format!("the offset is {by}")),
            WeightExpr::Offset { .. } => float(ty),
            WeightExpr::Quant(_) => quantized(ty, None),
            WeightExpr::Codes { scales, .. } => quantized(ty, None).or_else(|| groups(ty, &region.data(*scales).shape)),
            WeightExpr::Packed { layout, .. } => quantized(ty, Some(*layout)),
            WeightExpr::Pack(of) => match ty.layout {
                None => Some(format!("pack gives a layout, {ty} has none")),
                Some(layout) if child(of).elem == ty.elem => quantized(ty, Some(layout)),
                Some(_) => Some(format!("packing {} cannot give {ty}", child(of))),
            },
            WeightExpr::Cat { parts, .. } | WeightExpr::Stack(parts) => parts.iter().find_map(|p| kept(child(p), ty)),
            WeightExpr::Rows { of, .. } => kept(child(of), ty),
        };
        if let Some(message) = wrong {
            cx.report(Entity::Weight(id), "V10", message);
        }
    }
}

fn float(ty: &Type) -> Option<String> {
    (!ty.elem.is_float() || ty.layout.is_some()).then(|| format!("this term holds floats, its type is {ty}"))
}

/// A quantized matrix in `layout`.
fn quantized(ty: &Type, layout: Option<Layout>) -> Option<String> {
    let (Some(quant), Some((rows, _))) = (ty.elem.quant(), ty.matrix()) else {
        return Some(format!("this term is a quantized matrix, its type is {ty}"));
    };
    if ty.layout != layout {
        let want = layout.map_or("none".to_owned(), |l| l.to_string());
        return Some(format!("the layout of this term is {want}, its type is {ty}"));
    }
    match layout {
        Some(Layout::AwqGemm) if quant.bits != 4 || quant.symmetric || !rows.is_multiple_of(8) => {
            Some(format!("the layout awq_gemm holds 4-bit asymmetric weights with a multiple of 8 rows, not {ty}"))
        }
        Some(Layout::Simd16) if quant.bits != 4 => Some(format!("the layout simd16 holds 4-bit weights, not {ty}")),
        Some(Layout::Mma16) => {
            let cols = ty.const_shape().and_then(|s| s.get(1).copied()).unwrap_or(0);
            Tiles::of(quant, rows, cols).err().map(|why| format!("{ty}: {why}"))
        }
        Some(Layout::AwqGemm | Layout::Rows | Layout::R16 | Layout::Simd16) | None => None,
    }
}

/// Codes have scales for each group of the type.
fn groups(ty: &Type, scales: &[u64]) -> Option<String> {
    let (quant, (_, cols)) = (ty.elem.quant()?, ty.matrix()?);
    let want = quant.group.count(cols) as u64;
    let found = scales.last().copied();
    (found != Some(want)).then(|| format!("{ty} has {want} groups a row, the codes have {}", found.unwrap_or(0)))
}

/// Terms that move rows about: floats may change their type, quantized rows stay what they are. The result lies in no
/// layout, whatever the parts were stored in.
fn kept(child: &Type, ty: &Type) -> Option<String> {
    let same = if child.elem.is_float() { ty.elem.is_float() } else { child.elem == ty.elem };
    (!same || ty.layout.is_some()).then(|| format!("rows of {child} cannot be {ty}"))
}

fn weight_type(ty: &Type) -> Option<String> {
    match ty.elem {
        Elem::F32 | Elem::F16 | Elem::Bf16 => float(ty),
        Elem::Quant(_) => quantized(ty, ty.layout),
        Elem::I32 => Some(format!("a weight cannot be {ty}")),
    }
}

/// The number of entries of a data shape, if it can be counted.
fn entries(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |a, b| a.checked_mul(*b))
}

/// V11: data.
pub(super) fn data(cx: &mut Checker<'_>) {
    let region = cx.region;
    let used: BTreeSet<_> = live(cx).into_iter().flat_map(|w| region.weight(w).expr.data()).collect();
    for id in used {
        let data = region.data(id);
        let Some(count) = entries(&data.shape) else {
            cx.report(Entity::Data(id), "V11", "this shape has more entries than can be counted");
            continue;
        };
        let Some(values) = &data.values else { continue };
        let shown = Type::new(Elem::F32, data.shape.iter().copied().map(Dim::Const));
        if values.len() as u64 != count {
            cx.report(Entity::Data(id), "V11", format!("{} numbers for {shown}", values.len()));
        }
        if let Some((at, v)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            cx.report(Entity::Data(id), "V11", format!("entry {at} is {v}"));
        }
    }
}
