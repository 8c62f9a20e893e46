//! Which weights share numbers with another weight, so that scaling one of them would contradict the other.

use std::collections::{BTreeMap, BTreeSet};

use awqc_ir::{Name, Region, WeightExpr, WeightId};

/// A run of rows of a checkpoint tensor; `None` is all of it.
type Rows = Option<(u64, u64)>;

/// The used weights that must not be scaled: those over a tensor of `shared` (full names), those over rows of a tensor
/// that another weight covers too, and those that have no tensor below them at all.
pub(super) fn pinned(region: &Region, shared: &BTreeSet<String>) -> Vec<WeightId> {
    let used = region.used_weights();
    let mut covered: BTreeMap<Name, Vec<(WeightId, Rows)>> = BTreeMap::new();
    let mut pinned = BTreeSet::new();
    for w in &used {
        let mut pieces = Vec::new();
        if !collect(region, *w, None, &mut pieces) {
            pinned.insert(*w);
        }
        for (name, rows) in pieces {
            if shared.contains(&region.tensor_name(&name)) {
                pinned.insert(*w);
            }
            covered.entry(name).or_default().push((*w, rows));
        }
    }
    for pieces in covered.values() {
        for (i, (a, ra)) in pieces.iter().enumerate() {
            for (b, rb) in &pieces[i + 1..] {
                if overlap(*ra, *rb) {
                    pinned.extend([*a, *b]);
                }
            }
        }
    }
    // A weight that repeats its own rows overlaps itself: its copies would have to be scaled alike.
    used.into_iter().filter(|w| pinned.contains(w)).collect()
}

fn overlap(a: Rows, b: Rows) -> bool {
    match (a, b) {
        (Some((a, la)), Some((b, lb))) => a < b.saturating_add(lb) && b < a.saturating_add(la),
        (None, _) | (_, None) => true,
    }
}

/// The pieces of tensors below a weight; false if something else than a tensor is.
fn collect(region: &Region, w: WeightId, rows: Rows, out: &mut Vec<(Name, Rows)>) -> bool {
    match &region.weight(w).expr {
        WeightExpr::Source(name) | WeightExpr::Packed { tensor: name, .. } => {
            out.push((name.clone(), rows));
            true
        }
        WeightExpr::Param(_) => false,
        // A slice of a slice of a tensor is a run of its rows; of anything else we do not keep track.
        WeightExpr::Rows { of, start, len } => {
            let start = rows.map_or(*start, |(inner, _)| start.saturating_add(inner));
            let len = rows.map_or(*len, |(_, len)| len);
            collect(region, *of, Some((start, len)), out)
        }
        WeightExpr::Mul { of, .. }
        | WeightExpr::Div { of, .. }
        | WeightExpr::Offset { of, .. }
        | WeightExpr::Clip { of, .. }
        | WeightExpr::Codes { of, .. }
        | WeightExpr::Quant(of)
        | WeightExpr::Pack(of) => collect(region, *of, rows, out),
        WeightExpr::Transpose(of) => collect(region, *of, None, out),
        // Whatever rows of a stack are used, all of its parts count as used whole.
        WeightExpr::Stack(parts) => {
            let mut known = true;
            for part in parts {
                known &= collect(region, *part, None, out);
            }
            known
        }
        WeightExpr::Cat { axis, parts } => {
            let rows = if *axis == 0 { None } else { rows };
            let mut known = true;
            for part in parts {
                known &= collect(region, *part, rows, out);
            }
            known
        }
    }
}
