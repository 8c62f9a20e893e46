//! `awqc bench`.

use std::path::PathBuf;
use std::time::Instant;

use serde_json::json;

use super::kernels::{self, KernelArgs};
use super::{Context, print_json};
use crate::bandwidth::bandwidth;
use crate::bench::{Row, Subject, Test, measure};
use crate::device::has_kernels;
use crate::engine::{Engine, EngineArgs, RunsOn, Where, burn, by_burn, cpu, device, on_device};
use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::progress::{print, say};
use crate::rss;

/// Measure speed.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The model, or `kernels` for single products.
    model: PathBuf,
    /// Tokens of the prompt, 512 if not given; 0 leaves that test out.
    #[arg(long, short = 'p', value_name = "N")]
    prompt: Option<usize>,
    /// Tokens to generate, 128 if not given; 0 leaves that test out.
    #[arg(long, short = 'n', value_name = "N")]
    generate: Option<usize>,
    /// Positions that are filled before generation starts; none if not given.
    #[arg(long, short = 'd', value_name = "N")]
    depth: Option<usize>,
    /// Repetitions behind one warm-up, 5 if not given.
    #[arg(long, short = 'r', value_name = "N")]
    repetitions: Option<usize>,
    /// How to print.
    #[arg(long, value_name = "md|csv|json", default_value = "md")]
    output: Output,
    /// The same as --output json.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    kernels: KernelArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Output {
    /// A markdown table.
    Md,
    /// Comma-separated values with a header; of `kernels` the products, without the orders of codes.
    Csv,
    /// One JSON object.
    Json,
}

impl Args {
    /// An error if something is asked of single products that only a model has.
    fn refuse_for_kernels(&self) -> Result<(), Failure> {
        let given = [
            ("--prompt", self.prompt.is_some()),
            ("--generate", self.generate.is_some()),
            ("--depth", self.depth.is_some()),
            ("--repetitions", self.repetitions.is_some()),
            ("--ctx", self.engine.ctx.is_some()),
            ("--kv", self.engine.kv.is_some()),
            ("--pages", self.engine.pages.is_some()),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Failure::new(Exit::Usage, format!("{flag} is for models, not for single products"))),
            None => Ok(()),
        }
    }
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    let output = if args.json { Output::Json } else { args.output };
    if args.model.as_os_str() == "kernels" && !args.model.exists() {
        args.refuse_for_kernels()?;
        return kernels::run(context, &args.kernels, &args.engine, output);
    }
    args.kernels.refuse()?;
    let (prompt, generate, depth) = (args.prompt.unwrap_or(512), args.generate.unwrap_or(128), args.depth.unwrap_or(0));
    let repetitions = args.repetitions.unwrap_or(5);
    if repetitions == 0 {
        return Err(Failure::new(Exit::Usage, "--repetitions 0 measures nothing"));
    }
    if prompt == 0 && generate == 0 {
        return Err(Failure::new(Exit::Usage, "--prompt 0 and --generate 0 together measure nothing"));
    }
    let begin = Instant::now();
    let model = Model::open(&args.model)?;
    let room = depth.saturating_add(prompt.max(generate).max(1));
    let mut opened = open(context, args, &model, room)?;
    let session = opened.session.as_mut();
    session.run(&[0])?;
    let first_token = begin.elapsed().as_secs_f64();
    let bytes = session.bytes_per_token();
    let tests = [Test::Prompt(prompt), Test::Generate(generate)];
    let mut rows = Vec::new();
    let (start, before) = (Instant::now(), rss::busy());
    for test in tests.into_iter().filter(|t| !matches!(t, Test::Prompt(0) | Test::Generate(0))) {
        rows.push(measure(session, test, depth, repetitions, &context.interrupt)?);
    }
    // The team waits by spinning, so its threads run all the time if they may.
    let (whole, ran) = (start.elapsed().as_secs_f64() * opened.threads as f64, rss::busy().zip(before));
    let missing =
        ran.filter(|_| opened.bandwidth.is_none()).map_or(0.0, |(after, before)| 1.0 - (after - before) / whole);
    if missing > OTHERS && start.elapsed().as_secs_f64() > 0.5 {
        say(&format!(
            "warning: other programs took {:.0} % of the processors meanwhile: fewer --threads may be faster",
            100.0 * missing
        ));
    }
    let device_token_ms = match generate {
        0 => None,
        _ => {
            session.reset();
            if depth > 0 {
                session.run(&vec![0; depth])?;
            }
            session.device_seconds()?.map(|s| 1e3 * s)
        }
    };
    // Last, as it takes memory of its own.
    let peak = rss::peak();
    let limit = opened.bandwidth.unwrap_or_else(|| bandwidth(opened.threads));
    rows.iter_mut().for_each(|row: &mut Row| row.compare(limit));
    let name = args.model.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy());
    match output {
        Output::Json => print_json(&json!({
            "model": name,
            "isa": opened.runs_on.isa,
            "act": opened.runs_on.act,
            "kv": opened.runs_on.kv,
            "threads": opened.threads,
            "bytes_per_token": bytes,
            "load_to_first_token_seconds": first_token,
            "read_gigabytes_per_second": limit,
            "peak_rss_bytes": peak,
            "device_token_ms": device_token_ms,
            "tests": rows,
        })),
        Output::Md | Output::Csv => {
            say(&format!(
                "{:.1} MB of weights a token; memory reads {limit:.1} GB/s; load to first token {first_token:.2} s",
                bytes as f64 / 1e6
            ));
            if let Some(ms) = device_token_ms {
                say(&format!("the device needs {ms:.3} ms for a token and the choice of the next"));
            }
            let header = [
                "model",
                "isa",
                "act",
                "kv",
                "threads",
                "test",
                "t/s",
                "±",
                "median",
                "GB/s",
                "% of read",
                "p50 ms",
                "p99 ms",
            ];
            let cells = |r: &Row| {
                let number = |v: Option<f64>, digits: usize| v.map_or_else(String::new, |v| format!("{v:.digits$}"));
                vec![
                    name.to_string(),
                    opened.runs_on.isa.clone(),
                    opened.runs_on.act.to_owned(),
                    opened.runs_on.kv.to_owned(),
                    opened.threads.to_string(),
                    r.test.clone(),
                    format!("{:.2}", r.tokens_per_second),
                    format!("{:.2}", r.deviation),
                    format!("{:.2}", r.median),
                    number(r.gigabytes_per_second, 1),
                    number(r.bandwidth_share.map(|s| 100.0 * s), 0),
                    number(r.token_ms.map(|t| t[0]), 2),
                    number(r.token_ms.map(|t| t[1]), 2),
                ]
            };
            print(&table(output, &header, rows.iter().map(cells)));
            if opened.bandwidth.is_none() && rows.iter().any(|r| r.bandwidth_share.is_some_and(|s| s > 1.0)) {
                say("more than 100 % of read: weights stay in the processor's cache from one token to the next");
            }
            Ok(())
        }
    }
}

