//! The reference meaning through burn-cuda: burn's own kernels, on a CPU that plays a GPU, or, with `AWQC_GPU=1`, on
//! the machine's device.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use awqc::burn::{self, ProfileOn};
use awqc::cuda::Nvrtc;
use awqc::engine::Engine;
use awqc::exec::{Control, Logits};
use awqc::generate;
use awqc::model::Model;
use awqc::passes::profile::taps;
use awqc::passes::{Afterwards, Executor};
use serde_json::Value as Json;

use crate::cli::Done;
use crate::emulator::{Emulator, on_device};
use crate::models::{Expected, largest_difference};

/// Says to a process that the emulator is its driver.
const INSIDE: &str = "AWQC_EMULATED";

/// A command for which the emulator is the system's driver, unless the machine's device is wanted.
fn beside(emulator: &Emulator, program: &Path) -> Command {
    let mut command = Command::new(program);
    if !on_device() {
        let folder = emulator.folder();
        command.env("LD_LIBRARY_PATH", folder).env("CUDA_PATH", folder).env("AWQC_NVRTC", folder);
    }
    command
}

/// Runs `body` where there is a device: in a process of its own with the emulator, as this test alone.
fn with_device(test: &str, body: impl FnOnce()) {
    if on_device() || std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let emulator = Emulator::emulated([]).with_nvrtc();
    let test = format!("burn::{test}");
    let own = std::env::current_exe().expect("a program");
    let mut command = beside(&emulator, &own);
    let out = command.args([&test, "--exact", "--nocapture"]).env(INSIDE, "1").output().expect("it starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    assert!(text(&out.stdout).contains("1 passed"), "{}", text(&out.stdout));
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn open(name: &str) -> (Model, Expected) {
    let folder = golden(name);
    (Model::open(&folder).unwrap_or_else(|e| panic!("{name}: {e}")), Expected::read(&folder))
}

/// The largest difference, relative to the largest number.
fn error(got: &[f32], want: &[f32]) -> f32 {
    largest_difference(got, want) / want.iter().fold(1e-30f32, |m, v| m.max(v.abs()))
}

/// Compares the logits of a prompt, and those of its tokens one by one.
fn logits(name: &str) {
    let (model, expected) = open(name);
    let ids = expected.text().remove(0);
    let mut cuda = burn::session(&model).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut host = generate::session(&model).unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut forward = |ids: &[i32], which| {
        let got = cuda.forward(ids, which).unwrap_or_else(|e| panic!("{name}: {e}"));
        let want = host.forward(ids, which).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(got.shape, want.shape, "{name}");
        error(&got.data, &want.data)
    };
    let mut worst = forward(&ids, Logits::All);
    for id in &ids[..3] {
        worst = worst.max(forward(&[*id], Logits::Last));
    }
    assert!(worst <= 1e-4, "{name}: logits differ by {worst}");
}

#[test]
fn logits_are_those_of_the_host() {
    with_device("logits_are_those_of_the_host", || ["llama", "gpt2", "gemma2", "mixtral"].into_iter().for_each(logits));
}

/// Compares the statistics of all values that linears read.
fn statistics(name: &str) {
    let (model, expected) = open(name);
    let windows = expected.text();
    let [mut host, mut cuda] = [ProfileOn::Host, ProfileOn::Cuda].map(|place| {
        let exec = place.check().and_then(|_| place.calibrated(Arc::clone(&model.source), Control::new(), &windows));
        exec.unwrap_or_else(|e| panic!("{name}: {e}"))
    });
    let mut worst = 0f32;
    for region in &model.module.regions {
        let taps = taps(region);
        let profile = |exec: &mut dyn Executor| {
            let stats = exec.profile(region, &model.module.fused, &taps, Afterwards::Exit);
            stats.unwrap_or_else(|e| panic!("{name} {}: {e}", region.name))
        };
        let (got, want) = (profile(cuda.as_mut()), profile(host.as_mut()));
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            assert_eq!(got.tokens, want.tokens, "{name} {}", region.name);
            for (got, want) in [
                (&got.gram, &want.gram),
                (&got.mean_abs, &want.mean_abs),
                (&got.max_abs, &want.max_abs),
                (&got.sample, &want.sample),
            ] {
                worst = worst.max(error(got, want));
            }
        }
        let results = region.results().to_vec();
        let evaluate = |exec: &dyn Executor| {
            let values = exec.evaluate(region, &model.module.fused, &results);
            values.unwrap_or_else(|e| panic!("{name} {}: {e}", region.name))
        };
        for (got, want) in evaluate(cuda.as_ref()).iter().zip(&evaluate(host.as_ref())) {
            assert_eq!(got.shape, want.shape);
            worst = worst.max(error(&got.data, &want.data));
        }
    }
    assert!(worst <= 1e-5, "{name}: statistics differ by {worst}");
}

#[test]
fn statistics_are_those_of_the_host() {
    with_device("statistics_are_those_of_the_host", || ["llama", "mixtral"].into_iter().for_each(statistics));
}

fn awqc(emulator: &Emulator, args: &[&str], settings: &[(&str, &str)]) -> Done {
    let mut command = beside(emulator, Path::new(env!("CARGO_BIN_EXE_awqc")));
    Done::of(command.args(args).envs(settings.iter().copied()))
}

#[test]
fn the_program_calibrates_and_runs_on_the_device() {
    let emulator = Emulator::emulated([]).with_nvrtc();
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let model = golden("llama");
    let ids = model.join("expected.safetensors");
    let (model, ids) = (model.to_str().expect("UTF-8"), ids.to_str().expect("UTF-8"));
    let run = |args: &[&str]| awqc(&emulator, args, &[]);
    let mut perplexities = Vec::new();
    for place in ["host", "cuda"] {
        let out = at(place);
        let done = run(&["compile", model, "--calib-ids", ids, "--group", "16", "--profile-on", place, "-o", &out]);
        assert_eq!(done.code, 0, "{}", done.err);
        assert_eq!(done.err.contains("note: calibration runs on the CUDA device: "), place == "cuda", "{}", done.err);
        let report = std::fs::read_to_string(Path::new(&out).join("report.json")).expect("a report");
        let report: Json = serde_json::from_str(&report).expect("JSON");
        assert_eq!(report["calibration"]["profiled_on"], place);
        let eval = |device: &str| {
            let report = run(&["eval", &out, "--ids", ids, "--device", device, "--json", "-q"]).json();
            report["perplexity"].as_f64().expect("a number")
        };
        perplexities.extend([eval("host"), eval("cuda")]);
    }
    // Statistics differ in their last bits, and so may a few codes.
    assert!(perplexities.iter().all(|p| (p / perplexities[0] - 1.0).abs() < 1e-3), "{perplexities:?}");
    assert!((perplexities[1] / perplexities[0] - 1.0).abs() < 1e-5, "{perplexities:?}");
    let bench = run(&["bench", &at("cuda"), "--device", "cuda", "-p", "5", "-n", "2", "-r", "1", "--json"]).json();
    assert_eq!((&bench["act"], &bench["tests"][1]["test"]), (&Json::from("f32"), &Json::from("tg2")), "{bench}");
}

#[test]
fn what_is_missing_is_said_before_any_work() {
    if on_device() {
        return; // There nothing is missing.
    }
    let emulator = Emulator::emulated([]).with_nvrtc();
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (model, out, nowhere) = (golden("llama"), at("out"), at("nowhere"));
    let ids = model.join("expected.safetensors");
    let (model, ids) = (model.to_str().expect("UTF-8"), ids.to_str().expect("UTF-8"));
    let compile = ["compile", model, "--calib-ids", ids, "--group", "16", "--profile-on", "cuda", "-o", &out];
    let eval = ["eval", model, "--ids", ids, "--device", "cuda", "-q"];
    for (setting, code, message) in [
        (("EMULATOR_DEVICES", "0"), 3, "finds no device\nhelp: run it on a machine with an NVIDIA GPU"),
        (
            ("LD_LIBRARY_PATH", nowhere.as_str()),
            3,
            "the CUDA driver (libcuda) was not found\nhelp: run it on a machine",
        ),
        (("CUDA_PATH", &nowhere), 3, "cuda_runtime.h\nhelp: install the CUDA toolkit, or name its folder in CUDA_PATH"),
        // Enough for the embedding and some of the first layer.
        (("EMULATOR_MEGABYTES", "0.2"), 6, "the CUDA device has too little memory: "),
    ] {
        for args in [&compile[..], &eval] {
            let done = awqc(&emulator, args, &[setting]);
            assert_eq!(done.code, code, "{setting:?}: {}", done.err);
            assert!(done.err.contains(message), "{setting:?}: {}", done.err);
            assert!(!done.err.contains("panicked"), "{setting:?}: {}", done.err);
        }
        assert!(!Path::new(&out).exists(), "{setting:?}");
    }
    // A driver without a compiler beside it, unless the machine has one where every program finds it.
    if Nvrtc::open(&[]).is_err() {
        let emulator = Emulator::emulated([]);
        for args in [&compile[..], &eval] {
            let done = awqc(&emulator, args, &[]);
            assert_eq!(done.code, 3, "{}", done.err);
            let message =
                "(libnvrtc), was not found; burn-cuda compiles its kernels with it\nhelp: install the CUDA toolkit";
            assert!(done.err.contains(message), "{}", done.err);
        }
        assert!(!Path::new(&out).exists());
    }
    let done = awqc(&emulator, &[&eval[..], &["--kv", "f16"]].concat(), &[]);
    assert_eq!(done.code, 2, "{}", done.err);
    assert!(done.err.contains("--kv is for models that run on the processor"), "{}", done.err);
}
