//! `study bits`: perplexity by method, bits and group: the paper's main table.

use awqc_ir::{Group, Quant};
use awqc_passes::Registry;
use serde_json::json;

use super::activations::{Calibrated, statistics};
use super::methods::{Quantized, key, pipeline, profiled};
use super::{Axes, Lab, Outcome, cells};
use crate::failure::Failure;
use crate::target::Method;

/// What to study.
pub struct Settings {
    /// The methods.
    pub methods: Vec<Method>,
    /// Bits and groups.
    pub quants: Vec<Quant>,
}

/// Runs the study. The statistics of activations are gathered once.
///
/// # Errors
/// When a pass fails, the model cannot be run, or the user interrupts.
pub fn run(
    lab: &mut Lab<'_>,
    registry: &Registry,
    settings: &Settings,
    calibrated: Calibrated,
) -> Result<Outcome, Failure> {
    let axes = Axes { x: "bits_per_weight", label: "bits a weight", log: false, series: &["method", "group"] };
    let fixed = json!({ "methods": settings.methods.iter().map(|m| (m.name(), pipeline(*m))).collect::<Vec<_>>() });
    let mut outcome = lab.begin("bits", fixed, axes)?;
    let windows = calibrated.windows().to_vec();
    let (mut folder, mut calibrated) = (None, Some(calibrated));
    for quant in &settings.quants {
        for method in &settings.methods {
            let label = format!("{} {quant}", method.name());
            let key = key(&label, *method, *quant, &[]);
            let needed = profiled(*method) && !lab.knows(&key);
            if let Some(calibrated) = calibrated.take_if(|_| needed) {
                folder = Some(statistics(lab, calibrated, "statistics")?);
            }
            let found: Quantized =
                lab.score(&key, |lab| lab.quantized(registry, *method, *quant, folder.as_mut(), &windows))?;
            let group = match quant.group {
                Group::Size(n) => json!(n),
                Group::Row => json!("row"),
            };
            let row = cells([
                ("method", method.name().into()),
                ("bits", quant.bits.into()),
                ("group", group),
                ("bits_per_weight", json!(found.bits_per_weight)),
            ]);
            lab.add(&mut outcome, &label, row, &found.nll)?;
        }
    }
    Ok(outcome)
}
