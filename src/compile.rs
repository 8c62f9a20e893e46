//! Compiling: one region after the other through the pipeline and into the artefact.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use awqc_cuda::arch::Arch;
use awqc_exec::emit::{self, EmitCx, EmitError, Emitter, Existing, HfAwq, Reference, Staging};
use awqc_exec::{Control, HostExecutor};
use awqc_frontends::Kind;
use awqc_ir::{Group, Module, Op, Operand, Quant, Region, verify::verify};
use awqc_passes::awq_clip::AwqClip;
use awqc_passes::awq_scale::AwqScale;
use awqc_passes::manager::{Manager, ManagerError, ManagerErrorKind, ModuleCx, shared_tensors};
use awqc_passes::pipeline::{Pipeline, Step};
use awqc_passes::profile::Profile;
use awqc_passes::quantize::Quantize;
use awqc_passes::tune::Tune;
use awqc_passes::{Afterwards, ExecError, Executor, Pass, PassError, Registry, Remark, Remarks};
use serde::Serialize;
use serde_json::{Value as Json, json};

use crate::allocation::Allocation;
use crate::calibration::Calibration;
use crate::device::write_kernels;
use crate::evaluate::Watched;
use crate::failure::{Exit, Failure};
use crate::generate;
use crate::interrupt::Interrupt;
use crate::model::Model;
use crate::progress::{Progress, say};
use crate::resume::{Work, fingerprint};
use crate::rss;
use crate::size::Tally;
use crate::statistics::{Folder, Statistics};
use crate::target::{Format, Method, Mixed, Target, fill_mixed};
use crate::tuning::Tuning;
use crate::watch::Watch;

/// The configuration as Hugging Face tools name it.
const CONFIG: &str = "config.json";

/// What to compile, and how.
pub struct Request<'a> {
    /// The passes to choose from.
    pub registry: &'a Registry,
    /// The model.
    pub model: &'a Path,
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

/// What became of a compile. The first part also stands in the artefact as `report.json`.
#[derive(Serialize)]
pub struct Outcome {
    /// The artefact's folder.
    pub artefact: PathBuf,
    /// Wall time.
    pub seconds: f64,
    /// Largest resident memory, where the system tells.
    pub peak_rss_bytes: Option<u64>,
    /// Seconds and counters of each pass.
    pub passes: Vec<PassSummary>,
    /// The part that does not depend on the machine.
    #[serde(flatten)]
    pub report: Report,
}

/// What one pass did.
#[derive(Serialize)]
pub struct PassSummary {
    /// The pass.
    pub pass: String,
    /// Wall time over all regions.
    pub seconds: f64,
    /// Its counters.
    pub stats: serde_json::Map<String, Json>,
}

