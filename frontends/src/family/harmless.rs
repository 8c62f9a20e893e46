//! Configuration keys that change nothing of what a model computes, whatever its family. Every other key that the family
//! does not read is an error: it might stand for something that this program does not do.

use std::path::Path;

use serde_json::{Map, Value as Json};

use super::{Family, show};
use crate::error::ImportError;

/// What the file is, how it was made, what it asks of other programs.
const BOOKKEEPING: &[&str] = &[
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_commit_hash",
    "_name_or_path",
    "architectures",
    "attn_implementation",
    "auto_map",
    "cache_implementation",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "init_device",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "license",
    "model_type",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "problem_type",
    "quantization_config",
    "return_dict",
    "task_specific_params",
    "tf_legacy_loss",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "verbose",
];

/// What matters while a model is trained.
const TRAINING: &[&str] = &[
    "activation_dropout",
    "attention_dropout",
    "attn_pdrop",
    "aux_loss_alpha",
    "classifier_dropout",
    "dropout",
    "emb_pdrop",
    "embd_pdrop",
    "embedding_dropout",
    "hidden_dropout",
    "init_std",
    "initializer_factor",
    "initializer_range",
    "input_jitter_noise",
    "layerdrop",
    "resid_pdrop",
    "residual_dropout",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "seq_aux",
];

/// Rotary settings, which the `rope_table` op reads wherever they stand, and lengths that bound the context.
const POSITIONS: &[&str] = &[
    "max_position_embeddings",
    "max_sequence_length",
    "n_ctx",
    "original_max_position_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "seq_length",
];

/// How sums are cut and where f32 is used: the reference computes in f32 throughout.
const NUMERICS: &[&str] = &[
    "attention_softmax_in_fp32",
    "bias_dropout_fusion",
    "chunk_size_feed_forward",
    "masked_softmax_fusion",
    "pretraining_tp",
    "reorder_and_upcast_attn",
    "scale_attention_softmax_in_fp32",
    "slow_but_exact",
];

/// Tokens, and defaults for generating text.
const GENERATION: &[&str] = &[
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_scores",
    "pad_token_id",
    "prefix",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "unk_token_id",
];

/// Parts that other tasks put on top of a model.
const OTHER_TASKS: &[&str] = &[
    "cross_attention_hidden_size",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "tie_encoder_decoder",
];

/// Keys that are harmless with this value only.
const FIXED: &[(&str, &str)] = &[
    ("add_cross_attention", "false"),
    ("is_encoder_decoder", "false"),
    ("pruned_heads", "{}"),
    ("rope_interleaved", "false"),
    ("use_mrope", "false"),
];

/// Fails at a key of `config` that nobody reads and that is not known to be harmless.
///
/// # Errors
/// The first such key, in the order of the file.
pub(super) fn check(path: &Path, family: &Family, config: &Map<String, Json>) -> Result<(), ImportError> {
    let lists = [BOOKKEEPING, TRAINING, POSITIONS, NUMERICS, GENERATION, OTHER_TASKS];
    for (key, value) in config.iter().filter(|(_, v)| !v.is_null()) {
        let read = family.keys.iter().any(|rule| rule.key == *key);
        if read || family.harmless.contains(key) || lists.iter().any(|l| l.contains(&key.as_str())) {
            continue;
        }
        let own = family.fixed.iter().map(|(k, v)| (k.as_str(), v.as_str()));
        let only = own.chain(FIXED.iter().copied()).find(|(k, _)| k == key).map(|(_, v)| v);
        match only {
            Some(only) if value.to_string() == only => {}
            Some(only) => {
                return Err(ImportError::config(path, key, format!("is {}; only {only} is known", show(value))));
            }
            None => {
                let name = &family.name;
                return Err(ImportError::config(
                    path,
                    key,
                    format!(
                        "is {}, and means nothing to the family {name}: it may change what the model computes. If it does not, take it out of the file",
                        show(value)
                    ),
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::family::parse::parse;

    fn checked(config: Json) -> Result<(), ImportError> {
        let text = "arch \"toy\" for Toy\nkey size a\nharmless b\nfixed c = \"plain\"\nawqir 1\nmodel \"toy\"\n";
        check(Path::new("config.json"), &parse("toy.awqir", text).unwrap(), config.as_object().unwrap())
    }

    #[test]
    fn keys_are_read_or_known_or_an_error() {
        checked(json!({"a": 3, "b": [1], "c": "plain", "attention_dropout": 0.1, "other": null})).unwrap();
        let e = checked(json!({"a": 3, "other": 1})).unwrap_err();
        assert!(e.to_string().contains("`other` is 1") && !e.is_unsupported(), "{e}");
        let e = checked(json!({"c": "fancy"})).unwrap_err();
        assert!(e.to_string().contains("`c` is \"fancy\"; only \"plain\" is known"), "{e}");
        assert!(checked(json!({"is_encoder_decoder": true})).is_err());
    }
}
