//! `awqc passes`, `awqc targets`, `awqc archs`: what there is to name elsewhere.

use std::fmt::Write as _;

use awqc_passes::pass::Fidelity;
use awqc_passes::registry::PassInfo;
use comfy_table::{ContentArrangement, Table, presets};
use serde_json::{Value as Json, json};

use super::{Context, print_json};
use crate::failure::Failure;
use crate::progress::print;
use crate::target::TARGETS;

/// A listing.
#[derive(clap::Args)]
pub(super) struct Args {
    /// Print JSON instead.
    #[arg(long)]
    json: bool,
}

/// List the passes.
#[derive(clap::Args)]
pub(super) struct PassesArgs {
    /// Print JSON instead.
    #[arg(long, conflicts_with = "markdown")]
    json: bool,
    /// Print the whole documentation, as in docs/passes.md.
    #[arg(long)]
    markdown: bool,
}

pub(super) fn passes(context: &Context, args: &PassesArgs) -> Result<(), Failure> {
    let passes = context.registry.passes();
    if args.json {
        let list: Vec<_> = passes
            .iter()
            .map(|p| json!({ "name": p.name, "summary": summary(p), "fidelity": fidelity(p.fidelity), "options": p.options }))
            .collect();
        return print_json(&list);
    }
    if args.markdown {
        print(&page(passes));
        return Ok(());
    }
    let rows = passes.iter().map(|p| {
        let options: Vec<String> = p.options.iter().map(|(k, v)| format!("{k}={}", plain(v))).collect();
        [p.name.clone(), summary(p), fidelity(p.fidelity), options.join(" ")]
    });
    print(&table(["pass", "what it does", "fidelity", "options"], rows));
    print("`rewrites`, with --rewrites FILE, applies the rules of a file: docs/write-a-pass.md.\n");
    Ok(())
}

pub(super) fn targets(args: &Args) -> Result<(), Failure> {
    if args.json {
        let list: Vec<_> = TARGETS
            .iter()
            .map(|t| json!({ "name": t.name, "summary": t.summary, "pipeline": t.listed(), "group": t.group }))
            .collect();
        return print_json(&list);
    }
    let rows = TARGETS.iter().map(|t| [t.name.to_owned(), t.summary.to_owned(), t.listed()]);
    print(&table(["target", "what it is", "passes"], rows));
    Ok(())
}

pub(super) fn archs(args: &Args) -> Result<(), Failure> {
    let archs = awqc_frontends::archs();
    if args.json {
        let list: Vec<_> =
            archs.iter().map(|a| json!({ "name": a.name, "classes": a.classes, "file": a.file })).collect();
        return print_json(&list);
    }
    let rows = archs.iter().map(|a| [a.name.to_string(), a.classes.join(", "), a.file.to_string()]);
    print(&table(["family", "classes", "file"], rows));
    Ok(())
}

fn table<const N: usize>(head: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Dynamic).set_header(head);
    rows.for_each(|r| {
        table.add_row(r);
    });
    format!("{}\n", table.trim_fmt())
}

/// The first sentence of a pass's documentation.
fn summary(pass: &PassInfo) -> String {
    let lines = pass.doc.lines().map(str::trim).skip_while(|l| l.is_empty());
    let paragraph: Vec<&str> = lines.take_while(|l| !l.is_empty() && !l.starts_with('#')).collect();
    let text = paragraph.join(" ");
    match text.split_once(". ") {
        Some((first, _)) => format!("{first}."),
        None => text,
    }
}

fn fidelity(fidelity: Fidelity) -> String {
    match fidelity {
        Fidelity::Exact => "exact".into(),
        Fidelity::Rounding(ulps) => format!("rounding ({ulps} ulps)"),
        Fidelity::Lossy => "lossy".into(),
    }
}

/// The default of an option, as pipelines write it; `-` if there is none.
fn plain(value: &Json) -> String {
    match value {
        Json::Null => "-".to_owned(),
        Json::String(text) => text.clone(),
        Json::Bool(_) | Json::Number(_) | Json::Array(_) | Json::Object(_) => value.to_string(),
    }
}

/// `docs/passes.md`.
fn page(passes: &[PassInfo]) -> String {
    let mut out = String::from(
        "# Passes\n\nThis page is made from the passes' own documentation by `cargo xtask docs`.\n\n\
         A pipeline is text: `name{key=value,flag},name,…`. The targets' default pipelines: `awqc targets`. One pass more,\n\
         `rewrites`, applies the rules of a file: [write-a-pass.md](write-a-pass.md).\n",
    );
    for pass in passes {
        // The headings of a pass stand below its own.
        let doc = pass.doc.trim().replace("\n# ", "\n\n### ").replace("\n\n\n", "\n\n");
        let _ = write!(out, "\n## {}\n\n{doc}\n", pass.name);
        if !pass.options.is_empty() {
            out.push_str("\n| option | default |\n|---|---|\n");
            for (key, value) in &pass.options {
                let _ = writeln!(out, "| `{key}` | `{}` |", plain(value));
            }
        }
    }
    out
}
