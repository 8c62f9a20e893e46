//! Saved logits stand in for the model that they are of; files that cannot are refused with the reason.

use std::fs;

use crate::cli::{awqc, compile, golden, json, path, scratch};

fn number(json: &serde_json::Value, key: &str) -> f64 {
    json[key].as_f64().unwrap_or_else(|| panic!("`{key}` is no number in {json}"))
}

#[test]
fn saved_logits_compare_as_the_model_itself() {
    for name in ["llama", "gemma2", "gpt2"] {
        let dir = scratch();
        let (model, ids) = (golden(name), golden(&format!("{name}/expected.safetensors")));
        let (out, base) = (path(&dir, "out"), path(&dir, "base.safetensors"));
        assert_eq!(awqc(&compile(&model, &ids, &out, &["--bits", "3"])).code, 0);
        let saving = json(&["eval", &model, "--ids", &ids, "--save-logits", &base, "--json", "-q"]);
        let plain = json(&["eval", &model, "--ids", &ids, "--json", "-q"]);
        assert_eq!(saving, plain, "{name}: saving changes nothing");

        let direct = json(&["eval", &out, "--ids", &ids, "--against", &model, "--json", "-q"]);
        let saved = json(&["eval", &out, "--ids", &ids, "--base-logits", &base, "--json", "-q"]);
        assert_eq!(saved["perplexity"], direct["perplexity"], "{name}");
        assert_eq!(saved["top1_agreement"], direct["top1_agreement"], "{name}");
        for key in ["reference_perplexity", "perplexity_ratio", "perplexity_ratio_error"] {
            assert!((number(&saved, key) / number(&direct, key) - 1.0).abs() < 1e-5, "{name}: {key} {saved} {direct}");
        }
        assert!(number(&direct, "kl_divergence") > 1e-2, "{name}: the comparison has something to see: {direct}");
        for key in ["kl_divergence", "kl_error", "kl_median", "kl_p99", "kl_max"] {
            let (a, b) = (number(&saved, key), number(&direct, key));
            assert!((a - b).abs() < 1e-3 * b, "{name}: {key} {a} {b}");
        }
        // A model is as near to its own logits as the codes are to the numbers.
        let own = json(&["eval", &model, "--ids", &ids, "--base-logits", &base, "--json", "-q"]);
        assert!(number(&own, "kl_divergence") < 1e-6 && number(&own, "top1_agreement") == 1.0, "{name}: {own}");
        assert!((number(&own, "perplexity_ratio") - 1.0).abs() < 1e-5, "{name}: {own}");
        // Fewer windows of the same text will do.
        let less = json(&["eval", &out, "--ids", &ids, "--base-logits", &base, "--chunks", "1", "--json", "-q"]);
        assert!(less["perplexity_error"].is_null(), "one window says nothing of the spread: {less}");
    }
}

#[test]
fn damaged_and_foreign_logits_are_refused_with_the_reason() {
    let dir = scratch();
    let (model, ids) = (golden("llama"), golden("llama/expected.safetensors"));
    let (base, other) = (path(&dir, "base.safetensors"), path(&dir, "other.safetensors"));
    assert_eq!(awqc(&["eval", &model, "--ids", &ids, "--save-logits", &base, "-q"]).code, 0);
    let bytes = fs::read(&base).expect("the saved logits");
    let refuses = |model: &str, ids: &str, file: &str, says: &str| {
        let done = awqc(&["eval", model, "--ids", ids, "--base-logits", file, "-q"]);
        assert_eq!(done.code, 4, "`{says}`: {}", done.err);
        assert!(done.err.contains(says) && done.out.is_empty(), "`{says}` is not in: {}", done.err);
    };
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = bytes.clone();
        change(&mut bytes);
        fs::write(&other, bytes).expect("written");
    };
    refuses(&model, &ids, &path(&dir, "none"), "none");
    changed(&|b| b.truncate(4));
    refuses(&model, &ids, &other, "hold no header");
    changed(&|b| b.truncate(b.len() - 3));
    refuses(&model, &ids, &other, "its header describes");
    changed(&|b| b.extend([0; 2]));
    refuses(&model, &ids, &other, "its header describes");
    changed(&|b| b[0] -= 8);
    refuses(&model, &ids, &other, "damaged: its header");
    changed(&|b| b[7] = 0xff);
    refuses(&model, &ids, &other, "hold no header");
    changed(&|b| *b.last_mut().expect("bytes") ^= 1);
    refuses(&model, &ids, &other, "checksum of row 21 differs");
    changed(&|b| {
        let at = b.windows(4).position(|w| w == b"U16\"").expect("the header") + 1;
        b[at] = b'3';
    });
    refuses(&model, &ids, &other, "contradicts itself");
    refuses(&model, &ids, &golden("llama/model.safetensors"), "not a file of saved logits");
    refuses(&model, &golden("mistral/expected.safetensors"), &base, "other tokens");
    // The same tokens, but a model that knows more of them.
    let larger = golden("llama-mha-tied");
    assert_eq!(awqc(&["eval", &larger, "--ids", &ids, "--save-logits", &other, "-q"]).code, 0);
    refuses(&model, &ids, &other, "vocabularies differ: 160 tokens and 384");
    let done = awqc(&["eval", &model, "--ids", &ids, "--base-logits", &base, "--against", &model]);
    assert_eq!(done.code, 2, "{}", done.err);
    // The base would be gone: by the same name, and by another of the same file.
    let again = path(&dir, "./base.safetensors");
    for save in [&base, &again] {
        let done = awqc(&["eval", &model, "--ids", &ids, "--base-logits", &base, "--save-logits", save, "-q"]);
        assert!(done.code == 2 && done.err.contains("would replace the base"), "{save}: {}", done.err);
        assert_eq!(fs::read(&base).expect("the saved logits"), bytes);
    }
    // Windows of ids have their length.
    let done = awqc(&["eval", &model, "--ids", &ids, "--context", "8", "-q"]);
    assert!(done.code == 2 && done.err.contains("--context"), "{}", done.err);
    // A file that cannot be written is found before the model runs, and nothing is left.
    for (file, says) in [("no/folder", "does not exist"), ("", "this is a folder")] {
        let done = awqc(&["eval", &model, "--ids", &ids, "--save-logits", &path(&dir, file), "-q"]);
        assert!(done.code == 2 && done.err.contains(says) && done.out.is_empty(), "{}", done.err);
    }
    assert_eq!(fs::read_dir(dir.path()).expect("the folder").count(), 2);
}
