//! Evaluating: perplexity over windows of tokens, and the distance from another model, in one pass over both.

use std::path::Path;

use awqc_exec::stream::{self, Piece, Ready};
use awqc_exec::{Control, Logits, Progress as At};
use awqc_ir::verify::verify;
use awqc_ir::{Module, TensorSource};
use awqc_passes::{ExecError, Tensor};
use rayon::prelude::*;

use crate::device::has_kernels;
use crate::engine::{Engine, EngineArgs, RunsOn, Where, by_burn, engine, on_device, packed};
use crate::failure::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::logits::{Row, Saved, Saving};
use crate::metrics::{Clusters, Expected, Metrics, Summary, score};
use crate::model::Model;
use crate::progress::Progress;

/// Pieces of logits that are in memory together.
const TOGETHER: usize = 4;
/// Rows of a piece of a window that runs by itself.
const ROWS: usize = 128;

/// What a model is compared with.
#[derive(Clone, Copy)]
pub enum Against<'a> {
    /// Nothing.
    Nothing,
    /// Another model, which is run as well.
    Model(&'a Model),
    /// Another model's logits, which an earlier evaluation saved to this file.
    Saved(&'a Path),
}

/// How work is watched and stopped.
#[derive(Clone, Copy)]
pub struct Watched<'a> {
    /// Stops the work.
    pub interrupt: &'a Interrupt,
    /// No progress.
    pub quiet: bool,
}

/// What was measured, and what computed it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Evaluation {
    /// What ran the model.
    #[serde(flatten)]
    pub runs_on: RunsOn,
    /// The figures.
    #[serde(flatten)]
    pub summary: Summary,
}

/// Measures `model` on windows of tokens: every token but a window's first is a target. With `save`, the model's logits
/// are written to that file on the way, see [`crate::logits`].
///
/// # Errors
/// When a model cannot be run, a token is outside a vocabulary, the saved logits are of other tokens or damaged, a file
/// cannot be written, or the user interrupts.
pub fn evaluate(
    model: &Model,
    against: Against<'_>,
    save: Option<&Path>,
    args: &EngineArgs,
    threads: usize,
    windows: &[Vec<i32>],
    watched: Watched<'_>,
) -> Result<Evaluation, Failure> {
    // Where a model's own kernels are on the device, what it is compared with runs on the processor as ever.
    let device = args.device.filter(|device| *device == Where::Host || !has_kernels(model));
    let others = &EngineArgs { device, ..args.clone() };
    if !in_turn(model, args) && !matches!(against, Against::Model(other) if in_turn(other, others)) {
        args.refuse()?;
    }
    // What cannot be compared or written is found before anything runs.
    let saved = match against {
        Against::Nothing => None,
        Against::Model(other) => {
            same_vocabulary(model.vocabulary(), other.vocabulary())?;
            None
        }
        Against::Saved(path) => {
            let saved = Saved::open(path, windows)?;
            same_vocabulary(model.vocabulary(), Some(saved.vocabulary()))?;
            Some(saved)
        }
    };
    let saving = save.map(|path| {
        let name = model.path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let vocabulary = model.vocabulary().and_then(|v| usize::try_from(v).ok()).unwrap_or(0);
        Saving::create(path, &name, windows, vocabulary)
    });
    let saving = saving.transpose()?;
    let scorer = Scorer::new(model, args, threads, windows, "evaluate", watched)?;
    let reference = match (against, saved) {
        (Against::Model(other), _) => {
            Reference::Model(Scorer::new(other, others, threads, windows, "reference", watched)?)
        }
        (Against::Nothing | Against::Saved(_), None) => Reference::Nothing,
        (Against::Nothing | Against::Saved(_), Some(saved)) => Reference::Saved(saved),
    };
    let runs_on = scorer.runs_on();
    Ok(Evaluation { runs_on, summary: measure(scorer, reference, saving, windows, watched)?.summary() })
}

/// The negative log likelihoods of windows under `module`, as the reference executor runs it.
///
/// # Errors
/// As [`evaluate`].
pub fn likelihoods(
    module: &Module,
    source: &dyn TensorSource,
    windows: &[Vec<i32>],
    label: &str,
    watched: Watched<'_>,
) -> Result<Clusters, Failure> {
    let scorer = Scorer::Together(ready(module, source, windows, label, watched)?);
    Ok(measure(scorer, Reference::Nothing, None, windows, watched)?.nll().clone())
}

/// Where a reference's logits come from.
enum Reference<'a> {
    Nothing,
    Model(Scorer<'a>),
    Saved(Saved),
}

/// A reference's logits for one piece.
enum Base {
    Nothing,
    Logits(Tensor),
    /// One for each target of the piece.
    Rows(Vec<Row>),
}

