//! The pass manager: runs a pipeline on one region at a time, and watches over every step.
//!
//! Regions come in the order of the module, so that a driver can stream them: only one needs to be in memory. After
//! each pass the region is compacted and verified, and on request run before and after and compared.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use awqc_ir::Diagnostics;
use awqc_ir::{Elem, FusedDef, Module, Name, Region, RegionName};

use crate::exec::{Afterwards, ExecError, Executor};
use crate::facts::Facts;
use crate::instrument::{self, Event, Hook, Point};
use crate::pass::{Budget, Changed, Fidelity, Pass, PassCx, PassError};
use crate::pipeline::{Pipeline, PipelineError, Step};
use crate::profile::Profile;
use crate::registry::{DynPass, Registry};
use crate::remark::Remarks;
use crate::scheme::Scheme;

/// What [`Fidelity::Exact`] leaves to the order of additions: the largest deviation, relative to the output's largest
/// magnitude.
pub const EXACT: f64 = 2e-5;

/// How a pipeline is run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Verify the region after every pass.
    pub verify_each: bool,
    /// Run the region before and after every pass and compare, within the pass's fidelity.
    pub check_each: bool,
    /// How many rewrites may be applied in all.
    pub budget: Budget,
    /// Set from elsewhere to stop before the next pass.
    pub stop: Arc<AtomicBool>,
}

impl Default for Options {
    fn default() -> Self {
        Self { verify_each: true, check_each: false, budget: Budget::default(), stop: Arc::default() }
    }
}

/// What a region shares with the rest of its module.
pub struct ModuleCx<'a> {
    /// The module's fused ops.
    pub fused: &'a mut Vec<FusedDef>,
    /// Its symbolic dimensions.
    pub dims: &'a [Name],
    /// Its element type.
    pub dtype: Elem,
    /// Full names of checkpoint tensors that more than one region uses: see [`shared_tensors`].
    pub shared: &'a BTreeSet<String>,
    /// Whether this is the module's last region.
    pub last: bool,
    /// The widths that were allocated to this region, see [`PassCx::widths`].
    pub widths: Option<&'a [u8]>,
}

/// What became of a region.
#[derive(Clone, Debug)]
pub struct RegionReport {
    /// The region.
    pub region: RegionName,
    /// For each pass of the pipeline, whether it changed something.
    pub changed: Vec<Changed>,
    /// What is known of the region after the last pass.
    pub facts: Facts,
}

/// Why a pipeline stopped, with the place.
#[derive(Debug, thiserror::Error)]
#[error("{pass} on {region}: {kind}")]
pub struct ManagerError {
    /// The region.
    pub region: RegionName,
    /// The pass.
    pub pass: String,
    /// What went wrong.
    pub kind: ManagerErrorKind,
}

/// What went wrong in a pass.
#[derive(Debug, thiserror::Error)]
pub enum ManagerErrorKind {
    /// The pass itself failed.
    #[error(transparent)]
    Pass(#[from] PassError),
    /// What the pass left behind is not valid: a bug in the pass.
    #[error("the pass left an invalid region behind, which is a bug in the pass\n{0}")]
    Verify(Diagnostics),
    /// The region could not be run for the comparison.
    #[error("the region cannot be run for the comparison: {0}")]
    Run(ExecError),
    /// The pass changed the function by more than it promises.
    #[error(
        "result {result} changed by {deviation:.3e} of its largest magnitude; the pass promises at most {bound:.3e}"
    )]
    Check {
        /// The position among the region's results.
        result: usize,
        /// The largest deviation, relative to the result's largest magnitude.
        deviation: f64,
        /// What the pass's fidelity allows.
        bound: f64,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
}

/// Runs one pipeline on the regions of one module.
pub struct Manager {
    steps: Vec<Step>,
    passes: Vec<Box<dyn DynPass>>,
    options: Options,
    hooks: Vec<Box<dyn Hook>>,
    times: Vec<Duration>,
}

impl Manager {
    /// A manager for `pipeline`.
    ///
    /// # Errors
    /// When the pipeline names a pass or an option that does not exist.
    pub fn new(registry: &Registry, pipeline: Pipeline, options: Options) -> Result<Self, PipelineError> {
        let passes = registry.resolve(&pipeline)?;
        let times = vec![Duration::ZERO; passes.len()];
        Ok(Self { steps: pipeline.steps, passes, options, hooks: Vec::new(), times })
    }

