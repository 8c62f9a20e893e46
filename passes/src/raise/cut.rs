//! Cutting a model of one region into `@embed`, its layers and `@head`.
//!
//! A *cut* is a place in program order through which a single float value `[B,S,C]` goes, the residual stream; tables
//! that depend on positions alone, such as those of rotary embedding, go along. A layer begins at the last cut before
//! an attention. The last one has as many cuts inside as the others.

use std::collections::BTreeMap;

use awqc_ir::{Def, Module, NodeId, Op, Operand, Region, RegionName, ValueId, WeightExpr, WeightId};

/// A place between two nodes.
#[derive(Clone, Debug)]
struct Cut {
    /// Nodes before it.
    at: usize,
    /// The residual stream.
    stream: ValueId,
}

/// Cuts the only region of `module`.
///
/// # Errors
/// A sentence, when there is no attention, or the layers differ in shape.
pub(super) fn into_layers(module: &mut Module) -> Result<(), String> {
    let [region] = module.regions.as_mut_slice() else { return Ok(()) };
    tables_first(region);
    let order = region.order().to_vec();
    let last_use = last_uses(region, &order);
    let cuts = cuts(region, &order, &last_use);
    let attentions: Vec<usize> = order
        .iter()
        .enumerate()
        .filter(|(_, id)| matches!(region.node(**id).op, Op::Sdpa(_)))
        .map(|(i, _)| i)
        .collect();
    if attentions.is_empty() {
        return Err("there is no attention in the model".into());
    }
    let begins = |at: &usize| cuts.iter().rposition(|c| c.at <= *at);
    let starts: Option<Vec<usize>> = attentions.iter().map(begins).collect();
    let starts = starts.ok_or("the first layer does not begin with one value for each token")?;
    let steps: Vec<usize> = starts.windows(2).map(|w| w[1] - w[0]).collect();
    if steps.iter().any(|s| *s == 0 || Some(s) != steps.first()) {
        return Err(
            "the layers cannot be told apart: something else than the residual stream goes from one to the next".into(),
        );
    }
    let first = starts.first().copied().unwrap_or(0);
    let last = starts.last().copied().unwrap_or(0);
    let end = match steps.first() {
        Some(step) => last + step,
        // A single layer ends with its last sum.
        None => {
            let sum = |c: &Cut| matches!(region.value(c.stream).def, Def::Result(id, _) if matches!(region.node(id).op, Op::Add(_)));
            cuts.iter().rposition(sum).filter(|i| *i > last).ok_or("the only layer does not end with a sum")?
        }
    };
    let end = cuts.get(end).ok_or("the last layer does not end like the others")?;
    let mut bounds: Vec<Cut> = starts.iter().filter_map(|i| cuts.get(*i).cloned()).collect();
    bounds.push(end.clone());
    let at = cuts.get(first).map_or(0, |c| c.at);
    // Tables that are used after the first cut, in order of definition.
    let tables: Vec<ValueId> = order[..at]
        .iter()
        .flat_map(|id| region.node(*id).results.clone())
        .filter(|v| region.value(*v).ty.rank() == 2 && last_use.get(v).is_some_and(|u| *u >= at))
        .collect();
    let embed: Vec<ValueId> = bounds.first().map(|c| c.stream).into_iter().chain(tables.iter().copied()).collect();
    let mut pieces =
        vec![piece(region, RegionName::Named("embed".into()), &order[..at], &region_params(region), &embed)?];
    for (i, pair) in bounds.windows(2).enumerate() {
        let nodes = &order[pair[0].at..pair[1].at];
        let name = RegionName::Layer(u32::try_from(i).map_err(|e| e.to_string())?);
        pieces.push(piece(region, name, nodes, &params(region, nodes, pair[0].stream, &tables), &[pair[1].stream])?);
    }
    let nodes = &order[end.at..];
    let results = region.results().to_vec();
    pieces.push(piece(
        region,
        RegionName::Named("head".into()),
        nodes,
        &params(region, nodes, end.stream, &tables),
        &results,
    )?);
    facts(module, pieces.len() - 2);
    module.regions = pieces;
    Ok(())
}

/// Facts for people and for configurations.
fn facts(module: &mut Module, layers: usize) {
    let Some(region) = module.regions.first() else { return };
    let mut header = serde_json::Map::new();
    if let Some((_, node)) = region.nodes().find(|(_, n)| matches!(n.op, Op::Sdpa(_)))
        && let Op::Sdpa(s) = &node.op
        && let Some(Operand::Value(q)) = node.operands.first()
    {
        header.insert("layers".into(), layers.into());
        header.insert("heads".into(), s.heads.into());
        header.insert("kv_heads".into(), s.kv_heads.into());
        header.insert("head_dim".into(), s.head_dim(&region.value(*q).ty).into());
    }
    if let Some(vocab) = region.results().first().and_then(|r| region.value(*r).ty.channels()) {
        header.insert("vocab".into(), vocab.into());
    }
    module.header = header;
}

fn region_params(region: &Region) -> Vec<ValueId> {
    region.value_params().collect()
}

