//! The programs that the steps run: built here, or elsewhere.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json, json};

use super::Options;
use crate::binaries::binaries;
use crate::nvrtc;
use crate::run::{capture, cargo, command, root, run, show};

/// Test binaries: what cargo is asked for, the binary's name, the name that it gets in a folder, and the arguments that
/// choose the tests for a device.
const TESTS: [(&[&str], &str, &str, &[&str]); 2] = [
    (&["-p", "awqc-cuda", "--test", "all"], "all", "cuda-tests", &["--skip", "text::"]),
    (
        &["-p", "awqc", "--test", "main", "--features", "burn-cuda"],
        "main",
        "model-tests",
        &[
            "cuda::every_family_computes_what_pytorch_does",
            "cuda::packed_models_compute_what_the_reference_does",
            "burn::logits_are_those_of_the_host",
            "burn::statistics_are_those_of_the_host",
        ],
    ),
];

/// Where `awqc` looks for a CUDA toolkit by itself.
const USUAL: [&str; 2] = ["/usr/local/cuda", "/opt/cuda"];

/// See the module documentation.
pub(super) struct Tools {
    awqc: String,
    /// Binaries, and the arguments that choose their tests.
    pub(super) tests: Vec<(String, &'static [&'static str])>,
    nvrtc: Option<String>,
    /// What `nvidia-smi` says: name, compute capability, driver.
    device: Option<[String; 3]>,
}

impl Tools {
    pub(super) fn find(options: &Options) -> Result<Self> {
        let wants_tests = options.steps.iter().any(|s| s == "tests");
        let (awqc, tests) = match &options.with {
            Some(folder) => {
                let file = |name: &str| {
                    let path = folder.join(name);
                    match path.is_file() {
                        true => Ok(path.to_string_lossy().into_owned()),
                        false => bail!("{} is missing: `cargo xtask gpu-prepare DIR` makes it", path.display()),
                    }
                };
                let tests = TESTS.iter().filter(|_| wants_tests).map(|(_, _, name, which)| Ok((file(name)?, *which)));
                (file("awqc")?, tests.collect::<Result<Vec<_>>>()?)
            }
            None => {
                run(&cargo(), &["build", "--release", "--features", "burn-cuda"])?;
                let tests =
                    TESTS.iter().filter(|_| wants_tests).map(|(args, name, _, which)| Ok((built(args, name)?, *which)));
                ("target/release/awqc".to_owned(), tests.collect::<Result<Vec<_>>>()?)
            }
        };
        Ok(Self { awqc, tests, nvrtc: find_nvrtc(options), device: device() })
    }

    /// What the report says of the machine.
    pub(super) fn machine(&self) -> Json {
        let [name, capability, driver] = self.device.clone().unwrap_or_default();
        json!({ "device": name, "compute_capability": capability, "driver": driver, "nvrtc": self.nvrtc })
    }

    /// Fills in what the products found out, where `nvidia-smi` is missing.
    pub(super) fn complete(&self, found: &mut Map<String, Json>, products: &Json) {
        let Some(Json::Object(machine)) = found.get_mut("machine").filter(|_| self.device.is_none()) else { return };
        for key in ["device", "compute_capability"] {
            machine.insert(key.into(), products[key].clone());
        }
    }

    /// The architecture: as the options say, as `nvidia-smi` says, or as the products found it.
    pub(super) fn sm(&self, options: &Options, products: &Json) -> Result<u32> {
        let digits = |text: &str| text.replace('.', "").parse::<u32>().ok();
        let asked = self.device.as_ref().and_then(|d| digits(&d[1]));
        let measured = products["compute_capability"].as_str().and_then(digits);
        options.sm.or(asked).or(measured).context("the device's architecture is not known: give --sm")
    }

    /// Where NVRTC is looked for, and, by burn-cuda, CUDA's headers.
    pub(super) fn environment(&self) -> impl Iterator<Item = (&'static str, &str)> {
        let nvrtc = self.nvrtc.iter().map(|folder| (nvrtc::VARIABLE, folder.as_str()));
        let headers = self.nvrtc.iter().filter(|folder| Path::new(folder).join("include/cuda_runtime.h").is_file());
        nvrtc.chain(headers.map(|folder| ("CUDA_PATH", folder.as_str())))
    }

