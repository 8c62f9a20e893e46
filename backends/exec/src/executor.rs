//! The executor that passes use: calibration and evaluation on the host.

use std::collections::BTreeMap;
use std::sync::Arc;

use awqc_ir::{FusedDef, Region, RegionName, TensorSource, ValueId, WeightId};
use awqc_passes::profile::store::sets;
use awqc_passes::{Afterwards, ExecError, Executor, InputStats, Tensor};
use rayon::prelude::*;

use crate::control::Control;
use crate::gram::Accumulator;
use crate::host::math::all_finite;
use crate::host::{Host, floats};
use crate::interp::{Interpreter, Val, Weights};
use crate::memo::Memo;
use crate::realize::tensor;
use crate::{chain, stream, synthetic};

/// Tokens that are in flight between two updates of the statistics.
const BLOCK_TOKENS: usize = 4096;

type Stream = Vec<Val<Host>>;

/// Runs regions on the host for calibration, see [`Executor`].
pub struct HostExecutor {
    source: Memo,
    control: Control,
    /// One stream for each calibration window, at the entry of the region to be compiled.
    streams: Vec<Stream>,
    tokens: u64,
    last: Option<RegionName>,
    sample: Option<(RegionName, Vec<Stream>)>,
    sample_windows: usize,
    sample_rows: usize,
}

impl HostExecutor {
    /// An executor without calibration: it can realize weights and evaluate on synthetic inputs.
    pub fn new(source: Arc<dyn TensorSource>) -> Self {
        Self {
            source: Memo::new(source),
            control: Control::new(),
            streams: Vec::new(),
            tokens: 0,
            last: None,
            sample: None,
            sample_windows: 8,
            sample_rows: 128,
        }
    }

    /// Puts these token windows at the entry of the module.
    ///
    /// # Errors
    /// When there is no window, or an empty one.
    pub fn with_calibration(mut self, windows: &[Vec<i32>]) -> Result<Self, ExecError> {
        if windows.is_empty() {
            return Err(ExecError::Unavailable("there are no calibration tokens: give a text with --calib".into()));
        }
        self.streams = stream::open(windows)?;
        self.tokens = windows.iter().map(|w| w.len() as u64).sum();
        Ok(self)
    }

    /// Names the chain's last region, whose results nobody reads: they (the logits) are then not computed, which saves
    /// memory in proportion to the vocabulary.
    #[must_use]
    pub fn with_last_region(mut self, name: RegionName) -> Self {
        self.last = Some(name);
        self
    }

    /// How the caller watches and stops the work.
    #[must_use]
    pub fn with_control(mut self, control: Control) -> Self {
        self.control = control;
        self
    }

    /// Number of windows whose region inputs are kept for [`Executor::evaluate`]; 8 unless set.
    #[must_use]
    pub fn with_sample_windows(mut self, windows: usize) -> Self {
        self.sample_windows = windows;
        self
    }

    /// Number of rows in [`InputStats::sample`]; about 128 unless set.
    #[must_use]
    pub fn with_sample_rows(mut self, rows: usize) -> Self {
        self.sample_rows = rows;
        self
    }

    /// Calibration tokens in all.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    fn weights(&self, region: &Region) -> Result<Weights<Host>, ExecError> {
        self.source.enter(&region.name);
        Weights::load(region, &self.source, &Default::default())
    }

    /// Windows in one block of calibration: a function of the windows alone.
    fn block(&self) -> usize {
        let mean = (self.tokens as usize / self.streams.len().max(1)).max(1);
        (BLOCK_TOKENS / mean).max(2)
    }
}

/// Runs `region` on one window's inputs and returns the observed taps and the results, all checked to be finite.
fn window(
    interpreter: &Interpreter<'_, Host>,
    region: &Region,
    weights: &Weights<Host>,
    inputs: Stream,
    taps: &[ValueId],
) -> Result<(BTreeMap<ValueId, Val<Host>>, Stream), ExecError> {
    let again = inputs.clone();
    let mut seen = BTreeMap::new();
    let results = interpreter.run(region, weights, inputs, None, &mut |id, val| {
        if taps.contains(&id) {
            seen.insert(id, val.clone());
        }
        Ok(())
    })?;
    if seen.values().chain(&results).all(finite) {
        return Ok((seen, results));
    }
    // Once more, to name the first value that went wrong.
    interpreter.run(region, weights, again, None, &mut |id, val| {
        let name = &region.value(id).name;
        let message = || {
            ExecError::NotFinite(format!(
                "region {}: %{name} holds NaN or infinity; the weights are damaged, or the model overflows on these tokens",
                region.name
            ))
        };
        if finite(val) { Ok(()) } else { Err(message()) }
    })?;
    Err(ExecError::NotFinite(format!("region {}: a value inside a fused op is not finite", region.name)))
}

fn finite(val: &Val<Host>) -> bool {
    match val {
        Val::Float(t) => all_finite(&floats(t)),
        Val::Routed(r) => all_finite(&floats(&r.rows)),
        Val::Int(_) => true,
    }
}

/// The numbers of a value, and where those of each expert lie; all of them for a value without experts.
type Numbers<'a> = (std::borrow::Cow<'a, [f32]>, Vec<std::ops::Range<usize>>);

fn float_of<'a>(region: &Region, id: ValueId, val: &'a Val<Host>) -> Result<Numbers<'a>, ExecError> {
    match val {
        Val::Float(t) => {
            let numbers = floats(t);
            let all = 0..numbers.len();
            Ok((numbers, vec![all]))
        }
        Val::Routed(r) => {
            let numbers = floats(&r.rows);
            let width = numbers.len() / r.route.tokens.len().max(1);
            let ranges = r.route.ranges().map(|rows| rows.start * width..rows.end * width).collect();
            Ok((numbers, ranges))
        }
        Val::Int(_) => Err(ExecError::Tensor(format!(
            "region {}: %{} holds integers and has no statistics",
            region.name,
            region.value(id).name
        ))),
    }
}

