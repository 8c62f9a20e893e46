//! The steps. Each returns what it found.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value as Json, json};

use super::Options;
use super::tools::Tools;
use crate::demo;
use crate::run::{capture, command};
use crate::test::{self, Tally};

/// Text that models are compared on, and how much of it.
const TEXT: &str = "assets/evaluation.txt";
const WINDOWS: &str = "8";
/// The program that measures PyTorch.
const TORCH: &str = "xtask/src/torch_linear.py";

/// The kernels against their definitions and the golden models against PyTorch's logits, on the device.
pub(super) fn tests(tools: &Tools) -> Result<Json> {
    let mut tally = Tally::default();
    let mut all = Ok(());
    for (binary, which) in &tools.tests {
        let mut run = command(binary, which);
        run.args(["--test-threads", "1"]).env("AWQC_GPU", "1").envs(tools.environment());
        all = all.and(test::tests(&mut run, &mut tally));
    }
    println!("{tally}");
    all?;
    Ok(json!({ "result": tally.to_string() }))
}

/// Single products.
pub(super) fn kernels(tools: &Tools, options: &Options) -> Result<Json> {
    let more: Vec<&str> = options.products.iter().map(String::as_str).collect();
    tools.awqc(&[&["bench", "kernels", "--device", "cuda"], &more[..]].concat())
}

/// What PyTorch does with the same shapes.
pub(super) fn torch(options: &Options) -> Result<Json> {
    if capture("python3", &["-c", "import torch; assert torch.cuda.is_available()"]).is_err() {
        println!("skipped: python3 has no torch with a CUDA device");
        return Ok(json!({ "skipped": "python3 has no torch with a CUDA device" }));
    }
    let mut args = vec![TORCH.to_owned()];
    for config in &options.configs {
        args.extend(["--config".to_owned(), config.display().to_string()]);
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    serde_json::from_str(&capture("python3", &args)?).context("the program printed no JSON")
}

/// The model that the options name, or a small one.
fn subject(options: &Options) -> Result<PathBuf> {
    match (&options.model, &options.with) {
        (Some(path), _) => Ok(path.clone()),
        (None, None) => demo::fetch(),
        (None, Some(_)) => bail!("give the model with --model: nothing is downloaded with --with"),
    }
}

/// The time of calibration on the processor and, by burn-cuda, on the device; the perplexities of what comes of both.
pub(super) fn calibration(tools: &Tools, options: &Options) -> Result<Json> {
    let model = subject(options)?;
    if model.join("kernels/plan.json").is_file() {
        println!("skipped: {} is compiled already", model.display());
        return Ok(json!({ "skipped": "the model is compiled already" }));
    }
    let out = options.out.join("calibrated");
    let (calib, corpus) = match &options.ids {
        Some(ids) => (vec!["--calib-ids", text(ids)?], vec!["--ids", text(ids)?]),
        None => (Vec::new(), vec!["--text", TEXT, "--chunks", WINDOWS]),
    };
    let mut found = Map::new();
    for place in ["host", "cuda"] {
        let compile = ["compile", text(&model)?, "--group", "64", "--profile-on", place, "-o", text(&out)?, "--force"];
        let compiled = tools.awqc(&[&compile[..], &calib].concat())?;
        let passes = compiled["passes"].as_array().map_or(&[][..], Vec::as_slice);
        let profile: f64 = passes
            .iter()
            .filter(|p| p["pass"].as_str().is_some_and(|n| n.starts_with("profile")))
            .map(|p| number(&p["seconds"]))
            .sum();
        let eval = tools.awqc(&[&["eval", text(&out)?], &corpus[..]].concat())?;
        found.insert(
            place.to_owned(),
            json!({ "profile_seconds": profile, "seconds": compiled["seconds"], "perplexity": eval["perplexity"] }),
        );
    }
    drop(std::fs::remove_dir_all(&out));
    let off = (number(&found["cuda"]["perplexity"]) / number(&found["host"]["perplexity"]) - 1.0).abs();
    if off.is_nan() || off > 0.01 {
        bail!("the perplexities differ: {}", Json::Object(found));
    }
    Ok(Json::Object(found))
}

/// A model on the device beside the same artefact on the processor.
pub(super) fn model(tools: &Tools, options: &Options, found: &Map<String, Json>) -> Result<Json> {
    let model = subject(options)?;
    let artefact = if model.join("kernels/plan.json").is_file() {
        model
    } else {
        let out = options.out.join("model");
        let target = target(tools, options, found)?;
        let mut args =
            vec!["compile", text(&model)?, "--target", &target, "--group", "64", "-o", text(&out)?, "--force"];
        // Text cannot be tokenized for a model that is evaluated on ids.
        args.extend(options.ids.is_some().then_some(["--method", "rtn"]).into_iter().flatten());
        tools.awqc(&args)?;
        out
    };
    let artefact = text(&artefact)?;
    let logits = options.out.join("host.logits");
    let logits = text(&logits)?;
    let corpus = match &options.ids {
        Some(ids) => vec!["--ids", text(ids)?],
        None => vec!["--text", TEXT, "--chunks", WINDOWS],
    };
    let eval = |more: &[&str]| tools.awqc(&[&["eval", artefact], &corpus[..], more].concat());
    let host = eval(&["--device", "host", "--save-logits", logits])?;
    let device = eval(&["--base-logits", logits])?;
    let bench = bench(tools, options, artefact)?;
    drop(std::fs::remove_file(logits));
    let (a, b) = (number(&device["perplexity"]), number(&host["perplexity"]));
    let found = json!({ "device": device, "host": host, "bench": bench });
    // The caches of the device hold f16; rounding has no direction.
    let off = (a / b - 1.0).abs();
    if off.is_nan() || off > 0.01 {
        bail!("the perplexity is {a} on the device and {b} on the processor: {found}");
    }
    Ok(found)
}

/// Decoding and prompts for shapes of models with random weights.
pub(super) fn shapes(tools: &Tools, options: &Options, found: &Map<String, Json>) -> Result<Json> {
    let target = target(tools, options, found)?;
    let mut list = Vec::new();
    for config in &options.configs {
        let out = options.out.join("shape");
        let compile = ["compile", text(config)?, "--random-weights", "--method", "rtn", "--target", &target];
        let compiled = tools.awqc(&[&compile[..], &["-o", text(&out)?, "--force"]].concat())?;
        let bench = bench(tools, options, text(&out)?);
        // It takes gigabytes, and is quickly made again.
        drop(std::fs::remove_dir_all(&out));
        list.push(json!({
            "config": config.display().to_string(),
            "parameters": compiled["parameters"],
            "bits_per_weight": compiled["bits_per_weight"],
            "compile_seconds": compiled["seconds"],
            "bench": bench?,
        }));
    }
    Ok(json!({ "list": list }))
}

fn bench(tools: &Tools, options: &Options, artefact: &str) -> Result<Json> {
    let more: Vec<&str> = options.bench.iter().map(String::as_str).collect();
    tools.awqc(&[&["bench", artefact], &more[..]].concat())
}

fn target(tools: &Tools, options: &Options, found: &Map<String, Json>) -> Result<String> {
    Ok(format!("cuda-sm{}", tools.sm(options, found.get("kernels").unwrap_or(&Json::Null))?))
}

fn number(value: &Json) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// A path as an argument.
fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
