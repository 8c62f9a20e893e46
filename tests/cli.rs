//! The program as a user runs it: results on standard output, errors that name file and remedy, exit codes, artefacts
//! that appear whole or not at all, and the same bytes from the same input.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value as Json;

pub(crate) struct Done {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Done {
    /// Runs a command.
    pub(crate) fn of(command: &mut Command) -> Self {
        let Output { status, stdout, stderr } = command.output().expect("the program starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        Self { code: status.code().expect("an exit code"), out: text(stdout), err: text(stderr) }
    }

    /// What a command that ended well says.
    pub(crate) fn json(&self) -> Json {
        assert_eq!(self.code, 0, "{}", self.err);
        serde_json::from_str(&self.out).expect("one JSON object on standard output")
    }
}

pub(crate) fn awqc(args: &[&str]) -> Done {
    Done::of(Command::new(env!("CARGO_BIN_EXE_awqc")).args(args))
}

pub(crate) fn json(args: &[&str]) -> Json {
    awqc(args).json()
}

pub(crate) fn golden(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).to_str().expect("UTF-8").to_owned()
}

pub(crate) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a scratch folder")
}

pub(crate) fn path(dir: &tempfile::TempDir, name: &str) -> String {
    dir.path().join(name).to_str().expect("UTF-8").to_owned()
}

/// Every file below a folder with its contents.
fn contents(dir: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(dir).expect("a folder").flatten().map(|e| e.path()).collect();
    files.sort();
    files.into_iter().map(|p| (p.file_name().expect("a name").into(), fs::read(&p).expect("a file"))).collect()
}

/// A compile of a golden on its own ids: goldens have no tokenizer.
pub(crate) fn compile<'a>(model: &'a str, ids: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["compile", model, "--group", "16", "--calib-ids", ids, "-o", out, "-q"][..], more].concat()
}

#[test]
fn a_compiled_model_runs_and_stays_near_the_original() {
    for name in ["llama", "gpt2", "gemma2", "qwen3", "opt"] {
        let dir = scratch();
        let (model, ids, out) = (golden(name), golden(&format!("{name}/expected.safetensors")), path(&dir, "out"));
        let report = json(&compile(&model, &ids, &out, &["--bits", "8", "--json"]));
        for key in ["artefact", "seconds", "peak_rss_bytes", "bits_per_weight", "sites", "passes"] {
            assert!(report.get(key).is_some(), "{name}: the report misses {key}");
        }
        assert!((9.0..10.0).contains(&report["bits_per_weight"].as_f64().expect("bits")), "{name}: {report}");
        let eval = json(&["eval", &out, "--ids", &ids, "--against", &model, "--json", "-q"]);
        let float = json(&["eval", &model, "--ids", &ids, "--json", "-q"]);
        let (a, b) = (eval["perplexity"].as_f64().expect("a number"), float["perplexity"].as_f64().expect("a number"));
        assert!((a / b - 1.0).abs() < 0.05, "{name}: perplexity {a} against {b}");
        assert!(eval["kl_divergence"].as_f64().expect("a number") < 0.01, "{name}: {eval}");
        assert!(eval["top1_agreement"].as_f64().expect("a number") > 0.8, "{name}: {eval}");
    }
}

#[test]
fn saved_statistics_stand_in_for_a_calibration_run() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let (kept, a, b, c) = (path(&dir, "kept"), path(&dir, "a"), path(&dir, "b"), path(&dir, "c"));
    assert_eq!(awqc(&compile(&model, &ids, &a, &["--bits", "8", "--save-profile", &kept])).code, 0);
    assert_eq!(awqc(&compile(&model, &ids, &b, &["--bits", "3"])).code, 0);
    let replay = ["compile", &model, "--group", "16", "--bits", "3", "--profile", &kept, "-o", &c, "-q"];
    let done = awqc(&replay);
    assert_eq!(done.code, 0, "{}", done.err);
    assert_eq!(contents(&b), contents(&c));

    let other = golden("gpt2");
    let done = awqc(&["compile", &other, "--group", "16", "--profile", &kept, "-o", &path(&dir, "d"), "-q"]);
    assert_eq!(done.code, 4, "{}", done.err);
    assert!(done.err.contains("the statistics of another model"), "{}", done.err);
    let other = ["compile", &model, "--random-weights", "--profile", &kept, "-o", &path(&dir, "other"), "-q"];
    let done = awqc(&other);
    assert_eq!(done.code, 4, "{}", done.err);
    assert!(done.err.contains("the statistics of another model"), "{}", done.err);
    let done = awqc(&compile(&model, &ids, &path(&dir, "e"), &["--save-profile", &kept]));
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains("not empty"), "{}", done.err);
    let done = awqc(&["compile", &model, "--profile", &path(&dir, "none"), "-o", &path(&dir, "f"), "-q"]);
    assert_eq!(done.code, 4, "{}", done.err);
    assert!(done.err.contains("--save-profile"), "{}", done.err);
}

