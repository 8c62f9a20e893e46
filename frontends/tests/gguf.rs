//! GGUF files: the same model as a Hugging Face folder, from another container.

mod writer;

use std::fs;

use awqc_frontends::{Contents, Imported, open};
use awqc_ir::TensorSource;
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use writer::{Gguf, Meta, Tensor, folder, llama_config, llama_gguf, llama_tensors};

fn import(g: &Gguf) -> Result<Imported, String> {
    let dir = TempDir::new().unwrap();
    open(&g.write(dir.path())).map_err(|e| e.to_string())
}

fn file(m: &Imported, name: &str) -> Json {
    let file = m.files.iter().find(|f| f.name == name).unwrap();
    match &file.contents {
        Contents::Bytes(bytes) => serde_json::from_slice(bytes).unwrap(),
        Contents::Path(path) => panic!("{}", path.display()),
    }
}

#[test]
fn a_model_is_the_same_from_both_containers() {
    let dir = TempDir::new().unwrap();
    folder(dir.path(), &llama_config(), &llama_tensors());
    let (hf, gguf) = (open(dir.path()).unwrap(), import(&llama_gguf()));
    // The file is gone, its head is known: open again where it stays.
    assert!(gguf.is_ok());
    let gguf = open(&llama_gguf().write(dir.path())).unwrap();
    assert_eq!(awqc_ir::print(&gguf.module), awqc_ir::print(&hf.module));
    assert_eq!(gguf.source.names(), hf.source.names());
    for name in hf.source.names() {
        assert_eq!(gguf.source.read_f32(&name).unwrap(), hf.source.read_f32(&name).unwrap(), "{name}");
    }
    for key in [
        "hidden_size",
        "rms_norm_eps",
        "rope_theta",
        "head_dim",
        "vocab_size",
        "tie_word_embeddings",
        "architectures",
        "model_type",
    ] {
        assert_eq!(gguf.config.get(key), hf.config.get(key), "{key}");
    }
}

#[test]
fn the_made_up_configuration_imports_as_a_folder() {
    let dir = TempDir::new().unwrap();
    let m = open(&llama_gguf().write(dir.path())).unwrap();
    folder(dir.path(), &Json::Object(m.config.clone()), &llama_tensors());
    assert_eq!(awqc_ir::print(&open(dir.path()).unwrap().module), awqc_ir::print(&m.module));
}

