//! NVIDIA's run-time compiler, which needs no device: the tests compile every kernel with it.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::run::{root, run};

/// Names the folder to programs and tests.
pub(crate) const VARIABLE: &str = "AWQC_NVRTC";
/// The compiler, and the headers that kernels include. Another version gives other machine code.
const PACKAGES: [&str; 3] =
    ["nvidia-cuda-nvrtc-cu12==12.9.86", "nvidia-cuda-runtime-cu12==12.9.79", "nvidia-cuda-cccl-cu12==12.9.27"];
/// Where they are put.
const DIR: &str = "target/nvrtc";

/// The folder that the environment names, or one with NVIDIA's Python packages, downloaded once.
pub(crate) fn fetch() -> Result<PathBuf> {
    if let Some(named) = std::env::var_os(VARIABLE).filter(|v| !v.is_empty()) {
        return Ok(named.into());
    }
    let dir = root().join(DIR);
    if !dir.is_dir() {
        println!("Downloading NVRTC (96 MB)");
        let partial = dir.with_extension("partial");
        drop(std::fs::remove_dir_all(&partial));
        let to = partial.to_str().context("the project's path is not UTF-8")?;
        let pip = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--target", to];
        run("python3", &[&pip[..], &PACKAGES].concat())?;
        std::fs::rename(&partial, &dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    Ok(dir.join("nvidia"))
}