    /// With one more hook; hooks are called in the order in which they were added.
    #[must_use]
    pub fn with_hook(mut self, hook: impl Hook + 'static) -> Self {
        self.hooks.push(Box::new(hook));
        self
    }

    /// The time spent in each pass so far, over all regions, in pipeline order.
    pub fn times(&self) -> impl Iterator<Item = (&str, Duration)> + '_ {
        self.passes.iter().map(|p| p.name()).zip(self.times.iter().copied())
    }

    /// Counts time that the driver spent on the pass at this place of the pipeline.
    pub fn add_time(&mut self, index: usize, time: Duration) {
        if let Some(total) = self.times.get_mut(index) {
            *total += time;
        }
    }

    /// The quantization that the first `quantize` behind pass `index` will apply.
    fn scheme(&self, index: usize) -> Option<Scheme> {
        self.passes.iter().skip(index + 1).find_map(|p| p.scheme())
    }

    /// Runs the pipeline on one region.
    ///
    /// # Errors
    /// When a pass fails or breaks its promise, or the user asks to stop. The region may then be half changed.
    pub fn run_region(
        &mut self,
        cx: &mut ModuleCx<'_>,
        region: &mut Region,
        exec: &mut dyn Executor,
        remarks: &mut Remarks,
        sink: &mut dyn FnMut(Event),
    ) -> Result<RegionReport, ManagerError> {
        self.run_part(0..self.passes.len(), cx, region, exec, remarks, sink)
    }

    /// Runs the passes at these places of the pipeline on one region, for drivers that bring all regions as far before
    /// any goes on. What an earlier part found out of the region's activations is forgotten. A calibration stream that
    /// [`Profile`] left at the region's entry is moved to its exit at the end.
    ///
    /// # Errors
    /// As [`Manager::run_region`].
    pub fn run_part(
        &mut self,
        part: Range<usize>,
        cx: &mut ModuleCx<'_>,
        region: &mut Region,
        exec: &mut dyn Executor,
        remarks: &mut Remarks,
        sink: &mut dyn FnMut(Event),
    ) -> Result<RegionReport, ManagerError> {
        let mut report = RegionReport { region: region.name.clone(), changed: Vec::new(), facts: Facts::default() };
        for index in part.start..part.end.min(self.passes.len()) {
            let rest = Pipeline { steps: self.steps.iter().skip(index).cloned().collect() }.to_string();
            let name = self.passes[index].name().to_owned();
            let at = Point { index, pass: &name, region: &report.region, pipeline: &rest };
            let before = region.clone();
            for hook in &mut self.hooks {
                hook.before(&at, &|| print(cx, &before), sink);
            }
            remarks.enter(&name, &report.region.to_string());
            match self.run_pass(index, cx, region, &before, exec, &mut report.facts, remarks) {
                Ok(changed) => report.changed.push(changed),
                Err(kind) => {
                    for hook in &mut self.hooks {
                        hook.failed(&at, &|| print(cx, &before), sink);
                    }
                    return Err(ManagerError { region: report.region, pass: name, kind });
                }
            }
            for hook in &mut self.hooks {
                hook.after(&at, &|| print(cx, region), sink);
            }
        }
        if std::mem::take(&mut report.facts.waiting) {
            let moved = exec.profile(region, cx.fused, &[], Afterwards::Exit);
            moved.map_err(|e| ManagerError {
                region: report.region.clone(),
                pass: Profile::NAME.to_owned(),
                kind: PassError::from(e).into(),
            })?;
        }
        Ok(report)
    }

    #[expect(clippy::too_many_arguments, reason = "one step of `run_region`, kept apart for its error type")]
    fn run_pass(
        &mut self,
        index: usize,
        cx: &mut ModuleCx<'_>,
        region: &mut Region,
        before: &Region,
        exec: &mut dyn Executor,
        facts: &mut Facts,
        remarks: &mut Remarks,
    ) -> Result<Changed, ManagerErrorKind> {
        if self.options.stop.load(Ordering::Relaxed) {
            return Err(ManagerErrorKind::Interrupted);
        }
        let scheme = self.scheme(index);
        let pass = &self.passes[index];
        let start = Instant::now();
        let (shared, last, widths, budget) = (cx.shared, cx.last, cx.widths, &mut self.options.budget);
        let mut pass_cx =
            PassCx { exec: &mut *exec, fused: cx.fused, facts, remarks, scheme, widths, shared, last, budget };
        let result = pass.run(region, &mut pass_cx);
        self.times[index] += start.elapsed();
        let changed = result?;
        let map = region.compact();
        facts.renumber(&map);
        if self.options.verify_each {
            verify(cx, region).map_err(ManagerErrorKind::Verify)?;
        }
        if self.options.check_each && changed == Changed::Yes {
            check(pass.as_ref(), before, region, cx.fused, exec, remarks)?;
        }
        Ok(changed)
    }

    /// Runs the pipeline on every region of a module, in order.
    ///
    /// # Errors
    /// As [`Manager::run_region`].
    pub fn run_module(
        &mut self,
        module: &mut Module,
        exec: &mut dyn Executor,
        remarks: &mut Remarks,
        sink: &mut dyn FnMut(Event),
    ) -> Result<Vec<RegionReport>, ManagerError> {
        let shared = shared_tensors(&module.regions);
        let count = module.regions.len();
        let Module { fused, dims, dtype, regions, .. } = module;
        let mut reports = Vec::with_capacity(count);
        for (i, region) in regions.iter_mut().enumerate() {
            let mut cx = ModuleCx { fused, dims, dtype: *dtype, shared: &shared, last: i + 1 == count, widths: None };
            reports.push(self.run_region(&mut cx, region, exec, remarks, sink)?);
        }
        Ok(reports)
    }
}

