//! Inlining and outlining: a fused call and its body are the same thing, so either can take the other's place.

use std::collections::{BTreeMap, BTreeSet};

use crate::id::{NodeId, ValueId, WeightId};
use crate::module::FusedDef;
use crate::op::{Fused, Op, OpError, Operand};
use crate::region::{Def, Region, RegionName, Uses};
use crate::ty::Name;
use crate::view::isomorphic;
use crate::weight::WeightExpr;

/// The most nodes that inlining adds to a region: bodies that call each other can multiply without end.
const NODES: usize = 1 << 14;

/// Why a region could not be inlined.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum InlineError {
    /// A call names a definition that there is not.
    #[error("fused @{0} is not defined: define it before it is called")]
    Unknown(Name),
    /// A body uses something that is neither its own nor a parameter.
    #[error("the body of @{0} is not in order: verify the module")]
    Body(Name),
    /// A node of a body does not fit the operands of the call.
    #[error("the body of @{0} does not fit a call: {1}")]
    Op(Name, OpError),
    /// A definition calls itself.
    #[error("fused @{0} calls itself, directly or through another definition")]
    Recursive(Name),
    /// The calls unfold too far.
    #[error("the fused calls of this region unfold to more than {NODES} new nodes")]
    TooLarge,
}

/// Replaces every fused call by the body of its definition, calls in bodies included. The call's results keep their
/// names. Nothing else changes.
///
/// # Errors
/// When a definition is missing or does not fit; the region is then half inlined and must be dropped. A verified
/// module gives no error but [`InlineError::TooLarge`].
pub fn inline_fused(region: &mut Region, fused: &[FusedDef]) -> Result<(), InlineError> {
    let calls = region.nodes().filter(|(_, n)| matches!(n.op, Op::Fused(_)));
    let mut open: Vec<(NodeId, usize)> = calls.map(|(id, _)| (id, 0)).collect();
    let start = region.node_bound();
    while let Some((call, depth)) = open.pop() {
        if region.node_bound() - start > NODES {
            return Err(InlineError::TooLarge);
        }
        let nested = inline_call(region, call, fused)?;
        // Without recursion, calls nest no deeper than there are definitions.
        if let (Some((_, callee)), true) = (nested.first(), depth >= fused.len()) {
            return Err(InlineError::Recursive(callee.clone()));
        }
        open.extend(nested.into_iter().map(|(n, _)| (n, depth + 1)));
    }
    Ok(())
}

