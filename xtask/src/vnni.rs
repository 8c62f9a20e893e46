//! `cargo xtask vnni`: runs the CPU kernels' tests on an emulated processor with AVX-512 VNNI, which few machines have.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value as Json;

use crate::run::{cargo, command, finish, show};

/// What is run there: the name of a test binary, and its arguments. The emulator takes ten seconds for one of ours, so
/// only the products are, and what they are made of.
const COMMANDS: [(&str, &str); 3] = [
    ("all", "--test-threads=1 --nocapture products::instruction_sets"),
    ("all", "--test-threads=1 products"),
    ("awqc_cpu", "--test-threads=1 kernels"),
];

pub(crate) fn vnni() -> Result<()> {
    let mut run = command("bash", &["xtask/src/vnni.sh", "target/vnni"]);
    let binaries = binaries()?;
    for (name, args) in COMMANDS {
        let of = |(n, _): &&(String, String)| n == name;
        let (_, path) = binaries.iter().find(of).with_context(|| format!("there is no test binary `{name}`"))?;
        run.args([path, args]);
    }
    finish(&mut run)
}

/// Builds the tests; their names and files.
fn binaries() -> Result<Vec<(String, String)>> {
    let cargo = cargo();
    let args = ["test", "-p", "awqc-cpu", "--lib", "--tests", "--no-run", "--message-format", "json"];
    let mut build = command(&cargo, &args);
    eprintln!("$ {}", show(&build));
    let out = build.stderr(std::process::Stdio::inherit()).output().context("cannot start cargo")?;
    if !out.status.success() {
        bail!("the tests do not build");
    }
    let text = String::from_utf8(out.stdout).context("cargo printed something that is not UTF-8")?;
    let messages = text.lines().filter_map(|l| serde_json::from_str::<Json>(l).ok());
    let binary = |m: Json| {
        let file = m["executable"].as_str().filter(|f| Path::new(f).exists())?.to_owned();
        Some((m["target"]["name"].as_str()?.to_owned(), file))
    };
    Ok(messages.filter_map(binary).collect())
}
