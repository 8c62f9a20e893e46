//! Writers of tiny checkpoints for the tests: safetensors and GGUF files from names, shapes and numbers.

#![allow(dead_code, unreachable_pub, reason = "each test file uses a part")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value as Json, json};

/// A float tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: Vec<f32>,
}

impl Tensor {
    /// Numbers that differ from element to element and from name to name.
    pub fn counted(name: &str, shape: &[usize]) -> Self {
        let seed: usize = name.bytes().map(usize::from).sum();
        let data = (0..shape.iter().product()).map(|i: usize| ((i * 7 + seed) % 31) as f32 / 16.0 - 1.0).collect();
        Self { shape: shape.to_vec(), data }
    }
}

pub type Tensors = BTreeMap<String, Tensor>;

/// A safetensors file of f32 tensors.
pub fn safetensors(tensors: &Tensors) -> Vec<u8> {
    let mut header = Map::new();
    let mut data = Vec::new();
    for (name, t) in tensors {
        let start = data.len();
        data.extend(t.data.iter().flat_map(|v| v.to_le_bytes()));
        header.insert(name.clone(), json!({"dtype": "F32", "shape": t.shape, "data_offsets": [start, data.len()]}));
    }
    raw_safetensors(&Json::Object(header).to_string(), &data)
}

/// A safetensors file of this header and data.
pub fn raw_safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

/// A folder with `config.json` and `model.safetensors`.
pub fn folder(dir: &Path, config: &Json, tensors: &Tensors) {
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    fs::write(dir.join("model.safetensors"), safetensors(tensors)).unwrap();
}

/// The configuration of a model of two tiny layers: GQA, own head size, untied head.
pub fn llama_config() -> Json {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 12, "intermediate_size": 20,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 10,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 16,
        "tie_word_embeddings": false,
    })
}

/// The tensors that go with [`llama_config`].
pub fn llama_tensors() -> Tensors {
    let mut shapes: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".into(), vec![10, 12]),
        ("model.norm.weight".into(), vec![12]),
        ("lm_head.weight".into(), vec![10, 12]),
    ];
    for i in 0..2 {
        for (name, shape) in [
            ("input_layernorm.weight", vec![12]),
            ("self_attn.q_proj.weight", vec![16, 12]),
            ("self_attn.k_proj.weight", vec![8, 12]),
            ("self_attn.v_proj.weight", vec![8, 12]),
            ("self_attn.o_proj.weight", vec![12, 16]),
            ("post_attention_layernorm.weight", vec![12]),
            ("mlp.gate_proj.weight", vec![20, 12]),
            ("mlp.up_proj.weight", vec![20, 12]),
            ("mlp.down_proj.weight", vec![12, 20]),
        ] {
            shapes.push((format!("model.layers.{i}.{name}"), shape));
        }
    }
    shapes.into_iter().map(|(name, shape)| (name.clone(), Tensor::counted(&name, &shape))).collect()
}

/// A value of GGUF metadata.
#[derive(Clone, Debug)]
pub enum Meta {
    U32(u32),
    U64(u64),
    F32(f32),
    Bool(bool),
    Str(String),
    Strs(Vec<String>),
    Ints(Vec<i32>),
    Floats(Vec<f32>),
}

/// Writes GGUF files, version 3.
#[derive(Clone, Debug, Default)]
pub struct Gguf {
    pub metadata: Vec<(String, Meta)>,
    /// Name, shape with the outermost axis first, type id, bytes.
    pub tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

impl Gguf {
    pub fn set(&mut self, key: &str, value: Meta) -> &mut Self {
        self.metadata.push((key.to_owned(), value));
        self
    }

    pub fn f32(&mut self, name: &str, t: &Tensor) -> &mut Self {
        let bytes = t.data.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.tensors.push((name.to_owned(), t.shape.iter().map(|d| *d as u64).collect(), 0, bytes));
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            text(&mut out, key);
            let array = |out: &mut Vec<u8>, ty: u32, len: usize| {
                out.extend(9u32.to_le_bytes());
                out.extend(ty.to_le_bytes());
                out.extend((len as u64).to_le_bytes());
            };
            match value {
                Meta::U32(v) => out.extend([4u32.to_le_bytes(), v.to_le_bytes()].concat()),
                Meta::U64(v) => {
                    out.extend(10u32.to_le_bytes());
                    out.extend(v.to_le_bytes());
                }
                Meta::F32(v) => out.extend([6u32.to_le_bytes(), v.to_le_bytes()].concat()),
                Meta::Bool(v) => {
                    out.extend(7u32.to_le_bytes());
                    out.push(u8::from(*v));
                }
                Meta::Str(s) => {
                    out.extend(8u32.to_le_bytes());
                    text(&mut out, s);
                }
                Meta::Strs(list) => {
                    array(&mut out, 8, list.len());
                    list.iter().for_each(|s| text(&mut out, s));
                }
                Meta::Ints(list) => {
                    array(&mut out, 5, list.len());
                    out.extend(list.iter().flat_map(|v| v.to_le_bytes()));
                }
                Meta::Floats(list) => {
                    array(&mut out, 6, list.len());
                    out.extend(list.iter().flat_map(|v| v.to_le_bytes()));
                }
            }
        }
        let mut data = Vec::new();
        for (name, shape, ty, bytes) in &self.tensors {
            text(&mut out, name);
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(ty.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().div_ceil(32) * 32, 0);
        }
        out.resize(out.len().div_ceil(32) * 32, 0);
        out.extend(data);
        out
    }

