//! Tuning as a user runs it: nearer to the float model, in every format, and refused where it cannot work.

use serde_json::Value as Json;

use crate::cli::{awqc, golden, json, path, scratch};

/// What is tuned.
const CODES: &str = "canonicalize,dce,profile,awq-scale,awq-clip,quantize{SCHEME,method=gptq}";
/// Goldens have two windows of 24 tokens to calibrate on: too few to judge by others, enough to be fitted.
const TUNE: &str = "tune{steps=30,batch=1,rate=0.003,held-out=0}";

/// Compiles a golden to 3 bits; the report.
fn compile(name: &str, out: &str, target: &str, passes: &str) -> Json {
    let (model, ids) = (golden(name), golden(&format!("{name}/expected.safetensors")));
    let flags = ["compile", &model, "--target", target, "--bits", "3", "--group", "16", "--calib-ids", &ids];
    json(&[&flags[..], &["--passes", passes, "-o", out, "-q", "--json"]].concat())
}

/// KL divergence of a model from another on a golden's tokens, with float activations.
fn divergence(name: &str, out: &str, from: &str, more: &[&str]) -> f64 {
    let ids = golden(&format!("{name}/expected.safetensors"));
    let flags = ["eval", out, "--ids", &ids, "--against", from, "--json", "-q"];
    json(&[&flags[..], more].concat())["kl_divergence"].as_f64().expect("a number")
}

#[test]
fn a_tuned_model_is_nearer_to_the_float_model_and_packs_like_any_other() {
    for name in ["llama", "gpt2", "opt", "gemma2", "bloom", "phi", "mixtral", "deepseek_v2"] {
        let dir = scratch();
        let (plain, tuned, packed) = (path(&dir, "plain"), path(&dir, "tuned"), path(&dir, "packed"));
        compile(name, &plain, "reference", CODES);
        let report = compile(name, &tuned, "reference", &format!("{CODES},{TUNE}"));
        let tune = &report["records"]["tune"][0];
        assert_eq!((tune["kept"].as_bool(), tune["divergence"].as_array().map(Vec::len)), (Some(true), Some(30)));
        let float = golden(name);
        let (before, after) = (divergence(name, &plain, &float, &[]), divergence(name, &tuned, &float, &[]));
        assert!(after < 0.5 * before, "{name}: {before} before, {after} after");
        // The scales went with the codes through fusion and packing.
        let fused = "fuse-qkv,fuse-gate-up,fuse-norm,fuse-rope,dce,pack{layout=r16}";
        compile(name, &packed, "cpu-native", &format!("{CODES},{TUNE},{fused}"));
        let apart = divergence(name, &packed, &tuned, &["--act", "f32"]);
        assert!(apart < 1e-5, "{name}: packed and reference differ by {apart}");
    }
}

#[test]
fn fewer_bits_are_tuned_faster_unless_a_rate_is_given() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let rate = |bits: &str, tune: &str| {
        let passes = format!("quantize{{SCHEME}},{tune}");
        let flags = ["compile", &model, "--group", "16", "--calib-ids", &ids, "--force", "-q", "--json"];
        let report = json(&[&flags[..], &["--bits", bits, "--passes", &passes, "-o", &path(&dir, "out")]].concat());
        report["records"]["tune"][0]["rate"].as_f64().expect("a rate")
    };
    let rates = ["4", "3", "2"].map(|bits| rate(bits, "tune{steps=1,held-out=0}"));
    assert_eq!(rates, [0.001, 0.001, 0.002]);
    assert_eq!(rate("2", "tune{steps=1,held-out=0,rate=0.005}"), 0.005);
}

#[test]
fn what_does_not_help_on_other_windows_is_not_kept() {
    let dir = scratch();
    let (plain, tuned) = (path(&dir, "plain"), path(&dir, "tuned"));
    compile("llama", &plain, "reference", CODES);
    // One window of random tokens says nothing of another.
    let passes = format!("{CODES},tune{{steps=30,batch=1,rate=0.01,held-out=1}}");
    let report = compile("llama", &tuned, "reference", &passes);
    let tune = &report["records"]["tune"][0];
    assert_eq!(tune["kept"].as_bool(), Some(false), "{tune}");
    assert!(tune["held_out_after"].as_f64() > tune["held_out_before"].as_f64(), "{tune}");
    assert!(report["remarks"].to_string().contains("nothing is moved"), "{}", report["remarks"]);
    assert_eq!(divergence("llama", &tuned, &plain, &[]), 0.0);
}

#[test]
fn tuning_is_refused_before_work_is_lost() {
    let dir = scratch();
    let (model, ids, out) = (golden("llama"), golden("llama/expected.safetensors"), path(&dir, "out"));
    let refused = |more: &[&str], code: i32, words: &[&str]| {
        let flags = ["compile", &model, "-o", &out, "-q"];
        let done = awqc(&[&flags[..], more].concat());
        assert_eq!(done.code, code, "{}", done.err);
        words.iter().for_each(|w| assert!(done.err.contains(w), "no `{w}` in: {}", done.err));
        assert!(!std::path::Path::new(&out).exists());
    };
    let ids = ["--calib-ids", &ids];
    let with = |more: &[&'static str]| [&ids[..], more].concat();
    refused(&with(&["--quality", "best"]), 2, &["2 calibration windows", "--samples"]);
    refused(&with(&["--passes", "quantize,tune{held-out=0},tune"]), 2, &["once"]);
    refused(&with(&["--passes", "quantize,tune{rate=2}"]), 2, &["rate=2"]);
    let kept = path(&dir, "kept");
    let first = ["compile", &model, "--group", "16", "-q", "-o", &path(&dir, "first"), "--save-profile", &kept];
    assert_eq!(awqc(&[&first[..], &ids].concat()).code, 0);
    refused(&["--profile", &kept, "--quality", "best"], 2, &["calibration text", "--profile"]);
}
