//! A mean of bits as a user asks for it: the budget is kept, the bits go where they help, and what cannot be is
//! refused.

use std::path::Path;

use serde_json::Value as Json;

use crate::cli::{awqc, compile, golden, json, path, scratch};

/// Every unit's width, in order, and the mean.
fn allocation(report: &Json) -> (Vec<u64>, f64) {
    let records = report["records"]["allocate"].as_array().expect("an allocation");
    let (model, units) = records.split_last().expect("a record for the model");
    let widths = units.iter().map(|r| r["bits"].as_u64().expect("a width")).collect();
    (widths, model["bits"].as_f64().expect("a mean"))
}

/// Mean bits of the elements of the quantized weights, from the types that `quantize` gave them.
fn mean_of_types(report: &Json) -> f64 {
    let (mut bits, mut elements) = (0.0, 0.0);
    for record in report["records"]["quantize"].as_array().expect("records") {
        let shape = record["from"].as_str().and_then(|t| t.split_once('[')).expect("a shape").1.trim_end_matches(']');
        let n: f64 = shape.split(',').map(|d| d.parse::<f64>().expect("a size")).product();
        let width: f64 = record["to"].as_str().and_then(|t| t.get(1..2)).and_then(|b| b.parse().ok()).expect("a width");
        bits += n * width;
        elements += n;
    }
    bits / elements
}

fn divergence(model: &str, out: &str, ids: &str) -> f64 {
    let eval = json(&["eval", out, "--ids", ids, "--against", model, "--json", "-q"]);
    eval["kl_divergence"].as_f64().expect("a number")
}

#[test]
fn a_fraction_lies_between_its_neighbours() {
    for (name, target) in [("llama", "reference"), ("gpt2", "cpu-native"), ("gemma2", "reference")] {
        let dir = scratch();
        let (model, ids) = (golden(name), golden(&format!("{name}/expected.safetensors")));
        let with = |bits: &str| {
            let out = path(&dir, bits);
            let flags = ["--target", target, "--bits", bits, "--method", "awq-gptq", "--json"];
            let report = json(&compile(&model, &ids, &out, &flags));
            let divergence = divergence(&model, &out, &ids);
            (report, divergence)
        };
        let ((three, at_three), (mixed, at_mixed), (_, at_four)) = (with("3"), with("3.4"), with("4"));
        assert!(three["records"].get("allocate").is_none(), "{name}: nothing is spread at one width");
        let (widths, mean) = allocation(&mixed);
        assert!(mean <= 3.4 && mean > 3.2, "{name}: {mean} from {widths:?}");
        assert!((mean_of_types(&mixed) - mean).abs() < 1e-9, "{name}: {mean} was told, {}", mean_of_types(&mixed));
        assert!(widths.iter().any(|w| *w != widths[0]), "{name}: {widths:?}");
        assert!(at_four < at_mixed && at_mixed < at_three, "{name}: {at_three} {at_mixed} {at_four}");
    }
}

#[test]
fn the_same_mean_mixed_costs_less_and_does_not_depend_on_threads() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let (plain, a, b, narrow) = (path(&dir, "plain"), path(&dir, "a"), path(&dir, "b"), path(&dir, "narrow"));
    json(&compile(&model, &ids, &plain, &["--bits", "3", "--method", "rtn", "--json"]));
    let mixed = |out: &str, threads: &str| {
        let flags = ["--bits", "3", "--mixed", "--method", "rtn", "--json", "--threads", threads];
        json(&compile(&model, &ids, out, &flags))
    };
    let report = mixed(&a, "1");
    assert!(allocation(&report).1 <= 3.0, "{report}");
    let (alike, apart) = (divergence(&model, &plain, &ids), divergence(&model, &a, &ids));
    assert!(apart < 0.9 * alike, "{apart} mixed, {alike} at one width");
    mixed(&b, "3");
    for file in ["module.awqir", "weights.safetensors", "report.json"] {
        let read = |dir: &str| std::fs::read(Path::new(dir).join(file)).expect("a file");
        assert!(read(&a) == read(&b), "{file} depends on the number of threads");
    }
    // Two widths, given by name.
    let report = json(&compile(&model, &ids, &narrow, &["--bits", "3.5", "--mixed=4,3", "--json"]));
    let (widths, mean) = allocation(&report);
    assert!(mean <= 3.5 && widths.iter().all(|w| [3, 4].contains(w)), "{widths:?}");
}

