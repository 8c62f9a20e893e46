//! Raising: from a front end's module of foreign ops, all in one region, to this language.
//!
//! What an exporter made of a norm or of attention is recognised by rewrite rules in the language of all rewrites
//! (`patterns.awqrw`, then `leaves.awqrw`); then the region is cut where nothing but the residual stream goes through
//! ([`cut`]), so that layers can be calibrated one by one.

mod cut;

use awqc_ir::{Def, FusedDef, Module, NodeId, Op, Region, Uses};

use crate::rewrite::{Found, Rewrite, Rule, parse_rules};

/// Exporters' idioms.
const PATTERNS: &str = include_str!("patterns.awqrw");

/// Ops that mean what their names say.
const LEAVES: &str = include_str!("leaves.awqrw");

/// Why a module cannot be raised.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RaiseError {
    /// No rule recognised an op.
    #[error("{op} at node `{node}` is not recognised{near}; {left} ops are left")]
    Left {
        /// What the other system calls it.
        op: String,
        /// Where it stands there.
        node: String,
        /// What a rule missed.
        near: String,
        /// How many ops are not recognised.
        left: usize,
    },
    /// The layers of the model cannot be told apart.
    #[error("{0}")]
    Layers(String),
    /// The rules are wrong.
    #[error("{0}")]
    Rules(String),
}

/// Raises the only region of a module, with `rules` of the user's before those of this crate.
///
/// # Errors
/// When an op is not recognised, or the model does not fall into layers.
pub fn raise(module: &mut Module, rules: &[Rule]) -> Result<(), RaiseError> {
    let own = |text| parse_rules(text).map_err(|e| RaiseError::Rules(e.to_string()));
    let patterns: Vec<Rule> = rules.iter().cloned().chain(own(PATTERNS)?).collect();
    let leaves = own(LEAVES)?;
    for region in &mut module.regions {
        sweep(region);
        exhaust(&patterns, region, &mut module.fused)?;
        exhaust(&leaves, region, &mut module.fused)?;
        let all: Vec<&Rule> = patterns.iter().chain(&leaves).collect();
        complete(&all, region)?;
        region.compact();
    }
    cut::into_layers(module).map_err(RaiseError::Layers)
}

/// Applies rules until none applies.
fn exhaust(rules: &[Rule], region: &mut Region, fused: &mut Vec<FusedDef>) -> Result<(), RaiseError> {
    let limit = 64 + 16 * region.order().len();
    let mut applied = 0;
    loop {
        let before = applied;
        let mut uses = Uses::of(region);
        for root in region.order().to_vec() {
            for rule in rules {
                if region.get_node(root).is_none() {
                    break;
                }
                if let Found::Patch(patch) = rule.find(region, &uses, root)
                    && patch.apply(region, fused).is_ok()
                {
                    uses = Uses::of(region);
                    applied += 1;
                }
            }
        }
        sweep(region);
        if applied == before {
            return Ok(());
        }
        if applied > limit {
            return Err(RaiseError::Rules(format!("after {limit} rewrites there is no end: some undo each other")));
        }
    }
}

/// Removes what nothing uses.
fn sweep(region: &mut Region) {
    let mut live: Vec<bool> = vec![false; region.value_ids().count()];
    region.results().iter().for_each(|r| live[r.index()] = true);
    let mut dead = std::collections::BTreeSet::new();
    for (id, node) in region.nodes().rev() {
        if node.results.iter().any(|r| live[r.index()]) {
            node.operands.iter().filter_map(|o| o.value()).for_each(|v| live[v.index()] = true);
        } else {
            dead.insert(id);
        }
    }
    region.remove_all(&dead);
}

/// Fails where a foreign op is left.
fn complete(rules: &[&Rule], region: &Region) -> Result<(), RaiseError> {
    let foreign = |id: NodeId| {
        let Op::Foreign(f) = &region.node(id).op else { return None };
        Some(f.clone())
    };
    let left: Vec<NodeId> = region.order().iter().copied().filter(|id| foreign(*id).is_some()).collect();
    let Some((first, op)) = left.first().and_then(|id| Some((*id, foreign(*id)?))) else { return Ok(()) };
    let node = op.attributes.get("node").and_then(|v| v.as_str()).unwrap_or_default().to_owned();
    let uses = Uses::of(region);
    let miss = left.iter().find_map(|id| {
        rules.iter().find_map(|rule| match rule.find(region, &uses, *id) {
            Found::Near(why) if reaches(region, *id, first) => {
                Some(format!("; the rule `{}` nearly applied: {why}", rule.name()))
            }
            Found::Near(_) | Found::Nothing | Found::Patch(_) => None,
        })
    });
    Err(RaiseError::Left { op: op.op, node, near: miss.unwrap_or_default(), left: left.len() })
}

/// Whether `node` is `of`, or uses it at some remove.
fn reaches(region: &Region, node: NodeId, of: NodeId) -> bool {
    let mut open = vec![node];
    let mut seen = std::collections::BTreeSet::new();
    while let Some(id) = open.pop() {
        if id == of {
            return true;
        }
        if seen.insert(id) {
            let values = region.node(id).operands.iter().filter_map(|o| o.value());
            open.extend(values.filter_map(|v| match region.value(v).def {
                Def::Result(n, _) => Some(n),
                Def::Param(_) => None,
            }));
        }
    }
    false
}
