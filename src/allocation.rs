//! The part of a compile that comes before all others where widths are mixed: a mean of bits is spread over the linears
//! of the whole model.
//!
//! Every region comes as far as `profile` in a copy; then the float model says how much it minds errors in the outputs
//! of its linears, and the Gram matrices of their inputs what rounding makes of them. A few calibration windows tell
//! enough, so this measures for itself, and the compile that follows measures again, region by region, on all of them:
//! no statistics of a whole model have to be kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use awqc_exec::{Control, HostExecutor, sensitivity};
use awqc_ir::{Group, Module, TensorSource, ValueId, verify::verify};
use awqc_passes::allocate::{Unit, allocate, costs, covered, expected_loss, mean_bits};
use awqc_passes::analysis::linears::{label, units, weights};
use awqc_passes::manager::shared_tensors;
use awqc_passes::pipeline::Pipeline;
use awqc_passes::profile::Profile;
use awqc_passes::quantize::{Mixture, Quantize, QuantizeOptions};
use awqc_passes::{Afterwards, Pass, RemarkKind, Remarks};
use serde_json::{Value as Json, json};

use crate::compile::{Request, module_cx, pass_failure};
use crate::failure::{Exit, Failure};
use crate::progress::{Progress, say};
use crate::target::Format;
use crate::watch::Watch;

/// Who speaks in remarks and records.
const NAME: &str = "allocate";

/// Calibration tokens that are measured on, unless one window has more.
const TOKENS: usize = 4096;

/// For each region the widths of its units, in order.
pub(crate) type Widths = Vec<Vec<u8>>;

/// A pipeline that mixes widths.
pub(crate) struct Allocation {
    /// What is spread.
    pub(crate) mixture: Mixture,
    /// Where `profile` stands.
    profile: usize,
    symmetric: bool,
    group: Group,
    pipeline: String,
}

impl Allocation {
    /// What `pipeline` asks for, if it mixes widths.
    ///
    /// # Errors
    /// When it does so twice, or does not measure activations first.
    pub(crate) fn of(pipeline: &str) -> Result<Option<Self>, Failure> {
        let usage = |e: &dyn std::fmt::Display| Failure::new(Exit::Usage, e);
        let Pipeline { steps } = pipeline.parse().map_err(|e| usage(&e))?;
        let mut found: Option<(usize, QuantizeOptions, Mixture)> = None;
        for (at, step) in steps.iter().enumerate().filter(|(_, s)| s.name == Quantize::NAME) {
            let options = Json::Object(step.options.clone());
            let options: QuantizeOptions = serde_json::from_value(options).map_err(|e| usage(&e))?;
            let Some(mixture) = options.mixture().map_err(|e| usage(&e))? else { continue };
            if found.is_some() {
                return Err(usage(&"a pipeline can mix widths once only"));
            }
            found = Some((at, options, mixture));
        }
        let Some((at, options, mixture)) = found else { return Ok(None) };
        let Some(profile) = steps.iter().take(at).position(|s| s.name == Profile::NAME) else {
            let message = format!("a mean of {} bits is spread by what activations say", mixture.mean);
            return Err(usage(&message).help("put `profile` before `quantize`, or give bits=2, 3, 4 or 8"));
        };
        let (symmetric, group) = (options.symmetric, options.group.0);
        Ok(Some(Self { mixture, profile, symmetric, group, pipeline: pipeline.to_owned() }))
    }

    /// Whether the target and the model allow it: asked before work is done.
    ///
    /// # Errors
    /// When the format has one width for all weights, or there are experts.
    pub(crate) fn check(&self, request: &Request<'_>, module: &Module) -> Result<(), Failure> {
        let help = "give --bits 2, 3, 4 or 8";
        match request.target.format {
            Format::Artefact => {}
            Format::HfAwq => {
                let message = format!(
                    "the format of `{}` has one width for all weights, so a mean of {} bits cannot be spread over them",
                    request.target.name, self.mixture.mean
                );
                return Err(Failure::new(Exit::Unsupported, message).help("give --bits 4, or another target"));
            }
        }
        let experts = module.regions.iter().try_for_each(covered);
        experts.map_err(|e| Failure::new(Exit::Unsupported, e).help(help))
    }