#[test]
fn a_killed_compile_keeps_its_widths() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let (whole, resumed) = (path(&dir, "whole"), path(&dir, "resumed"));
    let flags = ["--bits", "3.25", "--resume"];
    assert_eq!(awqc(&compile(&model, &ids, &whole, &flags)).code, 0);
    // A folder in the place of the second layer's file stops the compile there.
    let work = dir.path().join(".resumed.resume");
    let stop = || {
        std::fs::create_dir_all(work.join("00002.awqir")).expect("a folder");
        assert_ne!(awqc(&compile(&model, &ids, &resumed, &flags)).code, 0);
        std::fs::remove_dir(work.join("00002.awqir")).expect("the folder");
    };
    stop();
    assert!(work.join("00001.awqir").exists() && work.join("widths.json").exists());
    let done = awqc(&compile(&model, &ids, &resumed, &flags));
    assert_eq!(done.code, 0, "{}", done.err);
    for file in ["module.awqir", "weights.safetensors"] {
        let read = |dir: &str| std::fs::read(Path::new(dir).join(file)).expect("a file");
        assert!(read(&whole) == read(&resumed), "{file} differs after the compile went on");
    }
    let allocated = |dir: &str| {
        let text = std::fs::read(Path::new(dir).join("report.json")).expect("a report");
        allocation(&serde_json::from_slice(&text).expect("JSON"))
    };
    assert_eq!(allocated(&whole), allocated(&resumed));
    // A table that does not fit is refused, not misapplied.
    std::fs::remove_dir_all(&resumed).expect("an output");
    stop();
    let kept = work.join("widths.json");
    let mut table: Json = serde_json::from_slice(&std::fs::read(&kept).expect("widths")).expect("JSON");
    table[0][2].as_array_mut().expect("the second layer's widths").push(Json::from(3));
    std::fs::write(&kept, table.to_string()).expect("written");
    let done = awqc(&compile(&model, &ids, &resumed, &flags));
    assert!(done.code == 3 && done.err.contains("groups of them"), "{} {}", done.code, done.err);
}

#[test]
fn what_cannot_be_spread_is_refused_before_work_is_lost() {
    let dir = scratch();
    let (model, ids, out) = (golden("llama"), golden("llama/expected.safetensors"), path(&dir, "out"));
    let refused = |model: &str, ids: &str, more: &[&str], code: i32, words: &[&str]| {
        let done = awqc(&compile(model, ids, &out, more));
        assert_eq!(done.code, code, "{more:?}: {}", done.err);
        words.iter().for_each(|w| assert!(done.err.contains(w), "no `{w}` in: {}", done.err));
        assert!(!Path::new(&out).exists());
    };
    refused(&model, &ids, &["--bits", "3.25", "--target", "hf-awq"], 3, &["hf-awq", "3.25", "one width"]);
    refused(&model, &ids, &["--bits", "5"], 2, &["--bits 5", "--mixed"]);
    refused(&model, &ids, &["--bits", "1.5"], 2, &["1.5", "2 to 8"]);
    refused(&model, &ids, &["--bits", "3", "--mixed=3,5"], 2, &["--mixed=5"]);
    let passes = ["compile", &model, "--passes", "quantize{bits=3.25,group=16}", "--calib-ids", &ids, "-o", &out];
    let done = awqc(&passes);
    assert!(done.code == 2 && done.err.contains("3.25") && done.err.contains("`profile`"), "{}", done.err);
    let (experts, tokens) = (golden("mixtral"), golden("mixtral/expected.safetensors"));
    refused(&experts, &tokens, &["--bits", "3.25"], 3, &["mixtures of experts", "bits=2, 3, 4 or 8"]);
    let kept = path(&dir, "kept");
    assert_eq!(awqc(&compile(&model, &ids, &path(&dir, "first"), &["--save-profile", &kept])).code, 0);
    let done = awqc(&["compile", &model, "--bits", "3.25", "--group", "16", "--profile", &kept, "-o", &out, "-q"]);
    assert!(done.code == 2 && done.err.contains("calibration text") && done.err.contains("--profile"), "{}", done.err);
    // IR text has nobody who allocates.
    let done = awqc(&["opt", &model, "--passes", "quantize{bits=3.25,group=16}"]);
    assert!(done.code == 3 && done.err.contains("no width was allocated"), "{}", done.err);
}
