//! `awqc study`: the measurements by which the AWQ paper argues.

use std::path::{Path, PathBuf};

use awqc_ir::Quant;
use awqc_passes::Pass;
use awqc_passes::quantize::Quantize;
use clap::{ArgGroup, Subcommand};

use super::calibrate::CalibrationArgs;
use super::{Context, print_json};
use crate::calibration::Calibration;
use crate::compile::{compilable, windows};
use crate::evaluate::Watched;
use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::progress::print;
use crate::resume::{digest, fingerprint};
use crate::statistics::Folder;
use crate::study::activations::Calibrated;
use crate::study::kept::Kept;
use crate::study::methods::{METHODS, find};
use crate::study::{Lab, Outcome, Text, bits, calibration, plot, salient, scale, table};
use crate::target::Method;
use crate::tokens::read_ids;

/// Measure what quantization does to a model, as the AWQ paper does.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    study: Study,
}

#[derive(Subcommand)]
enum Study {
    /// Keep a few channels in float, chosen by activation, by weight, at random: the paper's table 1.
    Salient(Salient),
    /// Scale the salient channels up before rounding, and down behind: table 2.
    Scale(Scale),
    /// Calibrate on more or less text, and on text of another kind: figure 8.
    Calibration(Calibrations),
    /// Perplexity by method, bits and group: the main table.
    Bits(Bits),
}

#[derive(clap::Args)]
#[command(group = ArgGroup::new("evaluated").args(["text", "ids"]).required(true).multiple(true))]
struct Common {
    /// The model, with float weights.
    model: PathBuf,
    /// A text to evaluate on: tokenized whole, no token added, cut into windows. May be given several times.
    #[arg(long, value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Token ids to evaluate on: `input_ids`, [windows, length], of a safetensors file.
    #[arg(long, value_name = "FILE")]
    ids: Vec<PathBuf>,
    /// Tokens in a window; all but the first are targets.
    #[arg(long, default_value_t = 512, value_name = "N")]
    context: usize,
    /// At most so many windows of each text.
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,
    /// Keep results in this folder as they come, and measure only what is not there yet.
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Write a plot to this file.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// How weights are rounded where that is not what is studied.
#[derive(clap::Args)]
struct Scheme {
    /// Bits a weight: 2, 3, 4 or 8.
    #[arg(long, default_value_t = 3)]
    bits: u8,
    /// Weights that share a scale: a number, or `row` for a whole row.
    #[arg(long, default_value = "64", value_name = "N|row")]
    group: String,
}

/// What activations are measured on.
#[derive(clap::Args)]
struct Calibrate {
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Take the statistics of the activations from this folder, which a compile filled with --save-profile.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["calib", "calib_ids"])]
    profile: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Salient {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    scheme: Scheme,
    #[command(flatten)]
    calibrate: Calibrate,
    /// Channels to keep, in percent of each linear's.
    #[arg(long, value_delimiter = ',', default_value = "0.1,1,3", value_name = "P,…", value_parser = percent)]
    percent: Vec<f64>,
    /// How many random choices are averaged.
    #[arg(long, default_value_t = 3, value_name = "N")]
    seeds: u64,
}

#[derive(clap::Args)]
struct Scale {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    scheme: Scheme,
    #[command(flatten)]
    calibrate: Calibrate,
    /// Channels to scale, in percent of each linear's.
    #[arg(long, default_value_t = 1.0, value_name = "P", value_parser = percent)]
    percent: f64,
    /// What they are multiplied by.
    #[arg(long, value_delimiter = ',', default_value = "1,1.25,1.5,2,4", value_name = "S,…", value_parser = factor)]
    s: Vec<f64>,
}

#[derive(clap::Args)]
#[command(group = ArgGroup::new("calibrated").args(["calib", "calib_ids"]).required(true).multiple(true))]
struct Calibrations {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    scheme: Scheme,
    /// A text to calibrate on: `builtin`, `self`, or a file. May be given several times.
    #[arg(long, value_name = "FILE|builtin|self")]
    calib: Vec<Calibration>,
    /// Token ids to calibrate on: `input_ids`, [windows, length], of a safetensors file. May be given several times.
    #[arg(long, value_name = "FILE")]
    calib_ids: Vec<PathBuf>,
    /// Tokens in a calibration window.
    #[arg(long, default_value_t = 512, value_name = "N")]
    seqlen: usize,
    /// Numbers of calibration windows.
    #[arg(long, alias = "windows", value_delimiter = ',', default_value = "1,4,16,64", value_name = "N,…")]
    samples: Vec<usize>,
    /// The methods.
    #[arg(long, value_delimiter = ',', default_value = "awq,gptq", value_name = "METHOD,…")]
    methods: Vec<String>,
}

