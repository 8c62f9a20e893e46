//! What is refused before work begins.

use std::path::Path;

use awqc_cuda::CudaError;
use awqc_cuda::arch::Arch;
use awqc_frontends::{CONFIG, Kind};
use awqc_ir::{Op, Operand, Quant};
use awqc_passes::Pass;
use awqc_passes::awq_clip::AwqClip;
use awqc_passes::awq_scale::AwqScale;
use awqc_passes::pack::Pack;
use awqc_passes::pipeline::Pipeline;
use awqc_passes::profile::Profile;
use awqc_passes::quantize::Quantize;
use awqc_passes::tune::Tune;

use super::Request;
use crate::calibration::Calibration;
use crate::device::nvrtc;
use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::statistics::Statistics;

/// Whether the target has kernels for the model, its linears quantized to any of `widths`.
///
/// # Errors
/// The first op or weight that none covers.
pub(super) fn kernels(request: &Request<'_>, model: &Model, widths: &[u8]) -> Result<(), Failure> {
    if request.target.cpu.is_some() {
        awqc_cpu::check(&model.module)?;
    }
    if request.target.cuda.is_some() && !request.nvrtc.is_empty() {
        // Who names its folder wants machine code, not a note at the end that there is none.
        let folders: Vec<String> = request.nvrtc.iter().map(|f| f.display().to_string()).collect();
        let named = |e: CudaError| Failure::new(Exit::Usage, format!("--nvrtc {}: {e}", folders.join(", ")));
        nvrtc(request.nvrtc)
            .map_err(|e| named(e).help("leave it out: the artefact then has the kernels' text alone"))?;
    }
    if let (Some(sm), None) = (request.target.cuda, &request.pipeline) {
        Arch::find(sm)?;
        for bits in widths {
            awqc_cuda::check(&model.module, Quant { bits: *bits, ..request.quant }).map_err(|e| {
                Failure::from(e)
                    .help("another --group may fit a shape that is refused; the reference target runs every model")
            })?;
        }
    }
    Ok(())
}

/// Searches that have nothing to go by would do nothing.
///
/// # Errors
/// When one of them comes before `profile`, or without it.
pub(super) fn searches_profiled(pipeline: &str) -> Result<(), Failure> {
    let Ok(Pipeline { steps }) = pipeline.parse::<Pipeline>() else { return Ok(()) };
    let profile = steps.iter().position(|s| s.name == Profile::NAME).unwrap_or(usize::MAX);
    let early = steps.iter().take(profile).find(|s| [AwqScale::NAME, AwqClip::NAME].contains(&s.name.as_str()));
    early.map_or(Ok(()), |step| {
        Err(Failure::new(Exit::Usage, format!("`{}` needs the statistics of the activations", step.name))
            .help("put `profile` before it in --passes"))
    })
}

/// What people should know of what they asked for, though it can be done.
pub(super) fn notes(request: &Request<'_>, pipeline: &str) -> Vec<String> {
    let Ok(Pipeline { steps }) = pipeline.parse::<Pipeline>() else { return Vec::new() };
    let has = |name: &str| steps.iter().any(|s| s.name == name);
    let kernels = request.target.cpu.is_some() || request.target.cuda.is_some();
    let mut out = Vec::new();
    if kernels && has(Quantize::NAME) && !has(Pack::NAME) {
        out.push(format!(
            "the pipeline has no `{}`, so the kernels for packed weights will not run the model; `awqc targets` lists the \
             target's own pipeline",
            Pack::NAME
        ));
    }
    if !has(Profile::NAME) && !has(Tune::NAME) && !matches!(request.calibration, Calibration::Builtin) {
        out.push("nothing in the pipeline looks at activations, so no calibration text is read".into());
    }
    if request.random.is_some() && has(Profile::NAME) {
        out.push("calibration says nothing of random weights: --method rtn leaves it out".into());
    }
    out
}

/// The failure to open `model`, with what can be done where there is a configuration and nothing else.
pub(super) fn or_random(model: &Path, failure: Failure) -> Failure {
    let config = model.file_name().is_some_and(|name| name == CONFIG) || model.join(CONFIG).is_file();
    if !config || failure.help.is_some() {
        return failure;
    }
    failure.help("a configuration alone compiles with --random-weights, to measure a model of its shape")
}

/// The failure to open the configuration `model` for random weights, if it is not another kind of file.
pub(super) fn or_configuration(model: &Path, failure: Failure) -> Failure {
    if !model.is_file() || model.extension().is_some_and(|e| e == "json") {
        return failure;
    }
    let message = format!("{}: --random-weights takes a {CONFIG}, or the folder of one", model.display());
    Failure::new(Exit::Usage, message).help("leave --random-weights out to compile the weights of the file")
}

/// Statistics that see the errors of earlier layers hold for one pipeline only.
///
/// # Errors
/// When they are to be kept, or come from elsewhere.
pub(super) fn own_statistics(statistics: &Statistics) -> Result<(), Failure> {
    let (what, flag) = match statistics {
        Statistics::Gather => return Ok(()),
        Statistics::Save(_) => ("cannot be kept for another", "--save-profile"),
        Statistics::Load(_) => ("cannot come from another", "--profile"),
    };
    let message = format!("the statistics of `profile{{propagate}}` belong to one pipeline and {what}");
    Err(Failure::new(Exit::Usage, message).help(format!("leave out {flag}, or `propagate`")))
}

/// An output that is the model, or a folder around it, would take the model's place.
pub(super) fn refuse_overlap(model: &Path, out: &Path) -> Result<(), Failure> {
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
