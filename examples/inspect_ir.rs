//! Reads IR text and asks the graph: which ops there are, what dominates what, which scales are free.
//!
//!     cargo run --example inspect_ir -- tests/filetests/passes/fuse-qkv/gqa.awqir
#![allow(clippy::print_stdout, reason = "an example that prints")]

use std::collections::BTreeMap;
use std::collections::BTreeSet;

use awqc::ir::text;
use awqc::passes::analysis::gauge;

fn main() -> anyhow::Result<()> {
    let path = std::env::args().nth(1).unwrap_or_else(|| "examples/block.awqir".into());
    let module = text::parse(&std::fs::read_to_string(&path)?)?;
    for region in &module.regions {
        let mut ops: BTreeMap<&str, usize> = BTreeMap::new();
        for (_, node) in region.nodes() {
            *ops.entry(node.op.mnemonic()).or_default() += 1;
        }
        println!("{}: {ops:?}", region.name);
        for site in gauge::sites(region, &BTreeSet::new()) {
            println!("  free scales: {}", gauge::describe(region, &site));
        }
    }
    Ok(())
}
