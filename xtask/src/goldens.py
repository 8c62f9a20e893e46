"""Makes tiny checkpoints of every model family with the outputs that PyTorch computes for them.

Run by `cargo xtask goldens`. One folder a model: what `save_pretrained` writes, and `expected.safetensors`:
`input_ids` i64 [2, 12]; `hidden.K`, the input of decoder layer K (the last one: the raw output of the last layer);
`logits` [2, 12, vocab]; `generated`, i64 [8]: the greedy continuation of the first 6 ids of row 0. All in float32.
"""
import json, os, sys
import torch
from safetensors.torch import save_file
import transformers as T

torch.set_num_threads(1)
BASE = dict(vocab_size=160, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA = dict(BASE, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
             head_dim=12, max_position_embeddings=64)

MODELS = {
    "llama": (T.LlamaConfig(**LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), torch.bfloat16),
    "llama-linear": (T.LlamaConfig(**LLAMA, rope_scaling=dict(rope_type="linear", factor=2.0)), torch.float16),
    "llama-bands": (T.LlamaConfig(**LLAMA, rope_theta=5e5, rope_scaling=dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                    high_freq_factor=4.0, original_max_position_embeddings=16)), torch.float16),
    "llama-yarn": (T.LlamaConfig(**LLAMA, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)), torch.float16),
    "llama-dynamic": (T.LlamaConfig(**dict(LLAMA, max_position_embeddings=8), rope_scaling=dict(rope_type="dynamic", factor=2.0)), torch.float16),
    "mistral": (T.MistralConfig(**LLAMA, sliding_window=5), torch.float16),
    "qwen2": (T.Qwen2Config(**{k: v for k, v in LLAMA.items() if k != "head_dim"}, tie_word_embeddings=True), torch.bfloat16),
    "qwen3": (T.Qwen3Config(**dict(LLAMA, head_dim=16)), torch.float16),
    "gemma": (T.GemmaConfig(**dict(LLAMA, num_key_value_heads=1)), torch.bfloat16),
    "gemma2": (T.Gemma2Config(**LLAMA, sliding_window=5, query_pre_attn_scalar=10, attn_logit_softcapping=10.0,
                              final_logit_softcapping=8.0), torch.float16),
    "gemma3": (T.Gemma3TextConfig(**dict(LLAMA, num_hidden_layers=3), sliding_window=5, sliding_window_pattern=3,
                                  query_pre_attn_scalar=12, rope_local_base_freq=1e4, rope_theta=1e6), torch.float32),
    "opt": (T.OPTConfig(**BASE, hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4,
                        word_embed_proj_dim=48, max_position_embeddings=64), torch.float16),
    "opt-post-norm": (T.OPTConfig(**BASE, hidden_size=48, ffn_dim=80, num_hidden_layers=2, num_attention_heads=4,
                                  word_embed_proj_dim=32, max_position_embeddings=64, do_layer_norm_before=False), torch.float16),
    "gpt2": (T.GPT2Config(**BASE, n_embd=48, n_inner=80, n_layer=2, n_head=4, n_positions=64), torch.float32),
}


def make(name, config, dtype, root, seed):
    torch.manual_seed(seed)
    model = T.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            offset = 0.0
            if p.dim() == 1 and "norm" in parameter_name and parameter_name.endswith("weight"):
                offset = 0.0 if "gemma" in name else 1.0
            p.copy_(torch.randn_like(p) * (0.2 if p.dim() == 1 else 1.5 / p.shape[-1] ** 0.5) + offset)
    model = model.to(dtype)
    folder = os.path.join(root, name)
    model.save_pretrained(folder)
    # Loaded afresh: `float()` would keep what `to(dtype)` rounded besides the weights, the rotary frequencies.
    model = T.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(3, 160, (2, 12))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
        layers = (model.model.decoder if hasattr(model.model, "decoder") else model.model).layers if hasattr(model, "model") else model.transformer.h
        raw = {}
        hook = layers[-1].register_forward_hook(lambda m, i, o: raw.update(last=o[0] if isinstance(o, tuple) else o))
        model(ids, use_cache=False)
        hook.remove()
        hidden = list(out.hidden_states[:-1]) + [raw["last"]]
        sequence = ids[:1, :6]
        for _ in range(8):
            sequence = torch.cat([sequence, model(sequence, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    tensors = {f"hidden.{i}": h.contiguous().clone() for i, h in enumerate(hidden)}
    tensors |= dict(input_ids=ids, logits=out.logits.contiguous().clone(), generated=sequence[0, 6:].clone())
    save_file(tensors, os.path.join(folder, "expected.safetensors"))
    print(name, "logits std", round(out.logits.std().item(), 3), flush=True)


for seed, (name, (config, dtype)) in enumerate(MODELS.items()):
    make(name, config, dtype, sys.argv[1], seed)
with open(os.path.join(sys.argv[1], "VERSIONS.json"), "w") as f:
    json.dump(dict(torch=torch.__version__, transformers=T.__version__), f)
