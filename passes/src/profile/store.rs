//! Saved statistics, so that a second compile with other bits needs no calibration.
//!
//! A region's statistics are a list, in the order of [`super::taps`], values of experts with a set for each, kept under
//! the region's name. The driver owns where they lie: it implements [`StatsStore`] over files, with [`to_tensors`] and
//! [`from_tensors`] for the contents, and puts [`Recording`] or [`Replaying`] in front of its executor. Passes do not
//! see the difference.

use awqc_ir::{FusedDef, Region, ValueId, WeightId};

use crate::exec::{Afterwards, ExecError, Executor, Tensor};
use crate::facts::InputStats;

/// Where statistics are kept.
pub trait StatsStore: Sync {
    /// The statistics of a region, or `None` if there are none.
    ///
    /// # Errors
    /// When what is kept cannot be read; the message names the file.
    fn load(&self, region: &str) -> Result<Option<Vec<InputStats>>, ExecError>;

    /// Keeps the statistics of a region.
    ///
    /// # Errors
    /// When they cannot be written; the message names the file.
    fn save(&mut self, region: &str, stats: &[InputStats]) -> Result<(), ExecError>;
}

/// An executor that also keeps the statistics that it gathers.
pub struct Recording<'a> {
    /// Does the work.
    pub inner: &'a mut dyn Executor,
    /// Keeps the results.
    pub store: &'a mut dyn StatsStore,
}

impl Executor for Recording<'_> {
    fn realize(&self, region: &Region, weight: WeightId) -> Result<Tensor, ExecError> {
        self.inner.realize(region, weight)
    }

    fn profile(
        &mut self,
        region: &Region,
        fused: &[FusedDef],
        taps: &[ValueId],
        afterwards: Afterwards,
    ) -> Result<Vec<InputStats>, ExecError> {
        if afterwards == Afterwards::Entry {
            return Err(ExecError::Unavailable(
                "the statistics of `profile{propagate}` hold for one pipeline only and cannot be saved: leave one of both out".into(),
            ));
        }
        let stats = self.inner.profile(region, fused, taps, afterwards)?;
        if !taps.is_empty() {
            self.store.save(&region.name.to_string(), &stats)?;
        }
        Ok(stats)
    }

    fn evaluate(&self, region: &Region, fused: &[FusedDef], at: &[ValueId]) -> Result<Vec<Tensor>, ExecError> {
        self.inner.evaluate(region, fused, at)
    }
}

/// An executor that answers `profile` from kept statistics and has no calibration stream. What it evaluates, it
/// evaluates on the inner executor's synthetic inputs: leave `loss=block` to runs that calibrate.
pub struct Replaying<'a> {
    /// Realizes weights and evaluates.
    pub inner: &'a mut dyn Executor,
    /// Has the statistics.
    pub store: &'a dyn StatsStore,
}

impl Executor for Replaying<'_> {
    fn realize(&self, region: &Region, weight: WeightId) -> Result<Tensor, ExecError> {
        self.inner.realize(region, weight)
    }

    fn profile(
        &mut self,
        region: &Region,
        _: &[FusedDef],
        taps: &[ValueId],
        afterwards: Afterwards,
    ) -> Result<Vec<InputStats>, ExecError> {
        if afterwards == Afterwards::Entry {
            return Err(ExecError::Unavailable(
                "saved statistics do not know the errors of earlier layers: leave out `propagate`, or give calibration text instead of them".into(),
            ));
        }
        if taps.is_empty() {
            return Ok(Vec::new());
        }
        let stats = self.store.load(&region.name.to_string())?.ok_or_else(|| {
            ExecError::Unavailable(format!(
                "the saved statistics have none of region {}: they belong to another model, or were cut short; calibrate again",
                region.name
            ))
        })?;
        check(region, taps, &stats)?;
        Ok(stats)
    }

    fn evaluate(&self, region: &Region, fused: &[FusedDef], at: &[ValueId]) -> Result<Vec<Tensor>, ExecError> {
        self.inner.evaluate(region, fused, at)
    }
}