    pub fn write(&self, dir: &Path) -> PathBuf {
        let path = dir.join("model.gguf");
        fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// A rotary projection as GGUF files have it: the rows of each head viewed as `[2, D/2]` and these axes exchanged.
pub fn permuted(t: &Tensor, heads: usize) -> Tensor {
    let (rows, cols) = (t.shape[0], t.data.len() / t.shape[0]);
    let per = rows / heads;
    let mut data = Vec::new();
    for h in 0..heads {
        for j in 0..per / 2 {
            for half in 0..2 {
                let row = h * per + half * per / 2 + j;
                data.extend_from_slice(&t.data[row * cols..(row + 1) * cols]);
            }
        }
    }
    Tensor { shape: t.shape.clone(), data }
}

/// [`llama_config`] and [`llama_tensors`] as a GGUF file, with a small byte-level vocabulary.
pub fn llama_gguf() -> Gguf {
    let mut g = Gguf::default();
    g.set("general.architecture", Meta::Str("llama".into()));
    for (key, value) in [
        ("block_count", 2),
        ("embedding_length", 12),
        ("feed_forward_length", 20),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 2),
        ("attention.key_length", 4),
        ("rope.dimension_count", 4),
        ("context_length", 16),
    ] {
        g.set(&format!("llama.{key}"), Meta::U32(value));
    }
    g.set("llama.attention.layer_norm_rms_epsilon", Meta::F32(1e-5)).set("llama.rope.freq_base", Meta::F32(10000.0));
    let names = [
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ];
    for (name, t) in llama_tensors() {
        let theirs = names.iter().fold(name.replace("model.layers.", "blk."), |n, (a, b)| n.replace(a, b));
        match () {
            () if name.contains("q_proj") => g.f32(&theirs, &permuted(&t, 4)),
            () if name.contains("k_proj") => g.f32(&theirs, &permuted(&t, 2)),
            () => g.f32(&theirs, &t),
        };
    }
    let tokens = ["<|end|>", "a", "b", "c", "Ġ", "ab", "Ġab", "1", "2", "Ċ"];
    g.set("tokenizer.ggml.model", Meta::Str("gpt2".into()))
        .set("tokenizer.ggml.pre", Meta::Str("smollm".into()))
        .set("tokenizer.ggml.tokens", Meta::Strs(tokens.map(String::from).to_vec()))
        .set("tokenizer.ggml.token_type", Meta::Ints(vec![3, 1, 1, 1, 1, 1, 1, 1, 1, 1]))
        .set("tokenizer.ggml.merges", Meta::Strs(vec!["a b".into(), "Ġ ab".into()]))
        .set("tokenizer.ggml.eos_token_id", Meta::U32(0))
        .set("tokenizer.chat_template", Meta::Str("{{ messages }}".into()));
    g
}

/// The pickle that `torch.save` writes for a dict of f32 tensors, each with a storage of its own: `0`, `1`, …
pub fn pickle(tensors: &Tensors) -> Vec<u8> {
    let text = |out: &mut Vec<u8>, s: &str| {
        out.push(b'X');
        out.extend((s.len() as u32).to_le_bytes());
        out.extend(s.bytes());
    };
    let int = |out: &mut Vec<u8>, n: usize| {
        out.push(b'J');
        out.extend((n as u32).to_le_bytes());
    };
    let mut out = b"\x80\x02}(".to_vec();
    for (i, (name, t)) in tensors.iter().enumerate() {
        text(&mut out, name);
        out.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend(b"ctorch\nFloatStorage\n");
        text(&mut out, &i.to_string());
        text(&mut out, "cpu");
        int(&mut out, t.shape.iter().product());
        out.extend(b"tQK\x00(");
        t.shape.iter().for_each(|d| int(&mut out, *d));
        out.extend(b"t(");
        (0..t.shape.len()).for_each(|axis| int(&mut out, t.shape[axis + 1..].iter().product()));
        out.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend(b"u.");
    out
}

/// A zip archive of a pickle and the storages of these tensors, with nothing compressed.
pub fn zip(pickle: &[u8], tensors: &Tensors) -> Vec<u8> {
    let bytes = |t: &Tensor| t.data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let storages = tensors.values().enumerate().map(|(i, t)| (format!("x/data/{i}"), bytes(t)));
    let entries: Vec<(String, Vec<u8>)> =
        std::iter::once(("x/data.pkl".to_owned(), pickle.to_vec())).chain(storages).collect();
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, data) in &entries {
        let crc = crc32fast::hash(data).to_le_bytes();
        let (len, at) = ((data.len() as u32).to_le_bytes(), (out.len() as u32).to_le_bytes());
        let sizes = [&crc[..], &len, &len, &(name.len() as u16).to_le_bytes(), &[0, 0]].concat();
        out.extend([&b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0"[..], &sizes, name.as_bytes(), data].concat());
        let rest = [&sizes[..], &[0; 10], &at, name.as_bytes()].concat();
        directory.extend([&b"PK\x01\x02\x14\0\x14\0\0\0\0\0\0\0\0\0"[..], &rest].concat());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let (size, at) = ((directory.len() as u32).to_le_bytes(), (out.len() as u32).to_le_bytes());
    out.extend([&directory[..], b"PK\x05\x06\0\0\0\0", &count, &count, &size, &at, &[0, 0]].concat());
    out
}