#[test]
fn the_same_input_gives_the_same_bytes_whatever_the_threads() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let (a, b) = (path(&dir, "a"), path(&dir, "b"));
    assert_eq!(awqc(&compile(&model, &ids, &a, &["--threads", "1"])).code, 0);
    assert_eq!(awqc(&compile(&model, &ids, &b, &["--threads", "3"])).code, 0);
    assert_eq!(contents(&a), contents(&b));
}

#[test]
fn an_autoawq_folder_is_written_and_read_back() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let (reference, hf) = (path(&dir, "reference"), path(&dir, "hf"));
    // 16 does not divide the 72 channels of the attention's output, which this format cannot hold …
    let done = awqc(&compile(&model, &ids, &hf, &["--target", "hf-awq"]));
    assert!(done.code == 3 && done.err.contains("o_proj") && !Path::new(&hf).exists(), "{}", done.err);
    // … 8 does.
    for (target, out) in [("reference", &reference), ("hf-awq", &hf)] {
        let done = awqc(&["compile", &model, "--target", target, "--group", "8", "--calib-ids", &ids, "-o", out, "-q"]);
        assert_eq!(done.code, 0, "{}", done.err);
    }
    let config: Json =
        serde_json::from_slice(&fs::read(Path::new(&hf).join("config.json")).expect("a config")).expect("JSON");
    let quantization = &config["quantization_config"];
    assert_eq!((&quantization["quant_method"], &quantization["bits"]), (&"awq".into(), &4.into()));
    assert_eq!((&quantization["group_size"], &quantization["version"]), (&8.into(), &"gemm".into()));
    // The same codes, unfused: the same function, up to the rounding of norms and embedding to f16.
    let eval = json(&["eval", &hf, "--ids", &ids, "--against", &reference, "--json", "-q"]);
    assert!(eval["kl_divergence"].as_f64().expect("a number") < 1e-4, "{eval}");
}

#[test]
fn experts_are_written_to_an_autoawq_folder_one_by_one_and_packed_for_cpus() {
    for name in ["mixtral", "qwen2_moe"] {
        let dir = scratch();
        let (model, ids) = (golden(name), golden(&format!("{name}/expected.safetensors")));
        let (reference, hf, cpu) = (path(&dir, "reference"), path(&dir, "hf"), path(&dir, "cpu"));
        for (target, out) in [("reference", &reference), ("hf-awq", &hf), ("cpu-native", &cpu)] {
            let args = ["compile", &model, "--target", target, "--group", "8", "--calib-ids", &ids];
            let args = [&args[..], &["--head-bits", "16", "-o", out, "-q"]].concat();
            let done = awqc(&args);
            assert_eq!(done.code, 0, "{name}: {}", done.err);
        }
        let apart = |more: &[&str]| {
            let args = ["eval", &cpu, "--ids", &ids, "--against", &reference, "--json", "-q"];
            json(&[&args[..], more].concat())["kl_divergence"].as_f64().expect("a number")
        };
        let (exact, rounded) = (apart(&["--act", "f32"]), apart(&[]));
        assert!(exact < 1e-6, "{name}: the packed experts differ by {exact}");
        assert!(exact < rounded && rounded < 0.3, "{name}: with activations in 8 bits by {rounded}");
        let bytes = fs::read(Path::new(&hf).join("model.safetensors")).expect("tensors");
        let file = safetensors::SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let has = |what: &str| file.names().iter().any(|n| n.contains("experts.3.") && n.ends_with(what));
        assert!(has(".qweight") && !has("weight_scale") && file.names().iter().all(|n| !n.contains("gate.qweight")));
        let eval = json(&["eval", &hf, "--ids", &ids, "--against", &reference, "--json", "-q"]);
        assert!(eval["kl_divergence"].as_f64().expect("a number") < 1e-3, "{name}: {eval}");
    }
}

