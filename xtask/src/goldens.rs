//! `cargo xtask goldens`: tiny checkpoints of every family with PyTorch's outputs, and of one family in every format, made in
//! scratch environments.

use anyhow::Result;

use crate::run::{root, run};

/// Where the scratch environments are kept between runs, the release of transformers in each, and the models that are
/// made with it; all that it knows where none are named.
const RELEASES: [(&str, &str, &[&str]); 2] = [
    ("target/goldens-venv", "transformers==4.51.3", &[]),
    ("target/goldens-venv-later", "transformers==4.55.4", &["deepseek_v2", "smollm3"]),
];

/// What else the outputs are computed with.
const PACKAGES: [&str; 4] = ["torch==2.6.0", "safetensors==0.5.3", "numpy<3", "onnx==1.17.0"];

/// Releases of compressed-tensors that pack in different ways, and what the first of them needs. Of the second, only
/// one file is used.
const PACKERS: [(&str, &[&str]); 2] = [
    (
        "target/goldens-packer-old",
        &[
            "compressed-tensors==0.9.4",
            "pydantic==2.14.3",
            "pydantic-core==2.50.4",
            "annotated-types",
            "typing-inspection",
        ],
    ),
    ("target/goldens-packer", &["compressed-tensors==0.20.0"]),
];

pub(crate) fn goldens(dir: &str) -> Result<()> {
    std::fs::create_dir_all(root().join(dir))?;
    for (venv, transformers, models) in RELEASES {
        let python = format!("{venv}/bin/python");
        if !root().join(&python).exists() {
            run("python3", &["-m", "venv", venv])?;
        }
        let install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", transformers];
        run(&python, &[&install, &PACKAGES[..]].concat())?;
        run(&python, &[&["xtask/src/goldens.py", dir], models].concat())?;
        if models.is_empty() {
            run(&python, &["xtask/src/image_goldens.py", dir])?;
        }
    }
    let python = format!("{}/bin/python", RELEASES[0].0);
    for (folder, packages) in PACKERS {
        let install = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--upgrade",
            "--target",
            folder,
        ];
        run(&python, &[&install, packages].concat())?;
    }
    run(&python, &["xtask/src/checkpoints.py", dir, PACKERS[0].0, PACKERS[1].0])
}