#[derive(clap::Args)]
struct Bits {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    calibrate: Calibrate,
    /// The methods; all but `best`, which tunes the model as a whole, if not given.
    #[arg(long, value_delimiter = ',', value_name = "METHOD,…")]
    methods: Vec<String>,
    /// Bits a weight.
    #[arg(long, value_delimiter = ',', default_value = "4,3,2", value_name = "N,…")]
    bits: Vec<u8>,
    /// Weights that share a scale: numbers, or `row`.
    #[arg(long, value_delimiter = ',', default_value = "64", value_name = "N|row,…")]
    group: Vec<String>,
}

fn percent(text: &str) -> Result<f64, String> {
    let value: Option<f64> = text.parse().ok().filter(|p| (0.0..=100.0).contains(p));
    value.ok_or_else(|| format!("`{text}`: a number from 0 to 100 is needed"))
}

fn factor(text: &str) -> Result<f64, String> {
    let value: Option<f64> = text.parse().ok().filter(|s| (1e-3..=1e3).contains(s));
    value.ok_or_else(|| format!("`{text}`: a positive number up to 1000 is needed"))
}

fn quant(bits: u8, group: &str) -> Result<Quant, Failure> {
    if !Quant::BITS.contains(&bits) {
        return Err(Failure::new(Exit::Usage, format!("--bits {bits}: 2, 3, 4 or 8 are supported")));
    }
    Ok(Quant { bits, symmetric: false, group: super::compile::group(group)? })
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    let common = match &args.study {
        Study::Salient(Salient { common, .. })
        | Study::Scale(Scale { common, .. })
        | Study::Calibration(Calibrations { common, .. })
        | Study::Bits(Bits { common, .. }) => common,
    };
    if let Some(path) = &common.svg {
        crate::files::check(path)?;
    }
    let outcome = match &args.study {
        Study::Salient(a) => salient(context, a)?,
        Study::Scale(a) => scale(context, a)?,
        Study::Calibration(a) => calibration(context, a)?,
        Study::Bits(a) => bits(context, a)?,
    };
    if common.json {
        print_json(&outcome)?;
    } else {
        print(&table::text(&outcome));
    }
    match &common.svg {
        Some(path) => crate::files::write(path, plot::svg(&outcome)?.as_bytes()),
        None => Ok(()),
    }
}

fn salient(context: &Context, args: &Salient) -> Result<Outcome, Failure> {
    let quant = quant(args.scheme.bits, &args.scheme.group)?;
    let model = open(&args.common)?;
    let (calibrated, of) = calibrated(context, &model, &args.calibrate)?;
    let mut lab = lab(context, &args.common, &model, &of)?;
    let settings = salient::Settings { quant, percents: args.percent.clone(), seeds: args.seeds };
    salient::run(&mut lab, &settings, calibrated)
}

fn scale(context: &Context, args: &Scale) -> Result<Outcome, Failure> {
    let quant = quant(args.scheme.bits, &args.scheme.group)?;
    let model = open(&args.common)?;
    let (calibrated, of) = calibrated(context, &model, &args.calibrate)?;
    let mut lab = lab(context, &args.common, &model, &of)?;
    let settings = scale::Settings { quant, percent: args.percent, scales: args.s.clone() };
    scale::run(&mut lab, &settings, calibrated)
}

fn bits(context: &Context, args: &Bits) -> Result<Outcome, Failure> {
    let methods = match args.methods.as_slice() {
        [] => METHODS.to_vec(),
        some => methods(some)?,
    };
    let mut quants = Vec::new();
    for bits in &args.bits {
        for group in &args.group {
            quants.push(quant(*bits, group)?);
        }
    }
    let model = open(&args.common)?;
    let (calibrated, of) = calibrated(context, &model, &args.calibrate)?;
    let mut lab = lab(context, &args.common, &model, &of)?;
    bits::run(&mut lab, &context.registry, &bits::Settings { methods, quants }, calibrated)
}

