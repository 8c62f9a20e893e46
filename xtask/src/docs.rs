//! `cargo xtask docs`: `docs/passes.md` is what the passes say of themselves.

use anyhow::{Context, Result, bail};

use crate::run::{capture, cargo, root};

/// Whether to write the page or to compare it.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Mode {
    Write,
    Check,
}

pub(crate) fn docs(mode: Mode) -> Result<()> {
    let page = capture(&cargo(), &["run", "--quiet", "--", "passes", "--markdown"])?;
    let path = root().join("docs/passes.md");
    match mode {
        Mode::Write => std::fs::write(&path, page).with_context(|| format!("cannot write {}", path.display())),
        Mode::Check => {
            let old = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            if old != page {
                bail!("docs/passes.md is out of date: run `cargo xtask docs`");
            }
            Ok(())
        }
    }
}
