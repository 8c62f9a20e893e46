//! Where to look at the effect of changing some linears: the module that the AWQ paper compares outputs of.

use std::collections::BTreeSet;

use awqc_ir::{NodeId, Op, Region, Uses, ValueId};

/// The last value that everything from `nodes` flows through before it meets the residual stream or leaves the region.
///
/// That is a common post-dominator of the nodes: the nearest one, moved on along the chain of post-dominators until
/// the next one is an `add` of something that the nodes do not reach. For the projections of an attention this is the
/// attention's output, for gate and up the feed-forward's. `None` if the paths from `nodes` part for good.
pub fn objective(region: &Region, nodes: &[NodeId]) -> Option<ValueId> {
    let uses = Uses::of(region);
    let mut after: Vec<Option<BTreeSet<usize>>> = vec![None; region.node_bound()];
    let exit = region.node_bound();
    // Post-dominators of each node by position in program order, itself included. Backwards, so users come first.
    let position = |id: NodeId| region.position(id);
    for (id, node) in region.nodes().rev() {
        let mut common: Option<BTreeSet<usize>> = None;
        let mut meet = |set: BTreeSet<usize>| {
            common = Some(match common.take() {
                None => set,
                Some(c) => c.intersection(&set).copied().collect(),
            });
        };
        for result in &node.results {
            if uses.is_result(*result) {
                meet(BTreeSet::from([exit]));
            }
            for (user, _) in uses.nodes(*result) {
                if let Some(Some(set)) = after.get(user.index()) {
                    meet(set.clone());
                }
            }
        }
        let mut set = common.unwrap_or_default();
        set.insert(position(id));
        after[id.index()] = Some(set);
    }
    let mut chain: Option<BTreeSet<usize>> = None;
    for id in nodes {
        let set = after.get(id.index())?.clone()?;
        chain = Some(match chain {
            None => set,
            Some(c) => c.intersection(&set).copied().collect(),
        });
    }
    let reached = reached_from(region, nodes);
    let mut best = None;
    for at in chain? {
        let Some(id) = region.order().get(at).filter(|_| at != exit) else { break };
        let node = region.node(*id);
        let meets_residual = matches!(node.op, Op::Add(_))
            && node.operands.iter().filter_map(|o| o.value()).any(|v| !reached.contains(&v));
        if meets_residual {
            break;
        }
        // A node with several results is not one value; its users come later in the chain if they join again.
        if let [result] = node.results.as_slice() {
            best = Some(*result);
        }
    }
    best
}

/// Every value that depends on one of `nodes`.
fn reached_from(region: &Region, nodes: &[NodeId]) -> BTreeSet<ValueId> {
    let mut reached = BTreeSet::new();
    for (id, node) in region.nodes() {
        let depends =
            nodes.contains(&id) || node.operands.iter().filter_map(|o| o.value()).any(|v| reached.contains(&v));
        if depends {
            reached.extend(&node.results);
        }
    }
    reached
}
