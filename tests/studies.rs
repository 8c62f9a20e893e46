//! Studies of golden models: where the answer is known without running them, they give it.

use std::fs;

use serde_json::Value as Json;

use crate::cli::{awqc, compile, golden, json, path, scratch};

/// A study of a golden on its own ids.
fn study(name: &str, golden_name: &str, more: &[&str]) -> Json {
    let (model, ids) = (golden(golden_name), golden(&format!("{golden_name}/expected.safetensors")));
    let head = ["study", name, &model, "--ids", &ids, "--calib-ids", &ids, "--group", "16", "--json", "-q"];
    json(&[&head[..], more].concat())
}

/// The perplexities of the rows with these cells.
fn rows<'a>(study: &'a Json, cells: &[(&str, &str)]) -> Vec<&'a Json> {
    let fits = |row: &&Json| {
        cells.iter().all(|(k, v)| row[*k].as_str().map_or_else(|| row[*k].to_string(), str::to_owned) == *v)
    };
    study["rows"].as_array().expect("rows").iter().filter(fits).collect()
}

fn one(study: &Json, cells: &[(&str, &str)], key: &str) -> f64 {
    let found = rows(study, cells);
    assert_eq!(found.len(), 1, "{cells:?} in {study}");
    found[0][key].as_f64().unwrap_or_else(|| panic!("`{key}` is no number in {}", found[0]))
}

#[test]
fn what_is_kept_whole_is_float_and_what_is_not_scaled_is_rounded() {
    for name in ["llama", "gpt2", "mixtral", "deepseek_v2"] {
        let salient = study("salient", name, &["--percent", "10,100", "--seeds", "2"]);
        let float = one(&salient, &[("chosen_by", "float")], "perplexity");
        let none = one(&salient, &[("chosen_by", "nothing kept")], "perplexity");
        assert!((none / float - 1.0).abs() > 1e-3, "{name}: rounding to 3 bits does something");
        for by in ["activation", "weight", "random"] {
            let all = one(&salient, &[("chosen_by", by), ("percent", "100.0")], "ratio");
            assert!((all - 1.0).abs() < 1e-9, "{name}: all kept by {by}: {all}");
            let some = one(&salient, &[("chosen_by", by), ("percent", "10.0")], "perplexity");
            assert!((some - none).abs() > 1e-6 * none, "{name}: keeping by {by} does something");
        }
        let part = |by| one(&salient, &[("chosen_by", by), ("percent", "10.0")], "perplexity");
        assert!(part("activation") != part("weight") && part("weight") != part("random"), "{name}: {salient}");

        let scale = study("scale", name, &["--s", "1,2", "--percent", "10"]);
        assert_eq!(one(&scale, &[("s", "1.0")], "perplexity"), none, "{name}");
        let cells = |s| ["changed_percent", "mean_step_ratio", "mean_error_ratio"].map(|k| one(&scale, &[("s", s)], k));
        assert_eq!(cells("1.0"), [0.0, 1.0, 1.0], "{name}");
        let [changed, step, error] = cells("2.0");
        assert!(changed > 0.0 && changed < 100.0 && step > 1.0 && step < 2.0, "{name}: {scale}");
        assert!((0.5..1.0).contains(&error), "{name}: twice the weight has half the error, or a larger step: {scale}");

        let bits = study("bits", name, &["--bits", "3", "--methods", "rtn"]);
        assert_eq!(one(&bits, &[("method", "rtn")], "perplexity"), none, "{name}");
    }
}

#[test]
fn methods_are_those_that_compile_runs() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let bits = study("bits", "llama", &["--bits", "3"]);
    for (method, pipeline) in
        [("rtn", "quantize{SCHEME}"), ("awq", "profile,awq-scale{bounds=64},awq-clip,quantize{SCHEME}")]
    {
        let out = path(&dir, method);
        let report = json(&compile(&model, &ids, &out, &["--bits", "3", "--passes", pipeline, "--json"]));
        let eval = json(&["eval", &out, "--ids", &ids, "--against", &model, "--json", "-q"]);
        for (key, of) in
            [("perplexity", "perplexity"), ("ratio", "perplexity_ratio"), ("ratio_error", "perplexity_ratio_error")]
        {
            let (a, b) = (one(&bits, &[("method", method)], key), eval[of].as_f64().expect("a number"));
            // Artefacts round norms and scales of channels to the model's own type.
            assert!((a / b - 1.0).abs() < 2e-3, "{method}: {key} {a}, the artefact's {b}");
        }
        assert_eq!(
            one(&bits, &[("method", method)], "bits_per_weight"),
            report["bits_per_weight"].as_f64().expect("bits")
        );
    }
    let published = one(&bits, &[("method", "paper")], "perplexity");
    assert!(published != one(&bits, &[("method", "awq")], "perplexity"));

    // The same statistics by another way, and less of them.
    let calibration = study("calibration", "llama", &["--samples", "1,2", "--methods", "rtn,awq"]);
    let by = |method, windows| one(&calibration, &[("method", method), ("windows", windows)], "perplexity");
    assert_eq!(by("awq", "2"), one(&bits, &[("method", "awq")], "perplexity"));
    assert!(by("awq", "1") != by("awq", "2"));
    assert_eq!(by("rtn", "1"), by("rtn", "2"), "rounding reads no calibration text");
    // More numbers of windows go into the same work folder, and so does another text of the same name.
    let work = path(&dir, "work");
    for samples in ["1", "1,2"] {
        let more = ["--samples", samples, "--methods", "awq", "--work", &work];
        let again = study("calibration", "llama", &more);
        assert_eq!(one(&again, &[("method", "awq"), ("windows", "1")], "perplexity"), by("awq", "1"));
    }
    let other = golden("mixtral/expected.safetensors");
    let more = ["--samples", "1", "--methods", "awq", "--work", &work, "--ids", &ids, "--calib-ids", &other];
    let again = json(&[&["study", "calibration", &model, "--group", "16", "--json", "-q"][..], &more].concat());
    assert_ne!(one(&again, &[("method", "awq"), ("windows", "1")], "perplexity"), by("awq", "1"));
}

