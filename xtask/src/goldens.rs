//! `cargo xtask goldens`: tiny checkpoints of every family with PyTorch's outputs, made in a scratch environment.

use anyhow::Result;

use crate::run::{root, run};

/// Where the scratch environment is kept between runs.
const VENV: &str = "target/goldens-venv";

/// What the outputs are computed with.
const PACKAGES: [&str; 4] = ["torch==2.6.0", "transformers==4.51.3", "safetensors==0.5.3", "numpy<3"];

pub(crate) fn goldens(dir: &str) -> Result<()> {
    let python = format!("{VENV}/bin/python");
    if !root().join(&python).exists() {
        run("python3", &["-m", "venv", VENV])?;
    }
    run(&python, &[&["-m", "pip", "install", "--quiet", "--disable-pip-version-check"], &PACKAGES[..]].concat())?;
    std::fs::create_dir_all(root().join(dir))?;
    run(&python, &["xtask/src/goldens.py", dir])
}