    /// Whether there is calibration text: asked before work is done.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn check_windows(&self, windows: &[Vec<i32>]) -> Result<(), Failure> {
        if windows.is_empty() {
            let message = "to spread a mean of bits needs calibration text, saved statistics are not enough";
            return Err(Failure::new(Exit::Usage, message).help("leave out --profile"));
        }
        Ok(())
    }

    /// Spreads the bits over `module`. What was decided goes to the remarks.
    ///
    /// # Errors
    /// When a pass before `profile` fails, a tensor cannot be read, or the user interrupts.
    pub(crate) fn run(
        &self,
        request: &Request<'_>,
        module: &Module,
        source: &Arc<dyn TensorSource>,
        windows: &[Vec<i32>],
        remarks: &mut Remarks,
    ) -> Result<Widths, Failure> {
        let windows = some(windows);
        let module = self.prepared(request, module, source)?;
        let float = verify(&module).map_err(|d| Failure::new(Exit::Check, d))?;
        let control = Control::new().with_interrupt(request.interrupt.flag());
        let mut progress: Option<Progress> = None;
        let measured = sensitivity(float, source.as_ref(), &windows, &control, &mut |_, total| {
            let new = || Progress::new("sensitivity", total as u64, request.quiet);
            progress.get_or_insert_with(new).step("");
        })?;
        if let Some(progress) = &progress {
            progress.finish();
        }
        let mut exec = request.profile_on.calibrated(source.clone(), control, &windows)?;
        let last = measured.iter().rposition(|m| !m.is_empty()).map_or(0, |at| at + 1);
        let mut progress = Progress::new("allocate", last as u64, request.quiet);
        let mut found: Vec<Vec<Unit>> = Vec::new();
        for (region, measured) in module.regions.iter().zip(&measured).take(last) {
            request.interrupt.check()?;
            let mut taps: Vec<ValueId> = measured.iter().map(|(l, _)| l.input).collect();
            taps.sort_unstable();
            taps.dedup();
            let stats = exec.profile(region, &module.fused, &taps, Afterwards::Exit)?;
            let stats: Vec<_> = taps.into_iter().zip(stats).collect();
            let costs = costs(region, exec.as_ref(), &stats, measured, self.symmetric, self.group);
            found.push(costs.map_err(|e| Failure::new(Exit::BadInput, e))?);
            progress.step(&region.name.to_string());
        }
        progress.finish();
        found.resize(module.regions.len(), Vec::new());
        let flat: Vec<Unit> = found.iter().flatten().copied().collect();
        let chosen = allocate(&flat, &self.mixture.widths, self.mixture.mean);
        let chosen = chosen.map_err(|e| Failure::new(Exit::Failed, e))?;
        let mut left = chosen.iter().copied();
        let widths: Widths = found.iter().map(|units| left.by_ref().take(units.len()).collect()).collect();
        self.tell(request, &module, (&found, &widths), (&flat, &chosen), remarks);
        Ok(widths)
    }

    /// A copy of the module as `profile` will see it.
    fn prepared(
        &self,
        request: &Request<'_>,
        module: &Module,
        source: &Arc<dyn TensorSource>,
    ) -> Result<Module, Failure> {
        let quiet = Watch { rewrites: request.watch.rewrites.clone(), ..Watch::default() };
        let mut manager = quiet.manager(request.registry, &self.pipeline, request.interrupt)?;
        let mut exec = HostExecutor::new(source.clone());
        let mut module = module.clone();
        let shared = shared_tensors(&module.regions);
        let count = module.regions.len();
        for (i, mut region) in std::mem::take(&mut module.regions).into_iter().enumerate() {
            let cx = &mut module_cx(&mut module, &shared, i + 1 == count, None);
            let mut said = Remarks::default();
            manager
                .run_part(0..self.profile, cx, &mut region, &mut exec, &mut said, &mut |_| {})
                .map_err(|e| pass_failure(&e))?;
            module.regions.push(region);
        }
        Ok(module)
    }

    /// Says what was decided: a record for each unit and one for the model.
    fn tell(
        &self,
        request: &Request<'_>,
        module: &Module,
        (found, widths): (&[Vec<Unit>], &Widths),
        (flat, chosen): (&[Unit], &[u8]),
        remarks: &mut Remarks,
    ) {
        for (region, (costs, widths)) in module.regions.iter().zip(found.iter().zip(widths)) {
            remarks.enter(NAME, &region.name.to_string());
            for ((unit, cost), bits) in units(region).iter().zip(costs).zip(widths) {
                let linears: Vec<String> = weights(unit).into_iter().map(|w| label(region, w)).collect();
                let loss = expected_loss(&[*cost], &[*bits]);
                remarks.record(json!({
                    "linears": linears, "elements": cost.elements, "bits": bits, "expected_loss": loss,
                }));
            }
        }
        let mut elements: BTreeMap<u8, u64> = BTreeMap::new();
        for (unit, bits) in flat.iter().zip(chosen) {
            *elements.entry(*bits).or_default() += unit.elements;
        }
        let all = elements.values().sum::<u64>().max(1) as f64;
        let mean = mean_bits(flat, chosen);
        remarks.enter(NAME, "the model");
        remarks.record(json!({
            "bits": mean,
            "at_most": self.mixture.mean,
            "elements": elements.iter().map(|(bits, n)| (bits.to_string(), json!(n))).collect::<serde_json::Map<_, _>>(),
            "expected_loss": expected_loss(flat, chosen),
        }));
        let share = |(bits, n): (&u8, &u64)| format!("{bits} bits for {:.1} %", 100.0 * *n as f64 / all);
        let shares: Vec<String> = elements.iter().map(share).collect();
        let line = format!("{mean:.4} bits on the mean: {} of the weights", shares.join(", "));
        if !request.quiet {
            say(&format!("allocate: {line}"));
        }
        remarks.push(RemarkKind::Applied, line);
    }
}

