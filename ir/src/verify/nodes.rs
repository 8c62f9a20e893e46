//! V02, V04 to V08: ids, definitions, operands, results and attributes.

use std::collections::BTreeSet;

use crate::diag::Diagnostic;
use crate::id::{ValueId, WeightId};
use crate::op::{Op, Operand, check_slots};
use crate::region::{Def, Region};
use crate::text::{DEPTH, Entity};
use crate::ty::Type;

use super::Checker;

/// V02: ids exist, terms are trees of bounded depth. The other checks rely on it.
pub(super) fn ids(region: &Region) -> Result<(), Diagnostic> {
    let (values, weights, data) = (region.value_ids().count(), region.weight_ids().count(), region.data_ids().count());
    let fail = |what: String| Err(Diagnostic::new("V02", what));
    let operands = region.nodes().flat_map(|(_, n)| n.operands.iter().copied()).chain(region.params().iter().copied());
    for operand in operands {
        match operand {
            Operand::Value(v) if v.index() >= values => return fail(format!("an operand is value {v:?} of {values}")),
            Operand::Weight(w) if w.index() >= weights => {
                return fail(format!("an operand is weight {w:?} of {weights}"));
            }
            Operand::Value(_) | Operand::Weight(_) => {}
        }
    }
    let defined = region.nodes().flat_map(|(_, n)| n.results.iter()).chain(region.results());
    if let Some(v) = defined.copied().find(|v| v.index() >= values) {
        return fail(format!("a result is value {v:?} of {values}"));
    }
    for w in region.weight_ids() {
        let expr = &region.weight(w).expr;
        if let Some(c) = expr.children().iter().find(|c| c.index() >= weights) {
            return fail(format!("weight {w:?} contains weight {c:?} of {weights}"));
        }
        if let Some(d) = expr.data().into_iter().find(|d| d.index() >= data) {
            return fail(format!("weight {w:?} uses data {d:?} of {data}"));
        }
    }
    depth(region)
}

/// The depth of every term, without recursion: the terms may be cyclic or very deep.
fn depth(region: &Region) -> Result<(), Diagnostic> {
    /// What is known of a term.
    #[derive(Clone, Copy, PartialEq)]
    enum Seen {
        New,
        Open,
        Done(usize),
    }
    let mut seen = vec![Seen::New; region.weight_ids().count()];
    let state = |seen: &[Seen], w: WeightId| seen.get(w.index()).copied().unwrap_or(Seen::Done(0));
    for root in region.weight_ids() {
        let mut path = vec![root];
        while let Some(&w) = path.last() {
            let children = region.weight(w).expr.children();
            match state(&seen, w) {
                Seen::Done(_) => {
                    path.pop();
                }
                Seen::New => {
                    seen[w.index()] = Seen::Open;
                    if let Some(c) = children.iter().find(|c| state(&seen, **c) == Seen::Open) {
                        return Err(Diagnostic::new("V02", format!("weight {c:?} contains itself")));
                    }
                    path.extend(children.iter().filter(|c| state(&seen, **c) == Seen::New));
                }
                Seen::Open => {
                    let below = children.iter().map(|c| match state(&seen, *c) {
                        Seen::Done(d) => d,
                        Seen::New | Seen::Open => 0,
                    });
                    let depth = 1 + below.max().unwrap_or(0);
                    if depth > DEPTH {
                        return Err(Diagnostic::new(
                            "V02",
                            format!("weight {w:?} nests {depth} deep, at most {DEPTH} are possible"),
                        ));
                    }
                    seen[w.index()] = Seen::Done(depth);
                    path.pop();
                }
            }
        }
    }
    Ok(())
}

/// V15: no op is foreign.
pub(super) fn known(cx: &mut Checker<'_>) {
    for (id, node) in cx.region.nodes() {
        if let Op::Foreign(f) = &node.op {
            cx.report(Entity::Node(id), "V15", format!("{} is an op of another system", f.op));
        }
    }
}

/// V04: definitions come once, and before uses.
pub(super) fn definitions(cx: &mut Checker<'_>) {
    let region = cx.region;
    let mut defined: BTreeSet<ValueId> = BTreeSet::new();
    for (i, param) in region.params().iter().enumerate() {
        if let Operand::Value(v) = param
            && (!defined.insert(*v) || region.value(*v).def != Def::Param(i))
        {
            cx.report(Entity::Header, "V04", format!("parameter {i} is defined elsewhere too"));
        }
    }
    for (id, node) in region.nodes() {
        for (i, v) in node.operands.iter().enumerate().filter_map(|(i, o)| Some((i, o.value()?))) {
            if !defined.contains(&v) {
                let message = format!("operand {i}, %{}, is not defined before this line", region.value(v).name);
                cx.report(Entity::Node(id), "V04", message);
            }
        }
        for (i, r) in node.results.iter().enumerate() {
            if !defined.insert(*r) || region.value(*r).def != Def::Result(id, i) {
                cx.report(Entity::Node(id), "V04", format!("result {i} is defined elsewhere too"));
            }
        }
    }
    if region.results().is_empty() {
        cx.report(Entity::Return, "V07", "nothing is returned");
    }
    for r in region.results() {
        if !defined.contains(r) {
            cx.report(Entity::Return, "V07", format!("%{} is returned but not defined", region.value(*r).name));
        }
    }
}

/// V05: operands are in their slots.
pub(super) fn operands(cx: &mut Checker<'_>) {
    for (id, node) in cx.region.nodes() {
        let kinds: Vec<bool> = node.operands.iter().map(|o| o.weight().is_some()).collect();
        if let Err(e) = check_slots(node.op.mnemonic(), node.op.slots(), &kinds) {
            cx.report(Entity::Node(id), "V05", e.0);
        }
    }
}

/// V06: result types are those that the op infers.
pub(super) fn results(cx: &mut Checker<'_>) {
    let region = cx.region;
    for (id, node) in region.nodes() {
        let kinds: Vec<bool> = node.operands.iter().map(|o| o.weight().is_some()).collect();
        if check_slots(node.op.mnemonic(), node.op.slots(), &kinds).is_err() {
            continue;
        }
        let types: Vec<&Type> = node.operands.iter().map(|o| region.operand_type(*o)).collect();
        // Longer axes were reported (V12); inference multiplies them.
        if types.iter().any(|ty| super::types::too_long(ty)) {
            continue;
        }
        match node.op.infer(&kinds, &types, cx.fused) {
            Err(e) => cx.report(Entity::Node(id), "V06", e.0),
            Ok(inferred) if inferred.len() != node.results.len() => {
                let message = format!("{} results, {} follow from the operands", node.results.len(), inferred.len());
                cx.report(Entity::Node(id), "V06", message);
            }
            Ok(inferred) => {
                for (ty, r) in inferred.iter().zip(&node.results) {
                    let value = region.value(*r);
                    if value.ty != *ty {
                        let message = format!("%{} is {}, {ty} follows from the operands", value.name, value.ty);
                        cx.report(Entity::Node(id), "V06", message);
                    }
                }
            }
        }
    }
}

/// V08: attributes survive the text. A number that is NaN or infinite does not.
pub(super) fn attributes(cx: &mut Checker<'_>) {
    for (id, node) in cx.region.nodes() {
        let again = Op::from_attributes(node.op.mnemonic(), node.op.attributes());
        if again.is_ok_and(|op| op == node.op) {
            continue;
        }
        let message =
            format!("the attributes of {} are not finite, or do not read back as they print", node.op.mnemonic());
        cx.report(Entity::Node(id), "V08", message);
    }
}