/// What the artefact says of itself: the same for the same input.
#[derive(Serialize)]
pub struct Report {
    /// The target.
    pub target: String,
    /// The pipeline as it ran.
    pub pipeline: String,
    /// Where calibration tokens came from, and how many.
    pub calibration: Json,
    /// Weights in linears, embedding and norms.
    pub parameters: u64,
    /// Weights that were quantized.
    pub quantized_parameters: u64,
    /// Mean bits of a quantized weight, scales and zero points included.
    pub bits_per_weight: f64,
    /// What `awq-scale` decided at each site.
    pub sites: Vec<Json>,
    /// What other passes recorded, by pass.
    pub records: serde_json::Map<String, Json>,
    /// What people should look at.
    pub remarks: Vec<Remark>,
    /// What people should know of the kernels.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
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
    let staging = Staging::create(&request.out, request.existing).map_err(emit_failure)?;
    let model = Model::open(request.model)?;
    compilable(&model, &pipeline)?;
    refuse_overlap(request.model, &request.out)?;
    if !request.quiet {
        model.notes.iter().for_each(|note| say(&format!("note: {note}")));
    }
    verify(&model.module).map_err(|d| Failure::new(Exit::BadInput, d))?;
    if let Some(allocation) = &allocation {
        allocation.check(request, &model.module)?;
    }
    // Before work is lost.
    if request.target.cpu.is_some() {
        awqc_cpu::check(&model.module)?;
    }
    if let (Some(sm), None) = (request.target.cuda, &request.pipeline) {
        Arch::find(sm)?;
        let widths = allocation.as_ref().map_or(vec![request.quant.bits], |a| a.mixture.widths.clone());
        for bits in widths {
            awqc_cuda::check(&model.module, Quant { bits, ..request.quant }).map_err(|e| {
                Failure::from(e).help("another --group may fit, or another target: reference runs every model")
            })?;
        }
    }
    let extra = model.files.iter().map(|f| Ok(emit::ExtraFile { name: f.name.clone(), bytes: model.read(f)? }));
    let extra = extra.collect::<Result<Vec<_>, Failure>>()?;
    let mut emitter: Box<dyn Emitter> = match request.target.format {
        Format::Artefact => {
            let config = serde_json::to_vec_pretty(&model.config).map_err(|e| Failure::new(Exit::Failed, e))?;
            let has = model.config.is_empty() || extra.iter().any(|f| f.name == CONFIG);
            let config = (!has).then(|| emit::ExtraFile { name: CONFIG.into(), bytes: config });
            Box::new(Reference::new(staging.path(), extra.into_iter().chain(config).collect()))
        }
        Format::HfAwq => {
            if model.config.is_empty() && model.kind == Kind::Onnx {
                let message = "a folder for transformers needs a config.json, and there is none beside the model";
                return Err(Failure::new(Exit::BadInput, format!("{}: {message}", request.model.display()))
                    .help("put the config.json of the exported model there, or give another target"));
            }
            if request.pipeline.is_none()
                && let Err(error) = emit::check(&model.module, request.quant)
            {
                let fits = |g: &u32| {
                    let quant = Quant { group: Group::Size(*g), ..request.quant };
                    emit::check(&model.module, quant).is_ok()
                };
                let failure = emit_failure(error);
                return Err(match [128, 64, 32, 16].iter().find(|g| fits(g)) {
                    Some(g) => failure.help(format!("give --group {g}")),
                    None => failure,
                });
            }
            Box::new(HfAwq::new(staging.path(), model.config.clone(), extra))
        }
    };
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
    });
    let mut statistics = match &request.statistics {
        Statistics::Gather => None,
        Statistics::Save(dir) => Some(Folder::create(dir, calibrated.clone())?),
        Statistics::Load(dir) => Some(Folder::open(dir)?),
    };
    let calibrated = statistics.as_ref().map_or(calibrated, |s| s.calibration.clone());
    let Model { mut module, source, .. } = model;
    let mut exec =
        HostExecutor::new(source.clone()).with_control(Control::new().with_interrupt(request.interrupt.flag()));
    if !windows.is_empty() {
        exec = exec.with_calibration(&windows)?;
    }

    let work = request.resume.then(|| Work::open(&request.out, &fingerprint(request.model, &pipeline, &windows)));
    let work = work.transpose()?;
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
        emitter.region(region, &EmitCx { source: source.as_ref(), fused: &module.fused }).map_err(emit_failure)?;
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
                Some(folder) => folder.with(&mut exec, run),
                None => run(&mut exec),
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
        tuning.run(watched, &mut module, float, source.as_ref(), &windows, &mut remarks)?;
        for (i, mut region) in std::mem::take(&mut module.regions).into_iter().enumerate() {
            request.interrupt.check()?;
            let (cx, rest) =
                (&mut module_cx(&mut module, &shared, i + 1 == count, widths(i)), tuning.at + 1..usize::MAX);
            manager
                .run_part(rest, cx, &mut region, &mut exec, &mut remarks, &mut |e| request.watch.show(e))
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
    let mut report = report(request, &pipeline, calibrated, &tally, &mut remarks);
    let module = verify(&module).map_err(|d| Failure::new(Exit::Check, d))?;
    emitter.finish(module).map_err(emit_failure)?;
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
    staging.commit().map_err(emit_failure)?;
    if let Some(work) = work {
        work.done();
    }
    let artefact = request.out.clone();
    let passes = summaries(&manager, &remarks);
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
    let tokenizer = model.tokenizer()?;
    let generate = |count, length| generate::windows(model, count, length, interrupt, quiet);
    calibration.windows(tokenizer.as_ref(), samples, seqlen, generate)
}

