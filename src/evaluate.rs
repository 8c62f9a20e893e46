//! Evaluating: perplexity over windows of tokens, and the distance from another model, in one pass over both.

use std::path::Path;

use awqc_exec::stream::{self, Piece, Ready};
use awqc_exec::{Control, Logits, Progress as At};
use awqc_ir::verify::verify;
use awqc_passes::{ExecError, Tensor};
use rayon::prelude::*;

use crate::engine::{Engine, EngineArgs, engine, on_device, packed};
use crate::failure::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::metrics::{Metrics, Summary, score};
use crate::model::Model;
use crate::progress::Progress;

/// Pieces of logits that are in memory together.
const TOGETHER: usize = 4;
/// Rows of a piece of a window that runs by itself.
const ROWS: usize = 128;

/// Measures `model` on windows of tokens: every token but a window's first is a target.
///
/// # Errors
/// When a model cannot be run, a token is outside a vocabulary, or the user interrupts.
pub fn evaluate(
    model: &Model,
    against: Option<&Model>,
    args: &EngineArgs,
    threads: usize,
    windows: &[Vec<i32>],
    interrupt: &Interrupt,
    quiet: bool,
) -> Result<Summary, Failure> {
    if let Some(other) = against {
        same_vocabulary(model, other)?;
    }
    let own = |m: &Model| packed(m) || on_device(m, args);
    if !own(model) && !against.is_some_and(own) {
        args.refuse()?;
    }
    let mut model = Scorer::new(model, args, threads, windows, "evaluate", interrupt, quiet)?;
    let mut against =
        against.map(|m| Scorer::new(m, args, threads, windows, "reference", interrupt, quiet)).transpose()?;
    let mut metrics = Metrics::default();
    let pieces = model.pieces();
    let mut progress = Progress::new("logits", pieces.len() as u64, quiet);
    for group in pieces.chunks(TOGETHER) {
        interrupt.check()?;
        let logits = model.logits(group)?;
        let reference = against.as_mut().map(|m| m.logits(group)).transpose()?;
        let part = |i: usize| -> Result<Metrics, Failure> {
            let (piece, logits) = (&group[i], &logits[i]);
            let reference = reference.as_ref().map(|r| &r[i]);
            let vocab = logits.cols();
            if let Some(r) = reference.filter(|r| r.cols() != vocab) {
                return Err(Failure::new(
                    Exit::BadInput,
                    format!("the vocabularies differ: {vocab} tokens and {}", r.cols()),
                ));
            }
            let mut metrics = Metrics::default();
            for (i, row) in logits.data.chunks(vocab.max(1)).enumerate() {
                let Some(target) = windows[piece.window].get(piece.first + i + 1) else { continue };
                let reference = reference.map(|r| &r.data[i * vocab..(i + 1) * vocab]);
                let (nll, against) =
                    usize::try_from(*target).ok().and_then(|t| score(row, t, reference)).ok_or_else(|| {
                        Failure::new(Exit::BadInput, format!("token {target} is outside the vocabulary of {vocab}"))
                    })?;
                metrics.push(nll, against);
            }
            Ok(metrics)
        };
        for part in (0..group.len()).into_par_iter().map(part).collect::<Result<Vec<_>, Failure>>()? {
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
    args: &EngineArgs,
    threads: usize,
    windows: &[Vec<i32>],
    interrupt: &Interrupt,
    quiet: bool,
) -> Result<(Vec<usize>, Vec<f32>), Failure> {
    let length = windows.first().map_or(0, Vec::len);
    if windows.iter().any(|w| w.len() != length) {
        return Err(Failure::new(Exit::BadInput, "logits can be saved for windows of one length only"));
    }
    let mut scorer = Scorer::new(model, args, threads, windows, "evaluate", interrupt, quiet)?;
    let (mut data, mut vocab) = (Vec::new(), 0);
    for piece in scorer.pieces() {
        interrupt.check()?;
        for tensor in scorer.logits(&[piece])? {
            vocab = tensor.cols();
            data.extend(tensor.data);
        }
    }
    Ok((vec![windows.len(), length, vocab], data))
}

fn same_vocabulary(model: &Model, other: &Model) -> Result<(), Failure> {
    let (a, b) = (model.vocabulary(), other.vocabulary());
    if a == b {
        return Ok(());
    }
    let say = |n: Option<u64>| n.map_or_else(|| "an unknown number of".to_owned(), |n| n.to_string());
    Err(Failure::new(Exit::BadInput, format!("the vocabularies differ: {} tokens and {}", say(a), say(b)))
        .help("compare a model with the one that it was made from"))
}

/// A model that gives logits piece by piece.
enum Scorer<'a> {
    /// All windows stand before the last region.
    Together(Ready<'a>),
    /// Windows run one after the other, from their first piece to their last.
    InTurn { session: Box<dyn Engine + 'a>, windows: &'a [Vec<i32>] },
}

impl<'a> Scorer<'a> {
    fn new(
        model: &'a Model,
        args: &EngineArgs,
        threads: usize,
        windows: &'a [Vec<i32>],
        label: &str,
        interrupt: &Interrupt,
        quiet: bool,
    ) -> Result<Self, Failure> {
        if packed(model) || on_device(model, args) {
            let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
            return Ok(Self::InTurn { session: engine(model, args, longest, threads)?, windows });
        }
        Ok(Self::Together(ready(model, windows, label, interrupt, quiet)?))
    }

    /// All logits, cut into pieces, in order of window and position.
    fn pieces(&self) -> Vec<Piece> {
        match self {
            Self::Together(ready) => ready.pieces(),
            Self::InTurn { windows, .. } => {
                let cut = |(window, ids): (usize, &Vec<i32>)| {
                    let len = ids.len();
                    (0..len).step_by(ROWS).map(move |first| Piece { window, first, len: ROWS.min(len - first) })
                };
                windows.iter().enumerate().flat_map(cut).collect()
            }
        }
    }

    /// The logits of some pieces, `[rows, vocab]` each. All pieces must be asked for in order.
    fn logits(&mut self, pieces: &[Piece]) -> Result<Vec<Tensor>, Failure> {
        match self {
            Self::Together(ready) => {
                Ok(pieces.par_iter().map(|p| ready.logits(p)).collect::<Result<Vec<_>, ExecError>>()?)
            }
            Self::InTurn { session, windows } => {
                let mut next = |p: &Piece| {
                    if p.first == 0 {
                        session.reset();
                    }
                    session.forward(&windows[p.window][p.first..p.first + p.len], Logits::All)
                };
                pieces.iter().map(&mut next).collect()
            }
        }
    }
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