#[test]
fn a_cpu_target_refuses_what_it_has_no_kernels_for_before_work_is_lost() {
    let dir = scratch();
    let (model, ids, out) = (golden("openflamingo"), golden("llama/expected.safetensors"), path(&dir, "out"));
    let args = ["compile", &model, "--target", "cpu-native", "--group", "8", "--calib-ids", &ids, "-o", &out, "-q"];
    let done = awqc(&args);
    assert_eq!(done.code, 3, "{}", done.err);
    for word in ["images", "reference target"] {
        assert!(done.err.contains(word), "no `{word}` in: {}", done.err);
    }
    assert!(!Path::new(&out).exists());
}

#[test]
fn a_killed_compile_goes_on_where_it_stopped() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let (whole, resumed) = (path(&dir, "whole"), path(&dir, "resumed"));
    assert_eq!(awqc(&compile(&model, &ids, &whole, &[])).code, 0);
    // A pipeline that fails in the head leaves the layers in the work folder …
    let work = dir.path().join(".resumed.resume");
    let first = awqc(&compile(&model, &ids, &resumed, &["--resume"]));
    assert_eq!(first.code, 0, "{}", first.err);
    assert!(!work.exists(), "the work folder goes when the output is complete");
    assert_eq!(contents(&whole), contents(&resumed));
    // … and a work folder of another compile is refused.
    fs::create_dir(&work).expect("a folder");
    fs::write(work.join("fingerprint.json"), "{}").expect("a file");
    let other = awqc(&compile(&model, &ids, &resumed, &["--resume", "--force"]));
    assert_eq!(other.code, 4);
    assert!(other.err.contains("belongs to another compile; what differs: "), "{}", other.err);
    assert_eq!(contents(&whole), contents(&resumed), "a refused compile leaves the output alone");
}

#[test]
fn errors_have_their_code_and_leave_nothing_behind() {
    let dir = scratch();
    let (model, ids, out) = (golden("llama"), golden("llama/expected.safetensors"), path(&dir, "out"));
    let fails = |args: &[&str], code: i32, says: &str| {
        let done = awqc(args);
        assert_eq!(done.code, code, "{args:?}: {}", done.err);
        assert!(done.err.contains(says), "{args:?}: `{says}` is not in: {}", done.err);
        assert!(!done.err.contains("panicked"), "{}", done.err);
        let left: Vec<_> = fs::read_dir(dir.path()).expect("a folder").flatten().map(|e| e.file_name()).collect();
        assert!(left.is_empty(), "{args:?} left {left:?}");
    };
    let passes = |text| ["compile", &model, "--calib-ids", &ids, "-o", &out, "-q", "--passes", text];
    fails(&passes("profile,awq-scal"), 2, "did you mean `awq-scale`");
    fails(&passes("quantize{bitz=4}"), 2, "did you mean `bits`");
    fails(&passes("awq-scale,profile,quantize"), 2, "put `profile` before it");
    fails(&compile(&model, &ids, &out, &["--target", "cuda-sm89", "--nvrtc", "no-such-folder"]), 2, "no-such-folder: ");
    fails(&compile(&model, &ids, &out, &["--threads", "0"]), 2, "a positive number is needed");
    fails(&[&passes("quantize")[..], &["--bits", "3"]].concat(), 2, "quantize{SCHEME}");
    fails(&["compile", "examples/block.awqir", "-o", &out], 4, "no tensors");
    fails(&compile(&golden("llama"), &ids, &golden("llama"), &["--force"]), 2, "is not replaced");
    fails(&compile(&model, &ids, &out, &["--bits", "5"]), 2, "2, 3, 4 or 8");
    fails(&compile(&model, &ids, &out, &["--target", "cuda-sm1"]), 3, "the targets are");
    fails(&["compile", "no-such-model", "-o", &out], 4, "no-such-model");
    fails(&["compile", &model, "-o", &out], 4, "tokenizer");
    fails(&compile(&model, &out, &out, &[]), 4, "out");
    fails(&compile(&golden("awq-gemm-llama"), &ids, &out, &[]), 3, "quantized already");
    fails(&compile(&golden("gpt2"), &ids, &out, &["--target", "hf-awq"]), 3, "c_");
    fails(&["eval", &model, "--ids", &ids, "--max-perplexity", "1.0"], 5, "above 1");
    fails(&["eval", &model], 2, "--text");
    fails(&["no-such-command"], 2, "unrecognized");
}

