//! What a node is, apart from names and from the nodes before it: the labels by which two regions are compared.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::id::{DataId, NodeId, ValueId, WeightId};
use crate::op::Operand;
use crate::region::{Def, Region};
use crate::weight::{DataRef, WeightExpr};

/// For each node, in program order, its description without names, and a number that two nodes share when they compute
/// the same from the same.
pub(super) fn nodes(region: &Region) -> Vec<(String, u64)> {
    let terms = terms(region);
    let mut keys: BTreeMap<NodeId, u64> = BTreeMap::new();
    let mut out = Vec::new();
    for (id, node) in region.nodes() {
        let mut hasher = DefaultHasher::new();
        let mut shape = format!("{} {}", node.op.mnemonic(), serde_json::Value::Object(node.op.attributes()));
        for operand in &node.operands {
            shape.push(' ');
            match operand {
                Operand::Weight(w) => shape.push_str(&format!("w{:x}", terms.get(w).copied().unwrap_or_default())),
                Operand::Value(v) => match region.value(*v).def {
                    Def::Param(i) => shape.push_str(&format!("p{i}")),
                    Def::Result(from, i) => {
                        shape.push_str(&format!("r{i}"));
                        keys.get(&from).hash(&mut hasher);
                    }
                },
            }
        }
        for r in &node.results {
            let places = region.results().iter().enumerate().filter(|(_, x)| *x == r).map(|(i, _)| i);
            shape.push_str(&format!(" : {} {:?}", region.value(*r).ty, places.collect::<Vec<_>>()));
        }
        shape.hash(&mut hasher);
        let key = hasher.finish();
        keys.insert(id, key);
        out.push((shape, key));
    }
    out
}

/// Which parameters are returned, and where: nodes say the rest.
pub(super) fn results(region: &Region) -> Vec<Option<usize>> {
    let param = |r: &ValueId| match region.value(*r).def {
        Def::Param(i) => Some(i),
        Def::Result(..) => None,
    };
    region.results().iter().map(param).collect()
}

/// For each weight, a number that two weights share when their terms are equal up to names.
fn terms(region: &Region) -> BTreeMap<WeightId, u64> {
    let mut keys = BTreeMap::new();
    for id in region.weight_closure(&region.used_weights()) {
        let mut hasher = DefaultHasher::new();
        term(region, id, &keys).hash(&mut hasher);
        keys.insert(id, hasher.finish());
    }
    keys
}

/// A weight's term, those below it by number.
fn term(region: &Region, id: WeightId, keys: &BTreeMap<WeightId, u64>) -> String {
    let weight = region.weight(id);
    let child = |w: &WeightId| format!("w{:x}", keys.get(w).copied().unwrap_or_default());
    let data = |d: &DataId| {
        let data = region.data(*d);
        let mut hasher = DefaultHasher::new();
        let bits = |v: &std::sync::Arc<[f32]>| v.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        data.values.as_ref().map(bits).hash(&mut hasher);
        format!("{:?}#{:x}", data.shape, hasher.finish())
    };
    let by = |by: &DataRef| format!("{}{:?}", data(&by.id), by.map);
    let expr = match &weight.expr {
        WeightExpr::Source(name) => format!("{:?}", region.tensor_name(name)),
        WeightExpr::Packed { tensor, layout } => format!("packed.{layout} {:?}", region.tensor_name(tensor)),
        WeightExpr::Param(i) => format!("p{i}"),
        WeightExpr::Mul { axis, of, by: factors } => format!("mul.{axis} {} {}", child(of), by(factors)),
        WeightExpr::Div { axis, of, by: factors } => format!("div.{axis} {} {}", child(of), by(factors)),
        WeightExpr::Offset { of, by } => format!("offset {} {by:?}", child(of)),
        WeightExpr::Cat { axis, parts } => {
            format!("cat.{axis} {}", parts.iter().map(child).collect::<Vec<_>>().join(" "))
        }
        WeightExpr::Stack(parts) => format!("stack {}", parts.iter().map(child).collect::<Vec<_>>().join(" ")),
        WeightExpr::Rows { of, start, len } => format!("rows {} {start} {len}", child(of)),
        WeightExpr::Transpose(of) => format!("transpose {}", child(of)),
        WeightExpr::Clip { of, lo, hi, group } => format!("clip {} {} {} {group:?}", child(of), data(lo), data(hi)),
        WeightExpr::Quant(of) => format!("quant {}", child(of)),
        WeightExpr::Codes { of, codes, scales, zeros } => {
            format!("codes {} {} {} {}", child(of), data(codes), data(scales), data(zeros))
        }
        WeightExpr::Pack(of) => format!("pack {}", child(of)),
    };
    format!("({expr} : {})", weight.ty)
}
