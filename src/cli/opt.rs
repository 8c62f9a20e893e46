//! `awqc opt`: IR text in, passes over it, IR text out.

use std::path::PathBuf;

use awqc_exec::HostExecutor;
use awqc_frontends::Kind;
use awqc_ir::{RegionName, text, verify::verify};
use awqc_passes::{RemarkKind, Remarks};

use super::Context;
use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::progress::{print, say};
use crate::watch::Watch;

/// Run passes on IR text.
#[derive(clap::Args)]
pub(super) struct Args {
    /// IR text (.awqir), or a model.
    file: PathBuf,
    /// The passes. A reproducer names its own in its first line.
    #[arg(long, value_name = "PIPELINE")]
    passes: Option<String>,
    /// Print the passes' counters and the time of each.
    #[arg(long)]
    stats: bool,
    #[command(flatten)]
    watch: Watch,
}

pub(super) fn run(context: &Context, args: &Args) -> Result<(), Failure> {
    let Model { mut module, source, kind, .. } = Model::open(&args.file)?;
    if kind == Kind::Text && args.watch.check_each {
        say(&format!("note: {} is text without weights: passes are checked on made-up ones", args.file.display()));
    }
    let in_file = || {
        let text = std::fs::read_to_string(&args.file).ok()?;
        Some(text.lines().next()?.strip_prefix("// passes:")?.trim().to_owned())
    };
    let pipeline = args.passes.clone().or_else(in_file).ok_or_else(|| {
        Failure::new(Exit::Usage, "no passes are given").help("give --passes, or begin the file with `// passes: …`")
    })?;
    if let Err(diagnostics) = verify(&module) {
        // A reproducer holds one region of its module: alone it is not the whole chain.
        let first = module.regions.first().is_some_and(|r| r.name == RegionName::Named("embed".into()));
        let whole = first || module.eye() > 0 && module.regions.len() > 1;
        if whole {
            return Err(Failure::new(Exit::BadInput, format!("{}\n{diagnostics}", args.file.display())));
        }
    }
    let mut manager = args.watch.manager(&context.registry, &pipeline, &context.interrupt)?;
    let mut exec = HostExecutor::new(source);
    let mut remarks = Remarks::default();
    let done = manager.run_module(&mut module, &mut exec, &mut remarks, &mut |e| args.watch.show(e));
    for remark in remarks.list.iter().filter(|r| r.kind == RemarkKind::Warning) {
        say(&format!("warning: {} on {}: {}", remark.pass, remark.region, remark.message));
    }
    if args.stats {
        let stats = remarks.stats.iter().map(|(of, value)| (of, super::stat(*value)));
        stats.for_each(|((pass, name), value)| say(&format!("{value:>12} {pass} {name}")));
        manager.times().for_each(|(pass, time)| say(&format!("{:>9.3} s {pass}", time.as_secs_f64())));
    }
    done.map_err(|e| crate::compile::pass_failure(&e))?;
    print(&text::print(&module));
    Ok(())
}