/// Windows spread evenly over the calibration text, of about [`TOKENS`] tokens in all.
fn some(windows: &[Vec<i32>]) -> Vec<Vec<i32>> {
    let longest = windows.iter().map(Vec::len).max().unwrap_or(1).max(1);
    let count = (TOKENS / longest).clamp(1, windows.len().max(1));
    (0..count).filter_map(|i| windows.get(i * windows.len() / count).cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_windows_stand_for_all() {
        let windows = |count: i32, length: usize| (0..count).map(|i| vec![i; length]).collect::<Vec<_>>();
        let first = |windows: &[Vec<i32>]| some(windows).iter().map(|w| w[0]).collect::<Vec<_>>();
        assert_eq!(first(&windows(64, 512)), [0, 8, 16, 24, 32, 40, 48, 56]);
        assert_eq!(first(&windows(3, 24)), [0, 1, 2]);
        assert_eq!(first(&windows(3, 5000)), [0]);
    }

    #[test]
    fn a_pipeline_says_what_is_mixed() {
        let of = |text: &str| Allocation::of(text).map(|a| a.map(|a| (a.mixture.mean, a.mixture.widths, a.profile)));
        assert_eq!(of("profile,quantize{bits=3}").unwrap(), None);
        assert_eq!(of("dce,profile,quantize{bits=3.25}").unwrap(), Some((3.25, vec![2, 3, 4, 8], 1)));
        assert_eq!(of("profile,quantize{bits=3,mixed,widths=[4,3]}").unwrap(), Some((3.0, vec![3, 4], 0)));
        let error = |text: &str| of(text).unwrap_err().to_string();
        assert!(error("quantize{bits=3.25}").contains("put `profile` before"), "{}", error("quantize{bits=3.25}"));
        assert!(error("profile,quantize{bits=3.5},quantize{bits=3.5}").contains("once"));
        assert!(error("profile,quantize{bits=1.5}").contains("mean of 1.5 bits"));
    }
}