impl Executor for HostExecutor {
    fn realize(&self, region: &Region, weight: WeightId) -> Result<Tensor, ExecError> {
        self.source.enter(&region.name);
        tensor(region, weight, &self.source)
    }

    fn profile(
        &mut self,
        region: &Region,
        fused: &[FusedDef],
        taps: &[ValueId],
        afterwards: Afterwards,
    ) -> Result<Vec<InputStats>, ExecError> {
        if self.streams.is_empty() {
            return Err(ExecError::Unavailable(
                "there is no calibration stream: give calibration tokens, or leave out the passes that profile".into(),
            ));
        }
        let stays = afterwards == Afterwards::Entry;
        let is_last = self.last.as_ref() == Some(&region.name);
        let ran = if is_last || stays { chain::prune(region, taps) } else { region.clone() };
        let weights = self.weights(&ran)?;
        let interpreter = Interpreter::<Host> { fused, device: &Default::default() };
        let mut statistics: BTreeMap<ValueId, Vec<Accumulator>> = BTreeMap::new();
        let (total, block) = (self.streams.len(), self.block());
        let mut sample = Vec::new();
        // Streams are replaced block by block, so that old and new hidden states do not both exist for all windows.
        // After an error the stream is gone: a half-moved one would be of no use.
        let mut left = std::mem::take(&mut self.streams).into_iter();
        let mut moved: Vec<Stream> = Vec::with_capacity(total);
        loop {
            let batch: Vec<Stream> = left.by_ref().take(block).collect();
            if batch.is_empty() {
                break;
            }
            self.control.check()?;
            if stays {
                moved.extend(batch.iter().cloned());
            }
            let entered = batch.into_iter().map(|s| chain::enter(s, region)).collect::<Result<Vec<_>, _>>()?;
            // Without images there is nothing to keep of what sees them.
            let kept = entered.iter().filter(|(inputs, _)| inputs.iter().any(|v| !v.shape().contains(&0)));
            for (inputs, _) in kept.take(self.sample_windows.saturating_sub(sample.len())) {
                sample.push(inputs.clone());
            }
            let run = |(inputs, rest): (Stream, Stream)| {
                let (seen, mut stream) = window(&interpreter, &ran, &weights, inputs, taps)?;
                if is_last {
                    stream.clear();
                }
                stream.extend(rest);
                Ok((seen, stream))
            };
            let ran_batch = entered.into_par_iter().map(run).collect::<Result<Vec<_>, ExecError>>()?;
            for tap in taps.iter().collect::<std::collections::BTreeSet<_>>() {
                let values = ran_batch.iter().filter_map(|(seen, _)| seen.get(tap));
                let blocks = values.map(|v| float_of(region, *tap, v)).collect::<Result<Vec<_>, _>>()?;
                let channels = region.value(*tap).ty.channels().and_then(|c| usize::try_from(c).ok()).unwrap_or(0);
                let (tokens, rows) = (self.tokens, self.sample_rows);
                let experts = sets(region, *tap);
                let statistics = statistics.entry(*tap).or_insert_with(|| {
                    (0..experts).map(|_| Accumulator::new(channels, tokens / experts as u64, rows)).collect()
                });
                for (e, statistics) in statistics.iter_mut().enumerate() {
                    let parts = blocks.iter().filter_map(|(numbers, ranges)| numbers.get(ranges.get(e)?.clone()));
                    statistics.add(&parts.collect::<Vec<_>>());
                }
            }
            if !stays {
                moved.extend(ran_batch.into_iter().map(|(_, stream)| stream));
            }
            self.control.report(&region.name, moved.len(), total);
        }
        self.streams = moved;
        self.sample = Some((region.name.clone(), sample));
        let finish = |(id, s): (ValueId, Vec<Accumulator>)| (id, s.into_iter().map(Accumulator::finish).collect());
        let done: BTreeMap<ValueId, Vec<InputStats>> = statistics.into_iter().map(finish).collect();
        let mut out = Vec::new();
        for tap in taps {
            out.extend(done.get(tap).cloned().ok_or_else(|| {
                ExecError::Tensor(format!("region {}: a tap names a value that is never computed", region.name))
            })?);
        }
        Ok(out)
    }

    fn evaluate(&self, region: &Region, fused: &[FusedDef], at: &[ValueId]) -> Result<Vec<Tensor>, ExecError> {
        let ran = chain::prune(region, at);
        let weights = self.weights(&ran)?;
        let inputs = match &self.sample {
            Some((name, inputs)) if *name == region.name && !inputs.is_empty() => inputs.clone(),
            Some(_) | None => vec![synthetic::inputs(region, fused)],
        };
        let interpreter = Interpreter::<Host> { fused, device: &Default::default() };
        let run = |inputs: Stream| {
            self.control.check()?;
            Ok(window(&interpreter, &ran, &weights, inputs, &[])?.1)
        };
        let windows = inputs.into_par_iter().map(run).collect::<Result<Vec<_>, ExecError>>()?;
        (0..at.len()).map(|i| join(windows.iter().filter_map(|w| w.get(i)))).collect()
    }
}

/// The rows of one value of all windows, `[rows, channels]`.
fn join<'a>(parts: impl Iterator<Item = &'a Val<Host>>) -> Result<Tensor, ExecError> {
    let mut out = Tensor::default();
    let mut cols = 1;
    for part in parts {
        let part = part.to_tensor()?;
        cols = part.cols();
        out.data.extend(part.data);
    }
    out.shape = vec![out.data.len() / cols.max(1), cols];
    Ok(out)
}
