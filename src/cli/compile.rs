//! `awqc compile`.

use std::path::PathBuf;

use awqc_exec::emit::Existing;
use awqc_ir::{Group, Quant};

use super::calibrate::CalibrationArgs;
use super::{Context, print_json};
use crate::burn::ProfileOn;
use crate::compile::{Outcome, Request, compile};
use crate::failure::{Exit, Failure};
use crate::progress::{print, say};
use crate::statistics::Statistics;
use crate::target::{Method, Mixed, Quality, Target};
use crate::watch::Watch;

/// Compile a model for a target.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The model: a folder with safetensors or `pytorch_model.bin`, a file of one, or a `.gguf` file; of floats, or
    /// quantized already, with a pipeline that keeps its codes.
    model: PathBuf,
    /// What to compile for; see `awqc targets`.
    #[arg(long, default_value = "reference")]
    target: String,
    /// The folder to write; named after model, target and quantization if not given.
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Replace the folder if it exists.
    #[arg(long)]
    force: bool,
    /// Keep finished layers in a work folder beside the output, and go on from there if an earlier run was killed.
    #[arg(long)]
    resume: bool,
    /// How codes are chosen.
    #[arg(long, value_enum, default_value_t, conflicts_with = "passes")]
    method: Method,
    /// How much work goes into a good result, in place of --method.
    #[arg(long, value_enum, conflicts_with_all = ["method", "passes"])]
    quality: Option<Quality>,
    /// Bits per weight: 2, 3, 4 or 8; 4 if not given. A number in between, such as 3.25, is spread over the model's
    /// linears, the bits going where they are needed most; scales are not counted.
    #[arg(long)]
    bits: Option<f64>,
    /// Spread a whole number of --bits, too. `--mixed=3,4` says which widths are mixed, `2,3,4,8` if not given.
    #[arg(long, value_name = "WIDTHS", num_args = 0..=1, require_equals = true, default_missing_value = "2,3,4,8",
          value_delimiter = ',')]
    mixed: Option<Vec<u8>>,
    /// Weights that share a scale: a number, or `row` for a whole row. The target's own choice if not given.
    #[arg(long, value_name = "N|row")]
    group: Option<String>,
    /// Symmetric codes, without zero points.
    #[arg(long)]
    symmetric: bool,
    /// Bits of the output head, for CPU and CUDA targets: 8, or 16 to leave it as it is.
    #[arg(long, default_value_t = 8)]
    head_bits: u8,
    /// The passes to run in place of the target's own; `quantize{SCHEME}` has the bits and groups of the flags.
    #[arg(long, value_name = "PIPELINE")]
    passes: Option<String>,
    /// For CUDA targets: a folder with NVRTC, NVIDIA's run-time compiler: a toolkit's, or `nvidia` of its Python
    /// packages.
    #[arg(long, value_name = "DIR")]
    nvrtc: Vec<PathBuf>,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Where the calibration text runs through the model: on the processor, or on a CUDA device, in f32. The device
    /// needs a build with the feature burn-cuda.
    #[arg(
        long,
        value_name = "host|cuda",
        default_value = "host",
        hide_possible_values = true,
        conflicts_with = "profile"
    )]
    profile_on: ProfileOn,
    /// Keep the statistics of the activations in this folder, for other compiles of the same model.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["profile", "resume"])]
    save_profile: Option<PathBuf>,
    /// Take the statistics of the activations from this folder instead of running calibration text.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["calib", "calib_ids"])]
    profile: Option<PathBuf>,
    /// Random weights: MODEL is a `config.json` or the folder of one, and no weights are read. To measure a shape.
    /// Without a tokenizer there, give --method rtn, or token ids with --calib-ids.
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    random_weights: Option<u64>,
    /// Print the error that rounding made in each linear's output, in percent of the output's energy on the calibration
    /// text. It stands in `report.json` and in --json in any case.
    #[arg(long)]
    errors: bool,
    /// Print the time of each pass.
    #[arg(long)]
    timing: bool,
    /// Print the counters of each pass.
    #[arg(long)]
    stats: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    watch: Watch,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    let target = Target::find(&args.target)?;
    let group = args.group.as_deref().map_or(Ok(Group::Size(target.group)), group)?;
    let (bits, mixed) = bits(args)?;
    let scheme_given = args.bits.is_some() || args.mixed.is_some() || args.group.is_some() || args.symmetric;
    if let (true, Some(passes)) = (scheme_given, &args.passes)
        && !passes.contains("SCHEME")
    {
        return Err(Failure::new(
            Exit::Usage,
            "--bits, --mixed, --group and --symmetric have no effect on these --passes",
        )
        .help("write the options into the pipeline, or `quantize{SCHEME}` for what the flags say"));
    }
    let quant = Quant { bits, symmetric: args.symmetric, group };
    let out = args.output.clone().unwrap_or_else(|| {
        let stem = args.model.file_stem().map_or_else(|| "model".into(), |s| s.to_string_lossy().into_owned());
        let mean = mixed.as_ref().map_or_else(|| bits.to_string(), |m| m.mean.to_string());
        let scheme = quant.to_string().replacen(&bits.to_string(), &mean, 1);
        PathBuf::from(format!("{stem}-{}-{scheme}", target.name))
    });
    if !matches!(args.head_bits, 8 | 16) {
        return Err(Failure::new(Exit::Usage, format!("--head-bits {}: 8 or 16 is needed", args.head_bits)));
    }
    if target.cuda.is_none() && !args.nvrtc.is_empty() {
        return Err(Failure::new(Exit::Usage, format!("--nvrtc is for CUDA targets, `{}` is none", target.name))
            .help("leave it out, or give another --target: `awqc targets` lists them"));
    }
    let plan = args.calibration.plan(64)?;
    let request = Request {
        registry: &context.registry,
        model: &args.model,
        random: args.random_weights,
        target,
        quant,
        mixed,
        method: args.quality.map_or(args.method, Quality::method),
        head_bits: args.head_bits,
        pipeline: args.passes.clone(),
        calibration: plan.calibration,
        samples: plan.samples,
        seqlen: plan.seqlen,
        statistics: match (&args.save_profile, &args.profile) {
            (Some(dir), _) => Statistics::Save(dir.clone()),
            (None, Some(dir)) => Statistics::Load(dir.clone()),
            (None, None) => Statistics::Gather,
        },
        profile_on: args.profile_on,
        out,
        existing: if args.force { Existing::Replace } else { Existing::Refuse },
        resume: args.resume,
        watch: &args.watch,
        interrupt: &context.interrupt,
        nvrtc: &args.nvrtc,
        quiet: context.quiet,
    };
    let outcome = compile(&request).map_err(|e| match args.resume {
        _ if e.exit != Exit::Interrupted => e,
        true => e.help("the same command goes on behind the regions that are finished"),
        false => e.help("with --resume, a compile can be interrupted and go on later"),
    })?;
    for remark in &outcome.report.remarks {
        say(&format!("warning: {} on {}: {}", remark.pass, remark.region, remark.message));
    }
    if args.timing {
        outcome.passes.iter().for_each(|p| say(&format!("{:>9.2} s  {}", p.seconds, p.pass)));
    }
    if args.stats {
        for pass in &outcome.passes {
            let values = pass.stats.iter().map(|(name, value)| (name, super::stat(value.as_f64().unwrap_or(0.0))));
            values.for_each(|(name, value)| say(&format!("{value:>12}  {}: {name}", pass.pass)));
        }
    }
    if args.json {
        return print_json(&outcome);
    }
    if args.errors {
        print(&super::errors::table(&outcome.report).unwrap_or_else(|| "nothing was quantized\n".to_owned()));
    }
    print(&summary(&outcome));
    Ok(())
}

