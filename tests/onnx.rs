//! ONNX files that PyTorch exported: the same ops as the family's template has, the same scale sites, PyTorch's logits,
//! and every command as for other models.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use awqc::exec::Logits;
use awqc::generate::session;
use awqc::ir::{Op, Region};
use awqc::model::Model;
use awqc::passes::analysis::gauge;
use awqc::passes::manager::shared_tensors;

use crate::cli::{awqc, compile, golden, json, path, scratch};
use crate::models::{Expected, folders, largest_difference};

/// Every exported file, with the folder of its golden.
fn files() -> Vec<(PathBuf, PathBuf)> {
    let exported = |folder: PathBuf| {
        let files = ["model.onnx", "model.dynamo.onnx"].map(|f| folder.join(f));
        files.into_iter().filter(|f| f.exists()).map(move |f| (f, folder.clone()))
    };
    let found: Vec<_> = folders().into_iter().flat_map(exported).collect();
    assert!(found.len() >= 7, "only {} exported models", found.len());
    found
}

fn open(path: &Path) -> Model {
    Model::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// How often each op with these attributes occurs. Constants that an exporter rounded to halves have few digits.
fn ops(region: &Region) -> BTreeMap<String, usize> {
    let mut out = BTreeMap::new();
    for (_, node) in region.nodes() {
        let mut attributes = node.op.attributes();
        if let Op::Scale(s) = &node.op {
            attributes.insert("by".into(), format!("{:.2}", s.by).into());
        }
        // The usual scale may be written or not.
        if let (Op::Sdpa(s), Some(q)) = (&node.op, node.operands.first()) {
            let usual = 1.0 / (s.head_dim(region.operand_type(*q)) as f64).sqrt();
            attributes.insert("scale".into(), format!("{:.4}", s.scale.unwrap_or(usual)).into());
        }
        // A window that is wider than the context hides nothing; exporters write it all the same.
        if attributes.get("window").and_then(serde_json::Value::as_u64).is_some_and(|w| w >= 4096) {
            attributes.remove("window");
        }
        // A gain of `1 + w` is `w` with an offset in the checkpoint, and one number for an exporter.
        attributes
            .remove("offset")
            .filter(|_| matches!(node.op, Op::Embedding(_)))
            .map(|o| attributes.insert("offset".into(), o));
        *out.entry(format!("{} {attributes:?} {}", node.op.mnemonic(), node.operands.len())).or_default() += 1;
    }
    out
}

fn sites(model: &Model) -> Vec<Vec<u64>> {
    let shared = shared_tensors(&model.module.regions);
    let layers = model.module.regions.iter().filter(|r| r.name.is_layer());
    let free = |r: &Region| {
        let mut free: Vec<u64> = gauge::sites(r, &shared).iter().map(|s| s.free as u64).collect();
        free.sort_unstable();
        free
    };
    layers.map(free).collect()
}

#[test]
fn exported_models_have_the_ops_and_sites_of_their_template() {
    for (file, folder) in files() {
        let (exported, template) = (open(&file), open(&folder));
        awqc::ir::verify::verify(&exported.module).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let names = |m: &Model| m.module.regions.iter().map(|r| r.name.to_string()).collect::<Vec<_>>();
        assert_eq!(names(&exported), names(&template), "{}", file.display());
        for (a, b) in exported.module.regions.iter().zip(&template.module.regions) {
            assert_eq!(ops(a), ops(b), "{}: {}", file.display(), a.name);
        }
        assert_eq!(sites(&exported), sites(&template), "{}", file.display());
    }
}

#[test]
fn exported_models_compute_what_pytorch_computes() {
    for (file, folder) in files() {
        let expected = Expected::read(&folder);
        let ids = expected.ids();
        let ids: Vec<&[i32]> = ids.iter().map(Vec::as_slice).collect();
        let mut session = session(&open(&file)).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let logits = session.trace(&ids, Logits::All, &mut |_, _| Ok(())).unwrap_or_else(|e| panic!("{e}"));
        let worst = largest_difference(&logits.data, &expected.floats["logits"].1);
        assert!(worst <= 1e-4, "{}: logits differ by {worst}", file.display());
    }
}

#[test]
fn windows_wider_than_any_sample_are_found() {
    let bytes = fs::read(golden("mistral/model.onnx")).expect("the model");
    let dir = scratch();
    for width in [5u8, 100] {
        let constant = |n: u8| [0x4a, 8, n, 0, 0, 0, 0, 0, 0, 0];
        let at = bytes.windows(10).position(|w| w == constant(5)).expect("the window's constant");
        let mut changed = bytes.clone();
        changed[at..at + 10].copy_from_slice(&constant(width));
        let file = path(&dir, "changed.onnx");
        fs::write(&file, changed).expect("a file");
        let module = open(Path::new(&file)).module;
        let windows = module.regions.iter().flat_map(|r| {
            r.nodes().filter_map(|(_, n)| match &n.op {
                Op::Sdpa(s) => Some(s.window),
                _other => None,
            })
        });
        assert_eq!(windows.collect::<Vec<_>>(), [Some(u64::from(width)); 2]);
    }
}

#[test]
fn commands_take_exported_models() {
    let dir = scratch();
    // As a folder, with the configuration but without other weights.
    let folder = dir.path().join("model");
    fs::create_dir(&folder).expect("a folder");
    for file in ["model.onnx", "config.json"] {
        fs::copy(golden(&format!("qwen2/{file}")), folder.join(file)).expect("a copy");
    }
    let model = folder.to_str().expect("UTF-8");
    let ids = golden("qwen2/expected.safetensors");
    let dump = awqc(&["dump", model, "--region", "@0"]);
    assert_eq!(dump.code, 0, "{}", dump.err);
    assert!(dump.out.contains("sdpa") && dump.out.contains("from \"model.layers.0\""), "{}", dump.out);
    for target in ["reference", "cpu-native", "hf-awq"] {
        let out = path(&dir, target);
        let done = json(&compile(model, &ids, &out, &["--bits", "4", "--target", target, "--json"]));
        assert!(done["bits_per_weight"].as_f64().is_some_and(|b| b < 7.0), "{target}: {}", done["bits_per_weight"]);
        // The output of hf-awq is a checkpoint that the family's template knows.
        let eval = awqc(&["eval", &out, "--ids", &ids, "-q"]);
        assert_eq!(eval.code, 0, "{target}: {}", eval.err);
    }
    // The graph alone says too little for other programs.
    fs::remove_file(folder.join("config.json")).expect("removed");
    let bare = awqc(&compile(model, &ids, &path(&dir, "bare"), &["--target", "hf-awq"]));
    assert_eq!(bare.code, 4, "{}", bare.err);
    assert!(bare.err.contains("config.json"), "{}", bare.err);
}

#[test]
fn what_is_not_known_is_refused_by_name() {
    let bytes = fs::read(golden("llama/model.onnx")).expect("the model");
    let dir = scratch();
    let refused = |from: &[u8], to: &[u8], code: i32, says: &[&str]| {
        assert_eq!(from.len(), to.len());
        let mut changed = bytes.clone();
        let at: Vec<usize> = (0..changed.len() - from.len()).filter(|i| changed[*i..].starts_with(from)).collect();
        assert!(!at.is_empty());
        at.into_iter().for_each(|i| changed[i..i + to.len()].copy_from_slice(to));
        let file = path(&dir, "changed.onnx");
        fs::write(&file, changed).expect("a file");
        let done = awqc(&["dump", &file]);
        assert_eq!(done.code, code, "{}", done.err);
        assert!(says.iter().all(|s| done.err.contains(s)), "{}", done.err);
    };
    // An op that nobody knows, and another input.
    refused(b"\x22\x07Sigmoid", b"\x22\x07Softsgn", 3, &["Softsgn", "/model/layers.0/mlp/act_fn/"]);
    refused(b"input_ids", b"input_idz", 3, &["input_idz", "input_ids"]);
    let file = path(&dir, "cut.onnx");
    fs::write(&file, &bytes[..bytes.len() / 2]).expect("a file");
    let done = awqc(&["dump", &file]);
    assert_eq!(done.code, 4, "{}", done.err);
    assert!(done.err.contains("cut.onnx"), "{}", done.err);
}
