//! Tuning a quantized model as a whole: codes stay, and the scales of their groups and the gains of norms are moved so
//! that the model's predictions come nearer to those of the float model.
//!
//! What is made small is the mean Kullback-Leibler divergence KL(float ‖ quantized) of the predictions on calibration
//! windows. Its gradient goes back through the model region by region ([`crate::gradient`]). Training scales alone, end
//! to end, is the second stage of EfficientQAT (arXiv 2407.11062, section 3.3); gains of norms cost nothing at run time
//! either.

mod moved;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use awqc_ir::{Module, Region, TensorSource, Verified, WeightId};
use awqc_passes::{ExecError, Tensor};
use burn_backend::TensorMetadata;
use burn_backend::tensor::FloatTensor;
use rayon::prelude::*;

use self::moved::{Moved, settle};
use crate::chain;
use crate::control::Control;
use crate::gradient::{Gradient, Stream, backward, cut, join, rejoin};
use crate::host::math::{self, exp, log_sum_exp, simd};
use crate::host::{Host, floats, tensor};
use crate::interp::{Interpreter, Val, Weights, upload};
use crate::stream::{self, Piece, Ready};

/// How to tune.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Steps of the optimiser.
    pub steps: usize,
    /// Windows in a step; not more than there are to train on.
    pub batch: usize,
    /// Largest relative change of a scale or gain in one step, at the start; it falls to 0 as a cosine.
    pub rate: f32,
    /// Windows that are not trained on: the result is kept if their divergence is smaller than before.
    pub held_out: usize,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuned {
    /// Mean divergence of each step's windows before the step, in nats.
    pub steps: Vec<f64>,
    /// Mean divergence of the windows that were not trained on, before.
    pub before: f64,
    /// The same after.
    pub after: f64,
    /// Whether the result was kept.
    pub kept: bool,
}

/// Moves the scales and gains of `module`, whose linears are quantized and whose ops are not fused yet, towards the
/// predictions of `float`.
///
/// # Errors
/// When there are too few windows, a weight cannot be realized, or `control` says stop; `module` is as before then.
pub fn tune(
    module: &mut Module,
    float: Verified<'_>,
    source: &dyn TensorSource,
    windows: &[Vec<i32>],
    options: &Options,
    control: &Control,
    report: &mut dyn FnMut(usize, f64),
) -> Result<Tuned, ExecError> {
    if windows.len() <= options.held_out || options.batch == 0 {
        return Err(ExecError::Unavailable(format!(
            "tuning needs more than {} calibration windows, {} are given",
            options.held_out,
            windows.len()
        )));
    }
    let teacher = stream::prepare(float, source, windows, control)?;
    let mut settled = module.clone();
    for region in &mut settled.regions {
        settle(region, source)?;
    }
    let mut student = Student::new(&settled, source)?;
    let trained = windows.len() - options.held_out;
    // More would be the same windows again.
    let size = options.batch.min(trained);
    let held: Vec<usize> = (trained..windows.len()).collect();
    let before = student.divergence(&teacher, windows, &held, control)?;
    let mut steps = Vec::with_capacity(options.steps);
    for step in 0..options.steps {
        control.check()?;
        let batch: Vec<usize> = (0..size).map(|i| (step * size + i) % trained).collect();
        let rate = options.rate * schedule(step, options.steps);
        let loss = student.step(&teacher, windows, &batch, rate, control)?;
        report(step + 1, loss);
        steps.push(loss);
    }
    let after = student.divergence(&teacher, windows, &held, control)?;
    let kept = after < before || held.is_empty();
    if kept {
        let moved = student.into_moved();
        for (region, moved) in settled.regions.iter_mut().zip(moved) {
            moved.into_iter().for_each(|m| m.finish(region));
        }
        *module = settled;
    }
    Ok(Tuned { steps, before, after, kept })
}

/// The rate of a step relative to the first: a short climb, then half a cosine.
fn schedule(step: usize, steps: usize) -> f32 {
    const CLIMB: usize = 4;
    let climb = (step + 1) as f32 / (CLIMB.min(steps) as f32).max(1.0);
    let fall = 0.5 * (1.0 + (std::f32::consts::PI * step as f32 / steps.max(1) as f32).cos());
    climb.min(1.0) * fall
}

/// The quantized model at work.
struct Student<'a> {
    module: &'a Module,
    /// The weights of each region that do not move.
    fixed: Vec<Weights<Host>>,
    /// Those that do.
    moved: Vec<Vec<Moved>>,
}

impl<'a> Student<'a> {
    fn new(module: &'a Module, source: &dyn TensorSource) -> Result<Self, ExecError> {
        let (mut fixed, mut all) = (Vec::new(), Vec::new());
        for region in &module.regions {
            let moved = Moved::of(region, source)?;
            let mut weights = Weights::empty();
            for id in region.used_weights().into_iter().filter(|id| moved.iter().all(|m| m.weight != *id)) {
                weights.insert(id, upload::<Host>(crate::realize::tensor(region, id, source)?, &Default::default()));
            }
            fixed.push(weights);
            all.push(moved);
        }
        Ok(Self { module, fixed, moved: all })
    }