/// Whether statistics belong to these taps.
///
/// # Errors
/// When their number or a number of channels differs, or a part is missing.
pub fn check(region: &Region, taps: &[ValueId], stats: &[InputStats]) -> Result<(), ExecError> {
    let wrong = |what: String| {
        Err(ExecError::Unavailable(format!(
            "the statistics of region {} do not fit: {what}; calibrate again",
            region.name
        )))
    };
    let taps: Vec<ValueId> = taps.iter().flat_map(|tap| std::iter::repeat_n(*tap, sets(region, *tap))).collect();
    if stats.len() != taps.len() {
        return wrong(format!("{} linear inputs are expected, there are {}", taps.len(), stats.len()));
    }
    for (tap, s) in taps.iter().zip(stats) {
        let value = region.value(*tap);
        let want = value.ty.channels().and_then(|c| usize::try_from(c).ok());
        let c = s.channels();
        if want != Some(c) || s.max_abs.len() != c || s.gram.len() != c * c || s.sample.len() % c.max(1) != 0 {
            return wrong(format!("%{} is {}, the statistics have {c} channels", value.name, value.ty));
        }
    }
    Ok(())
}

/// How many sets of statistics a value has: one for each expert whose rows it holds.
pub fn sets(region: &Region, value: ValueId) -> usize {
    usize::try_from(region.value(value).ty.experts()).unwrap_or(usize::MAX)
}

/// A region's statistics as named tensors: `0.tokens`, `0.mean_abs`, `0.max_abs`, `0.gram`, `0.sample`, `1.tokens`, …
/// The Gram matrix is kept as its lower triangle, row by row; the number of tokens as two f32, `n / 2²⁰` and the rest.
pub fn to_tensors(stats: &[InputStats]) -> Vec<(String, Tensor)> {
    let mut out = Vec::new();
    for (i, s) in stats.iter().enumerate() {
        let c = s.channels();
        let mut put = |name: &str, shape: Vec<usize>, data: Vec<f32>| {
            out.push((format!("{i}.{name}"), Tensor::new(shape, data)));
        };
        put("tokens", vec![2], vec![(s.tokens >> 20) as f32, (s.tokens & 0xf_ffff) as f32]);
        put("mean_abs", vec![c], s.mean_abs.clone());
        put("max_abs", vec![c], s.max_abs.clone());
        let lower: Vec<f32> =
            s.gram.chunks(c.max(1)).enumerate().flat_map(|(r, row)| row[..=r].iter().copied()).collect();
        put("gram", vec![lower.len()], lower);
        put("sample", vec![s.sample.len() / c.max(1), c], s.sample.clone());
    }
    out
}

/// The statistics that [`to_tensors`] wrote; `get` finds a tensor by name.
///
/// # Errors
/// When a tensor is missing or its size does not fit the others. The message names the tensor.
pub fn from_tensors(mut get: impl FnMut(&str) -> Option<Tensor>) -> Result<Vec<InputStats>, ExecError> {
    let mut out = Vec::new();
    loop {
        let i = out.len();
        let Some(tokens) = get(&format!("{i}.tokens")) else { return Ok(out) };
        let wrong = |name: &str, want: String| {
            ExecError::Tensor(format!(
                "the saved statistics are damaged: tensor `{i}.{name}` must have {want}; calibrate again"
            ))
        };
        let mut need = |name: &str| get(&format!("{i}.{name}")).ok_or_else(|| wrong(name, "been saved".into()));
        let (mean_abs, max_abs, lower, sample) = (need("mean_abs")?, need("max_abs")?, need("gram")?, need("sample")?);
        let c = mean_abs.data.len();
        let [high, low] = tokens.data[..] else { return Err(wrong("tokens", "2 numbers".into())) };
        if max_abs.data.len() != c {
            return Err(wrong("max_abs", format!("{c} numbers")));
        }
        if Some(lower.data.len()) != c.checked_mul(c + 1).map(|n| n / 2) {
            return Err(wrong("gram", format!("{c}·{}/2 numbers", c + 1)));
        }
        if sample.data.len() % c.max(1) != 0 {
            return Err(wrong("sample", format!("rows of {c} numbers")));
        }
        let mut gram = vec![0.0; c * c];
        let mut from = lower.data.iter();
        for r in 0..c {
            for (k, v) in from.by_ref().take(r + 1).enumerate() {
                gram[r * c + k] = *v;
                gram[k * c + r] = *v;
            }
        }
        let tokens = ((high as u64) << 20) + low as u64;
        out.push(InputStats { tokens, mean_abs: mean_abs.data, max_abs: max_abs.data, gram, sample: sample.data });
    }
}
