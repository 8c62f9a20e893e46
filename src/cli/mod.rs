//! The command line: one module a subcommand. Results go to standard output, everything else to standard error.

mod bench;
mod calibrate;
mod compile;
mod diff;
mod dump;
mod errors;
mod eval;
mod explain;
mod kernels;
mod list;
mod opt;
mod run;
mod study;
mod verify;

use std::ops::RangeInclusive;
use std::process::ExitCode;
use std::str::FromStr;

use awqc_passes::Registry;
use clap::{Parser, Subcommand};

use crate::failure::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::progress::say;

const AFTER: &str =
    "MODEL is a folder as Hugging Face tools write it, a .gguf, .onnx or .safetensors file, a compiled artefact, \
or IR text (.awqir).

Exit codes: 0 done, 1 failed, 2 usage, 3 unsupported model or target, 4 bad input, 5 a check or quality gate missed, \
6 out of memory, 130 interrupted.";

/// Compiles trained language models to 4, 3 and 2 bits, and runs them.
#[derive(Parser)]
#[command(name = "awqc", version, after_help = AFTER, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Threads to use; one for each physical core if not given, and never more than the machine runs at once. Results do not
    /// depend on it.
    #[arg(long, global = true, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// Show no progress.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Compile a model for a target.
    Compile(compile::Args),
    /// Print a model's graph.
    Dump(dump::Args),
    /// Run passes on IR text.
    Opt(opt::Args),
    /// Check the invariants of IR text or of a model's graph.
    Verify(verify::Args),
    /// Compare the graphs of two models.
    Diff(diff::Args),
    /// Say what a pass does to a model, and why it does not do more.
    Explain(explain::Args),
    /// Measure perplexity, and the distance from another model.
    Eval(eval::Args),
    /// Measure what quantization does to a model, as the AWQ paper does.
    Study(study::Args),
    /// Generate text.
    Run(run::Args),
    /// Measure speed: prompts, generation, single products.
    Bench(bench::Args),
    /// List the passes.
    Passes(list::PassesArgs),
    /// List the targets.
    Targets(list::Args),
    /// List the model families.
    Archs(list::Args),
}

/// What every subcommand is given.
struct Context {
    registry: Registry,
    interrupt: Interrupt,
    quiet: bool,
    /// Threads of engines that have their own.
    threads: usize,
}

/// Runs the program with these passes; see `src/main.rs`.
pub fn main(registry: Registry) -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            drop(e.print());
            return ExitCode::from(if e.use_stderr() { Exit::Usage as u8 } else { 0 });
        }
    };
    let most = num_cpus::get();
    let asked = cli.threads.map(|n| n.clamp(1, most));
    if let Some(n) = cli.threads.filter(|n| *n > most) {
        // They wait for each other by spinning.
        say(&format!("warning: --threads {n}: the machine runs {most} at once, which are used"));
    }
    if let Some(n) = asked {
        // Fails only if the pool exists already, as in a library user's process: theirs then stands.
        drop(rayon::ThreadPoolBuilder::new().num_threads(n).build_global());
    }
    let threads = asked.unwrap_or_else(num_cpus::get_physical).max(1);
    let context = Context { registry, interrupt: Interrupt::on_ctrl_c(), quiet: cli.quiet, threads };
    let done = match cli.command {
        Command::Compile(args) => compile::run(&context, &args),
        Command::Dump(args) => dump::run(&args),
        Command::Opt(args) => opt::run(&context, &args),
        Command::Verify(args) => verify::run(&args),
        Command::Diff(args) => diff::run(&args),
        Command::Explain(args) => explain::run(&context, &args),
        Command::Eval(args) => eval::run(&context, &args),
        Command::Study(args) => study::run(&context, &args),
        Command::Run(args) => run::run(&context, &args),
        Command::Bench(args) => bench::run(&context, &args),
        Command::Passes(args) => list::passes(&context, &args),
        Command::Targets(args) => list::targets(&args),
        Command::Archs(args) => list::archs(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&format!("error: {failure}"));
            ExitCode::from(failure.exit as u8)
        }
    }
}

/// Reads a number in a range, which `what` describes; NaN is in none.
fn number<T>(range: RangeInclusive<T>, what: &'static str) -> impl Fn(&str) -> Result<T, String> + Clone
where
    T: FromStr + PartialOrd + Clone + Send + Sync + 'static,
{
    move |text| text.parse().ok().filter(|n| range.contains(n)).ok_or_else(|| format!("{what} is needed"))
}

fn threads(text: &str) -> Result<usize, String> {
    let n = text.parse::<usize>().ok().filter(|n| *n > 0);
    n.ok_or_else(|| format!("`{text}`: a positive number is needed"))
}

/// A counter of a pass for people: most count things, few measure something.
fn stat(value: f64) -> String {
    if value.fract() == 0.0 { value.to_string() } else { format!("{value:.3e}") }
}

/// Prints a JSON object as the one line of output.
fn print_json(value: &impl serde::Serialize) -> Result<(), Failure> {
    let text = serde_json::to_string(value).map_err(|e| Failure::new(Exit::Failed, e))?;
    crate::progress::print(&format!("{text}\n"));
    Ok(())
}
