//! Compiling: one region after the other through the pipeline and into the artefact.

mod checks;
mod output;
mod report;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use awqc_exec::emit::{EmitCx, Existing, Staging};
use awqc_exec::{Control, HostExecutor};
use awqc_ir::{Module, Quant, Region, verify::verify};
use awqc_passes::manager::{ManagerError, ManagerErrorKind, ModuleCx, shared_tensors};
use awqc_passes::pipeline::{Pipeline, Step};
use awqc_passes::profile::Profile;
use awqc_passes::remark::counted;
use awqc_passes::{Afterwards, ExecError, Executor, Pass, PassError, Registry, Remarks};
use serde_json::{Value as Json, json};

pub use checks::compilable;
pub use report::{Outcome, PassSummary, Report};

use crate::allocation::Allocation;
use crate::burn::ProfileOn;
use crate::calibration::Calibration;
use crate::device::write_kernels;
use crate::evaluate::Watched;
use crate::failure::{Exit, Failure};
use crate::generate;
use crate::interrupt::Interrupt;
use crate::model::Model;
use crate::progress::{Progress, say};
use crate::resume::{Work, digest, fingerprint};
use crate::rss;
use crate::size::Tally;
use crate::statistics::{Folder, Statistics};
use crate::target::{Method, Mixed, Target, fill_mixed};
use crate::tuning::Tuning;
use crate::watch::Watch;

/// What to compile, and how.
pub struct Request<'a> {
    /// The passes to choose from.
    pub registry: &'a Registry,
    /// The model.
    pub model: &'a Path,
    /// The seed of random weights in place of the model's own: `model` is a configuration.
    pub random: Option<u64>,
    /// What for.
    pub target: &'static Target,
    /// The quantization of linear weights.
    pub quant: Quant,
    /// Widths that take the place of its bits.
    pub mixed: Option<Mixed>,
    /// How codes are chosen.
    pub method: Method,
    /// Bits of the output head, for targets that round it: 8 or 16.
    pub head_bits: u8,
    /// In place of the target's own pipeline.
    pub pipeline: Option<String>,
    /// Where calibration tokens come from.
    pub calibration: Calibration,
    /// At most so many calibration windows.
    pub samples: usize,
    /// Tokens in a window.
    pub seqlen: usize,
    /// Where the statistics of activations come from.
    pub statistics: Statistics,
    /// Where they are gathered.
    pub profile_on: ProfileOn,
    /// The artefact's folder.
    pub out: PathBuf,
    /// What to do with an existing folder.
    pub existing: Existing,
    /// Keep finished regions in a work folder, and go on from there if an earlier run left one.
    pub resume: bool,
    /// Hooks and checks.
    pub watch: &'a Watch,
    /// Stops the work.
    pub interrupt: &'a Interrupt,
    /// Where to look for NVRTC, for CUDA targets.
    pub nvrtc: &'a [PathBuf],
    /// No progress.
    pub quiet: bool,
}