/// An output that is the model, or a folder around it, would take the model's place.
fn refuse_overlap(model: &Path, out: &Path) -> Result<(), Failure> {
    let (Ok(model), Ok(out)) = (model.canonicalize(), out.canonicalize()) else { return Ok(()) };
    if model.starts_with(&out) {
        return Err(Failure::new(Exit::Usage, format!("{}: the output would replace the model itself", out.display()))
            .help("give another folder with -o"));
    }
    Ok(())
}

/// A model without tensors has nothing to quantize. One whose linears are quantized already is not quantized again, by
/// `pipeline`: the loss would be counted twice. Pipelines that leave weights as they are run on it.
///
/// # Errors
/// For such a model.
pub fn compilable(model: &Model, pipeline: &str) -> Result<(), Failure> {
    if model.kind == Kind::Text {
        let message = format!("{}: IR text has no tensors to compile", model.path.display());
        return Err(Failure::new(Exit::BadInput, message).help("give a checkpoint; `awqc opt` runs passes on text"));
    }
    let changes =
        |name: &str| [Profile::NAME, AwqScale::NAME, AwqClip::NAME, Quantize::NAME, Tune::NAME].contains(&name);
    let Ok(mut pipeline) = pipeline.parse::<Pipeline>() else { return Ok(()) };
    let steps = pipeline.steps.len();
    pipeline.steps.retain(|s| !changes(&s.name));
    if pipeline.steps.len() == steps {
        return Ok(());
    }
    for region in &model.module.regions {
        for (_, node) in region.nodes() {
            let quantized = |o: &Operand| region.operand_type(*o).elem.quant().is_some();
            if matches!(node.op, Op::Linear(_)) && node.operands.iter().any(quantized) {
                let failure =
                    Failure::new(Exit::Unsupported, format!("the model is quantized already (in {})", region.name));
                // A pipeline that did nothing else has nothing to keep.
                return Err(match pipeline.steps.as_slice() {
                    [] => failure.help("compile the float checkpoint that it was made from, or give another target"),
                    [..] => failure.help(format!(
                        "keep its codes with --passes \"{pipeline}\", or compile the float checkpoint that it was made from"
                    )),
                });
            }
        }
    }
    Ok(())
}

fn report(request: &Request<'_>, pipeline: &str, calibration: Json, tally: &Tally, remarks: &mut Remarks) -> Report {
    let mut sites = Vec::new();
    let mut records = serde_json::Map::new();
    for (pass, record) in std::mem::take(&mut remarks.records) {
        if pass == "awq-scale" {
            sites.push(record);
        } else if let Json::Array(list) = records.entry(pass).or_insert_with(|| json!([])) {
            list.push(record);
        }
    }
    Report {
        target: request.target.name.to_owned(),
        pipeline: pipeline.to_owned(),
        calibration,
        parameters: tally.parameters,
        quantized_parameters: tally.quantized,
        bits_per_weight: tally.bits_per_weight(),
        sites,
        records,
        remarks: remarks.list.iter().filter(|r| r.kind == awqc_passes::RemarkKind::Warning).cloned().collect(),
        notes: Vec::new(),
    }
}

fn summaries(manager: &Manager, remarks: &Remarks) -> Vec<PassSummary> {
    let stats_of = |pass: &str| {
        let own = remarks.stats.iter().filter(|((p, _), _)| p == pass);
        own.map(|((_, name), value)| (name.clone(), json!(value))).collect()
    };
    manager
        .times()
        .map(|(pass, time)| PassSummary { pass: pass.to_owned(), seconds: time.as_secs_f64(), stats: stats_of(pass) })
        .collect()
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
    };
    Failure::new(exit, error)
}

fn emit_failure(error: EmitError) -> Failure {
    match error {
        EmitError::Exists(_) => {
            Failure::new(Exit::Usage, error).help("give another folder with -o, or --force to replace it")
        }
        EmitError::Foreign(_) => {
            Failure::new(Exit::Usage, error).help("give another folder with -o, or remove that one yourself")
        }
        EmitError::Name(_) => Failure::new(Exit::Usage, error).help("give the new folder's name with -o"),
        EmitError::Io { .. } | EmitError::Duplicate(_) => Failure::new(Exit::Failed, error),
        EmitError::Unsupported(_) | EmitError::Layout { .. } => Failure::new(Exit::Unsupported, error),
        EmitError::Exec(error) => error.into(),
    }
}
