//! What a rewrite wants to change, and the checks under which it is changed.
//!
//! A rewrite only looks; it hands over a [`Patch`]. Applying one checks the types at the cut and, for outlining, that
//! the nodes are *contained* (no interior value is used outside), *convex* (nothing outside lies between them) and
//! *non-overlapping* (each is still there). A refused patch leaves the region's function as it was.

use awqc_ir::{Def, FusedDef, Name, NodeId, Op, Operand, Region, Uses, ValueId, outline};

/// A change to a region.
#[derive(Clone, Debug, PartialEq)]
pub enum Patch {
    /// Nodes become the body of a fused op.
    Outline(Outline),
    /// Values are computed in another way.
    Replace(Replace),
}

/// Nodes that become the body of a fused op, which takes their place.
#[derive(Clone, Debug, PartialEq)]
pub struct Outline {
    /// The fused op's name; an instance of other types gets a suffix.
    pub kernel: Name,
    /// The nodes.
    pub nodes: Vec<NodeId>,
    /// What the call takes, and what the body calls it.
    pub operands: Vec<(Name, Operand)>,
    /// What the call returns: results of the nodes, every one that is used outside among them.
    pub results: Vec<ValueId>,
}

/// Values that are computed in another way.
#[derive(Clone, Debug, PartialEq)]
pub struct Replace {
    /// The nodes that the patch was found at; those that nothing uses any more are removed.
    pub nodes: Vec<NodeId>,
    /// New nodes, each using only earlier ones.
    pub ops: Vec<NewOp>,
    /// Each left value is replaced by the right one, of the same type.
    pub swaps: Vec<(ValueId, Input)>,
}

/// A node to be made; its result types are inferred.
#[derive(Clone, Debug, PartialEq)]
pub struct NewOp {
    /// What it computes.
    pub op: Op,
    /// Its inputs.
    pub operands: Vec<Input>,
    /// Names for the results, for people.
    pub names: Vec<Name>,
}

/// An input of a new node, or a replacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Input {
    /// Something of the region.
    Old(Operand),
    /// A result of a new node of the same patch.
    New {
        /// Its position in [`Replace::ops`].
        op: usize,
        /// Which of its results.
        result: usize,
    },
}

impl Patch {
    /// Applies the patch.
    ///
    /// # Errors
    /// A sentence that says which check failed; the region then computes what it did.
    pub fn apply(&self, region: &mut Region, fused: &mut Vec<FusedDef>) -> Result<(), String> {
        match self {
            Patch::Outline(outline) => outline.apply(region, fused),
            Patch::Replace(replace) => replace.apply(region, fused),
        }
    }
}

impl Outline {
    fn apply(&self, region: &mut Region, fused: &mut Vec<FusedDef>) -> Result<(), String> {
        let operands: Vec<Operand> = self.operands.iter().map(|(_, o)| *o).collect();
        let known = fused.len();
        outline(region, fused, &self.kernel, &self.nodes, &operands, &self.results).map_err(|e| e.to_string())?;
        // A new definition speaks in the rule's names, not in those of the place where it was found first.
        if let Some(def) = fused.get_mut(known) {
            let params = def.body.params().to_vec();
            for (param, (name, _)) in params.into_iter().zip(&self.operands) {
                match param {
                    Operand::Value(v) => def.body.rename_value(v, name.clone()),
                    Operand::Weight(w) => def.body.rename_weight(w, Some(name.clone())),
                }
            }
        }
        Ok(())
    }
}

impl Replace {
    fn apply(&self, region: &mut Region, fused: &[FusedDef]) -> Result<(), String> {
        let order = positions(region);
        let at = |node: NodeId| order.get(node.index()).copied().flatten();
        let matched: Vec<usize> = self.nodes.iter().filter_map(|n| at(*n)).collect();
        if matched.len() != self.nodes.len() {
            return Err("one of its nodes was rewritten already".into());
        }
        let defined = |region: &Region, input: &Input| match input {
            Input::Old(Operand::Value(v)) => match region.value(*v).def {
                Def::Result(node, _) => at(node).map(|p| p + 1),
                Def::Param(_) => Some(0),
            },
            Input::Old(Operand::Weight(_)) | Input::New { .. } => Some(0),
        };
        let inputs = self.ops.iter().flat_map(|o| &o.operands);
        let ready = inputs.map(|i| defined(region, i)).try_fold(0, |a, b| Some(a.max(b?)));
        let ready = ready.ok_or("one of its operands is gone")?;
        // Where the first replaced node stands, or as soon after as the inputs are there.
        let place = matched.iter().copied().filter(|p| *p >= ready).min().unwrap_or(ready);
        let uses = Uses::of(region);
        for (old, new) in &self.swaps {
            let from = match new {
                Input::New { .. } => place,
                Input::Old(_) => defined(region, new).ok_or("a replacement is gone")?,
            };
            if uses.nodes(*old).iter().filter_map(|(n, _)| at(*n)).any(|p| p < from) {
                return Err(format!("%{} is used before its replacement is computed", region.value(*old).name));
            }
        }
        let made = self.insert(region, place, fused)?;
        let result = self.swap(region, &made);
        match &result {
            Ok(()) => self.nodes.iter().rev().for_each(|n| remove_dead(region, *n, &self.nodes)),
            Err(_) => made.iter().for_each(|n| region.remove(*n)),
        }
        result
    }

