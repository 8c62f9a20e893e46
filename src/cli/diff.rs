//! `awqc diff`: what differs between the graphs of two models, as a unified diff of their text.

use std::path::PathBuf;

use awqc_ir::text;

use super::print_json;
use crate::failure::Failure;
use crate::model::Model;
use crate::progress::print;

/// Compare the graphs of two models.
#[derive(clap::Args)]
pub(super) struct Args {
    /// One model.
    a: PathBuf,
    /// The other.
    b: PathBuf,
    /// Compare artefacts by the origin of their weights.
    #[arg(long)]
    provenance: bool,
    /// Print a JSON object instead.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let open = |path: &PathBuf| -> Result<String, Failure> {
        let module = if args.provenance { Model::provenance(path)? } else { Model::open(path)?.module };
        Ok(text::print(&module))
    };
    let (a, b) = (open(&args.a)?, open(&args.b)?);
    let diff = awqc_passes::diff::lines(&a, &b, &args.a.display().to_string(), &args.b.display().to_string());
    if args.json {
        return print_json(&serde_json::json!({ "same": a == b, "diff": diff }));
    }
    print(&diff);
    Ok(())
}
