//! Hugging Face folders: the models of the golden kit, and what is said of checkpoints that do not fit.

#![allow(clippy::unwrap_used, reason = "tests")]

mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use awqc_frontends::{Contents, ImportError, Imported, Kind, open};
use awqc_ir::{Op, RegionName, WeightExpr};
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use writer::{Tensor, Tensors, folder, llama_config, llama_tensors, safetensors};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

fn import(config: &Json, tensors: &Tensors) -> Result<Imported, ImportError> {
    let dir = TempDir::new().unwrap();
    folder(dir.path(), config, tensors);
    open(dir.path())
}

fn refused(config: &Json, tensors: &Tensors) -> String {
    match import(config, tensors) {
        Ok(_) => panic!("imported"),
        Err(e) => e.to_string(),
    }
}

fn with(key: &str, value: Json) -> Json {
    let mut config = llama_config();
    config[key] = value;
    config
}

#[test]
fn every_golden_model_imports_and_verifies() {
    let mut seen = 0;
    for entry in fs::read_dir(golden("")).unwrap().flatten().filter(|e| e.path().join("config.json").is_file()) {
        let m = open(&entry.path()).unwrap_or_else(|e| panic!("{}: {e}", entry.path().display()));
        awqc_ir::verify::verify(&m.module).unwrap_or_else(|e| panic!("{}: {e}", entry.path().display()));
        assert_eq!(m.kind, Kind::HuggingFace);
        assert!(m.module.layers() >= 2, "{}", entry.path().display());
        // Reading the printed text gives the same text: nothing of the template is left in it.
        let text = awqc_ir::print(&m.module);
        assert_eq!(awqc_ir::print(&awqc_ir::parse(&text).unwrap()), text);
        seen += 1;
    }
    assert!(seen >= 14, "{seen}");
}

#[test]
fn a_tiny_model_has_its_parts() {
    let m = import(&llama_config(), &llama_tensors()).unwrap();
    assert_eq!(m.module.regions.len(), 4);
    let layer = m.module.region(&RegionName::Layer(1)).unwrap();
    assert_eq!(&*layer.prefix, "model.layers.1");
    let sdpa = layer.nodes().find_map(|(_, n)| if let Op::Sdpa(s) = &n.op { Some(s) } else { None }).unwrap();
    assert_eq!((sdpa.heads, sdpa.kv_heads, sdpa.causal, sdpa.window), (4, 2, true, None));
    assert!(!layer.nodes().any(|(_, n)| n.operands.len() > 2 && matches!(n.op, Op::Linear(_))), "there is no bias");
    let q = m.source.read_f32("model.layers.1.self_attn.q_proj.weight").unwrap();
    assert_eq!(q, llama_tensors()["model.layers.1.self_attn.q_proj.weight"].data);
}