#[test]
fn an_existing_output_is_kept_unless_told_otherwise() {
    let dir = scratch();
    let (model, ids, out) = (golden("llama"), golden("llama/expected.safetensors"), path(&dir, "out"));
    fs::create_dir(&out).expect("a folder");
    fs::write(Path::new(&out).join("mine.txt"), "precious").expect("a file");
    let done = awqc(&compile(&model, &ids, &out, &[]));
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains("--force"), "{}", done.err);
    assert_eq!(fs::read_to_string(Path::new(&out).join("mine.txt")).expect("still there"), "precious");
    let done = awqc(&compile(&model, &ids, &out, &["--force"]));
    assert_eq!(done.code, 2, "a folder that is no output stays: {}", done.err);
    assert_eq!(fs::read_to_string(Path::new(&out).join("mine.txt")).expect("still there"), "precious");
    fs::remove_file(Path::new(&out).join("mine.txt")).expect("removed");
    assert_eq!(awqc(&compile(&model, &ids, &out, &["--force"])).code, 0);
    let first = contents(&out);
    assert_eq!(awqc(&compile(&model, &ids, &out, &["--force", "--bits", "3"])).code, 0);
    assert_ne!(first, contents(&out));
    // An output around the model would take the model with it.
    let (inside, around) = (path(&dir, "out/m"), path(&dir, "out"));
    fs::create_dir(&inside).expect("a folder");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(Path::new(&model).join(file), Path::new(&inside).join(file)).expect("copied");
    }
    let done = awqc(&compile(&inside, &ids, &around, &["--force"]));
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains("replace the model itself"), "{}", done.err);
    assert!(Path::new(&inside).join("model.safetensors").exists());
}

