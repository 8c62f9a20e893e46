//! What to show of the passes' work: the flags `--print-ir-…`, `--reproducer`, and where their output goes.

use std::fs;
use std::path::{Path, PathBuf};

use awqc_passes::instrument::{Event, PrintAfter, PrintBefore, PrintChange, PrintDir, Reproducer, Selection};
use awqc_passes::manager::{Manager, Options};
use awqc_passes::pass::Budget;
use awqc_passes::pipeline::Pipeline;
use awqc_passes::{Registry, rewrite};

use crate::failure::{Exit, Failure};
use crate::interrupt::Interrupt;
use crate::progress::say;

/// The pass that applies the rules of a file.
const REWRITES: &str = "rewrites";

/// Flags that every command with a pipeline takes.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Passes")]
pub struct Watch {
    /// Print each region before these passes (names separated by commas, or `all`).
    #[arg(long, value_name = "PASSES")]
    pub print_ir_before: Option<String>,
    /// Print each region after these passes.
    #[arg(long, value_name = "PASSES")]
    pub print_ir_after: Option<String>,
    /// Print what each pass changes.
    #[arg(long)]
    pub print_ir_change: bool,
    /// Write each region after each pass to a file below this folder.
    #[arg(long, value_name = "DIR")]
    pub print_ir_dir: Option<PathBuf>,
    /// Do not check the invariants after every pass.
    #[arg(long)]
    pub no_verify_each: bool,
    /// Run each region before and after every pass, and fail if the function changed by more than the pass promises.
    #[arg(long)]
    pub check_each: bool,
    /// Stop rewriting after this many rewrites, to find the one that goes wrong.
    #[arg(long, value_name = "N")]
    pub max_rewrites: Option<u64>,
    /// Where a pass fails, write the region and the remaining pipeline to this file, for `awqc opt`.
    #[arg(long, value_name = "FILE")]
    pub reproducer: Option<PathBuf>,
    /// A file of rewrite rules; the pass `rewrites` applies them.
    #[arg(long, value_name = "FILE")]
    pub rewrites: Option<PathBuf>,
}

impl Watch {
    /// The manager for a pipeline, with the hooks that the flags ask for.
    ///
    /// # Errors
    /// When the pipeline or the rules file is wrong.
    pub fn manager(&self, registry: &Registry, pipeline: &str, interrupt: &Interrupt) -> Result<Manager, Failure> {
        let usage = |e: &dyn std::fmt::Display| Failure::new(Exit::Usage, e);
        let registry = match &self.rewrites {
            None => registry.clone(),
            Some(path) => {
                let text = fs::read_to_string(path).map_err(|e| Failure::io(path, &e))?;
                let rules = rewrite::parse_rules(&text)
                    .map_err(|e| Failure::new(Exit::BadInput, format!("{}\n{e}", path.display())))?;
                registry.clone().with_rewrites(REWRITES, rules)
            }
        };
        let pipeline: Pipeline = pipeline.parse().map_err(|e| usage(&e))?;
        match (&self.rewrites, pipeline.steps.iter().any(|s| s.name == REWRITES)) {
            (Some(path), false) => {
                return Err(Failure::new(Exit::Usage, format!("{}: no pass applies these rules", path.display()))
                    .help("put `rewrites` into the pipeline, with --passes"));
            }
            (None, true) if registry.get(REWRITES).is_none() => {
                return Err(Failure::new(Exit::Usage, "`rewrites` applies the rules of a file, and none is given")
                    .help("give it with --rewrites FILE; docs/write-a-pass.md shows how rules are written"));
            }
            (Some(_), true) | (None, _) => {}
        }
        let options = Options {
            verify_each: !self.no_verify_each,
            check_each: self.check_each,
            budget: self.max_rewrites.map_or_else(Budget::default, Budget::of),
            stop: interrupt.flag(),
        };
        let mut manager = Manager::new(&registry, pipeline, options).map_err(|e| usage(&e))?;
        if let Some(passes) = &self.print_ir_before {
            manager = manager.with_hook(PrintBefore(Selection::new(passes)));
        }
        if let Some(passes) = &self.print_ir_after {
            manager = manager.with_hook(PrintAfter(Selection::new(passes)));
        }
        if self.print_ir_change {
            manager = manager.with_hook(PrintChange::default());
        }
        if self.print_ir_dir.is_some() {
            manager = manager.with_hook(PrintDir);
        }
        if self.reproducer.is_some() {
            manager = manager.with_hook(Reproducer);
        }
        Ok(manager)
    }

    /// Puts an event where the flags say. A file that cannot be written is said, and is no reason to stop the work.
    pub fn show(&self, event: Event) {
        match event {
            Event::Print { title, text } => say(&format!("// {title}\n{text}")),
            Event::File { path, text } => {
                if let Some(dir) = &self.print_ir_dir {
                    write(&dir.join(path), &text);
                }
            }
            Event::Reproducer { text } => {
                if let Some(path) = &self.reproducer {
                    write(path, &text);
                    say(&format!("the failure runs again with `awqc opt {}`", path.display()));
                }
            }
        }
    }
}

fn write(path: &Path, text: &str) {
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    if let Err(e) = made.and_then(|()| fs::write(path, text)) {
        say(&format!("warning: {}: {e}", path.display()));
    }
}
