//! GGUF files: the same model as a Hugging Face folder, from another container.

#![allow(clippy::unwrap_used, reason = "tests")]

mod writer;

use std::fs;
use std::path::{Path, PathBuf};

use awqc_frontends::{Contents, Imported, open};
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
    let tokens = ["<unk>", "<s>", "<0x0A>", "a", "b", "ab", "▁", "▁ab", "▁a", "<x>"];
    g.set("tokenizer.ggml.model", Meta::Str("llama".into()))
        .set("tokenizer.ggml.tokens", Meta::Strs(tokens.map(String::from).to_vec()))
        .set("tokenizer.ggml.scores", Meta::Floats(vec![0.0, 0.0, 0.0, -8.0, -9.0, -2.0, -7.0, -3.0, -1.0, -10.0]))
        .set("tokenizer.ggml.token_type", Meta::Ints(vec![2, 3, 6, 1, 1, 1, 4, 1, 1, 4]))
        .set("tokenizer.ggml.bos_token_id", Meta::U32(1));
    let t = file(&import(&g).unwrap(), "tokenizer.json");
    assert_eq!(t["model"]["merges"], json!(["▁ a", "a b", "▁ ab", "▁a b"]));
    assert_eq!((&t["model"]["byte_fallback"], &t["model"]["unk_token"]), (&json!(true), &json!("<unk>")));
    let added: Vec<&Json> = t["added_tokens"].as_array().unwrap().iter().map(|a| &a["content"]).collect();
    assert_eq!(added, ["<unk>", "<s>", "<x>"]);
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
fn frequency_factors_become_configuration() {
    let mut g = llama_gguf();
    g.f32("rope_freqs.weight", &Tensor { shape: vec![2], data: vec![1.0, 8.0] });
    let m = import(&g).unwrap();
    let text = awqc_ir::print(&m.module);
    assert!(text.contains("long(short=[1.0,8.0], long=[1.0,8.0], original=16.0, attention=1.0)"), "{text}");
}

/// The golden model of `folder` as a GGUF file: `names` are pairs of what stands in our names and in theirs, `change`
/// does to the numbers what the converter does.
fn converted(
    folder: &Path,
    architecture: &str,
    keys: &[(&str, &str)],
    names: &[(&str, &str)],
    change: impl Fn(&str, Tensor) -> Tensor,
) -> Gguf {
    let m = open(folder).unwrap();
    let mut g = Gguf::default();
    g.set("general.architecture", Meta::Str(architecture.into()));
    for (theirs, ours) in keys {
        let value = match m.config[*ours].as_u64() {
            Some(n) => Meta::U32(n as u32),
            None => Meta::F32(m.config[*ours].as_f64().unwrap() as f32),
        };
        g.set(&format!("{architecture}.{theirs}"), value);
    }
    for name in m.source.names() {
        let t = Tensor { shape: m.source.info(&name).unwrap().shape, data: m.source.read_f32(&name).unwrap() };
        let theirs = names.iter().fold(name.clone(), |n, (a, b)| n.replace(a, b));
        g.f32(&theirs, &change(&name, t));
    }
    g
}

fn same_as(folder: &Path, g: &Gguf) {
    let dir = TempDir::new().unwrap();
    let (hf, gguf) = (open(folder).unwrap(), open(&g.write(dir.path())).unwrap());
    assert_eq!(gguf.source.names(), hf.source.names());
    for name in hf.source.names() {
        assert_eq!(gguf.source.info(&name).unwrap().shape, hf.source.info(&name).unwrap().shape, "{name}");
        let pairs = gguf.source.read_f32(&name).unwrap().into_iter().zip(hf.source.read_f32(&name).unwrap());
        assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-6), "{name}");
    }
    // Everything but the element type, which is f32 from such a file.
    let text = |m: &Imported| awqc_ir::print(&m.module).replace("bf16", "f32").replace("f16", "f32");
    let squeeze = |s: String| s.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(squeeze(text(&gguf)), squeeze(text(&hf)));
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name)
}

