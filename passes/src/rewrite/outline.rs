//! The definition of a fused op whose body is a set of nodes. Equal bodies share one definition.

use std::collections::BTreeMap;

use awqc_ir::{FusedDef, Name, NodeId, Operand, Region, RegionName, ValueId, WeightId};

/// The name of the definition with these nodes as its body: one that is there already, or a new one. `nodes` are in
/// program order; the body's parameters are `operands`.
///
/// # Errors
/// When a node uses something that is not among the operands.
pub(super) fn define(
    kernel: &str,
    region: &Region,
    nodes: &[NodeId],
    operands: &[(Name, Operand)],
    results: &[ValueId],
    fused: &mut Vec<FusedDef>,
) -> Result<Name, String> {
    let body = body(kernel, region, nodes, operands, results, fused)?;
    if let Some(def) = fused.iter().find(|d| d.kernel() == kernel && same_body(&d.body, &body)) {
        return Ok(def.name.clone());
    }
    let names = std::iter::once(kernel.to_owned()).chain((1u64..).map(|i| format!("{kernel}.{i}")));
    let free = names.into_iter().find(|n| fused.iter().all(|d| *d.name != **n));
    let name: Name = free.unwrap_or_default().into();
    fused.push(FusedDef { name: name.clone(), body });
    Ok(name)
}

fn body(
    kernel: &str,
    region: &Region,
    nodes: &[NodeId],
    operands: &[(Name, Operand)],
    results: &[ValueId],
    fused: &[FusedDef],
) -> Result<Region, String> {
    let mut body = Region::new(RegionName::Named(kernel.into()), "");
    let mut values: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    let mut weights: BTreeMap<WeightId, WeightId> = BTreeMap::new();
    for (name, operand) in operands {
        let ty = region.operand_type(*operand).clone();
        match operand {
            Operand::Value(v) => {
                let param = body.add_param(name.clone(), ty);
                values.insert(*v, param);
            }
            Operand::Weight(w) => {
                let param = body.add_weight_param(name.clone(), ty);
                weights.insert(*w, param);
            }
        }
    }
    for node in nodes.iter().map(|n| region.node(*n)) {
        let inner = |o: &Operand| match o {
            Operand::Value(v) => values.get(v).copied().map(Operand::Value),
            Operand::Weight(w) => weights.get(w).copied().map(Operand::Weight),
        };
        let inputs: Option<Vec<Operand>> = node.operands.iter().map(inner).collect();
        let inputs =
            inputs.ok_or_else(|| format!("{} uses something that the call does not pass", node.op.mnemonic()))?;
        let names: Vec<Name> = node.results.iter().map(|r| body.fresh_value_name(&region.value(*r).name)).collect();
        let names: Vec<&str> = names.iter().map(|n| &**n).collect();
        let made = body.append(node.op.clone(), inputs, &names, fused).map_err(|e| e.to_string())?;
        values.extend(node.results.iter().copied().zip(body.node(made).results.iter().copied()));
    }
    let results: Option<Vec<ValueId>> = results.iter().map(|r| values.get(r).copied()).collect();
    body.set_results(results.ok_or("the fused op does not compute all of its results")?);
    Ok(body)
}

/// Whether two bodies are equal up to names.
fn same_body(a: &Region, b: &Region) -> bool {
    let (mut values, mut weights) = (BTreeMap::new(), BTreeMap::new());
    if a.params().len() != b.params().len()
        || a.order().len() != b.order().len()
        || a.results().len() != b.results().len()
    {
        return false;
    }
    for (pa, pb) in a.params().iter().zip(b.params()) {
        if a.operand_type(*pa) != b.operand_type(*pb) {
            return false;
        }
        match (*pa, *pb) {
            (Operand::Value(x), Operand::Value(y)) => drop(values.insert(x, y)),
            (Operand::Weight(x), Operand::Weight(y)) => drop(weights.insert(x, y)),
            (Operand::Value(_), Operand::Weight(_)) | (Operand::Weight(_), Operand::Value(_)) => return false,
        }
    }
    for ((_, na), (_, nb)) in a.nodes().zip(b.nodes()) {
        let operands = na.operands.iter().map(|o| match o {
            Operand::Value(v) => values.get(v).copied().map(Operand::Value),
            Operand::Weight(w) => weights.get(w).copied().map(Operand::Weight),
        });
        if na.op != nb.op || !operands.eq(nb.operands.iter().copied().map(Some)) || na.results.len() != nb.results.len()
        {
            return false;
        }
        values.extend(na.results.iter().copied().zip(nb.results.iter().copied()));
    }
    a.results().iter().map(|r| values.get(r).copied()).eq(b.results().iter().copied().map(Some))
}