/// Scores all targets, and saves the logits.
fn measure(
    mut scorer: Scorer<'_>,
    mut reference: Reference<'_>,
    mut saving: Option<Saving>,
    windows: &[Vec<i32>],
    watched: Watched<'_>,
) -> Result<Metrics, Failure> {
    let mut metrics = Metrics::default();
    let pieces = scorer.pieces();
    let targets = |piece: &Piece| (windows[piece.window].len() - 1).saturating_sub(piece.first).min(piece.len);
    let mut progress = Progress::new("logits", pieces.len() as u64, watched.quiet);
    for group in pieces.chunks(TOGETHER) {
        watched.interrupt.check()?;
        let logits = scorer.logits(group)?;
        let bases: Vec<Base> = match &mut reference {
            Reference::Nothing => group.iter().map(|_| Base::Nothing).collect(),
            Reference::Model(other) => other.logits(group)?.into_iter().map(Base::Logits).collect(),
            Reference::Saved(saved) => {
                let rows = |p: &Piece| Ok(Base::Rows((0..targets(p)).map(|_| saved.row()).collect::<Result<_, _>>()?));
                group.iter().map(rows).collect::<Result<_, Failure>>()?
            }
        };
        let part = |i: usize| score_piece(&group[i], &logits[i], &bases[i], windows, saving.is_some());
        for (part, rows) in (0..group.len()).into_par_iter().map(part).collect::<Result<Vec<_>, Failure>>()? {
            metrics.append(&part);
            if let Some(saving) = &mut saving {
                rows.iter().try_for_each(|row| saving.push(row))?;
            }
            progress.step("");
        }
    }
    progress.finish();
    if !metrics.nll().exp().0.is_finite() {
        return Err(Failure::new(Exit::BadInput, "the model's logits are not finite"));
    }
    saving.map_or(Ok(()), Saving::finish)?;
    Ok(metrics)
}

/// The scores of the targets of a piece, and, if `keep`, their rows to be saved.
fn score_piece(
    piece: &Piece,
    logits: &Tensor,
    base: &Base,
    windows: &[Vec<i32>],
    keep: bool,
) -> Result<(Metrics, Vec<Row>), Failure> {
    let vocab = logits.cols();
    if let Base::Logits(r) = base
        && r.cols() != vocab
    {
        same_vocabulary(Some(vocab as u64), Some(r.cols() as u64))?;
    }
    let (mut metrics, mut rows, mut scratch) = (Metrics::default(), Vec::new(), Vec::new());
    let targets = windows[piece.window].iter().skip(piece.first + 1);
    for (i, (row, token)) in logits.data.chunks(vocab.max(1)).zip(targets).enumerate() {
        let outside = || Failure::new(Exit::BadInput, format!("token {token} is outside the vocabulary of {vocab}"));
        let target = usize::try_from(*token).map_err(|_| outside())?;
        let expected = match base {
            Base::Nothing => None,
            Base::Logits(r) => Some(Expected::of(&r.data[i * vocab..(i + 1) * vocab], target).ok_or_else(outside)?),
            Base::Rows(rows) => rows.get(i).map(|r| r.decode(&mut scratch)),
        };
        metrics.push(piece.window, score(row, target, expected.as_ref()).ok_or_else(outside)?);
        if keep {
            rows.push(Row::of(row, target).ok_or_else(outside)?);
        }
    }
    Ok((metrics, rows))
}

fn same_vocabulary(model: Option<u64>, other: Option<u64>) -> Result<(), Failure> {
    if model == other {
        return Ok(());
    }
    let say = |n: Option<u64>| n.map_or_else(|| "an unknown number of".to_owned(), |n| n.to_string());
    Err(Failure::new(Exit::BadInput, format!("the vocabularies differ: {} tokens and {}", say(model), say(other)))
        .help("compare a model with the one that it was made from"))
}

/// Whether windows run one after the other: by kernels of the model's own, or on a device.
fn in_turn(model: &Model, args: &EngineArgs) -> bool {
    packed(model) || on_device(model, args) || by_burn(model, args)
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
        watched: Watched<'_>,
    ) -> Result<Self, Failure> {
        if in_turn(model, args) {
            let longest = windows.iter().map(Vec::len).max().unwrap_or(0);
            return Ok(Self::InTurn { session: engine(model, args, longest, threads, watched.interrupt)?, windows });
        }
        Ok(Self::Together(ready(&model.module, model.source.as_ref(), windows, label, watched)?))
    }

    fn runs_on(&self) -> RunsOn {
        match self {
            Self::Together(_) => RunsOn::reference(),
            Self::InTurn { session, .. } => session.runs_on(),
        }
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

/// A module whose windows have reached the last region.
fn ready<'a>(
    module: &'a Module,
    source: &dyn TensorSource,
    windows: &[Vec<i32>],
    label: &str,
    Watched { interrupt, quiet }: Watched<'_>,
) -> Result<Ready<'a>, Failure> {
    let verified = verify(module).map_err(|d| Failure::new(Exit::BadInput, d))?;
    let body = module.regions.len().saturating_sub(1);
    let progress = std::sync::Mutex::new(Progress::new(label, body as u64, quiet));
    let report = move |at: &At| {
        if let (true, Ok(mut progress)) = (at.done == at.windows, progress.lock()) {
            progress.step(&at.region.to_string());
        }
    };
    let control = Control::new().with_interrupt(interrupt.flag()).with_progress(report);
    Ok(stream::prepare(verified, source, windows, &control)?)
}
