//! `awqc bench`.

use std::path::PathBuf;
use std::time::Instant;

use awqc_cpu::{Activations, CpuError, Isa};
use awqc_ir::{Group, Quant};
use serde_json::json;

use super::{Context, print_json};
use crate::bandwidth::bandwidth;
use crate::bench::{Row, SHAPES, Subject, Test, kernel, measure};
use crate::engine::{EngineArgs, Where, cpu, device, on_device};
use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::order::orders;
use crate::progress::{print, say};
use crate::rss;

/// Measure speed.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The model, or `kernels` for single products.
    model: PathBuf,
    /// Tokens of the prompt; 0 leaves that test out.
    #[arg(long, short = 'p', default_value_t = 512, value_name = "N")]
    prompt: usize,
    /// Tokens to generate; 0 leaves that test out.
    #[arg(long, short = 'n', default_value_t = 128, value_name = "N")]
    generate: usize,
    /// Positions that are filled before generation starts.
    #[arg(long, short = 'd', default_value_t = 0, value_name = "N")]
    depth: usize,
    /// Repetitions behind one warm-up.
    #[arg(long, short = 'r', default_value_t = 5, value_name = "N")]
    repetitions: usize,
    /// How to print.
    #[arg(long, value_name = "md|csv|json", default_value = "md")]
    output: Output,
    /// The same as --output json.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Output {
    /// A markdown table.
    Md,
    /// Comma-separated values with a header.
    Csv,
    /// One JSON object.
    Json,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    if args.repetitions == 0 {
        return Err(Failure::new(Exit::Usage, "--repetitions 0 measures nothing"));
    }
    let output = if args.json { Output::Json } else { args.output };
    let kernels_only = args.model.as_os_str() == "kernels" && !args.model.exists();
    if args.prompt == 0 && args.generate == 0 && !kernels_only {
        return Err(Failure::new(Exit::Usage, "--prompt 0 and --generate 0 together measure nothing"));
    }
    if kernels_only {
        return kernels(context, args, output);
    }
    let begin = Instant::now();
    let model = Model::open(&args.model)?;
    let room = args.depth + args.prompt.max(args.generate).max(1);
    let mut opened = open(context, args, &model, room)?;
    let session = opened.session.as_mut();
    session.run(&[0])?;
    let first_token = begin.elapsed().as_secs_f64();
    let bytes = session.bytes_per_token();
    let limit = opened.bandwidth;
    let tests = [Test::Prompt(args.prompt), Test::Generate(args.generate)];
    let mut rows = Vec::new();
    for test in tests.into_iter().filter(|t| !matches!(t, Test::Prompt(0) | Test::Generate(0))) {
        rows.push(measure(session, test, args.depth, args.repetitions, limit, &context.interrupt)?);
    }
    let name = args.model.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy());
    match output {
        Output::Json => print_json(&json!({
            "model": name,
            "isa": opened.runs_on,
            "threads": opened.threads,
            "bytes_per_token": bytes,
            "load_to_first_token_seconds": first_token,
            "read_gigabytes_per_second": limit,
            "peak_rss_bytes": rss::peak(),
            "tests": rows,
        })),
        Output::Md | Output::Csv => {
            say(&format!(
                "{:.1} MB of weights a token; memory reads {limit:.1} GB/s; load to first token {first_token:.2} s",
                bytes as f64 / 1e6
            ));
            let header =
                ["model", "isa", "threads", "test", "t/s", "±", "median", "GB/s", "% of read", "p50 ms", "p99 ms"];
            let cells = |r: &Row| {
                let number = |v: Option<f64>, digits: usize| v.map_or_else(String::new, |v| format!("{v:.digits$}"));
                vec![
                    name.to_string(),
                    opened.runs_on.clone(),
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
            Ok(())
        }
    }
}

/// A model that is ready to be measured.
struct Opened<'m> {
    session: Box<dyn Subject + 'm>,
    /// The instruction set, or the device.
    runs_on: String,
    threads: usize,
    /// What reading memory alone reaches, in gigabytes a second.
    bandwidth: f64,
}

