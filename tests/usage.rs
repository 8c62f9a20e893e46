//! What the program answers to whoever asks for less, more or something else than there is: true, and with a way on.

use std::fs;

use serde_json::Value as Json;

use crate::cli::{Done, awqc, compile, golden, json, path, scratch};
use crate::images::ready;

#[test]
fn explain_tells_what_passes_do_that_change_no_number() {
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let explain = |more: &[&str]| {
        let done = awqc(&[&["explain", &model, "--calib-ids", &ids, "-q"][..], more].concat());
        assert_eq!(done.code, 0, "{}", done.err);
        done.out
    };
    let profile = explain(&["--pass", "profile"]);
    assert!(profile.starts_with("@0       applied  %h1: 24 tokens, 48 channels, magnitudes up to "), "{profile}");
    for (target, says) in [("reference", "@1       applied  4 weights packed as r16\n"), ("cuda-sm89", "as mma16\n")] {
        let pack = explain(&["--pass", "pack", "--target", target]);
        assert!(pack.contains(says), "{target}: {pack}");
    }
    assert!(
        explain(&["--pass", "pack", "--target", "cpu-native"]).contains("@head    applied  1 weight packed as r16")
    );
    assert_eq!(explain(&["--pass", "dce"]), "dce found nothing to do\n");

    let dir = scratch();
    let file = path(&dir, "dead.awqir");
    let text = awqc(&["dump", &model]).out;
    let (before, layer) = text.split_once("layer @0..1 ").expect("layers");
    let layer = layer.replacen("  return", "  %dead = silu %x : bf16[B,S,48]\n  return", 1);
    fs::write(&file, format!("{before}layer @0..1 {layer}")).expect("written");
    let done = awqc(&["explain", &file, "--pass", "dce"]);
    assert!(done.out.contains("@1       applied  1 op removed that nothing uses\n"), "{}{}", done.out, done.err);
}

#[test]
fn wrong_uses_are_answered_with_what_is_possible() {
    let dir = scratch();
    let (model, ids, out) = (golden("llama"), golden("llama/expected.safetensors"), path(&dir, "out"));
    let (quantized, gguf) = (golden("awq-gemm-llama"), path(&dir, "model.gguf"));
    fs::write(&gguf, b"GGUF").expect("written");
    let fails = |args: &[&str], code: i32, says: &str| {
        let done = awqc(args);
        assert_eq!(done.code, code, "{args:?}: {}", done.err);
        assert!(done.err.contains(says) && done.out.is_empty(), "{args:?}: `{says}` is not in: {}", done.err);
    };
    fails(&["explain", &model, "--passes", "dce", "--pass", "pack"], 2, "--passes do not run `pack`");
    fails(&["explain", &model, "--pass", "profile"], 4, "`awqc compile --method rtn`");
    fails(&["opt", &model, "--passes", "dce,rewrites"], 2, "--rewrites FILE");
    fails(&["explain", &model, "--pass", "rewrites"], 2, "--rewrites FILE");
    fails(&["compile", &gguf, "--random-weights", "-o", &out], 2, "model.gguf: --random-weights takes a config.json");
    fails(&compile(&model, &ids, &out, &["--bits", "5"]), 2, "a mean between 2 and 8");
    fails(&compile(&model, &ids, &out, &["--nvrtc", "."]), 2, "--nvrtc is for CUDA targets, `reference` is none");
    fails(&["study", "bits", &quantized, "--ids", &ids, "-q"], 3, "help: a study rounds float weights itself");
    for command in [&["eval"][..], &["study", "bits"], &["study", "calibration", "--calib-ids", &ids]] {
        fails(&[command, &[&model]].concat(), 2, "<--text <FILE>|--ids <FILE>>");
    }
    for (flag, value) in [("--temperature", "nan"), ("--temperature", "-1"), ("--top-p", "0"), ("--top-p", "5")] {
        fails(&["run", &model, "--prompt", "x", flag, value], 2, "is needed");
    }
    fails(&["eval", &model, "--ids", &ids, "--max-perplexity", "nan"], 2, "a number of 1 or more is needed");
    let binary = format!("{model}/model.safetensors");
    fails(&["eval", &model, "--text", &binary], 4, "model.safetensors is not a text in UTF-8");
    let study = ["study", "calibration", &model, "--ids", &ids];
    fails(&study, 2, "<--calib <FILE|builtin|self>|--calib-ids <FILE>>");
}

#[test]
fn what_is_done_otherwise_than_one_may_think_is_said() {
    let dir = scratch();
    let (model, ids, out) = (golden("llama"), golden("llama/expected.safetensors"), path(&dir, "out"));
    let own = ["--target", "cpu-native", "--passes", "quantize{SCHEME}", "--group", "16", "--calib-ids", &ids];
    let done = awqc(&[&["compile", &model, "-o", &out][..], &own].concat());
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.err.contains("note: the pipeline has no `pack`"), "{}", done.err);
    let bench = json(&["bench", &model, "-p", "4", "-n", "1", "-r", "1", "--json"]);
    assert_eq!(bench["act"], "f32", "no weight is packed: {bench}");

    let rounded = path(&dir, "rounded");
    let done = awqc(&["compile", &model, "--method", "rtn", "--group", "16", "--calib", "no-such.txt", "-o", &rounded]);
    assert!(done.code == 0 && done.err.contains("so no calibration text is read"), "{}", done.err);

    let text = path(&dir, "llama.awqir");
    fs::write(&text, awqc(&["dump", &model]).out).expect("written");
    let opt = |file: &str| awqc(&["opt", file, "--passes", "canonicalize,fuse-qkv", "--check-each"]);
    assert!(opt(&text).err.contains("llama.awqir is text without weights: passes are checked on made-up ones"));
    assert_eq!(opt(&model).err, "");
    assert!(awqc(&["passes"]).out.contains("`rewrites`, with --rewrites FILE"));
}

