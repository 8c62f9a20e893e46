//! Evaluating: perplexity over windows of tokens, and the distance from another model, in one pass over both.

use std::path::Path;

use awqc_exec::stream::{self, Ready};
use awqc_exec::{Control, Progress as At};
use awqc_ir::verify::verify;
use rayon::prelude::*;

use crate::failure::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::metrics::{Metrics, Summary, score};
use crate::model::Model;
use crate::progress::Progress;

/// Pieces of logits that are in memory together.
const TOGETHER: usize = 4;

/// Measures `model` on windows of tokens: every token but a window's first is a target.
///
/// # Errors
/// When a model cannot be run, a token is outside a vocabulary, or the user interrupts.
pub fn evaluate(
    model: &Model,
    against: Option<&Model>,
    windows: &[Vec<i32>],
    interrupt: &Interrupt,
    quiet: bool,
) -> Result<Summary, Failure> {
    let model = ready(model, windows, "evaluate", interrupt, quiet)?;
    let against = against.map(|m| ready(m, windows, "reference", interrupt, quiet)).transpose()?;
    let mut metrics = Metrics::default();
    let pieces = model.pieces();
    let mut progress = Progress::new("logits", pieces.len() as u64, quiet);
    for group in pieces.chunks(TOGETHER) {
        interrupt.check()?;
        let part = |piece: &stream::Piece| -> Result<Metrics, Failure> {
            let logits = model.logits(piece)?;
            let reference = against.as_ref().map(|m| m.logits(piece)).transpose()?;
            let vocab = logits.cols();
            if let Some(r) = reference.as_ref().filter(|r| r.cols() != vocab) {
                return Err(Failure::new(
                    Exit::BadInput,
                    format!("the vocabularies differ: {vocab} tokens and {}", r.cols()),
                ));
            }
            let mut metrics = Metrics::default();
            for (i, row) in logits.data.chunks(vocab.max(1)).enumerate() {
                let Some(target) = windows[piece.window].get(piece.first + i + 1) else { continue };
                let reference = reference.as_ref().map(|r| &r.data[i * vocab..(i + 1) * vocab]);
                let (nll, against) =
                    usize::try_from(*target).ok().and_then(|t| score(row, t, reference)).ok_or_else(|| {
                        Failure::new(Exit::BadInput, format!("token {target} is outside the vocabulary of {vocab}"))
                    })?;
                metrics.push(nll, against);
            }
            Ok(metrics)
        };
        for part in group.par_iter().map(part).collect::<Result<Vec<_>, Failure>>()? {
            metrics.append(part);
            progress.step("");
        }
    }
    progress.finish();
    let summary = metrics.summary();
    if !summary.perplexity.is_finite() {
        return Err(Failure::new(Exit::BadInput, "the model's logits are not finite"));
    }
    Ok(summary)
}

/// The logits of all windows, `[windows, length, vocab]`, which must be of one length.
///
/// # Errors
/// As [`evaluate`].
pub fn logits(
    model: &Model,
    windows: &[Vec<i32>],
    interrupt: &Interrupt,
    quiet: bool,
) -> Result<(Vec<usize>, Vec<f32>), Failure> {
    let length = windows.first().map_or(0, Vec::len);
    if windows.iter().any(|w| w.len() != length) {
        return Err(Failure::new(Exit::BadInput, "logits can be saved for windows of one length only"));
    }
    let ready = ready(model, windows, "evaluate", interrupt, quiet)?;
    let (mut data, mut vocab) = (Vec::new(), 0);
    for piece in ready.pieces() {
        interrupt.check()?;
        let tensor = ready.logits(&piece)?;
        vocab = tensor.cols();
        data.extend(tensor.data);
    }
    Ok((vec![windows.len(), length, vocab], data))
}

/// A model whose windows have reached the last region.
fn ready<'a>(
    model: &'a Model,
    windows: &[Vec<i32>],
    label: &str,
    interrupt: &Interrupt,
    quiet: bool,
) -> Result<Ready<'a>, Failure> {
    let module = verify(&model.module).map_err(|d| Failure::new(Exit::BadInput, d))?;
    let body = model.module.regions.len().saturating_sub(1);
    let progress = std::sync::Mutex::new(Progress::new(label, body as u64, quiet));
    let report = move |at: &At| {
        if let (true, Ok(mut progress)) = (at.done == at.windows, progress.lock()) {
            progress.step(&at.region.to_string());
        }
    };
    let control = Control::new().with_interrupt(interrupt.flag()).with_progress(report);
    Ok(stream::prepare(module, model.source.as_ref(), windows, &control)?)
}

/// Writes f32 numbers as tensor `name` of a safetensors file, whole or not at all.
///
/// # Errors
/// When the file cannot be written.
pub fn save(path: &Path, name: &str, shape: Vec<usize>, data: &[f32]) -> Result<(), Failure> {
    let bytes: Vec<u8> = data.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &bytes)
        .map_err(|e| Failure::new(Exit::Failed, e))?;
    let file = safetensors::serialize([(name, view)], None).map_err(|e| Failure::new(Exit::Failed, e))?;
    crate::files::write(path, &file)
}
