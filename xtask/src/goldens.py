"""Makes tiny checkpoints of every model family with the outputs that PyTorch computes for them.

Run by `cargo xtask goldens`. One folder a model: what `save_pretrained` writes, and `expected.safetensors`:
`input_ids` i64 [2, 12]; `hidden.K`, the input of decoder layer K (the last one: the raw output of the last layer);
`logits` [2, 12, vocab]; `generated`, i64 [8]: the greedy continuation of the first 6 ids of row 0. All in float32.
Names after the folder make those models only. Some are also exported to ONNX, as `model.onnx`.
"""
import json, os, sys
import torch
from safetensors.torch import save_file
import transformers as T

torch.set_num_threads(1)
BASE = dict(vocab_size=160, bos_token_id=1, eos_token_id=2, pad_token_id=0)
LLAMA = dict(BASE, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
             head_dim=12, max_position_embeddings=64)

FALCON = dict(BASE, hidden_size=48, ffn_hidden_size=80, num_hidden_layers=2, num_attention_heads=4)
GPT = dict(BASE, n_embd=48, n_inner=80, n_layer=2, n_head=4, n_positions=64)
NEOX = dict(BASE, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
MOE = dict(BASE, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_experts=6, num_hidden_layers=2, num_attention_heads=4,
           num_key_value_heads=2, max_position_embeddings=64)

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
    "falcon": (T.FalconConfig(**FALCON, multi_query=True, parallel_attn=True), torch.float16),
    "falcon-alibi": (T.FalconConfig(**FALCON, multi_query=False, parallel_attn=False, alibi=True, bias=True), torch.float16),
    "falcon-grouped": (T.FalconConfig(**FALCON, new_decoder_architecture=True, num_kv_heads=2), torch.float16),
    "gpt_bigcode": (T.GPTBigCodeConfig(**GPT), torch.float16),
    "gpt_bigcode-heads": (T.GPTBigCodeConfig(**GPT, multi_query=False), torch.float16),
    "starcoder2": (T.Starcoder2Config(**{k: v for k, v in LLAMA.items() if k != "head_dim"}, sliding_window=5), torch.float16),
    "stablelm": (T.StableLmConfig(**{k: v for k, v in LLAMA.items() if k != "head_dim"}, use_qkv_bias=True,
                                  partial_rotary_factor=0.5), torch.float16),
    "stablelm-parallel": (T.StableLmConfig(**{k: v for k, v in LLAMA.items() if k != "head_dim"}, use_parallel_residual=True,
                                           qk_layernorm=True), torch.float16),
    "mpt": (T.MptConfig(vocab_size=160, d_model=48, n_heads=6, n_layers=2, max_seq_len=64, attn_config=dict(clip_qkv=1.0)), torch.float16),
    "bloom": (T.BloomConfig(**BASE, hidden_size=48, n_layer=2, n_head=4), torch.float16),
    "gpt_neox": (T.GPTNeoXConfig(**NEOX, rotary_pct=0.5), torch.float16),
    "gpt_neox-sequential": (T.GPTNeoXConfig(**NEOX, use_parallel_residual=False, attention_bias=False, rotary_pct=1.0), torch.float16),
    "gptj": (T.GPTJConfig(**GPT, rotary_dim=8), torch.float16),
    "phi": (T.PhiConfig(**{k: v for k, v in LLAMA.items() if k != "head_dim"}, qk_layernorm=True), torch.float16),
    "phi3": (T.Phi3Config(**dict(LLAMA, max_position_embeddings=32, head_dim=8), sliding_window=5, original_max_position_embeddings=8,
                          rope_scaling=dict(type="longrope", short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.0, 1.5, 2.0, 4.0])), torch.float16),
    "cohere": (T.CohereConfig(**{k: v for k, v in LLAMA.items() if k != "head_dim"}, use_qk_norm=True, attention_bias=True,
                              logit_scale=0.5), torch.float16),
    "olmo2": (T.Olmo2Config(**{k: v for k, v in LLAMA.items() if k != "head_dim"}), torch.float16),
    "granite": (T.GraniteConfig(**{k: v for k, v in LLAMA.items() if k != "head_dim"}, embedding_multiplier=3.0, attention_multiplier=0.1,
                                residual_multiplier=0.5, logits_scaling=2.0), torch.float16),
    "mixtral": (T.MixtralConfig(**dict(LLAMA, intermediate_size=32, hidden_size=32, head_dim=8), num_local_experts=4, num_experts_per_tok=2,
                                sliding_window=5), torch.float16),
    "qwen2_moe": (T.Qwen2MoeConfig(**MOE, shared_expert_intermediate_size=40, norm_topk_prob=True, num_experts_per_tok=3, mlp_only_layers=[1]), torch.float16),
    "qwen3_moe": (T.Qwen3MoeConfig(**MOE, head_dim=8, norm_topk_prob=True, num_experts_per_tok=2), torch.float16),
    "phimoe": (T.PhimoeConfig(**{k: v for k, v in MOE.items() if k not in ("num_experts", "moe_intermediate_size")}, num_local_experts=4, num_experts_per_tok=2,
                              attention_bias=True, lm_head_bias=True, router_jitter_noise=0.2), torch.float16),
    "deepseek_v3": (T.DeepseekV3Config(**dict({k: v for k, v in MOE.items() if k != "num_experts"}, num_key_value_heads=4, num_hidden_layers=3), q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8,
                    qk_rope_head_dim=4, v_head_dim=6, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=3, n_group=4, topk_group=2,
                    first_k_dense_replace=1, routed_scaling_factor=1.5, attention_bias=True,
                    rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)), torch.float16),
}
if "deepseek_v2" in T.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
    # Families that the release above does not know yet.
    MODELS |= {
        "deepseek_v2": (T.DeepseekV2Config(**dict({k: v for k, v in MOE.items() if k != "num_experts"}, num_key_value_heads=4, num_hidden_layers=2),
                        q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, head_dim=4, n_routed_experts=8,
                        n_shared_experts=2, num_experts_per_tok=3, n_group=4, topk_group=2, topk_method="group_limited_greedy",
                        first_k_dense_replace=1, routed_scaling_factor=1.5), torch.float16),
        "smollm3": (T.SmolLM3Config(**dict({k: v for k, v in LLAMA.items() if k != "head_dim"}, num_hidden_layers=4)), torch.float16),
    }


