//! `cargo xtask docs`: the pages that are made from the code. `docs/passes.md` is what the passes say of themselves,
//! `docs/ir.md` is the language reference in `ir/src/lib.rs`.

use anyhow::{Context, Result, bail};

use crate::run::{capture, cargo, root};

/// Whether to write the pages or to compare them.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    Write,
    Check,
}

/// `features` are flags for cargo that say which build of the program is asked.
pub(crate) fn docs(mode: Mode, features: &[&str]) -> Result<()> {
    let passes = capture(&cargo(), &[&["run", "--quiet"], features, &["--", "passes", "--markdown"]].concat())?;
    for (page, text) in [("docs/passes.md", passes), ("docs/ir.md", language()?)] {
        let path = root().join(page);
        match mode {
            Mode::Write => std::fs::write(&path, text).with_context(|| format!("cannot write {page}"))?,
            Mode::Check => {
                let old = std::fs::read_to_string(&path).with_context(|| format!("cannot read {page}"))?;
                if old != text {
                    bail!("{page} is out of date: run `cargo xtask docs`");
                }
            }
        }
    }
    Ok(())
}

/// The module documentation of the language crate.
fn language() -> Result<String> {
    let source = std::fs::read_to_string(root().join("ir/src/lib.rs")).context("cannot read ir/src/lib.rs")?;
    let lines = source.lines().map_while(|l| l.strip_prefix("//!"));
    let text: Vec<&str> = lines.map(|l| l.strip_prefix(' ').unwrap_or(l)).collect();
    Ok(format!("{}\n", text.join("\n").trim_end()))
}
