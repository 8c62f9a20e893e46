//! `awqc verify`: the invariants of IR text, or of a model's graph against its tensors.

use std::path::PathBuf;

use super::print_json;
use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::progress::print;

/// Check the invariants of IR text or of a model's graph.
#[derive(clap::Args)]
pub(super) struct Args {
    /// IR text or a model.
    file: PathBuf,
    /// Print a JSON object instead.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let module = Model::open(&args.file)?.module;
    if let Err(diagnostics) = awqc_ir::verify::verify(&module) {
        return Err(Failure::new(Exit::Check, format!("{}\n{diagnostics}", args.file.display())));
    }
    let nodes: usize = module.regions.iter().map(|r| r.order().len()).sum();
    if args.json {
        return print_json(&serde_json::json!({ "valid": true, "regions": module.regions.len(), "nodes": nodes }));
    }
    print(&format!("{}: valid, {} regions, {nodes} nodes\n", args.file.display(), module.regions.len()));
    Ok(())
}
