//! Joins linears that read the same value into one: their weights are concatenated along the output axis, the result
//! is split. Each output channel is computed from the same numbers as before.
//!
//! Rows are quantized independently of each other, so `cat.0(quant(a), quant(b))` is `quant(cat.0(a, b))`; scales and
//! clip bounds stay below the concatenation. Codes that a pass chose are joined as they are.

use awqc_ir::op::{Linear, Split};
use awqc_ir::{Name, NodeId, Op, Operand, Region, ValueId, WeightExpr, WeightId};

use super::patch::{Input, NewOp, Patch, Replace};
use crate::pass::PassCx;
use crate::remark::RemarkKind;

/// Joins `linears`, in this order, if they fit together, and calls the result and the weight `name`. What was done, or
/// why not, goes to the remarks. Returns whether it was done.
pub fn join(region: &mut Region, cx: &mut PassCx<'_>, linears: &[NodeId], name: &str) -> bool {
    let outputs: Vec<ValueId> = linears.iter().filter_map(|n| region.node(*n).results.first().copied()).collect();
    let names: Vec<String> = outputs.iter().map(|v| format!("%{}", region.value(*v).name)).collect();
    let names = names.join(", ");
    let done = match plan(region, linears) {
        Ok(_) if !cx.budget.allows() => Err("the number of rewrites is limited".into()),
        Ok(parts) => apply(region, cx, linears, &parts, name),
        Err(why) => Err(why),
    };
    match &done {
        Ok(()) => {
            cx.budget.spend();
            cx.remarks.count("joined", 1.0);
            cx.remarks.push(RemarkKind::Applied, format!("{names} are one linear now"));
        }
        Err(why) => cx.remarks.push(RemarkKind::Missed, format!("{names} stay apart: {why}")),
    }
    done.is_ok()
}

/// The operands of linears that fit together.
struct Parts {
    input: Operand,
    weights: Vec<WeightId>,
    biases: Vec<WeightId>,
    sizes: Vec<u64>,
}

fn plan(region: &Region, linears: &[NodeId]) -> Result<Parts, String> {
    let (mut weights, mut biases, mut sizes, mut inputs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (i, id) in linears.iter().enumerate() {
        let node = region.node(*id);
        if linears.iter().skip(i + 1).any(|other| other == id) {
            return Err("two of them are the same linear".into());
        }
        let (Op::Linear(_), Some(input), Some(weight)) = (&node.op, node.operands.first(), node.operands.get(1)) else {
            return Err(format!("one of them is {}", node.op.mnemonic()));
        };
        inputs.push(*input);
        weights.extend(weight.weight());
        biases.extend(node.operands.get(2).and_then(|b| b.weight()));
        sizes.extend(node.results.first().and_then(|r| region.value(*r).ty.channels()));
    }
    let (Some(input), Some(first)) = (inputs.first(), weights.first()) else { return Err("there are none".into()) };
    if linears.len() < 2 || weights.len() != linears.len() || sizes.len() != linears.len() {
        return Err("at least two linears are needed".into());
    }
    if inputs.iter().any(|i| i != input) {
        return Err("they read different values".into());
    }
    let first = &region.weight(*first).ty;
    if let Some(other) = weights.iter().map(|w| &region.weight(*w).ty).find(|t| t.elem != first.elem) {
        return Err(format!("their weights are of different types, {first} and {other}"));
    }
    if weights.iter().any(|w| matches!(region.weight(*w).expr, WeightExpr::Pack(_))) {
        return Err("their weights are packed already".into());
    }
    if !biases.is_empty() && biases.len() != weights.len() {
        return Err("some have a bias and some have none".into());
    }
    Ok(Parts { input: *input, weights, biases, sizes })
}

fn apply(
    region: &mut Region,
    cx: &mut PassCx<'_>,
    linears: &[NodeId],
    parts: &Parts,
    name: &str,
) -> Result<(), String> {
    let value_name = region.fresh_value_name(name);
    let (weight, inner) = cat(region, &parts.weights, name)?;
    let mut operands = vec![Input::Old(parts.input), Input::Old(Operand::Weight(weight))];
    if !parts.biases.is_empty() {
        let (bias, _) = cat(region, &parts.biases, &format!("{name}_bias"))?;
        operands.push(Input::Old(Operand::Weight(bias)));
    }
    let linear = NewOp { op: Op::Linear(Linear {}), operands, names: vec![value_name] };
    let split = NewOp {
        op: Op::Split(Split::new(parts.sizes.clone())),
        operands: vec![Input::New { op: 0, result: 0 }],
        names: Vec::new(),
    };
    let outputs = linears.iter().filter_map(|n| region.node(*n).results.first().copied());
    let swaps = outputs.enumerate().map(|(i, old)| (old, Input::New { op: 1, result: i })).collect();
    let replace = Replace { nodes: linears.to_vec(), ops: vec![linear, split], swaps };
    Patch::Replace(replace).apply(region, cx.fused)?;
    // The quantized parts are gone unless something else uses them; their names go to the terms below.
    let used = region.weight_closure(&region.used_weights());
    for (part, inner) in parts.weights.iter().zip(inner) {
        if !used.contains(part) && region.weight(inner).name.is_none() {
            let name = region.weight(*part).name.clone();
            region.rename_weight(*part, None);
            region.rename_weight(inner, name);
        }
    }
    Ok(())
}

/// The concatenation of `parts` along the output axis, and the terms below the `quant` of each, if all have one.
fn cat(region: &mut Region, parts: &[WeightId], name: &str) -> Result<(WeightId, Vec<WeightId>), String> {
    let quantized = |id: &WeightId| match region.weight(*id).expr {
        WeightExpr::Quant(of) => Some(of),
        WeightExpr::Source(_)
        | WeightExpr::Packed { .. }
        | WeightExpr::Param(_)
        | WeightExpr::Mul { .. }
        | WeightExpr::Div { .. }
        | WeightExpr::Offset { .. }
        | WeightExpr::Cat { .. }
        | WeightExpr::Stack(_)
        | WeightExpr::Rows { .. }
        | WeightExpr::Transpose(_)
        | WeightExpr::Clip { .. }
        | WeightExpr::Codes { .. }
        | WeightExpr::Pack(_) => None,
    };
    let inner: Option<Vec<WeightId>> = parts.iter().map(quantized).collect();
    let terms = inner.clone().unwrap_or_else(|| parts.to_vec());
    // The output axis is the second from last: in a stack, matrix joins matrix.
    let axis = terms.first().map_or(0, |t| region.weight(*t).ty.rank().saturating_sub(2));
    let expr = WeightExpr::Cat { axis, parts: terms.clone() };
    let shape = expr.infer_shape(|w| region.weight(w).ty.clone(), |d| region.data(d).shape.clone())?;
    let mut ty = match terms.first() {
        Some(first) => region.weight(*first).ty.clone(),
        None => return Err("there are no weights".into()),
    };
    ty.shape = shape.unwrap_or_default();
    // What was stored in some layout is in none once it is joined.
    ty.layout = None;
    let name: Name = region.fresh_weight_name(name);
    let Some(inner) = inner else { return Ok((region.add_weight(Some(name), expr, ty), Vec::new())) };
    let elem = parts.first().map_or(ty.elem, |p| region.weight(*p).ty.elem);
    let outer = ty.with_elem(elem);
    let joined = region.add_weight(None, expr, ty);
    Ok((region.add_weight(Some(name), WeightExpr::Quant(joined), outer), inner))
}