    /// Makes the new nodes.
    fn insert(&self, region: &mut Region, place: usize, fused: &[FusedDef]) -> Result<Vec<NodeId>, String> {
        let mut made: Vec<NodeId> = Vec::new();
        for (i, new) in self.ops.iter().enumerate() {
            let op = self.typed(region, i, new.op.clone());
            let operands: Option<Vec<Operand>> = new.operands.iter().map(|i| resolve(region, &made, *i)).collect();
            let node = operands
                .ok_or_else(|| "a new node uses a later one".to_owned())
                .and_then(|o| insert_at(region, place + made.len(), op.clone(), o, &new.names, fused));
            match node {
                Ok(node) => made.push(node),
                Err(why) => {
                    made.into_iter().for_each(|n| region.remove(n));
                    return Err(why);
                }
            }
        }
        Ok(made)
    }

    /// A foreign op does not know its types, those of what it replaces, and where it stood there: where the matched one
    /// did.
    fn typed(&self, region: &Region, at: usize, mut op: Op) -> Op {
        if let Op::Foreign(f) = &mut op
            && f.results.is_empty()
        {
            let replaced = self.swaps.iter().find(|(_, new)| *new == Input::New { op: at, result: 0 });
            f.results.extend(replaced.map(|(old, _)| region.value(*old).ty.clone()));
            let mut places = self.nodes.iter().rev().filter_map(|n| {
                let Op::Foreign(f) = &region.get_node(*n)?.op else { return None };
                f.attributes.get("node").cloned()
            });
            if let (Some(place), false) = (places.next(), f.attributes.contains_key("node")) {
                f.attributes.insert("node".into(), place);
            }
        }
        op
    }

    /// Checks the types at the cut, then puts the new values in the place of the old ones.
    fn swap(&self, region: &mut Region, made: &[NodeId]) -> Result<(), String> {
        let mut swaps = Vec::new();
        for (old, new) in &self.swaps {
            let Some(Operand::Value(new)) = resolve(region, made, *new) else {
                return Err("a replacement is not a value".into());
            };
            let (a, b) = (region.value(*old), region.value(new));
            if a.ty != b.ty {
                return Err(format!("%{} is {}, its replacement would be {}", a.name, a.ty, b.ty));
            }
            swaps.push((*old, new));
        }
        for (old, new) in swaps {
            if made.contains(&definer(region, new).unwrap_or(NodeId::new(region.node_bound()))) {
                let name = region.value(old).name.clone();
                region.rename_value(new, name);
            }
            region.replace_value(old, new);
        }
        Ok(())
    }
}

fn definer(region: &Region, value: ValueId) -> Option<NodeId> {
    match region.value(value).def {
        Def::Result(node, _) => Some(node),
        Def::Param(_) => None,
    }
}

fn resolve(region: &Region, made: &[NodeId], input: Input) -> Option<Operand> {
    match input {
        Input::Old(operand) => Some(operand),
        Input::New { op, result } => region.node(*made.get(op)?).results.get(result).map(|v| Operand::Value(*v)),
    }
}

/// The place in program order of each node that is still there.
fn positions(region: &Region) -> Vec<Option<usize>> {
    let mut at = vec![None; region.node_bound()];
    for (i, node) in region.order().iter().enumerate() {
        at[node.index()] = Some(i);
    }
    at
}

fn insert_at(
    region: &mut Region,
    place: usize,
    op: Op,
    operands: Vec<Operand>,
    names: &[Name],
    fused: &[FusedDef],
) -> Result<NodeId, String> {
    let names: Vec<&str> = names.iter().map(|n| &**n).collect();
    let node = match region.order().get(place).copied() {
        Some(before) => region.insert_before(before, op, operands, &names, fused),
        None => region.append(op, operands, &names, fused),
    };
    node.map_err(|e| e.to_string())
}

/// Removes a node of `among` whose results nothing uses. If it stays, results that were replaced, and so share their
/// name with the replacement, get a new one.
fn remove_dead(region: &mut Region, node: NodeId, among: &[NodeId]) {
    let Some(results) = region.get_node(node).map(|n| n.results.clone()) else { return };
    let uses = Uses::of(region);
    if results.iter().all(|r| uses.count(*r) == 0) {
        region.remove(node);
        // What only this node used may be dead now.
        for other in among.iter().filter(|n| **n != node) {
            if region
                .get_node(*other)
                .is_some_and(|n| n.results.iter().any(|r| uses.nodes(*r).iter().any(|(u, _)| *u == node)))
            {
                remove_dead(region, *other, among);
            }
        }
    } else {
        for r in results.into_iter().filter(|r| uses.count(*r) == 0) {
            let name = region.fresh_value_name("unused");
            region.rename_value(r, name);
        }
    }
}