/// Inlines one call; answers with the calls that its body brought in, and what they call.
fn inline_call(region: &mut Region, call: NodeId, fused: &[FusedDef]) -> Result<Vec<(NodeId, Name)>, InlineError> {
    let Op::Fused(Fused { callee }) = region.node(call).op.clone() else { return Ok(Vec::new()) };
    let def = fused.iter().find(|d| d.name == callee).ok_or_else(|| InlineError::Unknown(callee.clone()))?;
    let body = &def.body;
    let bad = || InlineError::Body(callee.clone());
    let operands = region.node(call).operands.clone();
    let mut values: BTreeMap<ValueId, ValueId> = BTreeMap::new();
    for (param, operand) in body.params().iter().zip(&operands) {
        if let (Operand::Value(p), Operand::Value(v)) = (param, operand) {
            values.insert(*p, *v);
        }
    }
    // A body's weights are its parameters.
    let weight = |w: WeightId| match &body.weight(w).expr {
        WeightExpr::Param(at) => operands.get(*at).and_then(|o| o.weight()),
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
    let mut nested = Vec::new();
    for (_, node) in body.nodes() {
        let inputs = node.operands.iter().map(|o| match *o {
            Operand::Value(v) => values.get(&v).copied().map(Operand::Value),
            Operand::Weight(w) => weight(w).map(Operand::Weight),
        });
        let inputs: Vec<Operand> = inputs.collect::<Option<_>>().ok_or_else(bad)?;
        let names: Vec<&str> = node.results.iter().map(|r| &*body.value(*r).name).collect();
        let made = region.insert_before(call, node.op.clone(), inputs, &names, fused);
        let made = made.map_err(|e| InlineError::Op(callee.clone(), e))?;
        if let Op::Fused(call) = &node.op {
            nested.push((made, call.callee.clone()));
        }
        values.extend(node.results.iter().copied().zip(region.node(made).results.iter().copied()));
    }
    let old = region.node(call).results.clone();
    if old.len() != body.results().len() {
        return Err(bad());
    }
    for (old, inner) in old.into_iter().zip(body.results()) {
        let new = *values.get(inner).ok_or_else(bad)?;
        let name = region.value(old).name.clone();
        region.replace_value(old, new);
        // A body may hand a parameter through: that value has its name already.
        if !body.params().contains(&Operand::Value(*inner)) {
            region.rename_value(new, name);
        }
    }
    region.remove(call);
    Ok(nested)
}

/// Why nodes could not become the body of a fused op.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum OutlineError {
    /// There are no nodes, or one of them was removed.
    #[error("a node to be fused is not there any more")]
    Gone,
    /// A value between the nodes is used outside of them.
    #[error("%{0} is also used outside of the fused nodes (not contained)")]
    NotContained(Name),
    /// A path leaves the nodes and comes back.
    #[error("%{0} depends on the fused nodes and is needed by them (not convex)")]
    NotConvex(Name),
    /// A node uses something that is not among the operands.
    #[error("{0} uses an operand that the call does not pass")]
    Missing(&'static str),
    /// A result that the nodes do not compute.
    #[error("%{0} is not computed by the fused nodes")]
    Foreign(Name),
    /// The nodes do not fit together.
    #[error(transparent)]
    Op(#[from] OpError),
}

/// Replaces `nodes` by one call of a fused op whose body they become. `operands` are what the call takes, in order;
/// `results` what it returns, in order. A definition of this name (or an instance `name.N` of it) with the same body
/// is used again; otherwise a new one is added to `fused`.
///
/// # Errors
/// When the nodes are not contained or not convex, or use something that is not passed; nothing is then changed.
pub fn outline(
    region: &mut Region,
    fused: &mut Vec<FusedDef>,
    name: &str,
    nodes: &[NodeId],
    operands: &[Operand],
    results: &[ValueId],
) -> Result<NodeId, OutlineError> {
    let inside: BTreeSet<NodeId> = nodes.iter().copied().collect();
    if inside.is_empty() || inside.iter().any(|n| region.get_node(*n).is_none()) {
        return Err(OutlineError::Gone);
    }
    contained(region, &inside, results)?;
    let body = body(region, fused, name, &inside, operands, results)?;
    let (before, after) = around(region, &inside, operands)?;

    let (callee, new) = definition(fused, name, body);
    if let Some(def) = new {
        fused.push(def);
    }
    let names: Vec<Name> = results.iter().map(|r| region.value(*r).name.clone()).collect();
    let names: Vec<&str> = names.iter().map(|n| &**n).collect();
    let call = region.append(Fused { callee }.into(), operands.to_vec(), &names, fused)?;
    let made = region.node(call).results.clone();
    for (old, new) in results.iter().zip(made) {
        region.replace_value(*old, new);
    }
    region.remove_all(&inside);
    let order: Vec<NodeId> = before.into_iter().chain([call]).chain(after).collect();
    debug_assert!(is_permutation(region, &order), "the order around a call holds every node once");
    region.reorder(order);
    Ok(call)
}

fn is_permutation(region: &Region, order: &[NodeId]) -> bool {
    region.order().iter().collect::<BTreeSet<_>>() == order.iter().collect::<BTreeSet<_>>()
}

/// Values between the nodes must not be used elsewhere, and results must come from the nodes.
fn contained(region: &Region, inside: &BTreeSet<NodeId>, results: &[ValueId]) -> Result<(), OutlineError> {
    let uses = Uses::of(region);
    for id in inside {
        for value in region.node(*id).results.iter().filter(|v| !results.contains(v)) {
            if uses.is_result(*value) || uses.nodes(*value).iter().any(|(n, _)| !inside.contains(n)) {
                return Err(OutlineError::NotContained(region.value(*value).name.clone()));
            }
        }
    }
    let made = |v: &ValueId| matches!(region.value(*v).def, Def::Result(n, _) if inside.contains(&n));
    match results.iter().find(|v| !made(v)) {
        Some(v) => Err(OutlineError::Foreign(region.value(*v).name.clone())),
        None => Ok(()),
    }
}

/// The nodes as a region of their own.
fn body(
    region: &Region,
    fused: &[FusedDef],
    name: &str,
    inside: &BTreeSet<NodeId>,
    operands: &[Operand],
    results: &[ValueId],
) -> Result<Region, OutlineError> {
    let mut body = Region::new(RegionName::Named(name.into()), "");
    let mut inner: BTreeMap<Operand, Operand> = BTreeMap::new();
    for operand in operands {
        let ty = region.operand_type(*operand).clone();
        let param = match *operand {
            Operand::Value(v) => Operand::Value(body.add_param(region.value(v).name.clone(), ty)),
            Operand::Weight(w) => {
                let name = region.weight(w).name.clone().unwrap_or_else(|| "w".into());
                Operand::Weight(body.add_weight_param(name, ty))
            }
        };
        // An operand that is passed twice is used at its first place.
        inner.entry(*operand).or_insert(param);
    }
    for (id, node) in region.nodes().filter(|(id, _)| inside.contains(id)) {
        let inputs = node.operands.iter().map(|o| inner.get(o).copied()).collect::<Option<Vec<_>>>();
        let inputs = inputs.ok_or(OutlineError::Missing(node.op.mnemonic()))?;
        let names: Vec<&str> = node.results.iter().map(|r| &*region.value(*r).name).collect();
        let made = body.append(node.op.clone(), inputs, &names, fused)?;
        let made = body.node(made).results.clone();
        inner.extend(
            region.node(id).results.iter().copied().map(Operand::Value).zip(made.into_iter().map(Operand::Value)),
        );
    }
    let returned = results.iter().filter_map(|r| inner.get(&Operand::Value(*r)).and_then(|o| o.value()));
    body.set_results(returned.collect());
    Ok(body)
}

/// The other nodes, before and after the place of the call: what depends on the nodes comes after it, all else that
/// stands before their end comes before it.
fn around(
    region: &Region,
    inside: &BTreeSet<NodeId>,
    operands: &[Operand],
) -> Result<(Vec<NodeId>, Vec<NodeId>), OutlineError> {
    let defined_by = |v: ValueId| match region.value(v).def {
        Def::Result(n, _) => Some(n),
        Def::Param(_) => None,
    };
    let needed: BTreeSet<NodeId> = operands.iter().filter_map(|o| o.value()).filter_map(defined_by).collect();
    let last = region.order().iter().rposition(|n| inside.contains(n) || needed.contains(n)).unwrap_or(0);
    let (mut before, mut after) = (Vec::new(), Vec::new());
    let mut dependent: BTreeSet<NodeId> = BTreeSet::new();
    for (at, (id, node)) in region.nodes().enumerate() {
        let inputs = || node.operands.iter().filter_map(|o| o.value()).filter_map(|v| Some((v, defined_by(v)?)));
        if inside.contains(&id) {
            if let Some((v, _)) = inputs().find(|(_, n)| dependent.contains(n)) {
                return Err(OutlineError::NotConvex(region.value(v).name.clone()));
            }
            continue;
        }
        if inputs().any(|(_, n)| inside.contains(&n) || dependent.contains(&n)) {
            dependent.insert(id);
        }
        let list = if at > last || dependent.contains(&id) { &mut after } else { &mut before };
        list.push(id);
    }
    // Operands that no node uses count as well.
    let back = operands
        .iter()
        .filter_map(|o| o.value())
        .find(|v| defined_by(*v).is_some_and(|n| inside.contains(&n) || dependent.contains(&n)));
    match back {
        Some(v) => Err(OutlineError::NotConvex(region.value(v).name.clone())),
        None => Ok((before, after)),
    }
}

/// The name of a definition with this body, and the definition if it is new.
fn definition(fused: &[FusedDef], name: &str, body: Region) -> (Name, Option<FusedDef>) {
    if let Some(def) = fused.iter().find(|d| d.kernel() == name && isomorphic(&d.body, &body)) {
        return (def.name.clone(), None);
    }
    let taken = |n: &str| fused.iter().any(|d| *d.name == *n);
    let mut chosen = name.to_owned();
    let mut number = 0u64;
    while taken(&chosen) {
        number += 1;
        chosen = format!("{name}.{number}");
    }
    let name: Name = chosen.into();
    (name.clone(), Some(FusedDef { name, body }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::Module;
    use crate::text::{parse, print};
    use crate::verify::verify;

    const TEXT: &str = r#"awqir 1
region @r (%x: f16[B,S,6]) {
  $g = "g" : f16[6]
  %n = rms_norm %x, $g {eps=1e-5}
  %s = silu %n
  %o = relu %x
  %m = mul %s, %o
  %y = add %m, %x
  return %y
}"#;

    fn module(text: &str) -> Module {
        parse(text).map_err(|e| e.to_string()).unwrap()
    }

    /// The value of this name.
    fn value(region: &Region, name: &str) -> ValueId {
        let live = region.nodes().flat_map(|(_, n)| n.results.iter().copied());
        region.value_params().chain(live).find(|v| *region.value(*v).name == *name).unwrap()
    }

    fn node(region: &Region, name: &str) -> NodeId {
        region.nodes().find(|(_, n)| n.results.contains(&value(region, name))).unwrap().0
    }

    fn call(
        m: &mut Module,
        kernel: &str,
        nodes: &[&str],
        operands: &[Operand],
        results: &[&str],
    ) -> Result<NodeId, OutlineError> {
        let region = &mut m.regions[0];
        let nodes: Vec<_> = nodes.iter().map(|n| node(region, n)).collect();
        let results: Vec<_> = results.iter().map(|n| value(region, n)).collect();
        outline(region, &mut m.fused, kernel, &nodes, operands, &results)
    }

    #[test]
    fn outlining_and_inlining_undo_each_other() {
        let mut m = module(TEXT);
        let before = m.regions[0].clone();
        let (x, g) = (value(&before, "x"), before.used_weights()[0]);
        let operands = [Operand::Value(x), Operand::Weight(g)];
        call(&mut m, "norm_silu", &["n", "s"], &operands, &["s"]).unwrap();
        verify(&m).map_err(|e| e.to_string()).unwrap();
        let text = print(&m);
        assert!(text.contains("%s = fused @norm_silu(%x, $g) : f16[B,S,6]"), "{text}");
        assert_eq!(m.regions[0].order().len(), 4);
        inline_fused(&mut m.regions[0], &m.fused).unwrap();
        assert!(isomorphic(&before, &m.regions[0]));
        m.fused.clear();
        verify(&m).map_err(|e| e.to_string()).unwrap();
    }

    #[test]
    fn the_call_stands_where_its_operands_are_there() {
        // %o lies between the nodes and is an operand: it has to come before the call.
        let mut m = module(TEXT);
        let region = &m.regions[0];
        let (s, o) = (value(region, "s"), value(region, "o"));
        let swapped = vec![node(region, "n"), node(region, "s"), node(region, "m"), node(region, "y")];
        assert!(!m.regions[0].reorder(swapped));
        call(&mut m, "gate", &["m"], &[Operand::Value(s), Operand::Value(o)], &["m"]).unwrap();
        verify(&m).map_err(|e| e.to_string()).unwrap();
        let mut m = module(TEXT);
        let region = &m.regions[0];
        let (n, o) = (value(region, "n"), value(region, "o"));
        call(&mut m, "gate", &["s", "m"], &[Operand::Value(n), Operand::Value(o)], &["m"]).unwrap();
        verify(&m).map_err(|e| e.to_string()).unwrap();
    }

    #[test]
    fn an_equal_body_is_used_again_and_another_gets_a_number() {
        let text = "awqir 1 region @r (%x: f16[B,6], %z: f16[B,8]) { %a = silu %x %b = silu %a %c = silu %z
            %d = relu %b %e = relu %c %f = concat %d, %e return %f }";
        let mut m = module(text);
        for (node, operand) in [("a", "x"), ("b", "a"), ("c", "z")] {
            let operand = Operand::Value(value(&m.regions[0], operand));
            call(&mut m, "act", &[node], &[operand], &[node]).unwrap();
        }
        let names: Vec<&str> = m.fused.iter().map(|d| &*d.name).collect();
        assert_eq!(names, ["act", "act.1"]);
        verify(&m).map_err(|e| e.to_string()).unwrap();
    }

    #[test]
    fn illegal_cuts_are_refused_and_change_nothing() {
        let mut m = module(TEXT);
        let before = print(&m);
        let region = &m.regions[0];
        let of = |n: &str| Operand::Value(value(region, n));
        let (x, g, n, o, s, mm) =
            (of("x"), Operand::Weight(region.used_weights()[0]), of("n"), of("o"), of("s"), of("m"));
        let err = |r: Result<NodeId, OutlineError>| r.unwrap_err();
        let escapes = err(call(&mut m, "f", &["n", "s"], &[x, g], &["n"]));
        assert_eq!(escapes, OutlineError::NotContained("s".into()));
        assert_eq!(err(call(&mut m, "f", &["n", "s"], &[x], &["s"])), OutlineError::Missing("rms_norm"));
        assert_eq!(err(call(&mut m, "f", &["s"], &[n], &["s", "o"])), OutlineError::Foreign("o".into()));
        assert_eq!(err(call(&mut m, "f", &["s", "y"], &[n, mm, x], &["s", "y"])), OutlineError::NotConvex("m".into()));
        assert_eq!(err(call(&mut m, "f", &["s"], &[n, mm], &["s"])), OutlineError::NotConvex("m".into()));
        assert_eq!(err(call(&mut m, "f", &["m"], &[s, o, mm], &["m"])), OutlineError::NotConvex("m".into()));
        assert_eq!(err(call(&mut m, "f", &[], &[], &[])), OutlineError::Gone);
        assert_eq!(print(&m), before);
    }

    #[test]
    fn nested_calls_and_parameters_handed_through_are_inlined() {
        let text = "awqir 1
            fused @a (%x: f16[B,6], $g: f16[6]) { %y = rms_norm %x, $g {eps=1e-5} return %y, %x }
            fused @b (%x: f16[B,6], $g: f16[6]) { %y, %z = fused @a(%x, $g) %w = add %y, %z return %w }
            region @r (%p: f16[B,6]) { $h = \"h\" : f16[6] %q = fused @b(%p, $h) return %q }";
        let plain = "awqir 1 region @r (%p: f16[B,6]) { $h = \"h\" : f16[6] %y = rms_norm %p, $h {eps=1e-5}
            %q = add %y, %p return %q }";
        let mut m = module(text);
        inline_fused(&mut m.regions[0], &m.fused).unwrap();
        assert!(isomorphic(&m.regions[0], &module(plain).regions[0]), "{}", print(&m));
        assert_eq!(m.regions[0].value(m.regions[0].results()[0]).name, "q".into());
    }

    #[test]
    fn calls_without_end_and_without_definition_are_errors() {
        let mut m = module(
            "awqir 1 fused @a (%x: f16[B]) { %y = silu %x return %y }
            fused @b (%x: f16[B]) { %y = fused @a(%x) return %y }
            region @r (%p: f16[B]) { %q = fused @b(%p) return %q }",
        );
        let known = std::mem::take(&mut m.fused);
        assert_eq!(inline_fused(&mut m.regions[0].clone(), &known[..1]), Err(InlineError::Unknown("b".into())));
        // @a calls itself, which only an unverified module can hold.
        let mut own = known.clone();
        own[0].body = known[1].body.clone();
        assert_eq!(inline_fused(&mut m.regions[0], &own), Err(InlineError::Recursive("a".into())));
    }

    #[test]
    fn calls_that_multiply_are_stopped() {
        let mut text = "awqir 1 fused @f0 (%x: f16[B]) { %y = silu %x return %y }\n".to_owned();
        for i in 1..40 {
            let below = i - 1;
            text += &format!(
                "fused @f{i} (%x: f16[B]) {{ %y = fused @f{below}(%x) %z = fused @f{below}(%y) return %z }}\n"
            );
        }
        let mut m = module(&(text + "region @r (%p: f16[B]) { %q = fused @f39(%p) return %q }"));
        assert_eq!(inline_fused(&mut m.regions[0], &m.fused), Err(InlineError::TooLarge));
    }
}