#[test]
fn two_compiles_of_one_output_do_not_mix() {
    let dir = scratch();
    let (model, ids, out) = (golden("llama"), golden("llama/expected.safetensors"), path(&dir, "out"));
    let alone = path(&dir, "alone");
    assert_eq!(awqc(&compile(&model, &ids, &alone, &[])).code, 0);
    let run = || awqc(&compile(&model, &ids, &out, &[])).code;
    let codes = std::thread::scope(|s| [s.spawn(run), s.spawn(run)].map(|t| t.join().expect("a thread")));
    assert!(codes.contains(&0) && codes.iter().all(|c| matches!(c, 0 | 2)), "{codes:?}");
    assert_eq!(contents(&alone), contents(&out));
    let left: Vec<_> = fs::read_dir(dir.path()).expect("a folder").flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn a_cpu_artefact_runs_on_packed_weights() {
    for name in ["llama", "gemma2", "opt", "gpt2", "qwen3"] {
        let dir = scratch();
        let (model, ids) = (golden(name), golden(&format!("{name}/expected.safetensors")));
        let (packed, rows) = (path(&dir, "packed"), path(&dir, "rows"));
        let done = awqc(&compile(&model, &ids, &packed, &["--target", "cpu-native", "--head-bits", "16"]));
        assert_eq!(done.code, 0, "{name}: {}", done.err);
        assert_eq!(awqc(&compile(&model, &ids, &rows, &[])).code, 0);
        let perplexity = |dir: &str, more: &[&str]| {
            let eval = json(&[&["eval", dir, "--ids", &ids, "--against", &rows, "--json", "-q"], more].concat());
            (eval["perplexity"].as_f64().expect("a number"), eval["kl_divergence"].as_f64().expect("a number"))
        };
        // The same codes: exact activations give the same function, 8-bit ones nearly.
        let (reference, _) = perplexity(&rows, &[]);
        let (exact, kl) = perplexity(&packed, &["--act", "f32"]);
        assert!((exact / reference - 1.0).abs() < 1e-4 && kl < 1e-6, "{name}: {exact} against {reference}, KL {kl}");
        let (rounded, kl) = perplexity(&packed, &["--act", "int8"]);
        assert!(
            (rounded / reference - 1.0).abs() < 0.02 && kl < 0.01,
            "{name}: {rounded} against {reference}, KL {kl}"
        );
    }
    let dir = scratch();
    let (model, ids, out) = (golden("llama"), golden("llama/expected.safetensors"), path(&dir, "out"));
    assert_eq!(awqc(&compile(&model, &ids, &out, &["--target", "cpu-avx512vnni"])).code, 0);
    assert!(fs::read_to_string(dir.path().join("out/module.awqir")).expect("a module").contains("u4g16@r16["));
    let weights = dir.path().join("out/weights.safetensors");
    let mut bytes = fs::read(&weights).expect("weights");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, &bytes).expect("written");
    let done = awqc(&["run", &out, "--prompt", "x"]);
    assert_eq!(done.code, 4, "{}", done.err);
    assert!(done.err.contains("is damaged: its checksum differs"), "{}", done.err);
    bytes[last] ^= 1;
    fs::write(&weights, &bytes).expect("written");
    let bench = json(&["bench", &out, "-p", "8", "-n", "4", "-r", "1", "--json"]);
    assert_eq!(bench["tests"][1]["test"], "tg4", "{bench}");
    for (act, kv) in [("f32", "f32"), ("int8", "f16")] {
        let found = json(&["eval", &out, "--ids", &ids, "--isa", "scalar", "--act", act, "--json", "-q"]);
        assert_eq!((&found["isa"], &found["act"], &found["kv"]), (&"scalar".into(), &act.into(), &kv.into()));
    }
    let done = awqc(&["eval", &out, "--ids", &ids, "--ctx", "3"]);
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains("there is room for 3"), "{}", done.err);
    // Nothing is begun that cannot be done.
    for (more, code, says) in [
        (&["bench", &out, "-p", "0", "-n", "0"][..], 2, "measure nothing"),
        (&["bench", &out, "--isa", "scalar", "--act", "bf16"], 2, "made with amx, not with scalar"),
        (&["bench", "kernels", "--isa", "scalar", "--act", "bf16"], 2, "made with amx, not with scalar"),
        (&["bench", "kernels", "-p", "5"], 2, "--prompt is for models"),
        (&["bench", "kernels", "--kv", "f16"], 2, "--kv is for models"),
        (&["eval", &out, "--ids", &ids, "--ctx", "4611686018427387904"], 6, "there is no memory for the keys"),
    ] {
        let done = awqc(more);
        assert_eq!(done.code, code, "{}", done.err);
        assert!(done.err.contains(says), "{}", done.err);
    }
    // What is asked of kernels that do not run the model is no wish to pass over.
    let done = awqc(&["eval", &model, "--ids", &ids, "--act", "f32"]);
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains("--act is for models with packed weights"), "{}", done.err);
}

#[test]
fn later_layers_can_see_the_errors_of_earlier_ones() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let make = |n: &str, profile: &str, more: &[&str]| {
        let passes = format!("{profile},quantize{{SCHEME,method=gptq}}");
        let flags = [&["--bits", "3", "--target", "reference", "--passes", &passes], more].concat();
        awqc(&compile(&model, &ids, &path(&dir, n), &flags))
    };
    for (name, profile) in [("float", "profile"), ("seen", "profile{propagate}")] {
        let done = make(name, profile, &[]);
        assert_eq!(done.code, 0, "{}", done.err);
    }
    assert_ne!(contents(&path(&dir, "float")), contents(&path(&dir, "seen")));
    let statistics = path(&dir, "statistics");
    let out = path(&dir, "kept");
    let saving = make("kept", "profile{propagate}", &["--save-profile", &statistics]);
    let passes = "profile{propagate},quantize{SCHEME}";
    let loading = awqc(&["compile", &model, "--passes", passes, "--profile", &statistics, "-o", &out]);
    for (done, flag) in [(saving, "--save-profile"), (loading, "--profile")] {
        assert!(done.code == 2 && done.err.contains(&format!("leave out {flag}")), "{}", done.err);
        assert!(!Path::new(&out).exists() && !Path::new(&statistics).exists());
    }
}

