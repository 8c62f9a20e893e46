//! `study calibration`: how much calibration text a method needs, and what it matters that the text is of another kind
//! than what the model reads later. The paper's figure 8.

use awqc_ir::Quant;
use awqc_passes::Registry;
use serde_json::json;

use super::activations::{Calibrated, statistics};
use super::methods::{Quantized, key, pipeline, profiled};
use super::{Axes, Lab, Outcome, Text, cells};
use crate::failure::{Exit, Failure};
use crate::resume::digest;
use crate::target::Method;

/// What to study.
pub struct Settings {
    /// The methods.
    pub methods: Vec<Method>,
    /// How weights are rounded.
    pub quant: Quant,
    /// Calibration texts.
    pub texts: Vec<Text>,
    /// Numbers of windows of each.
    pub sizes: Vec<usize>,
}

/// Runs the study.
///
/// # Errors
/// When a calibration text is too short, a pass fails, the model cannot be run, or the user interrupts.
pub fn run(lab: &mut Lab<'_>, registry: &Registry, settings: &Settings) -> Result<Outcome, Failure> {
    let Settings { methods, quant, texts, sizes } = settings;
    if let (Some(most), Some(short)) = (sizes.iter().max(), texts.iter().min_by_key(|t| t.windows.len()))
        && short.windows.len() < *most
    {
        let message = format!("{}: {} calibration windows, {most} are asked for", short.name, short.windows.len());
        return Err(Failure::new(Exit::Usage, message).help("give a longer text, or smaller numbers with --samples"));
    }
    let axes = Axes { x: "windows", label: "calibration windows", log: true, series: &["method", "calibrated_on"] };
    let length = texts.first().and_then(|t| t.windows.first()).map_or(0, Vec::len);
    let fixed = json!({
        "quant": quant.to_string(),
        "window_tokens": length,
        "methods": methods.iter().map(|m| (m.name(), pipeline(*m))).collect::<Vec<_>>(),
    });
    let mut outcome = lab.begin("calibration", fixed, axes)?;
    for text in texts {
        for size in sizes {
            let windows: Vec<Vec<i32>> = text.windows.iter().take(*size).cloned().collect();
            let label = |method: &Method| format!("{} {quant} {} {size}", method.name(), text.name);
            let key = |method: &Method| key(&label(method), *method, *quant, &windows);
            let mut folder = None;
            if methods.iter().any(|m| profiled(*m) && !lab.knows(&key(m))) {
                let name = format!("{}-{size}-{}", text.name, digest(&windows));
                folder = Some(statistics(lab, Calibrated::Windows(windows.clone()), &name)?);
            }
            for method in methods {
                let found: Quantized =
                    lab.score(&key(method), |lab| lab.quantized(registry, *method, *quant, folder.as_mut(), &windows))?;
                let row = cells([
                    ("method", method.name().into()),
                    ("calibrated_on", text.name.as_str().into()),
                    ("windows", json!(size)),
                ]);
                lab.add(&mut outcome, &label(method), row, &found.nll)?;
            }
            // The next size has its own.
            folder.map_or(Ok(()), |f| f.remove())?;
        }
    }
    Ok(outcome)
}