fn open<'m>(context: &Context, args: &Args, model: &'m Model, room: usize) -> Result<Opened<'m>, Failure> {
    if on_device(model, &args.engine) {
        let session = device(model, &args.engine, room)?;
        let (runs_on, bandwidth) = (session.device().name().to_owned(), crate::device::bandwidth(session.device())?);
        return Ok(Opened { session: Box::new(session), runs_on, threads: 1, bandwidth });
    }
    let session = cpu(model, &args.engine, room, context.threads)?;
    let options = *session.options();
    Ok(Opened {
        session: Box::new(session),
        runs_on: options.isa.name().to_owned(),
        threads: options.threads,
        bandwidth: bandwidth(options.threads),
    })
}

/// Single products over the instruction sets that the machine has.
fn kernels(context: &Context, args: &Args, output: Output) -> Result<(), Failure> {
    let quant = Quant { bits: 4, symmetric: false, group: Group::Size(128) };
    if args.engine.device == Some(Where::Cuda) {
        return products(context, quant, output);
    }
    let isas: Vec<Isa> = match args.engine.isa {
        Some(isa) if !isa.is_available() => {
            return Err(CpuError::Feature(isa.name()).into());
        }
        Some(isa) if !args.engine.act.is_none_or(|act| act.works_with(isa)) => {
            return Err(CpuError::Bf16(isa.name()).into());
        }
        Some(isa) => vec![isa],
        None => {
            let fits = |isa: &Isa| *isa != Isa::Scalar && args.engine.act.is_none_or(|act| act.works_with(*isa));
            Isa::available().into_iter().filter(fits).collect()
        }
    };
    if isas.is_empty() {
        return Err(CpuError::Feature(Isa::Amx.name()).into());
    }
    let mut rows = Vec::new();
    for shape in SHAPES {
        for tokens in [1, 8, 32, 512] {
            for isa in &isas {
                context.interrupt.check()?;
                rows.push(kernel(
                    shape,
                    tokens,
                    quant,
                    *isa,
                    args.engine.act.unwrap_or(Activations::fastest(*isa)),
                    context.threads,
                )?);
            }
        }
    }
    let limit = bandwidth(context.threads);
    let orders = orders(isas.last().copied().unwrap_or(Isa::Scalar));
    if output == Output::Json {
        return print_json(&json!({
            "type": quant.to_string(),
            "threads": context.threads,
            "read_gigabytes_per_second": limit,
            "kernels": rows,
            "orders": orders,
        }));
    }
    say(&format!("{quant}, {} threads; memory reads {limit:.1} GB/s", context.threads));
    let header = ["rows", "cols", "tokens", "isa", "act", "µs", "GB/s", "GOP/s"];
    let cells = rows.iter().map(|k| {
        vec![
            k.rows.to_string(),
            k.cols.to_string(),
            k.tokens.to_string(),
            k.isa.to_owned(),
            k.act.to_owned(),
            format!("{:.0}", k.microseconds),
            format!("{:.1}", k.gigabytes_per_second),
            format!("{:.0}", k.gigaops),
        ]
    });
    print(&table(output, &header, cells));
    say("the order of 4-bit codes, one thread, weights in the cache");
    let header = ["layout", "order", "10⁹ weights/s", "gain"];
    let cells = orders
        .iter()
        .map(|o| vec![o.layout.clone(), o.order.to_owned(), format!("{:.1}", o.gigaweights), format!("{:.2}", o.gain)]);
    print(&table(output, &header, cells));
    Ok(())
}

/// Single products on the device.
fn products(context: &Context, quant: Quant, output: Output) -> Result<(), Failure> {
    let (device, limit, rows) =
        crate::device::products(&SHAPES, &[1, 2, 4, 8, 16, 64, 512, 2048], quant, &context.interrupt)?;
    if output == Output::Json {
        let report = json!({
            "type": quant.to_string(),
            "device": device,
            "copy_gigabytes_per_second": limit,
            "products": rows,
        });
        return print_json(&report);
    }
    say(&format!("{quant} on {device}; memory copies {limit:.0} GB/s, reads and writes together"));
    let header = ["rows", "cols", "tokens", "µs", "GB/s", "% of copy", "TOP/s"];
    let cells = rows.iter().map(|p| {
        vec![
            p.rows.to_string(),
            p.cols.to_string(),
            p.tokens.to_string(),
            format!("{:.1}", p.microseconds),
            format!("{:.0}", p.gigabytes_per_second),
            format!("{:.0}", 100.0 * p.bandwidth_share),
            format!("{:.1}", p.teraops),
        ]
    });
    print(&table(output, &header, cells));
    Ok(())
}

fn table(output: Output, header: &[&str], rows: impl Iterator<Item = Vec<String>>) -> String {
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