/// The width that the flags ask for, or what is mixed in its place.
fn bits(args: &Args) -> Result<(u8, Option<Mixed>), Failure> {
    let usage = |message: String| Err(Failure::new(Exit::Usage, message));
    let asked = args.bits.unwrap_or(4.0);
    if let Some(odd) = args.mixed.iter().flatten().find(|w| !Quant::BITS.contains(w)) {
        return usage(format!("--mixed={odd}: the widths are 2, 3, 4 and 8"));
    }
    let width = Quant::BITS.into_iter().find(|b| f64::from(*b) == asked);
    match (width, &args.mixed) {
        (Some(bits), None) => Ok((bits, None)),
        (None, None) if asked.fract() == 0.0 => {
            Err(Failure::new(Exit::Usage, format!("--bits {asked}: weights have 2, 3, 4 or 8 bits"))
                .help("a mean between 2 and 8 mixes them: a fraction such as 3.25, or a whole number with --mixed"))
        }
        (_, widths) => {
            let all = widths.as_deref().unwrap_or(&Quant::BITS);
            let (low, high) = (all.iter().min().copied().unwrap_or(2), all.iter().max().copied().unwrap_or(8));
            if !(f64::from(low)..=f64::from(high)).contains(&asked) {
                return usage(format!("--bits {asked}: a mean of widths from {low} to {high} lies between them"));
            }
            Ok((4, Some(Mixed { mean: asked, widths: widths.clone() })))
        }
    }
}

/// A group size as flags say it.
pub(super) fn group(text: &str) -> Result<Group, Failure> {
    match text.parse() {
        _row if text == "row" => Ok(Group::Row),
        Ok(n) if n > 0 => Ok(Group::Size(n)),
        _not_a_size => Err(Failure::new(Exit::Usage, format!("--group {text}: a positive number or `row` is needed"))),
    }
}

fn summary(outcome: &Outcome) -> String {
    let Outcome { artefact, seconds, peak_rss_bytes, report, .. } = outcome;
    let scaled = report.sites.iter().filter(|s| s["scaled"] == true).count();
    let (quantized, all) = (report.quantized_parameters, report.parameters);
    let weights = match all {
        0..1_000_000 => format!("{quantized} of {all} weights"),
        _ => format!("{:.1} of {:.1} million weights", quantized as f64 / 1e6, all as f64 / 1e6),
    };
    let memory = peak_rss_bytes.map_or_else(String::new, |b| format!(", {:.0} MB of memory at most", b as f64 / 1e6));
    format!(
        "{}: {weights} in {:.2} bits, {scaled} of {} sites scaled, {seconds:.1} s{memory}\n",
        artefact.display(),
        report.bits_per_weight,
        report.sites.len(),
    )
}
