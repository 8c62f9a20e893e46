//! Slices of the same channels that do not overlap are one split.

use std::collections::{BTreeMap, BTreeSet};

use awqc_ir::op::Split;
use awqc_ir::{NodeId, Op, Operand, Region, ValueId};

/// A slice: its node, where it begins, and how long it is, in each run of channels.
struct Cut {
    node: NodeId,
    start: u64,
    size: u64,
}

/// Puts a `split` in the place of foreign slices whose pieces do not overlap. Others stay, and are refused later.
pub(super) fn to_splits(region: &mut Region) {
    let mut tried: BTreeSet<(ValueId, u64)> = BTreeSet::new();
    // One at a time: what is cut may itself be a slice.
    while let Some(((of, heads), cuts)) = groups(region).into_iter().find(|(key, _)| !tried.contains(key)) {
        tried.insert((of, heads));
        to_split(region, of, heads, &cuts);
    }
}

/// The slices that are there, by what they cut.
fn groups(region: &Region) -> BTreeMap<(ValueId, u64), Vec<Cut>> {
    let mut cuts: BTreeMap<(ValueId, u64), Vec<Cut>> = BTreeMap::new();
    for (node, at) in region.nodes() {
        let (Op::Foreign(f), [Operand::Value(of)]) = (&at.op, at.operands.as_slice()) else { continue };
        let number = |key: &str| f.attributes.get(key).and_then(serde_json::Value::as_u64);
        let numbers = (number("heads"), number("start"), number("size"));
        if let ("Slice", (Some(heads), Some(start), Some(size))) = (f.op.as_str(), numbers) {
            cuts.entry((*of, heads)).or_default().push(Cut { node, start, size });
        }
    }
    cuts
}

fn to_split(region: &mut Region, of: ValueId, heads: u64, cuts: &[Cut]) {
    let Some(run) = region.value(of).ty.channels().and_then(|c| c.checked_div(heads)) else { return };
    let mut ends: Vec<u64> = cuts.iter().flat_map(|c| [c.start, c.start + c.size]).chain([0, run]).collect();
    ends.sort_unstable();
    ends.dedup();
    let sizes: Vec<u64> = ends.windows(2).map(|w| w[1] - w[0]).collect();
    let piece = |c: &Cut| ends.iter().position(|e| *e == c.start).filter(|i| sizes.get(*i) == Some(&c.size));
    let pieces: Option<Vec<usize>> = cuts.iter().map(piece).collect();
    let first = cuts.iter().map(|c| c.node).min_by_key(|n| region.position(*n));
    let (Some(pieces), Some(first)) = (pieces, first) else { return };
    let names: Vec<String> = (0..sizes.len()).map(|i| format!("part{i}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let split = Split { sizes, heads };
    let Ok(made) = region.insert_before(first, split.into(), vec![Operand::Value(of)], &names, &[]) else { return };
    let parts = region.node(made).results.clone();
    for (cut, piece) in cuts.iter().zip(pieces) {
        if let (Some(old), Some(new)) = (region.node(cut.node).results.first().copied(), parts.get(piece)) {
            region.replace_value(old, *new);
            region.remove(cut.node);
        }
    }
}
