//! Checkpoints that fit no family: what is said of them.

#![allow(clippy::unwrap_used, reason = "tests")]

mod writer;

use awqc_frontends::{ImportError, open};
use serde_json::{Value as Json, json};
use tempfile::TempDir;
use writer::{Tensor, Tensors, folder, llama_config, llama_tensors};

fn refused_with(config: &Json, tensors: &Tensors, files: &[&str]) -> ImportError {
    let dir = TempDir::new().unwrap();
    folder(dir.path(), config, tensors);
    files.iter().for_each(|f| std::fs::write(dir.path().join(f), "").unwrap());
    open(dir.path()).err().unwrap()
}

fn of_class(class: &str) -> Json {
    let mut config = llama_config();
    config["architectures"] = json!([class]);
    config
}

/// The tensors under other names.
fn renamed(name: impl Fn(&str) -> String) -> Tensors {
    llama_tensors().into_iter().map(|(n, t)| (name(&n), t)).collect()
}

fn says(e: &ImportError, words: &[&str]) {
    let text = e.to_string();
    words.iter().for_each(|w| assert!(text.contains(w), "`{w}` is not in: {text}"));
}

#[test]
fn an_unknown_class_is_compared_with_what_is_known() {
    let e = refused_with(&of_class("HouseBrewForCausalLM"), &llama_tensors(), &[]);
    assert!(e.is_unsupported());
    says(
        &e,
        &[
            "`HouseBrewForCausalLM`",
            "nearest family is `llama`: 12 of 12 kinds",
            "set `architectures` to [\"LlamaForCausalLM\"]",
        ],
    );
    assert!(!e.to_string().contains("missing") && !e.to_string().contains("surplus"), "{e}");
    // Other norms, and no gate.
    let mut tensors = renamed(|n| n.replace("input_layernorm", "norm_in"));
    tensors.retain(|n, _| !n.contains("gate"));
    let e = refused_with(&of_class("HouseBrewForCausalLM"), &tensors, &[]);
    says(
        &e,
        &[
            "10 of 11 kinds",
            "missing: `model.layers.*.input_layernorm.weight`, `model.layers.*.mlp.gate_proj.weight`",
            "surplus: `model.layers.*.norm_in.weight`",
        ],
    );
    let e = refused_with(
        &of_class("HouseBrewForCausalLM"),
        &Tensors::from([("a".into(), Tensor::counted("a", &[2]))]),
        &[],
    );
    says(&e, &["No known family is near"]);
}

#[test]
fn own_code_is_never_run() {
    let e = refused_with(&of_class("HouseBrewForCausalLM"), &llama_tensors(), &["modeling_house.py", "notes.txt"]);
    assert!(e.is_unsupported());
    says(
        &e,
        &["brings its own Python code (`modeling_house.py`)", "runs no code", "nearest family is `llama`", "arch/"],
    );
    let mut config = of_class("HouseBrewForCausalLM");
    config["auto_map"] = json!({"AutoModelForCausalLM": "modeling_house.HouseBrewForCausalLM"});
    says(&refused_with(&config, &llama_tensors(), &[]), &["(`auto_map`)"]);
}

#[test]
fn tensors_of_another_family_or_under_other_names_are_recognised() {
    let e = refused_with(&of_class("Qwen3ForCausalLM"), &llama_tensors(), &[]);
    assert!(!e.is_unsupported());
    says(
        &e,
        &["do not fit the model", "nearest family is `llama`", "`model.layers.0.self_attn.q_norm.weight` is missing"],
    );
    let e = refused_with(&llama_config(), &renamed(|n| format!("base_model.model.{n}")), &[]);
    says(
        &e,
        &["nearest family is `llama`: 12 of 12 kinds of tensors fit it without `base_model.model.` before their names"],
    );
    let e = refused_with(&llama_config(), &renamed(|n| n.replacen("model.", "", 1)), &[]);
    says(&e, &["nearest family is `llama`: 11 of 12 kinds of tensors fit it with `model.` before their names"]);
    // What is merely incomplete is said to be nothing else.
    let mut tensors = llama_tensors();
    tensors.remove("model.norm.weight");
    let e = refused_with(&llama_config(), &tensors, &[]);
    says(&e, &["`model.norm.weight` is missing"]);
    assert!(!e.to_string().contains("nearest"), "{e}");
}