    /// Runs `awqc` with `--json`; its answer.
    pub(super) fn awqc(&self, args: &[&str]) -> Result<Json> {
        let mut program = command(&self.awqc, args);
        program.arg("--json").envs(self.environment());
        let line = show(&program);
        eprintln!("$ {line}");
        let out = program.output().with_context(|| format!("cannot start {}", self.awqc))?;
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        if !out.status.success() {
            bail!("{line} failed ({}): {}", out.status, said.trim());
        }
        serde_json::from_slice(&out.stdout).with_context(|| format!("{line} printed no JSON"))
    }
}

/// The file of a test binary.
fn built(args: &[&str], name: &str) -> Result<String> {
    let found = binaries(args)?.into_iter().find(|(n, _)| n == name);
    found.map(|(_, file)| file).with_context(|| format!("cargo built no test binary `{name}`"))
}

/// `cargo xtask gpu-prepare DIR`: the programs that another machine needs to run `gpu --with DIR` there, and this tool.
pub(crate) fn prepare(folder: &str) -> Result<()> {
    let folder = root().join(folder);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    run(&cargo(), &["build", "--release", "-p", "awqc", "-p", "xtask", "--features", "awqc/burn-cuda"])?;
    let mut files: Vec<(PathBuf, &str)> =
        ["awqc", "xtask"].map(|name| (root().join("target/release").join(name), name)).to_vec();
    for (args, name, called, _) in TESTS {
        files.push((built(args, name)?.into(), called));
    }
    let mut bytes = 0;
    for (from, name) in files {
        let to = folder.join(name);
        std::fs::copy(&from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
        // Symbols are for debuggers; where there is no `strip`, they travel along.
        drop(Command::new("strip").arg(&to).status());
        bytes += std::fs::metadata(&to).map_or(0, |m| m.len());
    }
    // Programs shrink to a third.
    let archive = folder.with_extension("tar.gz");
    let archive = archive.to_str().context("the folder's name is not UTF-8")?;
    let name = folder.file_name().context("the folder has no name")?.to_string_lossy();
    let parent = folder.parent().context("the folder has no parent")?.to_string_lossy();
    run("tar", &["-czf", archive, "-C", &parent, &name])?;
    let packed = std::fs::metadata(archive).map_or(0, |m| m.len());
    println!(
        "{}: {:.1} MB; {archive}: {:.1} MB. On the other machine, in the root of a copy of this tree: {name}/xtask gpu --with \
         {name} --model MODEL",
        folder.display(),
        bytes as f64 / 1e6,
        packed as f64 / 1e6
    );
    Ok(())
}

/// NVRTC's folder: as the options or the environment say; nothing if it is where `awqc` looks by itself; otherwise that
/// of the compiler on the path, or of Python's packages.
fn find_nvrtc(options: &Options) -> Option<String> {
    let given = options.nvrtc.as_ref().map(|p| p.to_string_lossy().into_owned());
    let environment = || [nvrtc::VARIABLE, "CUDA_HOME", "CUDA_PATH"].iter().find_map(|v| std::env::var(v).ok());
    let python = || {
        let code = "import nvidia; print(list(nvidia.__path__)[0])";
        let out = Command::new("python3").args(["-c", code]).output().ok().filter(|o| o.status.success())?;
        let path = String::from_utf8(out.stdout).ok()?.trim().to_owned();
        Path::new(&path).is_dir().then_some(path)
    };
    if let Some(folder) = given.or_else(environment) {
        return Some(folder);
    }
    if USUAL.iter().any(|folder| Path::new(folder).join("include/cuda_fp16.h").is_file()) {
        return None;
    }
    let compiler = || {
        let paths = std::env::var_os("PATH")?;
        let found = std::env::split_paths(&paths).map(|p| p.join("nvcc")).find(|p| p.is_file())?;
        Some(found.canonicalize().ok()?.parent()?.parent()?.to_string_lossy().into_owned())
    };
    compiler().or_else(python)
}

/// What `nvidia-smi` says of the first device.
fn device() -> Option<[String; 3]> {
    let args = ["--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"];
    let text = capture("nvidia-smi", &args).ok()?;
    let mut fields = text.lines().next()?.split(',').map(|f| f.trim().to_owned());
    Some([fields.next()?, fields.next()?, fields.next()?])
}