def make(name, config, dtype, root, seed):
    torch.manual_seed(seed)
    model = T.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            offset = 0.0
            if ("norm" in parameter_name or "ln_" in parameter_name) and parameter_name.endswith("weight"):
                offset = 0.0 if "gemma" in name else 1.0
            p.copy_(torch.randn_like(p) * (0.2 if p.dim() == 1 or offset else 1.5 / p.shape[-1] ** 0.5) + offset)
        for buffer_name, b in model.named_buffers():
            if buffer_name.endswith("correction_bias"):
                b.copy_(torch.randn_like(b) * 0.2)
    model = model.to(dtype)
    folder = os.path.join(root, name)
    model.save_pretrained(folder)
    # Loaded afresh: `float()` would keep what `to(dtype)` rounded besides the weights, the rotary frequencies.
    # The eager attention of this family adds its position biases twice.
    attention = "sdpa" if name == "falcon-alibi" else "eager"
    model = T.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation=attention).eval()
    ids = torch.randint(3, 160, (2, 12))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
        layers = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == config.num_hidden_layers)
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


# Exported to ONNX, and in which type: halves where they are no less exact than what is computed with them.
EXPORTED = {"llama": torch.float16, "mistral": torch.float16, "qwen2": torch.float16, "opt": torch.float16, "gpt_neox": torch.float16,
            "gpt2": torch.float32, "gemma": torch.float32}


def export(name, dtype, root):
    folder = os.path.join(root, name)
    model = T.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype, attn_implementation="sdpa").eval()
    whole = model.forward
    model.forward = lambda input_ids: whole(input_ids=input_ids, use_cache=False).logits
    axes = {0: "batch", 1: "sequence"}
    torch.onnx.export(model, (torch.randint(3, 160, (2, 12)),), os.path.join(folder, "model.onnx"), input_names=["input_ids"],
                      output_names=["logits"], dynamic_axes={"input_ids": axes, "logits": axes}, opset_version=17, dynamo=False)


for seed, (name, (config, dtype)) in enumerate(MODELS.items()):
    if len(sys.argv) < 3 or name in sys.argv[2:]:
        make(name, config, dtype, sys.argv[1], seed)
        if name in EXPORTED:
            export(name, EXPORTED[name], sys.argv[1])
with open(os.path.join(sys.argv[1], "VERSIONS.json" if len(sys.argv) < 3 else "VERSIONS-later.json"), "w") as f:
    json.dump(dict(torch=torch.__version__, transformers=T.__version__), f)