#[test]
fn errors_are_compensated_for_every_target() {
    const GPTQ: &str = "profile,quantize{SCHEME,method=gptq},fuse-qkv,fuse-gate-up,fuse-norm,dce";
    for name in ["llama", "gpt2"] {
        let dir = scratch();
        let (model, ids) = (golden(name), golden(&format!("{name}/expected.safetensors")));
        let out = |n: &str| path(&dir, n);
        let make = |n: &str, pipeline: &str, target: &str| {
            let flags = ["--bits", "3", "--passes", pipeline, "--target", target, "--resume"];
            let done = awqc(&compile(&model, &ids, &out(n), &flags));
            assert_eq!(done.code, 0, "{name}: {}", done.err);
        };
        let loss = |n: &str, against: &str, more: &[&str]| {
            let dir = out(n);
            let eval = [&["eval", &dir, "--ids", &ids, "--against", against, "--json", "-q"], more].concat();
            json(&eval)["kl_divergence"].as_f64().expect("a number")
        };
        make("rounded", "quantize{SCHEME}", "reference");
        make("reference", GPTQ, "reference");
        let (rounded, compensated) = (loss("rounded", &model, &[]), loss("reference", &model, &[]));
        assert!(compensated < rounded, "{name}: {compensated}, by rounding {rounded}");
        // The same codes in the kernels' layouts.
        make("cpu", &format!("{GPTQ},pack{{layout=r16}}"), "cpu-native");
        let kl = loss("cpu", &out("reference"), &["--act", "f32"]);
        assert!(kl < 1e-6, "{name}: {kl}");
        make("cuda", &format!("{GPTQ},pack{{layout=mma16}}"), "cuda-sm89");
    }
    // Each method is a pipeline of the target's own.
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let pipeline = |method: &str| {
        let out = path(&dir, method);
        json(&compile(&model, &ids, &out, &["--method", method, "--json"]))["pipeline"].to_string()
    };
    let expected = [
        ("rtn", [false, false, false]),
        ("awq", [true, true, false]),
        ("gptq", [true, false, true]),
        ("awq-gptq", [true, true, true]),
    ];
    for (method, expected) in expected {
        let pipeline = pipeline(method);
        let found = ["profile", "awq-scale{bounds=64},awq-clip,", "method=gptq"].map(|part| pipeline.contains(part));
        assert_eq!(found, expected, "{method}: {pipeline}");
    }
    let done = awqc(&compile(&model, &ids, &path(&dir, "x"), &["--method", "gptq", "--passes", "quantize"]));
    assert_eq!(done.code, 2, "{}", done.err);
}

#[test]
fn damaged_checkpoints_are_named() {
    let dir = scratch();
    let broken = dir.path().join("broken");
    fs::create_dir(&broken).expect("a folder");
    let source = golden("llama");
    fs::copy(Path::new(&source).join("config.json"), broken.join("config.json")).expect("copied");
    let weights = fs::read(Path::new(&source).join("model.safetensors")).expect("weights");
    let verify = |expect: &str| {
        let done = awqc(&["verify", broken.to_str().expect("UTF-8")]);
        assert_eq!(done.code, 4, "{}", done.err);
        assert!(done.err.contains(expect), "`{expect}` is not in: {}", done.err);
    };
    fs::write(broken.join("model.safetensors"), &weights[..weights.len() - 100]).expect("written");
    verify("model.safetensors");
    fs::write(broken.join("model.safetensors"), &weights).expect("written");
    let config = fs::read_to_string(broken.join("config.json")).expect("a config");
    fs::write(broken.join("config.json"), config.replace("\"intermediate_size\": 80", "\"intermediate_size\": 96"))
        .expect("written");
    verify("mlp.");
    fs::write(broken.join("config.json"), config.replace("LlamaForCausalLM", "NovelForCausalLM")).expect("written");
    assert_eq!(awqc(&["verify", broken.to_str().expect("UTF-8")]).code, 3);
}