    fn into_moved(self) -> Vec<Vec<Moved>> {
        self.moved
    }

    /// The weights of region `at` as they are now.
    fn weights(&self, at: usize, region: &Region) -> Weights<Host> {
        let mut weights = self.fixed[at].clone();
        let now: Vec<Tensor> = self.moved[at].par_iter().map(|m| m.tensor(region)).collect();
        for (moved, tensor) in self.moved[at].iter().zip(now) {
            weights.insert(moved.weight, upload::<Host>(tensor, &Default::default()));
        }
        weights
    }

    /// Runs windows up to the last region; gives what enters each region, and stays behind it, for each window.
    fn forth(&self, windows: &[Vec<i32>], batch: &[usize], keep: Keep) -> Result<Vec<Vec<Stream>>, ExecError> {
        let (_, body) = self.module.regions.split_last().ok_or_else(no_regions)?;
        let ids: Vec<Vec<i32>> = batch.iter().map(|w| windows[*w].clone()).collect();
        let mut streams: Vec<Vec<Stream>> =
            stream::open(&ids, &Default::default())?.into_iter().map(|s| vec![s]).collect();
        for (at, region) in body.iter().enumerate() {
            let weights = self.weights(at, region);
            let interpreter = Interpreter::<Host> { fused: &self.module.fused, device: &Default::default() };
            streams.par_iter_mut().try_for_each(|streams| {
                let stream = streams.last().cloned().unwrap_or_default();
                if keep == Keep::Last {
                    streams.clear();
                }
                let (inputs, rest) = chain::enter(stream, region)?;
                let mut next = interpreter.run(region, &weights, inputs, None, &mut |_, _| Ok(()))?;
                next.extend(rest);
                streams.push(next);
                Ok::<_, ExecError>(())
            })?;
        }
        Ok(streams)
    }

    /// The mean divergence over some windows.
    fn divergence(
        &self,
        teacher: &Ready<'_>,
        windows: &[Vec<i32>],
        batch: &[usize],
        control: &Control,
    ) -> Result<f64, ExecError> {
        let (mut sum, mut rows) = (0.0, 0);
        let (head, body) = self.module.regions.split_last().ok_or_else(no_regions)?;
        let weights = self.weights(body.len(), head);
        for batch in batch.chunks(rayon::current_num_threads().max(1)) {
            control.check()?;
            let streams = self.forth(windows, batch, Keep::Last)?;
            for (window, streams) in batch.iter().zip(streams) {
                let stream = streams.into_iter().next_back().unwrap_or_default();
                let (inputs, _) = chain::enter(stream, head)?;
                let part = |piece: &Piece| {
                    let interpreter = Interpreter::<Host> { fused: &self.module.fused, device: &Default::default() };
                    let inputs = cut(teacher.sequence(), piece, head, &inputs);
                    let got = interpreter.run(head, &weights, inputs, None, &mut |_, _| Ok(()))?;
                    divergence(&got, &teacher.logits(piece)?, 1).map(|(kl, _)| (kl, piece.len))
                };
                let pieces = teacher.pieces_of(*window);
                for (kl, n) in pieces.par_iter().map(part).collect::<Result<Vec<_>, ExecError>>()? {
                    sum += kl;
                    rows += n;
                }
            }
        }
        Ok(if rows == 0 { 0.0 } else { sum / rows as f64 })
    }

    /// One step on some windows; returns their mean divergence before it.
    fn step(
        &mut self,
        teacher: &Ready<'_>,
        windows: &[Vec<i32>],
        batch: &[usize],
        rate: f32,
        control: &Control,
    ) -> Result<f64, ExecError> {
        let mut streams = self.forth(windows, batch, Keep::All)?;
        let rows = batch.iter().map(|w| windows[*w].len()).sum::<usize>().max(1);
        let count = self.module.regions.len();
        let mut entered = || streams.iter_mut().map(|s| s.pop().unwrap_or_default()).collect::<Vec<Stream>>();
        control.check()?;
        let (total, mut upstream) = self.head(teacher, batch, entered(), rows, rate)?;
        for at in (0..count.saturating_sub(1)).rev() {
            control.check()?;
            if self.moved[..=at].iter().all(Vec::is_empty) {
                break;
            }
            upstream = self.layer(at, entered(), upstream, rate)?;
        }
        Ok(total / rows as f64)
    }

