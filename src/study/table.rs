//! The table of a study, for people.

use awqc_passes::remark::counted;
use comfy_table::{CellAlignment, Table, presets};
use serde_json::Value as Json;

use super::Outcome;

/// A row for each variant and text, with what was varied in front.
pub fn text(outcome: &Outcome) -> String {
    let mut keys: Vec<&str> = Vec::new();
    for row in &outcome.rows {
        for key in row.cells.keys().filter(|k| *k != "each") {
            if !keys.contains(&key.as_str()) {
                keys.push(key);
            }
        }
    }
    let several = outcome.texts.len() > 1;
    let mut head: Vec<String> = keys.iter().map(|k| k.replace('_', " ")).collect();
    head.extend(several.then(|| "text".to_owned()));
    head.extend(["perplexity".to_owned(), "over float".to_owned()]);
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(head);
    for row in &outcome.rows {
        let m = &row.measured;
        let mut line: Vec<String> = keys.iter().map(|k| row.cells.get(*k).map_or_else(String::new, plain)).collect();
        line.extend(several.then(|| row.text.clone()));
        line.extend([with_error(m.perplexity, m.perplexity_error), with_error(m.ratio, m.ratio_error)]);
        table.add_row(line);
    }
    let numbers = keys
        .iter()
        .enumerate()
        .filter(|(_, k)| outcome.rows.iter().all(|r| r.cells.get(**k).is_none_or(Json::is_number)));
    let last = keys.len() + usize::from(several);
    for at in numbers.map(|(i, _)| i).chain([last, last + 1]) {
        if let Some(column) = table.column_mut(at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let count = |n: &Json, thing: &str| counted(n.as_u64().unwrap_or(0), thing);
    let texts: Vec<String> = outcome
        .texts
        .iter()
        .map(|t| {
            format!("{}: {}, {}", plain(&t["name"]), count(&t["windows"], "window"), count(&t["tokens"], "target"))
        })
        .collect();
    format!("{}\n{table}\n{}\n", outcome.model, texts.join("; "))
}

fn plain(value: &Json) -> String {
    match value {
        Json::String(s) => s.clone(),
        Json::Number(n) => match n.as_f64() {
            Some(v) if n.is_f64() => digits(v),
            Some(_) | None => n.to_string(),
        },
        Json::Null | Json::Bool(_) | Json::Array(_) | Json::Object(_) => value.to_string(),
    }
}

/// Four digits that mean something.
fn digits(v: f64) -> String {
    if v != 0.0 && !(1e-3..1e5).contains(&v.abs()) {
        return format!("{v:.2e}");
    }
    let decimals = (3 - v.abs().max(1.0).log10().floor() as i32).max(0) as usize;
    let text = format!("{v:.decimals$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// A value with its error, to two digits of the error and two decimals at least.
fn with_error(v: f64, error: Option<f64>) -> String {
    if v >= 1e5 {
        return error.map_or_else(|| format!("{v:.2e}"), |e| format!("{v:.2e} ± {e:.0e}"));
    }
    let decimals = error.filter(|e| *e > 0.0).map_or(3, |e| (1 - e.log10().floor() as i32).clamp(2, 4) as usize);
    error.map_or_else(|| format!("{v:.3}"), |e| format!("{v:.decimals$} ± {e:.decimals$}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_that_mean_something() {
        assert_eq!([0.1, 1.0, 3.297, 0.000123, 64.0].map(digits), ["0.1", "1", "3.297", "1.23e-4", "64"]);
        assert_eq!(with_error(94.196, Some(4.407)), "94.20 ± 4.41");
        assert_eq!(with_error(1.00312, Some(0.00042)), "1.0031 ± 0.0004");
        assert_eq!(with_error(1.0, Some(0.0)), "1.000 ± 0.000");
        assert_eq!(with_error(4.6e5, Some(3.2e4)), "4.60e5 ± 3e4");
        assert_eq!(with_error(29.647, None), "29.647");
    }
}