#[test]
fn graphs_print_as_text_dot_and_json_and_compare() {
    let model = golden("llama");
    let text = awqc(&["dump", &model]);
    assert!(text.out.starts_with("awqir 1\n") && text.out.contains("layer @0..1 "), "{}", text.out);
    let dir = scratch();
    let file = path(&dir, "model.awqir");
    fs::write(&file, &text.out).expect("written");
    assert_eq!(awqc(&["dump", &file]).out, text.out, "what is printed reads back");
    assert_eq!(awqc(&["verify", &file]).code, 0);
    assert!(awqc(&["dump", &model, "--region", "@1", "--format", "dot"]).out.contains("digraph"));
    let done = awqc(&["dump", &model, "--region", "@9"]);
    assert!(done.code == 2 && done.err.contains("@head"), "{}", done.err);
    let parsed: Json = serde_json::from_str(&awqc(&["dump", &model, "--format", "json"]).out).expect("JSON");
    assert!(parsed.is_object());
    let same = json(&["diff", &model, &file, "--json"]);
    assert_eq!(same["same"], true);
    let fused = awqc(&["opt", &file, "--passes", "fuse-qkv,fuse-rope", "--check-each"]);
    assert!(fused.out.contains("fused @rope_qkv"), "{}{}", fused.out, fused.err);
}

#[test]
fn explain_says_what_was_done_and_what_was_not() {
    let done = awqc(&["explain", &golden("llama"), "--pass", "fuse-rope"]);
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.out.contains("@0") && done.out.contains("applied"), "{}", done.out);
    let done = awqc(&["explain", &golden("opt"), "--pass", "fuse-swiglu"]);
    assert!(done.out.contains("missed") || done.out.contains("nothing"), "{}", done.out);
}

#[test]
fn rules_come_from_a_file_without_rust() {
    let dir = scratch();
    let rules = path(&dir, "my.awqrw");
    fs::write(
        &rules,
        "rewrite \"attention_out\" {\n  match   { %a = sdpa %q, %k, %v\n            %o = linear %a, $w }\n  \
         produce { %o = fused @attention_out(%q, %k, %v, $w) }\n}\n",
    )
    .expect("written");
    let done = awqc(&["opt", &golden("qwen2"), "--rewrites", &rules, "--passes", "rewrites", "--check-each"]);
    assert_eq!(done.code, 0, "{}", done.err);
    assert!(done.out.contains("fused @attention_out"), "{}", done.out);
}

#[test]
fn listings_name_what_there_is() {
    for (args, expect) in [
        (["passes", "--json"], "awq-scale"),
        (["targets", "--json"], "hf-awq"),
        (["archs", "--json"], "LlamaForCausalLM"),
    ] {
        assert!(json(&args).to_string().contains(expect), "{args:?}");
        assert!(awqc(&args[..1]).out.contains(expect), "{args:?}");
    }
}

#[test]
fn examples_run_and_the_documentation_shows_them() {
    let example = |name: &str, args: &[&str]| {
        let all = [&["run", "--quiet", "--example", name, "--"], args].concat();
        let out =
            Command::new(env!("CARGO")).args(all).current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("cargo runs");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("UTF-8")
    };
    let own = example("custom_fusion", &["opt", &golden("qwen2"), "--passes", "fuse-attention-out", "--check-each"]);
    assert!(own.contains("fused @attention_out"), "{own}");
    let facts = example("inspect_ir", &["examples/block.awqir"]);
    assert!(facts.contains("linear") && facts.contains("free scales: ln1 -> q, k, v (48 free)"), "{facts}");

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/write-a-pass.md")).expect("the page");
    let code = fs::read_to_string(root.join("examples/custom_fusion.rs")).expect("the example");
    assert!(page.contains(code.trim()), "docs/write-a-pass.md does not show examples/custom_fusion.rs as it is");
}
