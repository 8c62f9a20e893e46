//! What the search needs to know of a site: the weights that undo its scales, and the activations that they see.

use awqc_ir::{Elem, Group, Quant, Region, ValueId};

use crate::analysis::gauge::{ParamUse, Site, per_channel};
use crate::analysis::linears::{LinearUse, quantizable, weights};
use crate::exec::{Executor, Tensor};
use crate::facts::{Facts, InputStats};
use crate::pass::PassError;
use crate::scheme::Scheme;

/// A linear whose columns the site multiplies.
pub(super) struct Consumer {
    /// Its place among the site's consumers.
    pub(super) param: usize,
    /// Its place in a stack of matrices; 0 for a matrix by itself.
    pub(super) expert: usize,
    /// `[out, in]`.
    pub(super) weight: Tensor,
    /// How it will be rounded.
    pub(super) quant: Quant,
    /// The distinct values that it is used with.
    pub(super) inputs: Vec<ValueId>,
}

/// Numbers of one site.
pub(super) struct SiteData<'f> {
    /// Linears to be quantized, in order.
    pub(super) consumers: Vec<Consumer>,
    /// Statistics by value, each expert's in turn, in order.
    pub(super) stats: Vec<(ValueId, &'f [InputStats])>,
    /// Mean magnitude of the activation for each free scale; the root mean square over the channels that share it.
    pub(super) x: Vec<f32>,
    /// Largest magnitude that each scale multiplies (consumers) and divides (producers).
    largest: Vec<(f32, f32)>,
    limit: f32,
}