/// Full names of the checkpoint tensors that more than one region uses.
pub fn shared_tensors<'a>(regions: impl IntoIterator<Item = &'a Region>) -> BTreeSet<String> {
    let mut users: BTreeMap<String, usize> = BTreeMap::new();
    for region in regions {
        let weights = region.used_weights();
        let names: BTreeSet<String> =
            weights.into_iter().flat_map(|w| region.sources(w)).map(|n| region.tensor_name(&n)).collect();
        for name in names {
            *users.entry(name).or_default() += 1;
        }
    }
    users.into_iter().filter(|(_, n)| *n > 1).map(|(name, _)| name).collect()
}

/// A module of this one region, for the verifier and the printer.
fn module_of(cx: &ModuleCx<'_>, region: &Region) -> Module {
    let mut module = Module::new("region", cx.dtype);
    module.dims = cx.dims.to_vec();
    module.fused = cx.fused.clone();
    module.regions = vec![region.clone()];
    module
}

fn print(cx: &ModuleCx<'_>, region: &Region) -> String {
    instrument::print(&module_of(cx, region))
}

fn verify(cx: &ModuleCx<'_>, region: &Region) -> Result<(), Diagnostics> {
    awqc_ir::verify::verify(&module_of(cx, region)).map(|_| ())
}

/// Runs both forms of a region on the same inputs and compares their results.
fn check(
    pass: &dyn DynPass,
    before: &Region,
    after: &Region,
    fused: &[FusedDef],
    exec: &dyn Executor,
    remarks: &mut Remarks,
) -> Result<(), ManagerErrorKind> {
    let want = exec.evaluate(before, fused, before.results()).map_err(ManagerErrorKind::Run)?;
    let got = exec.evaluate(after, fused, after.results()).map_err(ManagerErrorKind::Run)?;
    let bound = match pass.fidelity() {
        Fidelity::Exact => EXACT,
        Fidelity::Rounding(ulps) => EXACT.max(ulps * f64::from(f32::EPSILON)),
        Fidelity::Lossy => f64::INFINITY,
    };
    for (result, (a, b)) in want.iter().zip(&got).enumerate() {
        let deviation = deviation(&a.data, &b.data);
        if pass.fidelity() == Fidelity::Lossy {
            remarks.largest("largest relative deviation", deviation);
        }
        // Written so that NaN fails.
        let kept = a.shape == b.shape && deviation <= bound;
        if !kept {
            return Err(ManagerErrorKind::Check { result, deviation, bound });
        }
    }
    Ok(())
}

/// The largest |a − b|, relative to the largest |a|; NaN if there is a NaN, infinite if the lengths differ.
pub fn deviation(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let (mut worst, mut scale) = (0.0f64, 0.0f64);
    for (a, b) in a.iter().zip(b) {
        let d = (f64::from(*a) - f64::from(*b)).abs();
        if d.is_nan() {
            return f64::NAN;
        }
        worst = worst.max(d);
        scale = scale.max(f64::from(a.abs()));
    }
    if worst == 0.0 { 0.0 } else { worst / scale }
}
