//! Checkpoints besides float safetensors, as a user compiles them: quantized ones keep their codes, pickled ones
//! compute what the same tensors in safetensors do.

use std::fs;
use std::path::Path;

use safetensors::SafeTensors;

use crate::cli::{awqc, golden, json, path, scratch};

const QUANTIZED: [&str; 8] = [
    "awq-gemm-llama",
    "awq-gemv-llama",
    "awq-gemv-fast-llama",
    "gptq-llama",
    "gptq-v2-order-llama",
    "gptq-gpt2",
    "compressed-llama",
    "compressed-8bit-llama",
];

/// What a target does to a model besides choosing codes.
const KEEP: &str = "canonicalize,dce,fuse-qkv,fuse-gate-up,fuse-norm,fuse-rope,fuse-swiglu,dce,pack{layout=r16}";

/// The bytes of every tensor whose name ends so, sorted.
fn parts(file: &str, suffix: &str) -> Vec<Vec<u8>> {
    let bytes = fs::read(file).expect("weights");
    let file = SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut out: Vec<Vec<u8>> =
        file.tensors().into_iter().filter(|(n, _)| n.ends_with(suffix)).map(|(_, t)| t.data().to_vec()).collect();
    out.sort();
    out
}

#[test]
fn quantized_checkpoints_keep_their_codes() {
    for name in QUANTIZED {
        let (dir, model, ids) = (scratch(), golden(name), golden(&format!("{name}/expected.safetensors")));
        let (rows, cpu) = (path(&dir, "rows"), path(&dir, "cpu"));
        let done = awqc(&[
            "compile",
            &model,
            "-o",
            &rows,
            "--target",
            "reference",
            "--passes",
            "canonicalize,dce,pack{layout=rows}",
        ]);
        assert_eq!(done.code, 0, "{name}: {}", done.err);
        assert_eq!(done.err.contains("act-order"), name.contains("order"), "{name}: {}", done.err);
        let source = awqc_frontends::open(Path::new(&model)).unwrap_or_else(|e| panic!("{name}: {e}")).source;
        let names = source.names();
        for suffix in [".codes", ".scales", ".zeros"] {
            let read = |n: &String| source.read(n).unwrap_or_else(|e| panic!("{name}: {e}")).bytes;
            // AutoAWQ's own layout has other parts, which its emitter's tests compare.
            let mut want: Vec<Vec<u8>> = names.iter().filter(|n| n.ends_with(suffix)).map(read).collect();
            want.sort();
            let got = parts(&path(&dir, "rows/weights.safetensors"), suffix);
            if name == "awq-gemm-llama" {
                assert_eq!(got.len(), 14, "{name}: {suffix}");
            } else {
                assert!(got == want, "{name}: {} {suffix} in, {} out", want.len(), got.len());
            }
        }
        let eval = json(&["eval", &rows, "--ids", &ids, "--against", &model, "--json", "-q"]);
        assert!(eval["kl_divergence"].as_f64().expect("a number").abs() < 1e-9, "{name}: {eval}");
        // Kernels round activations, nothing else.
        let done = awqc(&["compile", &model, "-o", &cpu, "--target", "cpu-native", "--passes", KEEP, "-q"]);
        assert_eq!(done.code, 0, "{name}: {}", done.err);
        let eval = json(&["eval", &cpu, "--ids", &ids, "--against", &model, "--json", "-q"]);
        assert!(eval["kl_divergence"].as_f64().expect("a number") < 0.01, "{name}: {eval}");
    }
}

#[test]
fn quantized_checkpoints_are_not_quantized_again() {
    let (dir, model) = (scratch(), golden("gptq-llama"));
    let done = awqc(&["compile", &model, "-o", &path(&dir, "out"), "--target", "cpu-native", "-q"]);
    assert_eq!(done.code, 3, "{}", done.err);
    assert!(
        done.err.contains("quantized already") && done.err.contains("--passes \"canonicalize,dce,quantize-head"),
        "{}",
        done.err
    );
    assert!(!done.err.contains("awq-scale"), "{}", done.err);
}

#[test]
fn a_pickled_model_computes_the_same() {
    let dir = scratch();
    let (model, ids) = (golden("pickled-llama"), golden("llama/expected.safetensors"));
    let (float, out) = (golden("llama"), path(&dir, "out"));
    let eval = json(&["eval", &model, "--ids", &ids, "--against", &float, "--json", "-q"]);
    assert!(eval["kl_divergence"].as_f64().expect("a number") == 0.0, "{eval}");
    let compile = |model: &str| {
        let done = awqc(&["compile", model, "--group", "16", "--calib-ids", &ids, "-o", &out, "-q", "--force"]);
        assert_eq!(done.code, 0, "{}", done.err);
        fs::read(path(&dir, "out/weights.safetensors")).expect("weights")
    };
    assert!(compile(&model) == compile(&float), "the same tensors make the same artefact");
    // A pickle that wants more than tensors.
    let attack = path(&dir, "attack");
    fs::create_dir(&attack).expect("a folder");
    fs::copy(Path::new(&model).join("config.json"), Path::new(&attack).join("config.json")).expect("copied");
    let old = fs::read(golden("pickled/old.pth")).expect("a file");
    let at = old.windows(19).position(|w| w == b"torch._utils\n_rebui").expect("the name of a function");
    let mut hostile = old;
    hostile[at..at + 19].copy_from_slice(b"posix\nsystem\n(cposi");
    fs::write(Path::new(&attack).join("pytorch_model.bin"), hostile).expect("written");
    let done = awqc(&["dump", &attack]);
    assert_eq!(done.code, 3, "{}", done.err);
    assert!(done.err.contains("`posix.system`") && done.err.contains("pytorch_model.bin"), "{}", done.err);
}
