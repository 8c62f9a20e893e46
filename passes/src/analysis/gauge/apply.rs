//! Scaling the parameters of a site: the weights become `div` and `mul` expressions over one data vector.

use awqc_ir::{Data, DataId, DataMap, DataRef, Dim, Region, WeightExpr, WeightId};

use super::{ParamUse, Site};
use crate::facts::Facts;

/// Divides the site's producers, and the facts of its values, by `scales`, and multiplies its consumers: the function
/// stays the same. The vector becomes a data entry `#s…` with `label`; its id is returned.
///
/// `scales` are `site.free` positive numbers; missing ones count as 1.
pub fn apply(region: &mut Region, site: &Site, scales: &[f32], label: &str, facts: &mut Facts) -> DataId {
    let scales: Vec<f32> = (0..site.free).map(|i| scales.get(i).copied().unwrap_or(1.0)).collect();
    let id = add_data(region, label, scales.clone());
    for p in &site.producers {
        let by = data_ref(region, p, id, &scales, label);
        if p.offset == 0.0 {
            wrap(region, p.weight, |of| WeightExpr::Div { axis: p.axis, of, by });
        } else {
            wrap(region, p.weight, |of| WeightExpr::Offset { of, by: p.offset });
            wrap(region, p.weight, |of| WeightExpr::Div { axis: p.axis, of, by });
            wrap(region, p.weight, |of| WeightExpr::Offset { of, by: -p.offset });
        }
    }
    for p in &site.consumers {
        let by = data_ref(region, p, id, &scales, label);
        wrap(region, p.weight, |of| WeightExpr::Mul { axis: p.axis, of, by });
    }
    for v in &site.values {
        let factors = per_channel(&v.entry, &scales);
        if let Some(stats) = facts.inputs.get_mut(&v.value) {
            let experts = stats.len().max(1);
            let parts = factors.chunks((factors.len() / experts).max(1));
            stats.iter_mut().zip(parts).for_each(|(s, factors)| s.divide(factors));
        }
    }
    id
}

/// The factor of each channel: its scale, or 1.
pub fn per_channel(entry: &[Option<u32>], scales: &[f32]) -> Vec<f32> {
    entry.iter().map(|e| e.and_then(|e| scales.get(e as usize)).copied().unwrap_or(1.0)).collect()
}

/// The map of that form which gives channel `c` of an axis the entry `entry[c]` of a vector of `free`, if there is one.
pub fn data_map(entry: &[Option<u32>], free: usize) -> Option<DataMap> {
    let (channels, entries) = (entry.len() as u64, free as u64);
    let fits = |map: &DataMap| {
        let same = |(c, e): (usize, &Option<u32>)| map.entry(c as u64, entries) == e.map(u64::from);
        map.len(entries) == channels && entry.iter().enumerate().all(same)
    };
    // A run repeats where the first channel's entry comes back; without repetition the whole vector is one run.
    let back = entry.iter().skip(1).position(|e| *e == Some(0)).map_or(free, |at| at + 1);
    let start = entry.iter().position(Option::is_some).unwrap_or(0) as u64;
    let candidates = [
        DataMap::Whole,
        DataMap::Tie { width: back as u64, times: channels / entries.max(1) },
        DataMap::Within { start, total: channels },
    ];
    candidates.into_iter().find(fits)
}

fn data_ref(region: &mut Region, param: &ParamUse, id: DataId, scales: &[f32], label: &str) -> DataRef {
    // What all matrices of a stack have in common is said once.
    let channels = region.weight(param.weight).ty.shape.get(param.axis).and_then(Dim::as_const).unwrap_or(0);
    let first = param.entry.get(..channels as usize).unwrap_or(&param.entry);
    let alike = !first.is_empty() && param.entry.chunks(first.len()).all(|part| part == first);
    let entry = if alike { first } else { &param.entry };
    match data_map(entry, scales.len()) {
        Some(map) => DataRef { id, map },
        None => {
            let expanded = add_data(region, &format!("{label}, by channel"), per_channel(entry, scales));
            DataRef { id: expanded, map: DataMap::Whole }
        }
    }
}

fn add_data(region: &mut Region, label: &str, values: Vec<f32>) -> DataId {
    let name = region.fresh_data_name("s");
    region.add_data(Data { name, label: label.into(), shape: vec![values.len() as u64], values: Some(values.into()) })
}

fn wrap(region: &mut Region, weight: WeightId, term: impl FnOnce(WeightId) -> WeightExpr) {
    let ty = region.weight(weight).ty.clone();
    region.wrap_weight(weight, ty, term);
}