#[test]
fn a_file_and_shards_import_like_a_folder() {
    let dir = TempDir::new().unwrap();
    folder(dir.path(), &llama_config(), &llama_tensors());
    assert_eq!(open(&dir.path().join("model.safetensors")).unwrap().module.layers(), 2);
    fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let files = open(dir.path()).unwrap().files;
    assert_eq!(files.len(), 1);
    assert!(matches!(&files[0].contents, Contents::Path(p) if p.ends_with("tokenizer.json")));

    let (first, second): (Tensors, Tensors) = llama_tensors().into_iter().partition(|(n, _)| n.contains("mlp"));
    let map: serde_json::Map<String, Json> = first
        .keys()
        .map(|n| (n.clone(), json!("a.safetensors")))
        .chain(second.keys().map(|n| (n.clone(), json!("b.safetensors"))))
        .collect();
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    fs::write(dir.path().join("a.safetensors"), safetensors(&first)).unwrap();
    fs::write(dir.path().join("b.safetensors"), safetensors(&second)).unwrap();
    fs::write(dir.path().join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    assert_eq!(open(dir.path()).unwrap().module.layers(), 2);
    assert_eq!(open(&dir.path().join("a.safetensors")).unwrap().module.layers(), 2);

    let mut wrong = map.clone();
    wrong.insert("ghost.weight".into(), json!("a.safetensors"));
    wrong.insert("model.norm.weight".into(), json!("a.safetensors"));
    fs::write(dir.path().join("model.safetensors.index.json"), json!({"weight_map": wrong}).to_string()).unwrap();
    let e = open(dir.path()).err().unwrap().to_string();
    assert!(
        e.contains("`ghost.weight` is not in `a.safetensors`")
            && e.contains("`model.norm.weight` is not in `a.safetensors`"),
        "{e}"
    );
    fs::write(dir.path().join("model.safetensors.index.json"), json!({"weight_map": map}).to_string()).unwrap();
    fs::remove_file(dir.path().join("b.safetensors")).unwrap();
    assert!(open(dir.path()).err().unwrap().to_string().contains("shard `b.safetensors` is missing"));
    let out = json!({"weight_map": {"x": "../x.safetensors"}});
    fs::write(dir.path().join("model.safetensors.index.json"), out.to_string()).unwrap();
    assert!(open(dir.path()).err().unwrap().to_string().contains("not a plain file name"));
}

#[test]
fn everything_that_does_not_fit_is_listed_at_once() {
    let mut tensors = llama_tensors();
    tensors.remove("model.layers.0.mlp.up_proj.weight");
    tensors.insert("model.layers.1.mlp.extra.weight".into(), Tensor::counted("x", &[2]));
    tensors.insert("model.layers.1.self_attn.k_proj.weight".into(), Tensor::counted("x", &[16, 12]));
    tensors.insert("model.layers.0.self_attn.q_proj.bias".into(), Tensor::counted("x", &[16]));
    let e = refused(&llama_config(), &tensors);
    assert!(e.contains("`model.layers.0.mlp.up_proj.weight` is missing; [20, 12] is needed"), "{e}");
    assert!(e.contains("`model.layers.1.mlp.extra.weight` is not part of the model"), "{e}");
    assert!(
        e.contains(
            "`model.layers.1.self_attn.k_proj.weight` has the shape [16, 12]; by the configuration it must be [8, 12]"
        ),
        "{e}"
    );
    assert!(
        e.contains(
            "`model.layers.0.self_attn.q_proj.bias` is in the checkpoint, but `config.attention_bias ?? false` is false"
        ),
        "{e}"
    );
}

#[test]
fn a_configuration_that_contradicts_the_tensors_is_refused() {
    let e = refused(&with("attention_bias", json!(true)), &llama_tensors());
    assert!(
        e.contains("`model.layers.0.self_attn.q_proj.bias` is missing, but `config.attention_bias ?? false` is true"),
        "{e}"
    );
    let e = refused(&with("num_hidden_layers", json!(1)), &llama_tensors());
    assert!(e.contains("`model.layers.1.input_layernorm.weight` is not part of the model (of 1 layers"), "{e}");
    let mut headless = llama_tensors();
    headless.remove("lm_head.weight");
    assert!(refused(&llama_config(), &headless).contains("`lm_head.weight` is missing"));
    assert!(import(&with("tie_word_embeddings", json!(true)), &headless).is_ok());
}

#[test]
fn keys_that_nobody_reads_are_refused_by_name() {
    let e = refused(&with("rope_flavour", json!("vanilla")), &llama_tensors());
    assert!(e.contains("`rope_flavour` is \"vanilla\"") && e.contains("means nothing to the family llama"), "{e}");
    assert!(import(&with("rope_flavour", json!(null)), &llama_tensors()).is_ok());
    assert!(import(&with("attention_dropout", json!(0.1)), &llama_tensors()).is_ok());
    let e = refused(&with("rope_interleaved", json!(true)), &llama_tensors());
    assert!(e.contains("`rope_interleaved` is true; only false is known"), "{e}");
}

#[test]
fn a_model_with_its_own_code_is_refused_with_the_reason() {
    let mut config = with("architectures", json!(["HouseBrewForCausalLM"]));
    config["auto_map"] = json!({"AutoModelForCausalLM": "modeling_house.HouseBrewForCausalLM"});
    let e = import(&config, &llama_tensors()).err().unwrap();
    assert!(e.is_unsupported() && e.to_string().contains("runs no code of checkpoints"), "{e}");
}

#[test]
fn a_tied_head_wins_over_a_stored_one() {
    let m = import(&with("tie_word_embeddings", json!(true)), &llama_tensors()).unwrap();
    let head = m.module.region(&RegionName::Named("head".into())).unwrap();
    let sources: Vec<_> = head.used_weights().into_iter().flat_map(|w| head.sources(w)).collect();
    assert!(sources.iter().any(|n| &**n == "model.embed_tokens.weight"), "{sources:?}");
    assert!(m.source.info("lm_head.weight").is_none());
}

#[test]
fn wrong_configuration_values_are_named() {
    for (key, value, word) in [
        ("hidden_size", json!("12"), "a positive integer"),
        ("num_attention_heads", json!(0), "a positive integer"),
        ("num_hidden_layers", Json::Null, "is missing"),
        ("rms_norm_eps", json!([1]), "a number"),
        ("tie_word_embeddings", json!("yes"), "true or false"),
        ("hidden_act", json!(3), "a text"),
        ("rope_theta", json!({}), "a number"),
        ("rope_scaling", json!("linear"), "an object"),
        ("architectures", json!({"a": 1}), "a list of class names"),
        ("head_dim", json!(-4), "a positive integer"),
        ("quantization_config", json!(7), "an object"),
    ] {
        let e = import(&with(key, value), &llama_tensors()).err().unwrap();
        let text = e.to_string();
        assert!(text.contains(&format!("`{key}`")) && text.contains(word) && !e.is_unsupported(), "{key}: {text}");
    }
}

#[test]
fn what_is_not_known_is_unsupported_and_named() {
    for (key, value, word) in [
        ("architectures", json!(["TotallyNewForCausalLM"]), "TotallyNewForCausalLM"),
        ("hidden_act", json!("mish"), "`hidden_act` is `mish`"),
        ("rope_scaling", json!({"rope_type": "cubic", "factor": 2.0}), "cubic"),
        ("quantization_config", json!({"quant_method": "bitsandbytes", "bits": 4}), "bitsandbytes"),
    ] {
        let e = import(&with(key, value), &llama_tensors()).err().unwrap();
        assert!(e.is_unsupported() && e.to_string().contains(word), "{e}");
    }
    let mut no_class = llama_config();
    no_class.as_object_mut().unwrap().remove("architectures");
    assert!(import(&no_class, &llama_tensors()).is_ok(), "the model type stands in for the class");
}

#[test]
fn a_damaged_configuration_is_no_crash() {
    let dir = TempDir::new().unwrap();
    folder(dir.path(), &llama_config(), &llama_tensors());
    for text in ["", "{", "[]", "{\"a\":", "\u{0}", "null"] {
        fs::write(dir.path().join("config.json"), text).unwrap();
        assert!(open(dir.path()).err().unwrap().to_string().contains("config.json"));
    }
    fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(open(dir.path()).err().unwrap().to_string().contains("is missing"));
    assert!(open(&dir.path().join("nothing")).is_err());
    assert!(open(Path::new("/dev/null")).is_err());
}

#[test]
fn other_prefixes_are_read_as_the_usual_ones() {
    for name in ["gpt2", "opt", "opt-post-norm"] {
        let source = open(&golden(name)).unwrap();
        let config = Json::Object(source.config.clone());
        let strip = |n: &str| n.strip_prefix("transformer.").or(n.strip_prefix("model.")).unwrap_or(n).to_owned();
        let tensors: Tensors = source
            .source
            .names()
            .into_iter()
            .map(|n| {
                (
                    strip(&n),
                    Tensor { shape: source.source.info(&n).unwrap().shape, data: source.source.read_f32(&n).unwrap() },
                )
            })
            .collect();
        assert!(tensors.keys().all(|n| !n.starts_with("model.") && !n.starts_with("transformer.")));
        let m = import(&config, &tensors).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(m.module.layers(), source.module.layers());
        assert_eq!(m.source.names(), source.source.names());
    }
}

#[test]
fn packed_weights_become_packed_terms() {
    let m = open(&golden("awq-gemm-llama")).unwrap();
    let layer = m.module.region(&RegionName::Layer(0)).unwrap();
    let types: Vec<String> = layer
        .used_weights()
        .into_iter()
        .map(|w| layer.weight(w))
        .filter(|w| matches!(w.expr, WeightExpr::Packed { .. }))
        .map(|w| w.ty.to_string())
        .collect();
    assert_eq!(types.len(), 7);
    assert!(types.contains(&"u4g64@awq_gemm[256,128]".to_owned()), "{types:?}");
    let text = awqc_ir::print(&m.module);
    assert!(text.contains("packed.awq_gemm(\"self_attn.q_proj\")"), "{text}");
}

#[test]
fn packed_parts_of_wrong_shape_are_refused() {
    let from = golden("awq-gemm-llama");
    let dir = TempDir::new().unwrap();
    fs::copy(from.join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config: Json = serde_json::from_slice(&fs::read(from.join("config.json")).unwrap()).unwrap();
    config["quantization_config"]["group_size"] = json!(32);
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let e = open(dir.path()).err().unwrap().to_string();
    assert!(e.contains("q_proj.qzeros` is i32 [2, 16]; i32 [4, 16] is needed"), "{e}");
    config.as_object_mut().unwrap().remove("quantization_config");
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    assert!(open(dir.path()).err().unwrap().to_string().contains("`quantization_config`"));
    // The same settings in the older file of their own.
    let old = json!({"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMM"});
    fs::write(dir.path().join("quant_config.json"), old.to_string()).unwrap();
    assert_eq!(open(dir.path()).unwrap().module.layers(), 2);
}

#[test]
fn an_artefact_and_a_bare_text_open() {
    let m = import(&llama_config(), &llama_tensors()).unwrap();
    let dir = TempDir::new().unwrap();
    let text = awqc_ir::print(&m.module);
    fs::write(dir.path().join("module.awqir"), &text).unwrap();
    let bare = open(&dir.path().join("module.awqir")).unwrap();
    assert_eq!(bare.kind, Kind::Text);
    let name = "model.layers.0.mlp.up_proj.weight";
    let (a, b) = (bare.source.read_f32(name).unwrap(), bare.source.read_f32(name).unwrap());
    assert!(a.len() == 240 && a == b && a.iter().any(|v| *v != a[0]));

    let e = open(dir.path()).err().unwrap().to_string();
    assert!(e.contains("weights.safetensors"), "{e}");
    let mut tensors = llama_tensors();
    tensors.remove("lm_head.weight");
    fs::write(dir.path().join("weights.safetensors"), safetensors(&tensors)).unwrap();
    assert!(open(dir.path()).err().unwrap().to_string().contains("`lm_head.weight` is missing"));
    fs::write(dir.path().join("weights.safetensors"), safetensors(&llama_tensors())).unwrap();
    let again = open(dir.path()).unwrap();
    assert_eq!((again.kind, awqc_ir::print(&again.module)), (Kind::Artefact, text));
    fs::write(dir.path().join("module.awqir"), "awqir 1\nregion").unwrap();
    assert!(open(dir.path()).err().unwrap().to_string().contains("F07"));
}

#[test]
fn data_entries_come_from_the_sidecar() {
    let text = "awqir 1\nlayer @0 (%x: f32[B,S,4]) from \"l\" {\n  #s0 = data \"scales\" : f32[4]\n  $w = mul.1(\"w\", #s0) : f32[2,4]\n  %y = linear %x, $w\n  return %y\n}\n";
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("m.awqir");
    fs::write(&path, text).unwrap();
    let values = |m: &Imported| m.module.regions[0].data(m.module.regions[0].data_ids().next().unwrap()).values.clone();
    assert!(values(&open(&path).unwrap()).is_none());
    let entry = |shape: &[usize]| Tensors::from([("0.s0".to_owned(), Tensor::counted("s", shape))]);
    fs::write(dir.path().join("m.data.safetensors"), safetensors(&entry(&[4]))).unwrap();
    assert_eq!(values(&open(&path).unwrap()).unwrap().to_vec(), Tensor::counted("s", &[4]).data);
    fs::write(dir.path().join("m.data.safetensors"), safetensors(&entry(&[5]))).unwrap();
    assert!(open(&path).err().unwrap().to_string().contains("`0.s0` has the shape [5], the module says [4]"));
}

#[test]
fn families_are_listed() {
    let archs = awqc_frontends::archs();
    let llama = archs.iter().find(|a| a.name == "llama").unwrap();
    assert_eq!((llama.classes.as_slice(), llama.file.as_str()), (&["LlamaForCausalLM".to_owned()][..], "llama.awqir"));
    assert!(archs.len() >= 10 && archs.iter().all(|a| !a.classes.is_empty()));
    let on_disk = fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("arch")).unwrap().count();
    assert_eq!(archs.len(), on_disk, "every file of the folder is in the list");
}