impl<'f> SiteData<'f> {
    /// Reads the weights and finds the statistics; the inner error says why the site cannot be searched.
    pub(super) fn gather(
        region: &Region,
        site: &Site,
        scheme: Scheme,
        exec: &dyn Executor,
        facts: &'f Facts,
    ) -> Result<Result<SiteData<'f>, String>, PassError> {
        let linears = quantizable(region);
        let mut data = SiteData {
            consumers: Vec::new(),
            stats: Vec::new(),
            x: vec![0.0; site.free],
            largest: vec![(0.0, 0.0); site.free],
            limit: f32::MAX,
        };
        for (param, p) in site.consumers.iter().enumerate() {
            data.limit = data.limit.min(limit(region.weight(p.weight).ty.elem));
            let weight = exec.realize(region, p.weight)?;
            let experts = experts(&weight);
            let size = weight.data.len() / experts;
            for (c, entry) in p.entry.iter().enumerate() {
                let Some(slot) = entry.and_then(|e| data.largest.get_mut(e as usize)) else { continue };
                let cols = weight.cols().max(1);
                let matrix = weight.data.get(c / cols * size..).unwrap_or(&[]);
                let column = matrix.iter().take(size).skip(c % cols).step_by(cols);
                slot.0 = column.fold(slot.0, |m, v| m.max(v.abs()));
            }
            if !weights(&linears).contains(&p.weight) {
                continue;
            }
            let uses: Vec<LinearUse> = linears.iter().filter(|l| l.weight == p.weight).copied().collect();
            let quant = scheme.of(region, &uses, facts)?;
            let mut inputs: Vec<ValueId> = Vec::new();
            for l in &uses {
                if !inputs.contains(&l.input) {
                    inputs.push(l.input);
                }
            }
            for input in &inputs {
                let Some(stats) = facts.inputs.get(input) else {
                    let name = &region.value(*input).name;
                    return Ok(Err(format!("no statistics of %{name}: put `profile` before this pass")));
                };
                let cols = weight.cols();
                let fits = |s: &InputStats| s.channels() == cols && s.gram.len() == cols * cols;
                if stats.len() != experts || !stats.iter().all(fits) {
                    return Ok(Err(format!("the statistics of %{} have another size", region.value(*input).name)));
                }
                if stats.iter().all(|s| s.tokens == 0) {
                    return Ok(Err("no calibration token came by".to_owned()));
                }
                if !data.stats.iter().any(|(v, _)| v == input) {
                    data.stats.push((*input, stats));
                }
            }
            let Tensor { shape, data: numbers } = weight;
            let matrix: Vec<usize> = shape.iter().skip(shape.len().saturating_sub(2)).copied().collect();
            for (expert, part) in numbers.chunks(size.max(1)).enumerate() {
                let weight = Tensor::new(matrix.clone(), part.to_vec());
                data.consumers.push(Consumer { param, expert, weight, quant, inputs: inputs.clone() });
            }
        }
        if data.consumers.is_empty() {
            return Ok(Err("none of its linears is quantized".to_owned()));
        }
        for p in &site.producers {
            data.limit = data.limit.min(limit(region.weight(p.weight).ty.elem));
            let weight = exec.realize(region, p.weight)?;
            // The channels of a stack's matrices follow each other, those of other weights come back.
            let inner: usize = weight.shape.iter().skip(p.axis + 1).product();
            for (i, v) in weight.data.iter().enumerate() {
                let channel = (i / inner.max(1)) % p.entry.len().max(1);
                let Some(slot) = p.entry[channel].and_then(|e| data.largest.get_mut(e as usize)) else { continue };
                slot.1 = slot.1.max((v + p.offset as f32).abs());
            }
        }
        data.x = data.activation_mean(site);
        Ok(Ok(data))
    }

    /// The statistics of what a consumer reads of a value.
    pub(super) fn stats_of(&self, value: ValueId, consumer: &Consumer) -> Option<&InputStats> {
        self.stats.iter().find(|(v, _)| *v == value).and_then(|(_, s)| s.get(consumer.expert))
    }

    /// How many tokens came by a consumer.
    pub(super) fn tokens(&self, consumer: &Consumer) -> u64 {
        consumer.inputs.iter().filter_map(|v| self.stats_of(*v, consumer)).map(|s| s.tokens).sum()
    }

    fn activation_mean(&self, site: &Site) -> Vec<f32> {
        let mut sums = vec![(0.0f64, 0usize); site.free];
        for (value, stats) in &self.stats {
            let Some(used) = site.values.iter().find(|v| v.value == *value) else { continue };
            for (entry, x) in used.entry.iter().zip(stats.iter().flat_map(|s| &s.mean_abs)) {
                if let Some(slot) = entry.and_then(|e| sums.get_mut(e as usize)) {
                    *slot = (slot.0 + f64::from(*x).powi(2), slot.1 + 1);
                }
            }
        }
        sums.into_iter().map(|(sum, n)| (sum / n.max(1) as f64).sqrt() as f32).collect()
    }

    /// Mean relative magnitude of the weights for each free scale: over all rows of all consumers, |w| relative to the
    /// largest of its group, averaged over the channels that share the scale.
    pub(super) fn weight_mean(&self, site: &Site, group: Group) -> Vec<f32> {
        let mut sums = vec![(0.0f64, 0usize); site.free];
        for consumer in &self.consumers {
            let (w, rows) = (&consumer.weight, consumer.weight.rows());
            let mean = crate::awq::reference::weight_mean(&[&w.data], w.cols(), group);
            for (entry, m) in self.entry(site, consumer).iter().zip(mean) {
                if let Some(slot) = entry.and_then(|e| sums.get_mut(e as usize)) {
                    *slot = (slot.0 + f64::from(m) * rows as f64, slot.1 + rows);
                }
            }
        }
        sums.into_iter().map(|(sum, n)| (sum / n.max(1) as f64) as f32).collect()
    }

    /// Whether several channels share a scale.
    pub(super) fn tied(&self, site: &Site) -> bool {
        let scaled = |p: &ParamUse| p.entry.iter().filter(|e| e.is_some()).count();
        site.consumers.iter().chain(&site.producers).any(|p| scaled(p) > site.free)
    }

    /// Which scale each column of a consumer has.
    pub(super) fn entry<'s>(&self, site: &'s Site, consumer: &Consumer) -> &'s [Option<u32>] {
        let all = site.consumers.get(consumer.param).map_or(&[][..], |p| &p.entry);
        let cols = consumer.weight.cols();
        all.get(consumer.expert * cols..(consumer.expert + 1) * cols).unwrap_or(&[])
    }

    /// The factors of a consumer's columns.
    pub(super) fn columns(&self, site: &Site, consumer: &Consumer, scales: &[f32]) -> Vec<f32> {
        per_channel(self.entry(site, consumer), scales)
    }

    /// Whether every folded parameter can be held by its element type.
    pub(super) fn stays_finite(&self, site: &Site, scales: &[f32]) -> bool {
        let one = scales.iter().all(|s| *s == 1.0);
        let fits = |(s, (up, down)): (&f32, &(f32, f32))| up * s <= self.limit && down / s <= self.limit;
        one || (scales.len() == site.free && scales.iter().zip(&self.largest).all(fits))
    }
}

/// The matrices of a weight.
fn experts(weight: &Tensor) -> usize {
    if weight.shape.len() == 3 { weight.shape[0].max(1) } else { 1 }
}

/// The largest number that an element type holds.
fn limit(elem: Elem) -> f32 {
    match elem {
        Elem::F16 => 65504.0,
        Elem::Bf16 | Elem::F32 | Elem::I32 | Elem::Quant(_) => f32::MAX / 2.0,
    }
}