/// The share of the processors' time from which on other programs disturb a measurement.
const OTHERS: f64 = 0.1;

/// A model that is ready to be measured.
struct Opened<'m> {
    session: Box<dyn Subject + 'm>,
    runs_on: RunsOn,
    threads: usize,
    /// What a device reaches by copying memory, in gigabytes a second; none if the processor runs the model.
    bandwidth: Option<f64>,
}

fn open<'m>(context: &Context, args: &Args, model: &'m Model, room: usize) -> Result<Opened<'m>, Failure> {
    if on_device(model, &args.engine) {
        let session = device(model, &args.engine, room)?;
        let (runs_on, bandwidth) = (RunsOn::cuda(&session), Some(crate::device::bandwidth(session.device())?));
        return Ok(Opened { session: Box::new(session), runs_on, threads: 1, bandwidth });
    }
    if by_burn(model, &args.engine) {
        let session = burn(model, &args.engine)?;
        let device = awqc_cuda::driver::Device::open(None)?;
        let runs_on = RunsOn { isa: device.name().to_owned(), ..session.runs_on() };
        let bandwidth = Some(crate::device::bandwidth(&device)?);
        return Ok(Opened { session: Box::new(session), runs_on, threads: 1, bandwidth });
    }
    args.engine.refuse_device()?;
    if args.engine.device == Some(Where::Host) && has_kernels(model) {
        let why = "--device host decodes the weights to f32: that is no speed to measure";
        return Err(
            Failure::new(Exit::Usage, why).help("compile the model for a CPU target, and bench what comes of it")
        );
    }
    let session = cpu(model, &args.engine, room, context.threads)?.with_interrupt(context.interrupt.flag());
    let (runs_on, threads) = (RunsOn::cpu(&session), session.options().threads);
    Ok(Opened { session: Box::new(session), runs_on, threads, bandwidth: None })
}

pub(super) fn table(output: Output, header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
    let header = || header.iter().map(|h| (*h).to_owned()).collect::<Vec<_>>();
    if output == Output::Csv {
        let lines = std::iter::once(header()).chain(rows).map(|cells| cells.join(",") + "\n");
        return lines.collect();
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::ASCII_MARKDOWN).set_header(header());
    rows.for_each(|cells| {
        table.add_row(cells);
    });
    format!("{table}\n")
}