/// Moves what is computed from the inputs alone to the front.
fn tables_first(region: &mut Region) {
    let from_inputs = |id: &NodeId| {
        region.node(*id).operands.iter().filter_map(|o| o.value()).all(|v| matches!(region.value(v).def, Def::Param(_)))
    };
    let (first, rest): (Vec<NodeId>, Vec<NodeId>) = region.order().iter().partition(|id| from_inputs(id));
    region.reorder(first.into_iter().chain(rest).collect());
}

/// The last place where each value is used; results are used at the end.
fn last_uses(region: &Region, order: &[NodeId]) -> BTreeMap<ValueId, usize> {
    let mut out = BTreeMap::new();
    for (i, id) in order.iter().enumerate() {
        out.extend(region.node(*id).operands.iter().filter_map(|o| Some((o.value()?, i))));
    }
    out.extend(region.results().iter().map(|r| (*r, order.len())));
    out
}

fn cuts(region: &Region, order: &[NodeId], last_use: &BTreeMap<ValueId, usize>) -> Vec<Cut> {
    let mut live: Vec<ValueId> = region.value_params().collect();
    let mut out = Vec::new();
    for at in 0..=order.len() {
        live.retain(|v| last_use.get(v).is_some_and(|u| *u >= at));
        let through: Vec<ValueId> = live.iter().copied().filter(|v| region.value(*v).ty.rank() > 2).collect();
        let inputs = live.iter().any(|v| matches!(region.value(*v).def, Def::Param(_)));
        if let ([stream], false) = (through.as_slice(), inputs) {
            out.push(Cut { at, stream: *stream });
        }
        if let Some(id) = order.get(at) {
            live.extend(&region.node(*id).results);
        }
    }
    out
}

/// The residual stream, and as many tables as are needed to have all that the nodes use: parameters are a prefix.
fn params(region: &Region, nodes: &[NodeId], stream: ValueId, tables: &[ValueId]) -> Vec<ValueId> {
    let used = |t: &ValueId| nodes.iter().any(|id| region.node(*id).operands.contains(&Operand::Value(*t)));
    let needed = tables.iter().rposition(used).map_or(0, |i| i + 1);
    [stream].into_iter().chain(tables.iter().take(needed).copied()).collect()
}

/// A region of these nodes.
fn piece(
    region: &Region,
    name: RegionName,
    nodes: &[NodeId],
    params: &[ValueId],
    results: &[ValueId],
) -> Result<Region, String> {
    let roots: Vec<WeightId> =
        nodes.iter().flat_map(|id| region.node(*id).operands.iter().filter_map(|o| o.weight())).collect();
    let layer = name.is_layer();
    let mut out = Region::new(name, "");
    let closure = region.weight_closure(&roots);
    let sources = closure.iter().filter_map(|w| {
        let WeightExpr::Source(name) = &region.weight(*w).expr else { return None };
        Some(&**name)
    });
    let prefix = if layer { common(sources) } else { String::new() };
    out.prefix = prefix.as_str().into();
    let mut weights: BTreeMap<WeightId, WeightId> = BTreeMap::new();
    for id in closure {
        let weight = region.weight(id);
        let mut expr = weight.expr.map_children(|c| weights.get(&c).copied().unwrap_or(c));
        if let WeightExpr::Source(name) = &mut expr
            && let Some(rest) = name.strip_prefix(prefix.as_str()).and_then(|r| r.strip_prefix('.'))
        {
            *name = rest.into();
        }
        weights.insert(id, out.add_weight(weight.name.clone(), expr, weight.ty.clone()));
    }
    let mut values: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for (i, v) in params.iter().enumerate() {
        let value = region.value(*v);
        let name = if i == 0 && value.ty.rank() > 2 { "x".into() } else { value.name.clone() };
        values.insert(*v, out.add_param(name, value.ty.clone()));
    }
    let outside = |v: &ValueId| format!("%{} is used in another layer", region.value(*v).name);
    for id in nodes {
        let node = region.node(*id);
        let operands = node.operands.iter().map(|o| match o {
            Operand::Value(v) => values.get(v).copied().map(Operand::Value).ok_or_else(|| outside(v)),
            Operand::Weight(w) => {
                weights.get(w).copied().map(Operand::Weight).ok_or_else(|| "a weight is missing".into())
            }
        });
        let operands = operands.collect::<Result<Vec<_>, String>>()?;
        let names: Vec<&str> = node.results.iter().map(|r| &*region.value(*r).name).collect();
        let made = out.append(node.op.clone(), operands, &names, &[]).map_err(|e| e.0)?;
        values.extend(node.results.iter().copied().zip(out.node(made).results.clone()));
    }
    let results = results.iter().map(|r| values.get(r).copied().ok_or_else(|| outside(r)));
    let results = results.collect::<Result<Vec<_>, String>>()?;
    out.set_results(results);
    Ok(out)
}

/// The words, between dots, that all names begin with.
fn common<'n>(mut names: impl Iterator<Item = &'n str>) -> String {
    let mut words: Vec<&str> = names.next().map(|n| n.split('.').collect()).unwrap_or_default();
    // The last word is the tensor's own.
    words.pop();
    for name in names {
        let same = words.iter().zip(name.split('.')).take_while(|(a, b)| *a == b).count();
        words.truncate(same);
    }
    words.join(".")
}
