//! Generating: tokens one after the other from a prompt, and windows of calibration text that a model writes itself.

use awqc_exec::{Host, Logits, Session};
use awqc_ir::verify::verify;

use crate::engine::Engine;
use crate::failure::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::model::Model;
use crate::progress::Progress;
use crate::sample::Sampling;

/// Sequences that are generated side by side.
const BATCH: usize = 16;

/// When a generation ends, and how tokens are chosen.
#[derive(Clone, Debug)]
pub struct Settings {
    /// At most so many new tokens.
    pub max_tokens: usize,
    /// Tokens that end the text.
    pub stop: Vec<i32>,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Start of the random numbers.
    pub seed: u64,
}

/// A prepared session.
///
/// # Errors
/// When the module is invalid or a tensor cannot be read.
pub fn session(model: &Model) -> Result<Session<Host>, Failure> {
    let module = verify(&model.module).map_err(|d| Failure::new(Exit::BadInput, d))?;
    Ok(Session::new(module, model.source.as_ref(), Default::default())?)
}

/// Continues `prompt`; `show` gets every new token and says whether to go on. Returns the new tokens.
///
/// # Errors
/// When the prompt is empty or holds a token outside the vocabulary. An interrupt ends the text, it is no failure.
pub fn generate(
    engine: &mut dyn Engine,
    prompt: &[i32],
    settings: &Settings,
    interrupt: &Interrupt,
    show: &mut dyn FnMut(i32) -> bool,
) -> Result<Vec<i32>, Failure> {
    let mut rng = fastrand::Rng::with_seed(settings.seed);
    let mut new = Vec::new();
    let mut token = id(settings.sampling.choose(&engine.forward(prompt, Logits::Last)?.data, &mut rng));
    while new.len() < settings.max_tokens && interrupt.check().is_ok() {
        if settings.stop.contains(&token) {
            break;
        }
        new.push(token);
        if !show(token) || new.len() == settings.max_tokens {
            break;
        }
        token = next(engine, token, settings.sampling, &mut rng)?;
    }
    Ok(new)
}

/// The token behind `token`, from as few logits as the engine can hand out: the same in any case.
fn next(engine: &mut dyn Engine, token: i32, sampling: Sampling, rng: &mut fastrand::Rng) -> Result<i32, Failure> {
    if sampling.is_greedy() {
        if let Some(next) = engine.likeliest(token)? {
            return Ok(next);
        }
    } else if sampling.top_k > 0
        && let Some(kept) = engine.largest(token, sampling.top_k)?
    {
        return Ok(id(sampling.draw(&kept, rng)));
    }
    Ok(id(sampling.choose(&engine.forward(&[token], Logits::Last)?.data, rng)))
}

/// The token at this place of the vocabulary.
fn id(place: usize) -> i32 {
    i32::try_from(place).unwrap_or(i32::MAX)
}

/// `count` windows of `length` tokens that the model writes itself by plain sampling, from its start-of-text token (or,
/// without one, from tokens drawn from the whole vocabulary): no calibration data needed.
///
/// # Errors
/// When the model cannot be run, or the user interrupts.
pub fn windows(
    model: &Model,
    count: usize,
    length: usize,
    interrupt: &Interrupt,
    quiet: bool,
) -> Result<Vec<Vec<i32>>, Failure> {
    let start =
        model.config.get("bos_token_id").and_then(serde_json::Value::as_i64).and_then(|id| i32::try_from(id).ok());
    let vocabulary = model.vocabulary().and_then(|n| i32::try_from(n).ok()).unwrap_or(1).max(1);
    let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0 };
    let mut session = session(model)?;
    let mut progress = Progress::new("self-text", (count.div_ceil(BATCH) * length) as u64, quiet);
    let mut all = Vec::with_capacity(count);
    while all.len() < count {
        session.reset();
        let batch = BATCH.min(count - all.len());
        let mut rngs: Vec<_> = (0..batch).map(|i| fastrand::Rng::with_seed((all.len() + i) as u64)).collect();
        let mut texts: Vec<Vec<i32>> =
            rngs.iter_mut().map(|rng| vec![start.unwrap_or_else(|| rng.i32(0..vocabulary))]).collect();
        for _ in 1..length {
            interrupt.check()?;
            let last: Vec<[i32; 1]> = texts.iter().filter_map(|t| t.last().map(|id| [*id])).collect();
            let ids: Vec<&[i32]> = last.iter().map(|id| &id[..]).collect();
            let logits = session.forward_batch(&ids, Logits::Last)?;
            for ((text, rng), row) in texts.iter_mut().zip(&mut rngs).zip(logits.data.chunks(logits.cols().max(1))) {
                text.push(i32::try_from(sampling.choose(row, rng)).unwrap_or(i32::MAX));
            }
            progress.step("");
        }
        all.extend(texts);
    }
    progress.finish();
    Ok(all)
}
