//! Emitters: what they write can be read back and means the same.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use awqc_exec::emit::{self, EmitCx, EmitError, Emitted, Emitter, Existing, ExtraFile, HfAwq, Reference, Staging};
use awqc_exec::{Host, Logits, MemorySource, Realized, Session, layout, realize};
use awqc_ir::{DataId, Group, Layout, Module, Quant, TensorSource, parse, verify};
use serde_json::{Map, Value as Json, json};

use crate::support::{DECODER, Random, module, read, weights, windows};

const QUANT: Quant = Quant { bits: 4, symmetric: false, group: Group::Size(8) };

/// The model with every linear of the layers quantized and `ln1 -> q, k, v` scaled.
fn compiled() -> Module {
    let mut text = DECODER.replace("$w: f16[24,32]", "$w: u4g8[24,32]");
    for (name, tensor, shape) in [("q", "q", "24,24"), ("k", "k", "8,24"), ("v", "v", "8,24")] {
        text = text.replace(
            &format!("${name}   = \"{tensor}.weight\"   : f16[{shape}]"),
            &format!("${name}   = quant(mul.1(\"{tensor}.weight\", #s)) : u4g8[{shape}]"),
        );
    }
    for (old, new) in [
        ("$o   = \"o.weight\"   : f16[24,24]", "$o   = quant(\"o.weight\") : u4g8[24,24]"),
        ("$g   = \"gate.weight\" : f16[32,24]", "$g   = quant(\"gate.weight\") : u4g8[32,24]"),
        ("$u   = \"up.weight\"  : f16[32,24]", "$u   = quant(\"up.weight\") : u4g8[32,24]"),
        ("$d   = \"down.weight\" : f16[24,32]", "$d   = quant(\"down.weight\") : u4g8[24,32]"),
        (
            "$ln1 = \"ln1.weight\" : f16[24]",
            "#s = data \"scales\" : f32[24]\n  $ln1 = div.0(\"ln1.weight\", #s) : f16[24]",
        ),
    ] {
        assert!(text.contains(old), "{old}");
        text = text.replace(old, new);
    }
    let mut m = module(&text);
    let scales: Arc<[f32]> = Random(9).numbers(24).iter().map(|v| v.exp()).collect();
    for region in m.regions.iter_mut().filter(|r| r.name.is_layer()) {
        region.set_data_values(DataId::new(0), Some(scales.clone()));
    }
    m
}