#[test]
fn the_tokenizer_is_complete() {
    let m = import(&llama_gguf()).unwrap();
    let t = file(&m, "tokenizer.json");
    assert_eq!(t["model"]["vocab"]["Ġab"], 6);
    assert_eq!(t["model"]["merges"], json!(["a b", "Ġ ab"]));
    assert_eq!(t["added_tokens"][0]["content"], "<|end|>");
    assert_eq!(t["added_tokens"].as_array().unwrap().len(), 1);
    assert_eq!(t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"], r"\p{N}");
    let config = file(&m, "tokenizer_config.json");
    assert_eq!((&config["eos_token"], &config["chat_template"]), (&json!("<|end|>"), &json!("{{ messages }}")));
    assert_eq!(file(&m, "generation_config.json"), json!({"eos_token_id": 0}));
    assert!(m.notes.is_empty());
}

#[test]
fn scored_vocabularies_become_merges_in_order_of_score() {
    let mut g = llama_gguf();
    g.metadata.retain(|(k, _)| !k.starts_with("tokenizer."));
    let tokens = ["<unk>", "<s>", "<0x0A>", "a", "b", "ab", "▁", "▁ab", "▁a", "c"];
    g.set("tokenizer.ggml.model", Meta::Str("llama".into()))
        .set("tokenizer.ggml.tokens", Meta::Strs(tokens.map(String::from).to_vec()))
        .set("tokenizer.ggml.scores", Meta::Floats(vec![0.0, 0.0, 0.0, -8.0, -9.0, -2.0, -7.0, -3.0, -1.0, -10.0]))
        .set("tokenizer.ggml.token_type", Meta::Ints(vec![2, 3, 6, 1, 1, 1, 1, 1, 1, 1]))
        .set("tokenizer.ggml.bos_token_id", Meta::U32(1));
    let t = file(&import(&g).unwrap(), "tokenizer.json");
    assert_eq!(t["model"]["merges"], json!(["▁ a", "a b", "▁ ab", "▁a b"]));
    assert_eq!((&t["model"]["byte_fallback"], &t["model"]["unk_token"]), (&json!(true), &json!("<unk>")));
    assert_eq!(t["post_processor"]["single"][0]["SpecialToken"]["id"], "<s>");
}

#[test]
fn an_unknown_tokenizer_leaves_a_note() {
    let mut g = llama_gguf();
    g.metadata.retain(|(k, _)| k != "tokenizer.ggml.pre");
    g.set("tokenizer.ggml.pre", Meta::Str("martian".into()));
    let m = import(&g).unwrap();
    assert!(m.files.is_empty() && m.notes[0].contains("martian"), "{:?}", m.notes);
}

#[test]
fn gains_less_one_and_frequency_factors_are_restored() {
    let mut g = llama_gguf();
    g.f32("rope_freqs.weight", &Tensor { shape: vec![2], data: vec![1.0, 8.0] });
    let m = import(&g).unwrap();
    let text = awqc_ir::print(&m.module);
    assert!(text.contains("long(short=[1.0,8.0], long=[1.0,8.0], original=16.0, attention=1.0)"), "{text}");
}

#[test]
fn quantized_tensors_are_decoded() {
    let mut g = llama_gguf();
    let bytes: Vec<u8> = (0..4).flat_map(|r| [&[0x00, 0x3c][..], &[r; 32]].concat()).collect();
    g.tensors.push(("extra".into(), vec![4, 32], 8, bytes));
    let dir = TempDir::new().unwrap();
    let e = open(&g.write(dir.path())).err().unwrap();
    assert!(e.to_string().contains("`extra` is not part of the model"), "{e}");
    let header = awqc_frontends::gguf::Gguf::open(&dir.path().join("model.gguf")).unwrap();
    assert_eq!(
        (header.header().tensors["extra"].shape.as_slice(), header.header().tensors["extra"].len),
        (&[4, 32][..], 136)
    );
}

#[test]
fn metadata_of_the_wrong_kind_is_named() {
    for (key, value, word) in [
        ("llama.block_count", Meta::Str("two".into()), "`num_hidden_layers`"),
        ("llama.attention.head_count", Meta::U32(3), "num_attention_heads"),
        ("general.architecture", Meta::U32(1), "general.architecture"),
        ("tokenizer.ggml.token_type", Meta::Ints(vec![1]), "tokenizer.ggml.token_type"),
        ("tokenizer.ggml.eos_token_id", Meta::U32(99), "tokenizer.ggml.eos_token_id"),
        ("general.alignment", Meta::U32(7), "general.alignment"),
    ] {
        let mut g = llama_gguf();
        g.metadata.retain(|(k, _)| k != key);
        g.set(key, value);
        let e = import(&g).err().unwrap();
        assert!(e.contains(word), "{key}: {e}");
    }
    let mut g = llama_gguf();
    g.metadata.retain(|(k, _)| k != "general.architecture");
    g.set("general.architecture", Meta::Str("martian".into()));
    let dir = TempDir::new().unwrap();
    let e = open(&g.write(dir.path())).err().unwrap();
    assert!(e.is_unsupported() && e.to_string().contains("`martian`"), "{e}");
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("bad.gguf");
    let head = |tensors: u64, keys: u64, rest: &[u8]| {
        [b"GGUF", &3u32.to_le_bytes()[..], &tensors.to_le_bytes(), &keys.to_le_bytes(), rest].concat()
    };
    let key = |ty: u32, rest: &[u8]| [&1u64.to_le_bytes()[..], b"k", &ty.to_le_bytes(), rest].concat();
    let array = |ty: u32, n: u64| key(9, &[&ty.to_le_bytes()[..], &n.to_le_bytes()].concat());
    for (bytes, word) in [
        (head(u64::MAX, 0, &[]), "tensors do not fit"),
        (head(0, u64::MAX, &[]), "metadata entries do not fit"),
        (head(0, 1, &array(8, 1 << 60)), "strings do not fit"),
        (head(0, 1, &array(12, u64::MAX)), "array elements do not fit"),
        (head(0, 1, &key(8, &[&u64::MAX.to_le_bytes()[..], &[0; 8]].concat())), "do not fit"),
        (head(0, 1, &key(77, &[0; 8])), "unknown value type 77"),
    ] {
        fs::write(&path, &bytes).unwrap();
        let e = open(&path).err().unwrap().to_string();
        assert!(e.contains(word), "{e}");
    }
    fs::write(&path, b"GGUF\x00\x00\x00\x03").unwrap();
    assert!(open(&path).err().unwrap().to_string().contains("big-endian"));
    fs::write(&path, b"GGUF\x01\x00\x00\x00").unwrap();
    assert!(open(&path).err().unwrap().to_string().contains("version 1"));
}
