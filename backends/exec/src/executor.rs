//! The executor that passes use: calibration and evaluation on any backend.

use std::collections::BTreeMap;
use std::sync::Arc;

use awqc_ir::{FusedDef, Region, RegionName, TensorSource, ValueId, WeightId};
use awqc_passes::profile::store::sets;
use awqc_passes::{Afterwards, ExecError, Executor, InputStats, Tensor};
use burn_backend::tensor::Device;

use crate::calibrate::{Calibrate, Rows, Sums};
use crate::control::Control;
use crate::host::Host;
use crate::interp::{Interpreter, Val, Weights};
use crate::memo::Memo;
use crate::realize::tensor;
use crate::{chain, stream, synthetic};

/// Tokens that are in flight between two updates of the statistics.
const BLOCK_TOKENS: usize = 4096;

type Stream<B> = Vec<Val<B>>;

/// Runs regions on the host, see [`Executor`].
pub type HostExecutor = BurnExecutor<Host>;

/// Runs regions on a burn backend for calibration, see [`Executor`].
pub struct BurnExecutor<B: Calibrate> {
    source: Memo,
    device: Device<B>,
    control: Control,
    /// One stream for each calibration window, at the entry of the region to be compiled.
    streams: Vec<Stream<B>>,
    tokens: u64,
    last: Option<RegionName>,
    sample: Option<(RegionName, Vec<Stream<B>>)>,
    sample_windows: usize,
    sample_rows: usize,
}

impl HostExecutor {
    /// An executor without calibration: it can realize weights and evaluate on synthetic inputs.
    pub fn new(source: Arc<dyn TensorSource>) -> Self {
        Self::on(Device::<Host>::default(), source)
    }
}

impl<B: Calibrate> BurnExecutor<B> {
    /// As [`HostExecutor::new`], on a device of the backend.
    pub fn on(device: Device<B>, source: Arc<dyn TensorSource>) -> Self {
        Self {
            source: Memo::new(source),
            device,
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
        self.streams = stream::open(windows, &self.device)?;
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

    fn weights(&self, region: &Region) -> Result<Weights<B>, ExecError> {
        self.source.enter(&region.name);
        Weights::load(region, &self.source, &self.device)
    }

    /// Windows in one block of calibration: a function of the windows alone.
    fn block(&self) -> usize {
        let mean = (self.tokens as usize / self.streams.len().max(1)).max(1);
        (BLOCK_TOKENS / mean).max(2)
    }
}

/// Observed values, and results.
type Ran<B> = (BTreeMap<ValueId, Val<B>>, Stream<B>);

/// Runs `region` on one window's inputs and returns the observed taps and the results, all checked to be finite.
fn window<B: Calibrate>(
    interpreter: &Interpreter<'_, B>,
    region: &Region,
    weights: &Weights<B>,
    inputs: Stream<B>,
    taps: &[ValueId],
) -> Result<Ran<B>, ExecError> {
    let again = inputs.clone();
    let mut seen = BTreeMap::new();
    let results = interpreter.run(region, weights, inputs, None, &mut |id, val| {
        if taps.contains(&id) {
            seen.insert(id, val.clone());
        }
        Ok(())
    })?;
    if finite(seen.values().chain(&results))? {
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
        if finite([val])? { Ok(()) } else { Err(message()) }
    })?;
    Err(ExecError::NotFinite(format!("region {}: a value inside a fused op is not finite", region.name)))
}

fn finite<'a, B: Calibrate>(values: impl IntoIterator<Item = &'a Val<B>>) -> Result<bool, ExecError> {
    let floats = |val: &'a Val<B>| match val {
        Val::Float(t) => Some(t),
        Val::Routed(r) => Some(&r.rows),
        Val::Int(_) => None,
    };
    B::all_finite(&values.into_iter().filter_map(floats).collect::<Vec<_>>())
}

