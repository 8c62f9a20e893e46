//! `awqc dump`: a model's graph as text, dot or JSON.

use std::path::PathBuf;

use awqc_ir::{Module, Region, text, view};
use clap::ValueEnum;

use crate::failure::{Exit, Failure};
use crate::model::Model;
use crate::progress::print;

/// Print a model's graph.
#[derive(clap::Args)]
pub(super) struct Args {
    /// The model.
    model: PathBuf,
    /// Only this region: @embed, @0, @head, …
    #[arg(long, value_name = "REGION")]
    region: Option<String>,
    /// What to print.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// For an artefact: the graph as it was compiled, with the origin of every weight.
    #[arg(long)]
    provenance: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// IR text, which awqc reads back.
    Text,
    /// Graphviz.
    Dot,
    /// JSON.
    Json,
}

pub(super) fn run(args: &Args) -> Result<(), Failure> {
    let mut module = if args.provenance { Model::provenance(&args.model)? } else { Model::open(&args.model)?.module };
    if let Some(wanted) = &args.region {
        keep(&mut module, wanted)?;
    }
    let out = match args.format {
        Format::Text => text::print(&module),
        Format::Dot => module.regions.iter().map(view::dot).collect(),
        Format::Json => format!("{:#}\n", view::json(&module)),
    };
    print(&out);
    Ok(())
}

/// Leaves only the named region, and the fused ops that it uses.
fn keep(module: &mut Module, wanted: &str) -> Result<(), Failure> {
    let names: Vec<String> = module.regions.iter().map(|r| r.name.to_string()).collect();
    let wanted = if wanted.starts_with('@') { wanted.to_owned() } else { format!("@{wanted}") };
    module.regions.retain(|r| r.name.to_string() == wanted);
    if module.regions.is_empty() {
        return Err(Failure::new(Exit::Usage, format!("there is no region {wanted}"))
            .help(format!("the regions are {}", names.join(", "))));
    }
    let mut used: Vec<_> = module.regions.iter().flat_map(callees).collect();
    // A definition may call others: each round adds one level.
    while let Some(more) = {
        let below = module.fused.iter().filter(|d| used.contains(&d.name)).flat_map(|d| callees(&d.body));
        let new: Vec<_> = below.filter(|n| !used.contains(n)).collect();
        (!new.is_empty()).then_some(new)
    } {
        used.extend(more);
    }
    module.fused.retain(|d| used.contains(&d.name));
    Ok(())
}

fn callees(region: &Region) -> Vec<awqc_ir::Name> {
    let fused = region.nodes().filter_map(|(_, n)| match &n.op {
        awqc_ir::Op::Fused(call) => Some(call.callee.clone()),
        _not_a_call => None,
    });
    fused.collect()
}
