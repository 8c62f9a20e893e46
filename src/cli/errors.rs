//! The error that rounding made in the output of every linear, as a table of regions and linears.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde_json::Value as Json;

use crate::compile::Report;

/// The relative squared errors that `quantize` recorded, in percent; `None` if it recorded none.
pub(super) fn table(report: &Report) -> Option<String> {
    let records = report.records.get("quantize")?.as_array()?;
    let text = |record: &Json, key: &str| record[key].as_str().unwrap_or_default().to_owned();
    let (mut regions, mut linears): (Vec<String>, Vec<String>) = (Vec::new(), Vec::new());
    for record in records {
        for (list, key) in [(&mut regions, "region"), (&mut linears, "linear")] {
            let name = text(record, key);
            if !list.contains(&name) {
                list.push(name);
            }
        }
    }
    let error = |region: &str, linear: &str| {
        let own = |r: &&Json| text(r, "region") == region && text(r, "linear") == linear;
        records.iter().find(own).and_then(|r| r["relative_error"].as_f64())
    };
    let mean = |errors: &[f64]| {
        let n = errors.len();
        if n == 0 { String::new() } else { format!("{:.3}", 100.0 * errors.iter().sum::<f64>() / n as f64) }
    };
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    let head = ["error, %".to_owned()].into_iter().chain(linears.iter().cloned()).chain(["mean".to_owned()]);
    table.set_header(head.collect::<Vec<_>>());
    for region in &regions {
        let errors: Vec<Option<f64>> = linears.iter().map(|l| error(region, l)).collect();
        let cell = |e: &Option<f64>| e.map_or_else(String::new, |e| format!("{:.3}", 100.0 * e));
        let known: Vec<f64> = errors.iter().flatten().copied().collect();
        table.add_row([region.clone()].into_iter().chain(errors.iter().map(cell)).chain([mean(&known)]));
    }
    let columns = linears.iter().map(|l| regions.iter().filter_map(|r| error(r, l)).collect::<Vec<_>>());
    let means: Vec<String> = columns.map(|c| mean(&c)).collect();
    table.add_row(["mean".to_owned()].into_iter().chain(means).chain([String::new()]));
    for at in 1..=linears.len() + 1 {
        if let Some(column) = table.column_mut(at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    Some(format!("{}\n", table.trim_fmt()))
}