#[test]
fn numbers_are_written_for_people() {
    let dir = scratch();
    let (model, ids, out) = (golden("llama"), golden("llama/expected.safetensors"), path(&dir, "out"));
    let done = awqc(&compile(&model, &ids, &out, &["--stats", "--check-each"]));
    assert!(done.out.contains(": 41472 of 50144 weights in "), "{}{}", done.out, done.err);
    assert!(done.err.contains("          14  quantize: weights\n"), "{}", done.err);
    let measured = done.err.lines().find(|l| l.ends_with("quantize: largest relative deviation"));
    let value = measured.and_then(|l| l.split_whitespace().next()).expect("a measurement");
    assert!(value.len() == "1.234e-1".len() && value.parse::<f64>().is_ok(), "{value}");
    let eval = awqc(&["eval", &out, "--ids", &ids, "--chunks", "1", "-q"]);
    assert!(eval.out.contains(" over 11 tokens in 1 window\n"), "{}", eval.out);
    for args in [&["passes"][..], &["passes", "--markdown"]] {
        assert!(!awqc(args).out.contains("null"), "{args:?}: an option without a default has none");
    }
}

#[test]
fn single_products_as_csv_are_one_table() {
    let kernels = ["bench", "kernels", "--shapes", "32x128", "--tokens", "1", "--isa", "scalar", "--output", "csv"];
    let done = awqc(&kernels);
    assert_eq!(done.code, 0, "{}", done.err);
    let columns: Vec<usize> = done.out.lines().map(|l| l.split(',').count()).collect();
    assert_eq!(columns, [9, 9], "{}", done.out);
}

#[test]
fn a_model_without_a_tokenizer_continues_token_ids() {
    let model = golden("llama");
    let run = |model: &str, more: &[&str]| {
        awqc(&[&["run", model, "--prompt-ids", "5,6,7", "--max-tokens", "4"], more].concat())
    };
    let read = |done: Done| serde_json::from_str::<Json>(&done.out).unwrap_or_else(|e| panic!("{e}: {}", done.err));
    let answer = read(run(&model, &["--json"]));
    assert!(answer["prompt"].is_null() && answer["text"].is_null(), "{answer}");
    assert_eq!(answer["prompt_ids"], serde_json::json!([5, 6, 7]));
    let ids: Vec<String> = answer["ids"].as_array().expect("ids").iter().map(ToString::to_string).collect();
    assert_eq!(ids.len(), 4);
    let done = run(&model, &[]);
    assert_eq!((done.code, done.out, done.err.as_str()), (0, format!("{}\n", ids.join(" ")), ""));

    // With a tokenizer, what comes of ids is a text.
    let dir = scratch();
    let (reads, _) = ready(&dir, "llama");
    let by_ids = read(run(&reads, &["--json"]));
    let by_text = json(&["run", &reads, "--prompt", "w5 w6 w7", "--max-tokens", "4", "--json"]);
    assert_eq!((&by_ids["text"], &by_ids["ids"]), (&by_text["text"], &answer["ids"]));
    assert!(by_ids["text"].is_string(), "{by_ids}");

    for more in [&["--prompt", "w5"][..], &["--chat"], &["--image", "a.png"]] {
        assert_eq!(run(&reads, more).code, 2, "{more:?}");
    }
    let done = awqc(&["run", &model]);
    assert!(done.code == 2 && done.err.contains("--prompt <PROMPT>|--prompt-ids <ID,…>"), "{}", done.err);
    let done = awqc(&["run", &model, "--prompt", "w5"]);
    assert!(done.code == 4 && done.err.contains("or give token ids with --prompt-ids"), "{}", done.err);
}

#[test]
fn a_text_longer_than_the_model_was_made_for_is_warned_of() {
    // The configuration's own number, what a scaling makes of it, and none.
    let models =
        [("llama", Some(64)), ("gpt2", Some(64)), ("llava", Some(64)), ("llama-linear", Some(128)), ("bloom", None)];
    for (name, positions) in models {
        let model = golden(name);
        for new in [8, 70, 130] {
            let done = awqc(&["run", &model, "--prompt-ids", "5", "--max-tokens", &new.to_string()]);
            let warning = positions.filter(|p| new + 1 > *p).map_or_else(String::new, |p| {
                format!("warning: 1 token of prompt and up to {new} new ones are more than the {p} positions")
            });
            assert!(done.err.starts_with(&warning), "{name}: {}", done.err);
            assert_eq!(done.err.matches("warning").count(), usize::from(!warning.is_empty()), "{name}: {}", done.err);
        }
    }
}
