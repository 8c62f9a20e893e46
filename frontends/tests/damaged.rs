//! Damaged files: whatever the bytes are, the answer is an error or a model, never a panic.

#![allow(clippy::unwrap_used, reason = "tests")]

mod writer;

use std::fs;
use std::path::Path;

use awqc_frontends::open;
use awqc_frontends::safetensors::Safetensors;
use awqc_ir::TensorSource;
use proptest::prelude::*;
use serde_json::json;
use tempfile::TempDir;
use writer::{folder, llama_config, llama_gguf, llama_tensors, raw_safetensors, safetensors};

/// Opens `path` and reads whatever the model says that it has.
fn exercise(path: &Path) {
    if let Ok(m) = open(path) {
        for name in m.source.names() {
            let _ = m.source.read(&name);
        }
    }
}

fn refused(bytes: &[u8], words: &[&str]) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.safetensors");
    fs::write(&path, bytes).unwrap();
    let e = Safetensors::open(&path).err().unwrap().to_string();
    assert!(e.contains("x.safetensors") && words.iter().all(|w| e.contains(w)), "{e}");
}

fn entry(start: usize, end: usize) -> serde_json::Value {
    json!({"dtype": "F32", "shape": [(end - start) / 4], "data_offsets": [start, end]})
}

#[test]
fn headers_that_lie_are_refused() {
    refused(&[1, 2, 3], &["3 bytes"]);
    refused(&u64::MAX.to_le_bytes(), &["claims a header"]);
    refused(&raw_safetensors("{", &[]), &["not a safetensors header"]);
    let two = |a, b| json!({"a": a, "b": b}).to_string();
    refused(&raw_safetensors(&two(entry(0, 8), entry(4, 12)), &[0; 12]), &["`b`", "overlaps"]);
    refused(&raw_safetensors(&two(entry(0, 4), entry(8, 12)), &[0; 12]), &["`b`", "gap"]);
    refused(&raw_safetensors(&two(entry(0, 4), entry(4, 8)), &[0; 12]), &["12 bytes of data", "describes 8"]);
    refused(&raw_safetensors(&two(entry(0, 4), entry(4, 80)), &[0; 12]), &["`b`", "4..80 of 12"]);
    let long = json!({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).to_string();
    refused(&raw_safetensors(&long, &[0; 8]), &["`a`", "needs 12"]);
    let huge = json!({"a": {"dtype": "F32", "shape": [1u64 << 40, 1u64 << 40], "data_offsets": [0, 8]}}).to_string();
    refused(&raw_safetensors(&huge, &[0; 8]), &["`a`", "more than any file"]);
    let twice = format!("{{\"a\": {}, \"a\": {}}}", entry(0, 4), entry(4, 8));
    refused(&raw_safetensors(&twice, &[0; 8]), &["`a` occurs twice"]);
    let strange = json!({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).to_string();
    refused(&raw_safetensors(&strange, &[0; 8]), &["`a`", "F8_E4M3"]);
    let backwards = json!({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}).to_string();
    refused(&raw_safetensors(&backwards, &[0; 8]), &["`a`", "8..4"]);
}

#[test]
fn a_file_that_shrinks_after_it_was_opened_is_an_error() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("x.safetensors");
    let bytes = safetensors(&llama_tensors());
    fs::write(&path, &bytes).unwrap();
    let source = Safetensors::open(&path).unwrap();
    fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(bytes.len() as u64 / 2).unwrap();
    let last = source.names().pop().unwrap();
    let e = source.read(&last).unwrap_err().to_string();
    assert!(e.contains(&last) && e.contains("x.safetensors"), "{e}");
}

#[test]
fn numbers_that_are_not_finite_are_named() {
    let dir = TempDir::new().unwrap();
    let mut tensors = llama_tensors();
    tensors.get_mut("model.norm.weight").unwrap().data[3] = f32::NAN;
    folder(dir.path(), &llama_config(), &tensors);
    let e = open(dir.path()).unwrap().source.read_f32("model.norm.weight").unwrap_err().to_string();
    assert!(e.contains("model.norm.weight") && e.contains("element 3"), "{e}");
}

/// What is done to a file.
#[derive(Clone, Debug)]
enum Damage {
    Cut(usize),
    Flip(Vec<(usize, u8)>),
    Insert(usize, Vec<u8>),
    Word(usize, u64),
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        any::<usize>().prop_map(Damage::Cut),
        prop::collection::vec((any::<usize>(), 0..8u8), 1..6).prop_map(Damage::Flip),
        (any::<usize>(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, b)| Damage::Insert(at, b)),
        (any::<usize>(), any::<u64>()).prop_map(|(at, w)| Damage::Word(at, w)),
    ]
}