/// The rows of each expert; all of them for a value without experts.
fn rows_of<'a, B: Calibrate>(region: &Region, id: ValueId, val: &'a Val<B>) -> Result<Vec<Rows<'a, B>>, ExecError> {
    match val {
        Val::Float(of) => {
            let rows = val.shape().split_last().map_or(1, |(_, lead)| lead.iter().product());
            Ok(vec![Rows { of, range: 0..rows }])
        }
        Val::Routed(r) => Ok(r.route.ranges().map(|range| Rows { of: &r.rows, range }).collect()),
        Val::Int(_) => Err(ExecError::Tensor(format!(
            "region {}: %{} holds integers and has no statistics",
            region.name,
            region.value(id).name
        ))),
    }
}

impl<B: Calibrate> Executor for BurnExecutor<B> {
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
        let interpreter = Interpreter::<B> { fused, device: &self.device };
        let mut statistics: BTreeMap<ValueId, Vec<B::Sums>> = BTreeMap::new();
        let (total, block) = (self.streams.len(), self.block());
        let mut sample = Vec::new();
        // Streams are replaced block by block, so that old and new hidden states do not both exist for all windows.
        // After an error the stream is gone: a half-moved one would be of no use.
        let mut left = std::mem::take(&mut self.streams).into_iter();
        let mut moved: Vec<Stream<B>> = Vec::with_capacity(total);
        loop {
            let batch: Vec<Stream<B>> = left.by_ref().take(block).collect();
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
            let run = |(inputs, rest): (Stream<B>, Stream<B>)| {
                let (seen, mut stream) = window(&interpreter, &ran, &weights, inputs, taps)?;
                if is_last {
                    stream.clear();
                }
                stream.extend(rest);
                Ok((seen, stream))
            };
            let ran_batch = B::each(entered, run)?;
            for tap in taps.iter().collect::<std::collections::BTreeSet<_>>() {
                let values = ran_batch.iter().filter_map(|(seen, _)| seen.get(tap));
                let blocks = values.map(|v| rows_of(region, *tap, v)).collect::<Result<Vec<_>, _>>()?;
                let channels = region.value(*tap).ty.channels().and_then(|c| usize::try_from(c).ok()).unwrap_or(0);
                let (tokens, rows) = (self.tokens, self.sample_rows);
                let experts = sets(region, *tap);
                let statistics = statistics.entry(*tap).or_insert_with(|| {
                    (0..experts).map(|_| B::Sums::new(channels, tokens / experts as u64, rows)).collect()
                });
                for (e, statistics) in statistics.iter_mut().enumerate() {
                    statistics.add(&blocks.iter().filter_map(|rows| rows.get(e).cloned()).collect::<Vec<_>>())?;
                }
            }
            if !stays {
                moved.extend(ran_batch.into_iter().map(|(_, stream)| stream));
            }
            self.control.report(&region.name, moved.len(), total);
        }
        self.streams = moved;
        self.sample = Some((region.name.clone(), sample));
        let finish = |(id, s): (ValueId, Vec<B::Sums>)| {
            Ok((id, s.into_iter().map(Sums::finish).collect::<Result<_, ExecError>>()?))
        };
        let done: BTreeMap<ValueId, Vec<InputStats>> =
            statistics.into_iter().map(finish).collect::<Result<_, ExecError>>()?;
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
            Some(_) | None => vec![synthetic::inputs(region, fused, &self.device)],
        };
        let interpreter = Interpreter::<B> { fused, device: &self.device };
        let run = |inputs: Stream<B>| {
            self.control.check()?;
            Ok(window(&interpreter, &ran, &weights, inputs, &[])?.1)
        };
        let windows = B::each(inputs, run)?;
        (0..at.len()).map(|i| join(windows.iter().filter_map(|w| w.get(i)))).collect()
    }
}

/// The rows of one value of all windows, `[rows, channels]`.
fn join<'a, B: Calibrate>(parts: impl Iterator<Item = &'a Val<B>>) -> Result<Tensor, ExecError> {
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