/// Compiles a model.
///
/// # Errors
/// When the model, the pipeline or the target do not fit, a pass fails, or the artefact cannot be written; nothing is
/// then left behind.
pub fn compile(request: &Request<'_>) -> Result<Outcome, Failure> {
    let start = Instant::now();
    let own = request.pipeline.as_deref().unwrap_or(request.target.pipeline);
    let pipeline = fill_mixed(own, request.method, request.quant, request.mixed.as_ref(), request.head_bits);
    let mut manager = request.watch.manager(request.registry, &pipeline, request.interrupt)?;
    let tuning = Tuning::of(&pipeline)?;
    let allocation = Allocation::of(&pipeline)?;
    let first = 0..tuning.as_ref().map_or(usize::MAX, |t| t.at);
    checks::searches_profiled(&pipeline)?;
    if propagates(&pipeline) {
        checks::own_statistics(&request.statistics)?;
    }
    let device = request.profile_on.check()?.filter(|_| profiles(&pipeline) && !request.quiet);
    if let Some(device) = device {
        say(&format!("note: calibration runs on the CUDA device: {device}"));
    }
    let staging = Staging::create(&request.out, request.existing).map_err(output::emit_failure)?;
    let model = match request.random {
        None => Model::open(request.model).map_err(|e| checks::or_random(request.model, e))?,
        Some(seed) => {
            Model::open_random(request.model, seed).map_err(|e| checks::or_configuration(request.model, e))?
        }
    };
    compilable(&model, &pipeline)?;
    checks::refuse_overlap(request.model, &request.out)?;
    if !request.quiet {
        let own = checks::notes(request, &pipeline);
        model.notes.iter().chain(&own).for_each(|note| say(&format!("note: {note}")));
    }
    verify(&model.module).map_err(|d| Failure::new(Exit::BadInput, d))?;
    if let Some(allocation) = &allocation {
        allocation.check(request, &model.module)?;
    }
    let widths = allocation.as_ref().map_or(vec![request.quant.bits], |a| a.mixture.widths.clone());
    checks::kernels(request, &model, &widths)?;
    let mut emitter = output::emitter(request, &model, staging.path())?;
    let load = matches!(request.statistics, Statistics::Load(_));
    let windows = if (profiles(&pipeline) || tuning.is_some()) && !load {
        let Request { calibration, samples, seqlen, interrupt, quiet, .. } = request;
        windows(&model, calibration, *samples, *seqlen, interrupt, *quiet)?
    } else {
        Vec::new()
    };
    if let Some(tuning) = &tuning {
        tuning.check(&windows)?;
    }
    if let Some(allocation) = &allocation {
        allocation.check_windows(&windows)?;
    }
    let calibrated = json!({
        "source": request.calibration.describe(),
        "windows": windows.len(),
        "tokens": windows.iter().map(Vec::len).sum::<usize>(),
        "profiled_on": (!windows.is_empty()).then(|| request.profile_on.name()),
    });
    let mut statistics = match &request.statistics {
        Statistics::Gather => None,
        Statistics::Save(dir) => Some(Folder::create(dir, calibrated.clone())?.of(&model)?),
        Statistics::Load(dir) => Some(Folder::open(dir)?.of(&model)?),
    };
    let calibrated = statistics.as_ref().map_or(calibrated, |s| s.calibration.clone());
    let Model { mut module, source, .. } = model;
    let control = Control::new().with_interrupt(request.interrupt.flag());
    let mut exec: Box<dyn Executor> = match windows.is_empty() {
        true => Box::new(HostExecutor::new(source.clone()).with_control(control)),
        false => request.profile_on.calibrated(source.clone(), control, &windows)?,
    };

    let work = request.resume.then(|| {
        let parts = [
            ("pipeline", json!(pipeline)),
            ("calibration text", digest(&windows)),
            ("random weights", json!(request.random)),
            ("profile on", json!(request.profile_on.name())),
        ];
        Work::open(&request.out, &fingerprint(request.model, parts))
    });
    let work = work.transpose()?;
    let finished = work.as_ref().map_or(0, Work::finished);
    if finished > 0 && !request.quiet {
        say(&format!("note: {} finished by an earlier run", counted(finished as u64, "region")));
    }
    let mut remarks = Remarks::default();
    let mut tally = Tally::default();
    let kept = if let Some(work) = &work { work.load_widths(&mut remarks)? } else { None };
    let widths = match (kept, &allocation) {
        (_, None) => None,
        (Some(widths), Some(_)) => Some(widths),
        (None, Some(allocation)) => {
            let widths = allocation.run(request, &module, &source, &windows, &mut remarks)?;
            if let Some(work) = &work {
                work.save_widths(&widths, &Remarks::default(), &remarks)?;
            }
            Some(widths)
        }
    };
    let widths = |region: usize| widths.as_ref().map(|w| w.get(region).map_or(&[][..], Vec::as_slice));
    let shared = shared_tensors(&module.regions);
    let count = module.regions.len();
    let float = tuning.is_some().then(|| module.clone());
    let mut emit = |region: &mut Region, module: &Module, first: bool| {
        tally.add(region, &shared, first);
        emitter
            .region(region, &EmitCx { source: source.as_ref(), fused: &module.fused })
            .map_err(output::emit_failure)?;
        // What is written needs its numbers no more; codes have as many as weights.
        region.data_ids().for_each(|id| region.set_data_values(id, None));
        Ok::<_, Failure>(())
    };
    let mut progress = Progress::new("compile", count as u64, request.quiet);
    for (i, mut region) in std::mem::take(&mut module.regions).into_iter().enumerate() {
        request.interrupt.check()?;
        let name = region.name.to_string();
        let kept = match &work {
            Some(work) => work.load(i, &mut module, &mut remarks)?,
            None => None,
        };
        if let Some(kept) = kept {
            if !windows.is_empty() && i + 1 < count {
                let seen = if propagates(&pipeline) { &kept } else { &region };
                exec.profile(seen, &module.fused, &[], Afterwards::Exit)?;
            }
            region = kept;
        } else {
            let before = remarks.clone();
            let mut run = |exec: &mut dyn Executor| {
                let cx = &mut module_cx(&mut module, &shared, i + 1 == count, widths(i));
                manager.run_part(first.clone(), cx, &mut region, exec, &mut remarks, &mut |e| request.watch.show(e))
            };
            match &mut statistics {
                Some(folder) => folder.with(exec.as_mut(), run),
                None => run(exec.as_mut()),
            }
            .map_err(|e| pass_failure(&e))?;
            if let Some(work) = &work {
                work.save(i, &module, &region, &before, &remarks)?;
            }
        }
        if tuning.is_none() {
            emit(&mut region, &module, i == 0)?;
        }
        module.regions.push(region);
        progress.step(&name);
    }
    if let (Some(tuning), Some(float)) = (&tuning, &float) {
        progress.finish();
        let watched = Watched { interrupt: request.interrupt, quiet: request.quiet };
        let began = Instant::now();
        tuning.run(watched, &mut module, float, source.as_ref(), &windows, &mut remarks)?;
        manager.add_time(tuning.at, began.elapsed());
        for (i, mut region) in std::mem::take(&mut module.regions).into_iter().enumerate() {
            request.interrupt.check()?;
            let (cx, rest) =
                (&mut module_cx(&mut module, &shared, i + 1 == count, widths(i)), tuning.at + 1..usize::MAX);
            manager
                .run_part(rest, cx, &mut region, exec.as_mut(), &mut remarks, &mut |e| request.watch.show(e))
                .map_err(|e| pass_failure(&e))?;
            emit(&mut region, &module, i == 0)?;
            module.regions.push(region);
        }
    }
    progress.finish();
    request.interrupt.check()?;
    if let Some(folder) = &statistics {
        folder.finish()?;
    }
    let mut report = report::report(request, &pipeline, calibrated, &tally, &mut remarks);
    let module = verify(&module).map_err(|d| Failure::new(Exit::Check, d))?;
    emitter.finish(module).map_err(output::emit_failure)?;
    if let Some(sm) = request.target.cuda {
        for note in write_kernels(staging.path(), sm, request.nvrtc, request.quiet)? {
            if !request.quiet {
                say(&format!("note: {note}"));
            }
            report.notes.push(note);
        }
    }
    let text = serde_json::to_string_pretty(&report).map_err(|e| Failure::new(Exit::Failed, e))?;
    crate::files::write(&staging.path().join("report.json"), text.as_bytes())?;
    staging.commit().map_err(output::emit_failure)?;
    if let Some(work) = work {
        work.done();
    }
    let artefact = request.out.clone();
    let passes = report::summaries(&manager, &remarks);
    Ok(Outcome { artefact, seconds: start.elapsed().as_secs_f64(), peak_rss_bytes: rss::peak(), passes, report })
}