fn folder(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("awqc-exec-{}-{name}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    dir
}

fn write(mut emitter: Box<dyn Emitter>, m: &Module, source: &dyn TensorSource) -> Result<Emitted, EmitError> {
    for region in &m.regions {
        emitter.region(region, &EmitCx { source, fused: &m.fused })?;
    }
    emitter.finish(verify(m).unwrap())
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn opened(path: &Path) -> MemorySource {
    let mut source = MemorySource::new();
    read(path).into_iter().for_each(|(n, t)| source.insert(n, t));
    source
}

fn logits(m: &Module, source: &dyn TensorSource) -> Vec<f32> {
    let mut s =
        Session::<Host>::new(verify(m).map_err(|e| e.to_string()).unwrap(), source, Default::default()).unwrap();
    s.forward(&windows(&[15], 50)[0], Logits::All).unwrap().data
}

#[test]
fn reference_reopens_and_means_the_same() {
    let m = compiled();
    let source = weights(&m);
    let target = folder("reference");
    let stage = Staging::create(&target, Existing::Refuse).unwrap();
    let extra = vec![ExtraFile { name: "tokenizer.json".into(), bytes: b"{}".to_vec() }];
    let out = write(Box::new(Reference::new(stage.path(), extra)), &m, &source).unwrap();
    assert!(!target.exists(), "nothing appears before the commit");
    stage.commit().unwrap();
    assert_eq!(
        out.files,
        ["checksums.json", "module.awqir", "provenance.awqir", "tokenizer.json", "weights.safetensors"]
    );
    assert_eq!(files(&target), out.files, "no temporary file stays");

    let text = std::fs::read_to_string(target.join("module.awqir")).unwrap();
    let reopened = parse(&text).map_err(|e| e.to_string()).unwrap();
    let stored = opened(&target.join("weights.safetensors"));
    assert_eq!(logits(&reopened, &stored), logits(&m, &source), "bit by bit");
    assert!(reopened.regions.iter().all(|r| r.data_ids().next().is_none()), "no sidecar is needed");
    assert!(text.contains("layer @0..1"), "equal layers print once:\n{text}");
    assert!(text.contains("packed.rows(\"q\")"));
    assert_eq!(
        stored.names().iter().filter(|n| n.contains("emb")).count(),
        1,
        "the tied table is stored once: {:?}",
        stored.names()
    );
    assert!(std::fs::read_to_string(target.join("provenance.awqir")).unwrap().contains("mul.1"));
    std::fs::remove_dir_all(&target).unwrap();
}

#[test]
fn the_same_input_gives_the_same_bytes() {
    let m = compiled();
    let source = weights(&m);
    let bytes = |name| {
        let dir = folder(name);
        std::fs::create_dir_all(&dir).unwrap();
        write(Box::new(Reference::new(&dir, Vec::new())), &m, &source).unwrap();
        let all: Vec<Vec<u8>> = files(&dir).iter().map(|f| std::fs::read(dir.join(f)).unwrap()).collect();
        std::fs::remove_dir_all(&dir).unwrap();
        all
    };
    assert_eq!(bytes("first"), bytes("second"));
}

fn config() -> Map<String, Json> {
    match json!({"architectures": ["X"], "hidden_size": 24, "torch_dtype": "bfloat16"}) {
        Json::Object(map) => map,
        _ => unreachable!(),
    }
}

#[test]
fn hf_awq_keeps_names_and_numbers() {
    let m = compiled();
    let source = weights(&m);
    let dir = folder("hf");
    std::fs::create_dir_all(&dir).unwrap();
    let out = write(Box::new(HfAwq::new(&dir, config(), Vec::new())), &m, &source).unwrap();
    assert_eq!(out.files, ["config.json", "model.safetensors"]);
    let config: Json = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["torch_dtype"], "float16");
    assert_eq!(config["hidden_size"], 24);
    assert_eq!(
        config["quantization_config"],
        json!({"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": true, "version": "gemm", "modules_to_not_convert": null})
    );
    let stored = opened(&dir.join("model.safetensors"));
    let region = &m.regions[1];
    for id in region.used_weights() {
        let name = region.tensor_name(&region.sources(id)[0]);
        match realize(region, id, &source).unwrap() {
            Realized::Quant(codes) => {
                let stem = name.strip_suffix(".weight").unwrap();
                let read = layout::read(&stored, stem, Layout::AwqGemm, QUANT, codes.rows, codes.cols).unwrap();
                assert_eq!(read, codes, "{name}");
            }
            Realized::Float { data, .. } => assert_eq!(stored.read_f32(&name).unwrap(), data, "{name}"),
        }
    }
    assert!(stored.info("layers.0.o.bias").is_some());
    assert_eq!(stored.names().iter().filter(|n| n.starts_with("embed")).count(), 1);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn hf_awq_shards_and_lists_float_linears() {
    // An untied head is a float linear of its own.
    let mut m = compiled();
    let text = awqc_ir::print(&m)
        .replace("$emb = \"embed.weight\" : f16[50,24]\n  %h ", "$emb = \"lm_head.weight\" : f16[50,24]\n  %h ");
    let head = text.rfind("\"embed.weight\"").unwrap();
    let text = format!("{}\"lm_head.weight\"{}", &text[..head], &text[head + "\"embed.weight\"".len()..]);
    let data: Vec<_> = m.regions[1].data(DataId::new(0)).values.clone().into_iter().collect();
    m = module(&text);
    m.regions
        .iter_mut()
        .filter(|r| r.name.is_layer())
        .for_each(|r| r.set_data_values(DataId::new(0), data.first().cloned()));
    let source = weights(&m);
    let dir = folder("shards");
    std::fs::create_dir_all(&dir).unwrap();
    let out = write(Box::new(HfAwq::new(&dir, config(), Vec::new()).with_shard_bytes(3000)), &m, &source).unwrap();
    let config: Json = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization_config"]["modules_to_not_convert"], json!(["lm_head"]));
    let index: Json =
        serde_json::from_slice(&std::fs::read(dir.join("model.safetensors.index.json")).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], out.tensor_bytes);
    let shards: Vec<&String> = out.files.iter().filter(|f| f.starts_with("model-")).collect();
    assert!(shards.len() > 2);
    let mut found = 0;
    for shard in shards {
        for name in read(&dir.join(shard)).keys() {
            assert_eq!(index["weight_map"][name], shard.as_str());
            found += 1;
        }
    }
    assert_eq!(index["weight_map"].as_object().unwrap().len(), found);
    std::fs::remove_dir_all(&dir).unwrap();
}

/// The error of an hf-awq folder for a model with this replacement.
fn refused(old: &str, new: &str) -> String {
    let text = DECODER.replace(old, new);
    assert_ne!(text, DECODER);
    let m = module(&text);
    let dir = folder(&format!("refused{}", old.len() + new.len()));
    std::fs::create_dir_all(&dir).unwrap();
    let mut source = weights(&m);
    source.insert_f32("layers.0.big", &[24], &[70000.0; 24]);
    let out = write(Box::new(HfAwq::new(&dir, config(), Vec::new())), &m, &source).unwrap_err();
    std::fs::remove_dir_all(&dir).unwrap();
    out.to_string()
}

#[test]
fn hf_awq_says_what_it_cannot_express() {
    let q = "$q   = \"q.weight\"   : f16[24,24]";
    let joined = refused(
        q,
        "$q1 = \"q1.weight\" : f16[8,24]\n  $q2 = \"q2.weight\" : f16[8,24]\n  $q3 = \"q3.weight\" : f16[8,24]\n  $q = cat.0($q1, $q2, $q3) : f16[24,24]",
    );
    assert!(joined.contains("joins 3") && joined.contains("`layers.0.q1.weight`"), "{joined}");
    assert!(refused(q, "$q   = transpose(\"q.weight\") : f16[24,24]").contains("Conv1D"));
    assert!(
        refused(q, "$w = \"qkv.weight\" : f16[48,24]\n  $q = rows($w, 0, 24) : f16[24,24]").contains("part of tensor")
    );
    assert!(refused(q, "$q   = quant(\"q.weight\") : u3g8[24,24]").contains("4-bit"));
    assert!(refused(q, "$q   = quant(\"q.weight\") : u4g7[24,24]").contains("whole groups"));
    assert!(refused(q, "$q   = quant(\"q.kernel\") : u4g8[24,24]").contains("`.weight`"));
    let big = refused("$ln1 = \"ln1.weight\" : f16[24]", "$ln1 = \"big\" : f32[24]");
    assert!(big.contains("`layers.0.big`") && big.contains("70000"), "{big}");
    let tied = refused(
        "$emb = \"embed.weight\" : f16[50,24]\n  %h ",
        "$emb = offset(offset(\"embed.weight\", 1.0), -1.0) : f16[50,24]\n  %h ",
    );
    assert!(tied.contains("used twice"), "{tied}");
}

#[test]
fn hf_awq_can_be_asked_before() {
    let m = module(DECODER);
    // The down projection is an operand of a fused op here; all others are plain linears.
    emit::check(&m, QUANT).unwrap();
    let error = emit::check(&m, Quant { group: Group::Size(16), ..QUANT }).unwrap_err().to_string();
    assert!(error.contains("`layers.0.q.weight`") && error.contains("16"), "{error}");
    assert!(emit::check(&m, Quant { bits: 3, ..QUANT }).is_err());
    assert!(emit::check(&m, Quant { group: Group::Row, ..QUANT }).is_ok());
}

#[test]
fn staging_is_all_or_nothing() {
    let target = folder("staging");
    {
        let stage = Staging::create(&target, Existing::Refuse).unwrap();
        std::fs::write(stage.path().join("a"), "half").unwrap();
    }
    assert!(!target.exists());
    std::fs::create_dir_all(&target).unwrap();
    std::fs::write(target.join("old"), "").unwrap();
    assert!(matches!(Staging::create(&target, Existing::Refuse), Err(EmitError::Exists(_))));
    assert!(matches!(Staging::create(&target, Existing::Replace), Err(EmitError::Foreign(_))));
    std::fs::write(target.join("report.json"), "{}").unwrap();
    let stage = Staging::create(&target, Existing::Replace).unwrap();
    let partial = stage.path().to_owned();
    std::fs::write(partial.join("new"), "").unwrap();
    stage.commit().unwrap();
    assert_eq!(files(&target), ["new"]);
    assert!(!partial.exists());
    std::fs::remove_dir_all(&target).unwrap();
}

#[test]
fn paths_are_in_errors() {
    let missing = folder("nowhere").join("deeper");
    let error = write(Box::new(Reference::new(&missing, Vec::new())), &compiled(), &weights(&compiled())).unwrap_err();
    assert!(error.to_string().contains("deeper"), "{error}");
    let bad = ExtraFile { name: "../x".into(), bytes: Vec::new() };
    let dir = folder("extra");
    std::fs::create_dir_all(&dir).unwrap();
    let m = compiled();
    assert!(
        write(Box::new(Reference::new(&dir, vec![bad])), &m, &weights(&m)).unwrap_err().to_string().contains("../x")
    );
    std::fs::remove_dir_all(&dir).unwrap();
}