#[test]
fn gains_that_were_stored_plus_one_are_restored() {
    let keys = [
        ("block_count", "num_hidden_layers"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
        ("rope.freq_base", "rope_theta"),
        ("attention.sliding_window", "sliding_window"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ];
    let names = [
        ("model.layers.", "blk."),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "ffn_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
    ];
    // Such files do not carry the scale of the scores: give the model the one that is assumed, the size of a head.
    let dir = TempDir::new().unwrap();
    fs::copy(golden("gemma2").join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    let mut config: Json = serde_json::from_slice(&fs::read(golden("gemma2").join("config.json")).unwrap()).unwrap();
    config["query_pre_attn_scalar"] = config["head_dim"].clone();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let folder = dir.path();
    let g = converted(folder, "gemma2", &keys, &names, |name, mut t| {
        if name.contains("norm") {
            t.data.iter_mut().for_each(|v| *v += 1.0);
        }
        t
    });
    same_as(folder, &g);
}

#[test]
fn a_shared_table_has_one_type() {
    // Most numbers are half precision; the embedding, which is the head as well, is presented as f32 like all others.
    let mut g = llama_gguf();
    g.tensors.retain(|(n, ..)| n != "output.weight");
    for (_, shape, ty, bytes) in g.tensors.iter_mut().filter(|(_, s, ..)| s.len() == 2) {
        *ty = 1;
        *bytes = vec![0; shape.iter().product::<u64>() as usize * 2];
    }
    let text = awqc_ir::print(&import(&g).unwrap().module);
    let of = |name: &str| -> Vec<String> {
        let lines = text.lines().filter(|l| l.contains(name));
        lines.map(|l| l.rsplit(": ").next().unwrap().to_owned()).collect()
    };
    assert_eq!(of("model.embed_tokens.weight"), ["f16[10,12]", "f16[10,12]"]);
    assert_eq!(of("model.norm.weight"), ["f32[12]"]);
}

#[test]
fn transposed_matrices_are_restored() {
    let keys = [
        ("block_count", "n_layer"),
        ("embedding_length", "n_embd"),
        ("attention.head_count", "n_head"),
        ("context_length", "n_positions"),
        ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    ];
    let names = [
        ("transformer.h.", "blk."),
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
        ("ln_1", "attn_norm"),
        ("ln_2", "ffn_norm"),
        ("transformer.ln_f", "output_norm"),
        ("transformer.wte", "token_embd"),
        ("transformer.wpe", "position_embd"),
    ];
    let folder = golden("gpt2");
    let mut g = converted(&folder, "gpt2", &keys, &names, |name, t| {
        if !name.contains(".c_") || t.shape.len() != 2 {
            return t;
        }
        let (rows, cols) = (t.shape[0], t.shape[1]);
        let data = (0..cols).flat_map(|c| (0..rows).map(move |r| r * cols + c)).map(|i| t.data[i]).collect();
        Tensor { shape: vec![cols, rows], data }
    });
    let ffn = g.tensors.iter().find(|(n, ..)| n == "blk.0.ffn_up.bias").unwrap().1[0];
    g.set("gpt2.feed_forward_length", Meta::U32(ffn as u32));
    same_as(&folder, &g);
}

#[test]
fn quantized_tensors_are_decoded() {
    // Row r of the embedding becomes the numbers r, r, … in Q8_0; its 12 channels become 32.
    let mut config = llama_config();
    config["hidden_size"] = json!(32);
    let mut g = llama_gguf();
    g.metadata.retain(|(k, _)| k != "llama.embedding_length");
    g.set("llama.embedding_length", Meta::U32(32));
    for (_, shape, ty, bytes) in &mut g.tensors {
        shape.iter_mut().filter(|d| **d == 12).for_each(|d| *d = 32);
        let rows = shape.iter().product::<u64>() / 32;
        if shape.last() == Some(&32) && shape.len() == 2 {
            *ty = 8;
            *bytes = (0..rows).flat_map(|r| [&[0x00, 0x3c][..], &[r as u8; 32]].concat()).collect();
        } else {
            bytes.resize(shape.iter().product::<u64>() as usize * 4, 0);
        }
    }
    let dir = TempDir::new().unwrap();
    let m = open(&g.write(dir.path())).unwrap();
    let table = m.source.read_f32("model.embed_tokens.weight").unwrap();
    assert!(table.len() == 320 && table.chunks(32).enumerate().all(|(r, row)| row.iter().all(|v| *v == r as f32)));
    // Rows of the rotary projections return to their places.
    let k = m.source.read_f32("model.layers.0.self_attn.k_proj.weight").unwrap();
    let rows: Vec<f32> = k.chunks(32).map(|r| r[0]).collect();
    assert_eq!(rows, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
    let mut bad = g.clone();
    bad.tensors[0].2 = 10;
    let e = open(&bad.write(dir.path())).err().unwrap();
    assert!(e.is_unsupported() && e.to_string().contains("Q2_K"), "{e}");
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