    /// The last region's part of a step: the sum of the divergences, and the gradient at what enters it.
    fn head(
        &mut self,
        teacher: &Ready<'_>,
        batch: &[usize],
        entered: Vec<Stream>,
        rows: usize,
        rate: f32,
    ) -> Result<(f64, Vec<Gradient>), ExecError> {
        let (head, body) = self.module.regions.split_last().ok_or_else(no_regions)?;
        let (at, fused) = (body.len(), &self.module.fused);
        let weights = self.weights(at, head);
        let wanted = self.wanted(at);
        let (mut total, mut sums, mut upstream) = (0.0, BTreeMap::new(), Vec::with_capacity(batch.len()));
        for (window, stream) in batch.iter().zip(entered) {
            let slots = stream.len();
            let (inputs, _) = chain::enter(stream, head)?;
            let part = |piece: &Piece| {
                let mut kl = 0.0;
                let want = teacher.logits(piece)?;
                let back =
                    backward(head, fused, &weights, &wanted, cut(teacher.sequence(), piece, head, &inputs), |got| {
                        let (sum, gradient) = divergence(got, &want, rows)?;
                        kl = sum;
                        Ok(vec![Some(gradient)])
                    })?;
                Ok((kl, back))
            };
            let mut parts = Vec::new();
            let pieces = teacher.pieces_of(*window);
            for (kl, back) in pieces.par_iter().map(part).collect::<Result<Vec<_>, ExecError>>()? {
                total += kl;
                gather(&mut sums, back.weights);
                parts.push(back.inputs);
            }
            let mut gradient = join(teacher.sequence(), head, parts);
            gradient.resize(slots, None);
            upstream.push(gradient);
        }
        self.apply(at, &sums, rate);
        Ok((total, upstream))
    }

    /// Another region's part of a step: the gradient at what enters it, from that at what leaves it.
    fn layer(
        &mut self,
        at: usize,
        entered: Vec<Stream>,
        upstream: Vec<Gradient>,
        rate: f32,
    ) -> Result<Vec<Gradient>, ExecError> {
        let (region, fused) = (&self.module.regions[at], &self.module.fused);
        let weights = self.weights(at, region);
        let wanted = self.wanted(at);
        let results = region.results().len();
        let back = |(stream, mut after): (Stream, Gradient)| {
            let (inputs, _) = chain::enter(stream, region)?;
            let passing = after.split_off(results.min(after.len()));
            let back = backward(region, fused, &weights, &wanted, inputs, |_| Ok(after))?;
            // What the region reads and does not replace also goes by it.
            Ok((rejoin(back.inputs, results, passing), back.weights))
        };
        let jobs: Vec<(Stream, Gradient)> = entered.into_iter().zip(upstream).collect();
        let (mut sums, mut out) = (BTreeMap::new(), Vec::with_capacity(jobs.len()));
        for (before, weights) in jobs.into_par_iter().map(back).collect::<Result<Vec<_>, ExecError>>()? {
            out.push(before);
            gather(&mut sums, weights);
        }
        self.apply(at, &sums, rate);
        Ok(out)
    }

    /// The weights of a region whose gradient is asked for.
    fn wanted(&self, at: usize) -> Vec<WeightId> {
        self.moved[at].iter().map(|m| m.weight).collect()
    }

    fn apply(&mut self, at: usize, sums: &BTreeMap<WeightId, Vec<f32>>, rate: f32) {
        for moved in &mut self.moved[at] {
            if let Some(gradient) = sums.get(&moved.weight) {
                moved.step(gradient, rate);
            }
        }
    }
}

/// What [`Student::forth`] keeps.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// What enters every region.
    All,
    /// What enters the last.
    Last,
}

fn no_regions() -> ExecError {
    ExecError::Tensor("the module has no regions".into())
}

fn gather(sums: &mut BTreeMap<WeightId, Vec<f32>>, more: BTreeMap<WeightId, Vec<f32>>) {
    for (id, gradient) in more {
        match sums.get_mut(&id) {
            Some(sum) => sum.iter_mut().zip(gradient).for_each(|(s, g)| *s += g),
            None => {
                sums.insert(id, gradient);
            }
        }
    }
}

/// Sum over rows of KL(want ‖ got) in nats, and its gradient at the logits, divided by `rows`.
fn divergence(got: &[Val<Host>], want: &Tensor, rows: usize) -> Result<(f64, FloatTensor<Host>), ExecError> {
    let Some(Val::Float(logits)) = got.first() else { return Err(ExecError::Tensor("there are no logits".into())) };
    let got = floats(logits);
    let vocab = want.cols().max(1);
    let mut gradient = vec![0.0f32; got.len()];
    let mut sum = 0.0f64;
    for ((got, want), out) in got.chunks(vocab).zip(want.data.chunks(vocab)).zip(gradient.chunks_mut(vocab)) {
        let (zg, zw) = (log_sum_exp(got) as f32, log_sum_exp(want) as f32);
        let part = rows as f32;
        // `out` holds the terms of the sum first.
        let kl = simd(
            #[inline(always)]
            || {
                for ((g, w), out) in got.iter().zip(want).zip(&mut *out) {
                    let (g, w) = (g - zg, w - zw);
                    *out = exp(w) * (w - g);
                }
                let kl = math::sum(out);
                for ((g, w), out) in got.iter().zip(want).zip(&mut *out) {
                    *out = (exp(g - zg) - exp(w - zw)) / part;
                }
                kl
            },
        );
        sum += f64::from(kl);
    }
    Ok((sum, tensor(gradient, logits.shape().to_vec())))
}
