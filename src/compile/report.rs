//! What a compile says of itself.

use std::path::PathBuf;

use awqc_passes::manager::Manager;
use awqc_passes::{Remark, RemarkKind, Remarks};
use serde::Serialize;
use serde_json::{Value as Json, json};

use super::Request;
use crate::size::Tally;

/// What became of a compile. The first part also stands in the artefact as `report.json`.
#[derive(Serialize)]
pub struct Outcome {
    /// The artefact's folder.
    pub artefact: PathBuf,
    /// Wall time.
    pub seconds: f64,
    /// Largest resident memory, where the system tells.
    pub peak_rss_bytes: Option<u64>,
    /// Seconds and counters of each pass.
    pub passes: Vec<PassSummary>,
    /// The part that does not depend on the machine.
    #[serde(flatten)]
    pub report: Report,
}

/// What one pass did.
#[derive(Serialize)]
pub struct PassSummary {
    /// The pass.
    pub pass: String,
    /// Wall time over all regions.
    pub seconds: f64,
    /// Its counters.
    pub stats: serde_json::Map<String, Json>,
}

/// What the artefact says of itself: the same for the same input.
#[derive(Serialize)]
pub struct Report {
    /// The target.
    pub target: String,
    /// The pipeline as it ran.
    pub pipeline: String,
    /// The seed of random weights, if the model has no others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub random_weights: Option<u64>,
    /// Where calibration tokens came from, and how many.
    pub calibration: Json,
    /// Weights in linears, embedding and norms.
    pub parameters: u64,
    /// Weights that were quantized.
    pub quantized_parameters: u64,
    /// Mean bits of a quantized weight, scales and zero points included.
    pub bits_per_weight: f64,
    /// What `awq-scale` decided at each site.
    pub sites: Vec<Json>,
    /// What other passes recorded, by pass.
    pub records: serde_json::Map<String, Json>,
    /// What people should look at.
    pub remarks: Vec<Remark>,
    /// What people should know of the kernels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

pub(super) fn report(
    request: &Request<'_>,
    pipeline: &str,
    calibration: Json,
    tally: &Tally,
    remarks: &mut Remarks,
) -> Report {
    let mut sites = Vec::new();
    let mut records = serde_json::Map::new();
    for (pass, record) in std::mem::take(&mut remarks.records) {
        if pass == "awq-scale" {
            sites.push(record);
        } else if let Json::Array(list) = records.entry(pass).or_insert_with(|| json!([])) {
            list.push(record);
        }
    }
    Report {
        target: request.target.name.to_owned(),
        pipeline: pipeline.to_owned(),
        random_weights: request.random,
        calibration,
        parameters: tally.parameters,
        quantized_parameters: tally.quantized,
        bits_per_weight: tally.bits_per_weight(),
        sites,
        records,
        remarks: remarks.list.iter().filter(|r| r.kind == RemarkKind::Warning).cloned().collect(),
        notes: Vec::new(),
    }
}

pub(super) fn summaries(manager: &Manager, remarks: &Remarks) -> Vec<PassSummary> {
    let stats_of = |pass: &str| {
        let own = remarks.stats.iter().filter(|((p, _), _)| p == pass);
        own.map(|((_, name), value)| (name.clone(), json!(value))).collect()
    };
    manager
        .times()
        .map(|(pass, time)| PassSummary { pass: pass.to_owned(), seconds: time.as_secs_f64(), stats: stats_of(pass) })
        .collect()
}
