//! Test binaries: built by cargo, run by others.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value as Json;

use crate::run::{cargo, command, show};

/// Builds the tests that `args` select; their names and files.
pub(crate) fn binaries(args: &[&str]) -> Result<Vec<(String, String)>> {
    let cargo = cargo();
    let args = [&["test"], args, &["--no-run", "--message-format", "json"]].concat();
    let mut build = command(&cargo, &args);
    eprintln!("$ {}", show(&build));
    let out = build.stderr(std::process::Stdio::inherit()).output().context("cannot start cargo")?;
    if !out.status.success() {
        bail!("the tests do not build");
    }
    let text = String::from_utf8(out.stdout).context("cargo printed something that is not UTF-8")?;
    let messages = text.lines().filter_map(|l| serde_json::from_str::<Json>(l).ok());
    let binary = |m: Json| {
        if m["profile"]["test"] != true {
            return None;
        }
        let file = m["executable"].as_str().filter(|f| Path::new(f).exists())?.to_owned();
        Some((m["target"]["name"].as_str()?.to_owned(), file))
    };
    Ok(messages.filter_map(binary).collect())
}