impl Damage {
    /// Most of the damage goes to the head, where it matters.
    fn apply(&self, bytes: &mut Vec<u8>, head: usize) {
        let len = bytes.len();
        match self {
            Damage::Cut(at) => bytes.truncate(at % len),
            Damage::Flip(bits) => bits.iter().for_each(|(at, bit)| bytes[at % head] ^= 1 << bit),
            Damage::Insert(at, extra) => {
                let at = at % head;
                bytes.splice(at..at, extra.iter().copied());
            }
            Damage::Word(at, word) => {
                let at = at % head.saturating_sub(8);
                bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_safetensors_file_panics(damage in damage()) {
        let dir = TempDir::new().unwrap();
        folder(dir.path(), &llama_config(), &llama_tensors());
        let mut bytes = safetensors(&llama_tensors());
        let head = 2400.min(bytes.len());
        damage.apply(&mut bytes, head);
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        exercise(dir.path());
    }

    #[test]
    fn no_quantized_checkpoint_panics(
        from in prop::sample::select(vec!["awq-gemv-llama", "awq-gemv-fast-llama", "gptq-v2-order-llama", "compressed-llama"]),
        damage in prop::option::of(damage()), key in prop::sample::select(vec![
            "bits", "group_size", "version", "sym", "desc_act", "checkpoint_format", "dynamic", "format", "config_groups", "quant_method",
        ]), value in prop::sample::select(vec![
            json!(null), json!(0), json!(-1), json!(1), json!(2), json!(3), json!(8), json!(64), json!(u64::MAX), json!(""), json!("gemv"), json!("gptq"),
            json!([]), json!({}), json!({"g": 1}), json!({"g": {"weights": {"num_bits": 3}}}), json!({"g": {"weights": {"num_bits": 2, "group_size": 7}}}),
            json!(true), json!(false),
        ]),
    ) {
        let dir = TempDir::new().unwrap();
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(from);
        let mut config: serde_json::Value = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
        let mut bytes = fs::read(from.join("model.safetensors")).unwrap();
        match damage {
            Some(damage) => damage.apply(&mut bytes, 6000),
            None => config["quantization_config"][key] = value,
        }
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        exercise(dir.path());
    }

    #[test]
    fn no_gguf_file_panics(damage in damage()) {
        let dir = TempDir::new().unwrap();
        let mut bytes = llama_gguf().bytes();
        let head = 2400.min(bytes.len());
        damage.apply(&mut bytes, head);
        let path = dir.path().join("x.gguf");
        fs::write(&path, bytes).unwrap();
        exercise(&path);
    }

    #[test]
    fn no_onnx_file_panics(damage in damage(), at in 0usize..60_000) {
        let dir = TempDir::new().unwrap();
        let mut bytes = include_bytes!("../../tests/golden/gpt_neox/model.onnx").to_vec();
        // The graph comes before the tensors: somewhere in it.
        let mut part = bytes.split_off(at);
        damage.apply(&mut part, 2400);
        bytes.extend(part);
        let path = dir.path().join("x.onnx");
        fs::write(&path, bytes).unwrap();
        exercise(&path);
    }

    #[test]
    fn no_configuration_panics(key in prop::sample::select(vec![
        "architectures", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "vocab_size", "rms_norm_eps", "rope_theta", "rope_scaling", "hidden_act", "tie_word_embeddings", "quantization_config", "model_type",
    ]), value in prop::sample::select(vec![
        json!(null), json!(0), json!(-1), json!(1), json!(3), json!(1.5), json!(1e300), json!(u64::MAX), json!(""), json!("x"), json!([]), json!({}),
        json!([[]]), json!({"type": 1}), json!({"rope_type": "yarn"}), json!({"rope_type": "llama3", "factor": 0}), json!(["GPT2LMHeadModel"]), json!(true),
        json!(9_999), json!(1u64 << 31),
    ])) {
        let dir = TempDir::new().unwrap();
        let mut config = llama_config();
        config[key] = value;
        folder(dir.path(), &config, &llama_tensors());
        if let Err(e) = open(dir.path()) {
            prop_assert!(!e.to_string().is_empty());
        }
    }
}