/// What passes are told of the module around a region.
pub(crate) fn module_cx<'a>(
    module: &'a mut Module,
    shared: &'a BTreeSet<String>,
    last: bool,
    widths: Option<&'a [u8]>,
) -> ModuleCx<'a> {
    ModuleCx { fused: &mut module.fused, dims: &module.dims, dtype: module.dtype, shared, last, widths }
}

/// Whether a pipeline measures activations. (What cannot be read as a pipeline does not; the manager says why.)
pub fn profiles(pipeline: &str) -> bool {
    pipeline.parse::<Pipeline>().is_ok_and(|p| p.steps.iter().any(|s| s.name == Profile::NAME))
}

/// Whether later layers are to see the errors of earlier ones.
fn propagates(pipeline: &str) -> bool {
    let propagate = |s: &Step| s.name == Profile::NAME && s.options.get("propagate") == Some(&Json::Bool(true));
    pipeline.parse::<Pipeline>().is_ok_and(|p| p.steps.iter().any(propagate))
}

/// At most `samples` calibration windows of `seqlen` tokens.
///
/// # Errors
/// As [`Calibration::windows`].
pub fn windows(
    model: &Model,
    calibration: &Calibration,
    samples: usize,
    seqlen: usize,
    interrupt: &Interrupt,
    quiet: bool,
) -> Result<Vec<Vec<i32>>, Failure> {
    let generate = |count, length| generate::windows(model, count, length, interrupt, quiet);
    calibration.windows(model, samples, seqlen, generate)
}

/// The failure that a pass's error means.
pub fn pass_failure(error: &ManagerError) -> Failure {
    let exit = match &error.kind {
        ManagerErrorKind::Interrupted
        | ManagerErrorKind::Pass(PassError::Exec(ExecError::Interrupted))
        | ManagerErrorKind::Run(ExecError::Interrupted) => return Failure::interrupted(),
        ManagerErrorKind::Pass(PassError::Exec(ExecError::Tensor(_) | ExecError::NotFinite(_)))
        | ManagerErrorKind::Run(ExecError::Tensor(_) | ExecError::NotFinite(_)) => Exit::BadInput,
        ManagerErrorKind::Verify(_) | ManagerErrorKind::Check { .. } => Exit::Check,
        ManagerErrorKind::Pass(PassError::Refused(_)) => Exit::Unsupported,
        ManagerErrorKind::Pass(PassError::Exec(ExecError::Unavailable(_)))
        | ManagerErrorKind::Run(ExecError::Unavailable(_)) => Exit::Failed,
        ManagerErrorKind::Pass(PassError::Exec(ExecError::Memory(_))) | ManagerErrorKind::Run(ExecError::Memory(_)) => {
            Exit::Memory
        }
    };
    Failure::new(exit, error)
}
