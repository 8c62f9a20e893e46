//! What measures on a device, from the command line, on a CPU that plays a GPU: kernels are compiled when they are
//! wanted.

use std::path::Path;
use std::process::Command;

use serde_json::Value as Json;

use crate::cli::Done;
use crate::emulator::Emulator;

/// Runs the program with the emulator as the system's driver and compiler.
fn awqc(emulator: &Emulator, args: &[&str], settings: &[(&str, &str)]) -> Done {
    let mut command = Command::new(env!("CARGO_BIN_EXE_awqc"));
    command.env("LD_LIBRARY_PATH", emulator.folder()).env("AWQC_NVRTC", emulator.folder());
    Done::of(command.args(args).envs(settings.iter().copied()))
}

#[test]
fn products_are_measured_on_a_device() {
    let emulator = Emulator::emulated([]).with_nvrtc();
    let bench = ["bench", "kernels", "--device", "cuda", "--repeats", "1"];
    let run = |more: &[&str], settings: &[(&str, &str)]| awqc(&emulator, &[&bench[..], more].concat(), settings);
    let small = ["--shapes", "40x132,16x256", "--tokens", "1,9"];
    let report = run(&[&small[..], &["--bits", "4,3", "--json"]].concat(), &[]).json();
    assert_eq!(report["device"], "a CPU that plays a GPU");
    assert!(report["copy_gigabytes_per_second"].as_f64().is_some_and(|r| r > 0.0), "{report}");
    let products = report["products"].as_array().expect("products");
    assert_eq!(products.len(), 8);
    for product in products {
        let number = |key: &str| product[key].as_f64().expect("a number");
        assert!(number("error") < 1e-5 && number("microseconds") > 0.0, "{product}");
        // The clock says one millisecond, whatever was measured.
        let (rows, cols, tokens) = (number("rows"), number("cols"), number("tokens"));
        assert!((number("teraops") - 2e-9 * rows * cols * tokens).abs() < 1e-9, "{product}");
    }
    assert_eq!((&products[0]["type"], &products[4]["type"]), (&Json::from("u4g128"), &Json::from("u3g128")));
    let csv = run(&[&small[..2], &["--tokens", "1", "--bits", "2", "--output", "csv"]].concat(), &[]);
    assert_eq!(csv.out.lines().count(), 3, "{}{}", csv.out, csv.err);
    assert!(
        csv.out.starts_with("type,rows,cols,tokens,µs,GB/s,% of copy,TFLOP/s,error\nu2g128,40,132,1,"),
        "{}",
        csv.out
    );

    for (more, settings, code, message) in [
        (&small[..], &[("EMULATOR_DEVICES", "0")][..], 3, "finds no device\nhelp: run it on a machine"),
        (&small, &[("EMULATOR_SM", "75")], 3, "no kernels for sm_75"),
        (&small, &[("EMULATOR_MEGABYTES", "10")], 6, "bytes of device memory"),
        (&["--shapes", "16x130"], &[], 3, "a multiple of 4 columns"),
        (&["--shapes", "16"], &[], 2, "ROWSxCOLS is needed"),
        (&["--shapes", "0x4"], &[], 2, "weights are needed"),
        (&["--tokens", "0"], &[], 2, "from 1 to 4096"),
        (&["--bits", "5"], &[], 2, "2, 3, 4 or 8"),
    ] {
        let done = run(more, settings);
        assert_eq!(done.code, code, "{more:?} {settings:?}: {}", done.err);
        assert!(done.err.contains(message), "{more:?}: {}", done.err);
    }
}

#[test]
fn random_weights_run_everywhere() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama");
    let ids = golden.join("expected.safetensors");
    let ids = ids.to_str().expect("UTF-8");
    let config = golden.join("config.json");
    let config = config.to_str().expect("UTF-8");
    let emulator = Emulator::emulated([]).with_nvrtc();
    let run = |args: &[&str]| awqc(&emulator, args, &[]);
    let perplexity = |out: &str| {
        let report = run(&["eval", out, "--ids", ids, "--json", "-q"]).json();
        report["perplexity"].as_f64().expect("a number")
    };
    let mut seen = Vec::new();
    for target in ["reference", "cpu-native", "cuda-sm89"] {
        let out = at(target);
        let compile =
            ["compile", config, "--random-weights=3", "--method", "rtn", "--group", "16", "--head-bits", "16"];
        let done = run(&[&compile[..], &["--target", target, "-o", &out, "--json"]].concat());
        assert_eq!(done.json()["random_weights"], 3);
        assert!(done.err.contains("the weights are random (seed 3)"), "{}", done.err);
        seen.push(perplexity(&out));
        if target != "reference" {
            let bench = run(&["bench", &out, "-p", "9", "-n", "2", "-r", "1", "--json"]).json();
            assert_eq!(bench["tests"][1]["test"], "tg2", "{bench}");
        }
    }
    // Of 160 tokens, none is likelier than the others.
    assert!((100.0..260.0).contains(&seen[0]), "{seen:?}");
    assert!(seen.iter().all(|p| (p / seen[0] - 1.0).abs() < 0.01), "{seen:?}");
    // A folder with nothing but a configuration is no model otherwise.
    std::fs::copy(config, dir.path().join("config.json")).expect("a copy");
    let done = run(&["compile", dir.path().to_str().expect("UTF-8"), "-o", &at("none")]);
    assert_eq!(done.code, 4, "{}", done.err);
    assert!(done.err.contains("it is not a model folder"), "{}", done.err);
}