fn calibration(context: &Context, args: &Calibrations) -> Result<Outcome, Failure> {
    let quant = quant(args.scheme.bits, &args.scheme.group)?;
    let methods = methods(&args.methods)?;
    let most = args.samples.iter().copied().max().unwrap_or(0);
    if args.samples.contains(&0) || most == 0 || args.seqlen < 2 {
        return Err(Failure::new(Exit::Usage, "at least one calibration window of two tokens is needed"));
    }
    let model = open(&args.common)?;
    let files = args.calib_ids.iter().cloned().map(Calibration::Ids);
    let mut texts = Vec::new();
    for source in args.calib.iter().cloned().chain(files) {
        let name = match &source {
            Calibration::Builtin => "builtin".to_owned(),
            Calibration::SelfGenerated => "self".to_owned(),
            Calibration::Text(path) | Calibration::Ids(path) => name(path),
        };
        let windows = windows(&model, &source, most, args.seqlen, &context.interrupt, context.quiet)?;
        texts.push(Text { name, windows });
    }
    distinct(&texts)?;
    // Each result is known by the windows that it was calibrated on, so that more can be asked for later.
    let mut lab = lab(context, &args.common, &model, &[])?;
    let settings = calibration::Settings { methods, quant, texts, sizes: args.samples.clone() };
    calibration::run(&mut lab, &context.registry, &settings)
}

fn methods(names: &[String]) -> Result<Vec<Method>, Failure> {
    names.iter().map(|n| find(n)).collect()
}

fn open(common: &Common) -> Result<Model, Failure> {
    if common.context < 2 || common.chunks == Some(0) {
        return Err(Failure::new(Exit::Usage, "at least one window of two tokens is needed"));
    }
    let model = Model::open(&common.model)?;
    compilable(&model, Quantize::NAME)
        .map_err(|e| e.help("a study rounds float weights itself: give the checkpoint that has them"))?;
    Ok(model)
}

/// The statistics to use, and the tokens by which another choice is noticed.
fn calibrated(context: &Context, model: &Model, args: &Calibrate) -> Result<(Calibrated, Vec<Vec<i32>>), Failure> {
    if let Some(dir) = &args.profile {
        let folder = Folder::open(dir)?.of(model)?;
        let of = folder.calibration.to_string().bytes().map(i32::from).collect();
        return Ok((Calibrated::Folder(folder), vec![of]));
    }
    let plan = args.calibration.plan(64)?;
    let windows = windows(model, &plan.calibration, plan.samples, plan.seqlen, &context.interrupt, context.quiet)?;
    Ok((Calibrated::Windows(windows.clone()), windows))
}

fn lab<'a>(
    context: &'a Context,
    common: &Common,
    model: &'a Model,
    calibrated_on: &[Vec<i32>],
) -> Result<Lab<'a>, Failure> {
    let limit = common.chunks.unwrap_or(usize::MAX);
    let mut texts = Vec::new();
    for path in &common.text {
        texts.push(Text { name: name(path), windows: model.windows(path, common.context, limit)? });
    }
    for path in &common.ids {
        texts.push(Text { name: name(path), windows: read_ids(path)?.into_iter().take(limit).collect() });
    }
    distinct(&texts)?;
    let tokens: Vec<Vec<i32>> = texts.iter().flat_map(|t| t.windows.iter().cloned()).collect();
    // Studies of one model on the same tokens share a folder: what one has measured, another need not.
    let parts = [("windows to evaluate on", digest(&tokens)), ("windows to calibrate on", digest(calibrated_on))];
    let kept = Kept::open(common.work.as_deref(), &fingerprint(&model.path, parts))?;
    Ok(Lab::new(model, texts, kept, Watched { interrupt: &context.interrupt, quiet: context.quiet }))
}

fn name(path: &Path) -> String {
    path.file_stem().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned())
}

fn distinct(texts: &[Text]) -> Result<(), Failure> {
    for (i, text) in texts.iter().enumerate() {
        if texts[..i].iter().any(|t| t.name == text.name) {
            let message = format!("two texts are called `{}`", text.name);
            return Err(Failure::new(Exit::Usage, message).help("tables tell texts by their file names: rename one"));
        }
    }
    Ok(())
}