#[test]
fn a_study_goes_on_where_it_stopped() {
    let dir = scratch();
    let (work, svg) = (path(&dir, "work"), path(&dir, "plot.svg"));
    let first = study("bits", "llama", &["--bits", "3", "--methods", "rtn", "--work", &work]);
    let file = dir.path().join("work/results.jsonl");
    let lines = fs::read_to_string(&file).expect("results");
    assert_eq!(lines.lines().count(), 2, "float and one method: {lines}");
    // A kept result is taken as it is, and a line that was cut off is measured again.
    let (float, rtn) = lines.split_once('\n').expect("two lines");
    let mut float: Json = serde_json::from_str(float).expect("a result");
    float["value"]["sums"][0] = (float["value"]["sums"][0].as_f64().expect("a sum") + 11.0).into();
    fs::write(&file, format!("{float}\n{}", &rtn[..rtn.len() / 2])).expect("written");
    let again = study("bits", "llama", &["--bits", "3", "--methods", "rtn", "--work", &work, "--svg", &svg]);
    assert_eq!(one(&again, &[("method", "rtn")], "perplexity"), one(&first, &[("method", "rtn")], "perplexity"));
    let (old, new) = [&first, &again].map(|s| one(s, &[("method", "float")], "perplexity")).into();
    assert!((f64::ln(new / old) - 0.5).abs() < 1e-9, "11 nats over 22 targets: {old} {new}");
    assert_eq!(fs::read_to_string(&file).expect("results").lines().count(), 2);
    let plot = fs::read_to_string(&svg).expect("a plot");
    assert!(plot.starts_with("<svg") && plot.trim_end().ends_with("</svg>"), "{plot}");
    for says in ["rtn, group 16", "float: ", "bits a weight", "perplexity"] {
        assert!(plot.contains(says), "`{says}` is not in {plot}");
    }

    let fails = |args: &[&str], code: i32, says: &str| {
        let done = awqc(args);
        assert_eq!(done.code, code, "{args:?}: {}", done.err);
        assert!(done.err.contains(says) && done.out.is_empty(), "{args:?}: `{says}` is not in: {}", done.err);
    };
    let (gpt2, ids) = (golden("gpt2"), golden("gpt2/expected.safetensors"));
    let common = ["--ids", &ids, "--calib-ids", &ids, "-q"];
    fails(
        &[&["study", "bits", &gpt2, "--work", &work][..], &common].concat(),
        4,
        "another study; what differs: files of the model, windows to",
    );
    fails(&[&["study", "bits", &gpt2, "--methods", "worst"][..], &common].concat(), 2, "the methods are rtn");
    fails(
        &[&["study", "bits", &gpt2, "--methods", "best"][..], &common].concat(),
        2,
        "2 calibration windows are too few",
    );
    fails(&[&["study", "salient", &gpt2, "--percent", "101"][..], &common].concat(), 2, "0 to 100");
    fails(&[&["study", "calibration", &gpt2, "--windows", "3"][..], &common].concat(), 2, "2 calibration windows");
    fails(&[&["study", "bits", &gpt2, "--ids", &ids][..], &common].concat(), 2, "two texts are called");
    fails(&["study", "bits", &golden("awq-gemm-llama"), "--ids", &ids, "-q"], 3, "quantized already");
    fails(&["study", "bits", &gpt2], 2, "--text");
    let nowhere = path(&dir, "none/plot.svg");
    fails(&[&["study", "bits", &gpt2, "--svg", &nowhere][..], &common].concat(), 2, "does not exist");
    fails(&[&["study", "bits", &gpt2, "--svg", &path(&dir, "")][..], &common].concat(), 2, "this is a folder");
    fs::write(&file, "{}\n").expect("written");
    let (llama, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    fails(&["study", "bits", &llama, "--ids", &ids, "--calib-ids", &ids, "--work", &work, "-q"], 4, "line 1");
}

#[test]
fn a_compile_tells_the_error_of_every_linear() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let done = awqc(&compile(&model, &ids, &path(&dir, "a"), &["--bits", "3", "--errors"]));
    assert_eq!(done.code, 0, "{}", done.err);
    let report = json(&compile(&model, &ids, &path(&dir, "b"), &["--bits", "3", "--json"]));
    let records = report["records"]["quantize"].as_array().expect("records");
    assert!(records.len() >= 14, "{report}");
    for record in records {
        let error = format!("{:.3}", 100.0 * record["relative_error"].as_f64().expect("an error"));
        let region = record["region"].as_str().expect("a region");
        let line = done
            .out
            .lines()
            .find(|l| l.trim_start().starts_with(region))
            .unwrap_or_else(|| panic!("no {region}: {}", done.out));
        assert!(
            line.contains(&error) && done.out.contains(record["linear"].as_str().expect("a linear")),
            "{}",
            done.out
        );
    }
}
