//! `cargo xtask gpu`: everything that a machine with a GPU can tell, in one command and one report. Programs that were
//! built elsewhere will do (`--with`): the machine then needs the driver and NVRTC, but no Rust.

mod report;
mod steps;
mod tools;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json, json};

use crate::run::root;

use tools::Tools;
pub(crate) use tools::prepare;

pub(crate) const USAGE: &str = "usage: cargo xtask gpu [OPTION...]

Runs on the machine's NVIDIA device, step by step: `tests` (every kernel, every golden model), `kernels` (single products),
`torch` (the same with PyTorch, if it is there), `model` (perplexity beside the reference), `calibration` (its time on the
device and on the processor), `shapes` (decoding with random weights). A step that fails does not stop the others. Steps may be run one by one: the report keeps what earlier runs found.

  --steps A,B      only these
  --with DIR       programs that `cargo xtask gpu-prepare DIR` put there; nothing is built
  --model PATH     the model of the steps `model` and `calibration`, or, for the first, an artefact that was made of it;
                   SmolLM2-135M-Instruct if not given
  --ids FILE       token ids to evaluate and calibrate it on, in place of texts
  --configs A,B    configurations of the step `shapes`; assets/shapes/llama-7b if not given
  --nvrtc DIR      where NVRTC is, if not where it usually is
  --sm N           the device's architecture, such as 90; asked of the driver if not given
  --products ARGS  more arguments of `awqc bench kernels`, such as \"--bits 4\"
  --bench ARGS     more arguments of `awqc bench` in the steps `model` and `shapes`, such as \"-d 4096\"
  --out DIR        where report.md and report.json go; target/gpu if not given";

/// The steps, in order.
const STEPS: [&str; 6] = ["tests", "kernels", "torch", "model", "calibration", "shapes"];

/// What the command line says.
pub(crate) struct Options {
    steps: Vec<String>,
    with: Option<PathBuf>,
    model: Option<PathBuf>,
    ids: Option<PathBuf>,
    configs: Vec<PathBuf>,
    nvrtc: Option<PathBuf>,
    sm: Option<u32>,
    products: Vec<String>,
    bench: Vec<String>,
    out: PathBuf,
}

impl Options {
    pub(crate) fn parse(args: &[&str]) -> Result<Self> {
        let mut options = Self {
            steps: STEPS.map(str::to_owned).to_vec(),
            with: None,
            model: None,
            ids: None,
            configs: vec![root().join("assets/shapes/llama-7b/config.json")],
            nvrtc: None,
            sm: None,
            products: Vec::new(),
            bench: Vec::new(),
            out: root().join("target/gpu"),
        };
        let mut args = args.iter();
        while let Some(flag) = args.next() {
            let value = *args.next().with_context(|| format!("{flag} needs a value\n{USAGE}"))?;
            let list = || value.split(',').map(str::to_owned);
            // Programs run in the project's root, wherever this one was started.
            let path = |text: &str| std::path::absolute(text).with_context(|| format!("{flag}: `{text}` is no path"));
            match *flag {
                "--steps" => options.steps = list().collect(),
                "--with" => options.with = Some(path(value)?),
                "--model" => options.model = Some(path(value)?),
                "--ids" => options.ids = Some(path(value)?),
                "--configs" => options.configs = list().map(|p| path(&p)).collect::<Result<_>>()?,
                "--nvrtc" => options.nvrtc = Some(path(value)?),
                "--sm" => options.sm = Some(value.parse().context("--sm: a number such as 90 is needed")?),
                "--products" => options.products = value.split_whitespace().map(str::to_owned).collect(),
                "--bench" => options.bench = value.split_whitespace().map(str::to_owned).collect(),
                "--out" => options.out = path(value)?,
                other => bail!("{other} is unknown\n{USAGE}"),
            }
        }
        match options.steps.iter().find(|s| !STEPS.contains(&s.as_str())) {
            Some(step) => bail!("there is no step `{step}`\n{USAGE}"),
            None => Ok(options),
        }
    }
}

pub(crate) fn gpu(options: &Options) -> Result<()> {
    std::fs::create_dir_all(&options.out).with_context(|| format!("cannot create {}", options.out.display()))?;
    let tools = Tools::find(options)?;
    let json = options.out.join("report.json");
    let mut found = read(&json);
    found.insert("machine".into(), tools.machine());
    let mut failed = Vec::new();
    for step in STEPS.iter().filter(|s| options.steps.iter().any(|o| o == *s)) {
        println!("\n== {step}");
        let start = Instant::now();
        let done = match *step {
            "tests" => steps::tests(&tools),
            "kernels" => steps::kernels(&tools, options),
            "torch" => steps::torch(options),
            "model" => steps::model(&tools, options, &found),
            "calibration" => steps::calibration(&tools, options),
            "shapes" => steps::shapes(&tools, options, &found),
            other => bail!("there is no step `{other}`"),
        };
        let mut result = done.unwrap_or_else(|e| {
            eprintln!("{step}: {e:#}");
            failed.push(*step);
            json!({ "failed": format!("{e:#}") })
        });
        if let Some(result) = result.as_object_mut() {
            result.insert("seconds".into(), start.elapsed().as_secs().into());
        }
        if *step == "kernels" {
            tools.complete(&mut found, &result);
        }
        found.insert((*step).into(), result);
        // A machine may be taken away at any time.
        write(&json, &serde_json::to_string_pretty(&found)?)?;
        write(&options.out.join("report.md"), &report::markdown(&found))?;
    }
    println!("\n{}", report::markdown(&found));
    match failed.as_slice() {
        [] => Ok(()),
        failed => bail!("these steps failed: {}", failed.join(", ")),
    }
}

fn read(path: &Path) -> Map<String, Json> {
    let bytes = std::fs::read(path).ok();
    bytes.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default()
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_understood_or_refused() {
        let parse = |args: &[&str]| Options::parse(args).map_err(|e| format!("{e:#}"));
        let all = parse(&[]).unwrap();
        assert_eq!(all.steps, STEPS);
        assert!(all.out.ends_with("target/gpu") && all.configs[0].is_file(), "{:?}", all.configs);
        let some = parse(&["--steps", "kernels,model", "--sm", "90", "--products", "--bits 4"]).unwrap();
        assert_eq!((some.steps.len(), some.sm, some.products.len()), (2, Some(90), 2));
        assert!(parse(&["--with", "x"]).unwrap().with.is_some_and(|p| p.is_absolute()));
        for (args, message) in [
            (&["--steps", "none"][..], "no step `none`"),
            (&["--out"], "--out needs a value"),
            (&["--sm", "x"], "a number such as 90"),
            (&["--color", "red"], "--color is unknown"),
        ] {
            let error = parse(args).err().unwrap();
            assert!(error.contains(message), "{args:?}: {error}");
        }
    }
}
