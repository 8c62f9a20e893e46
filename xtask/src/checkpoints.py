"""Makes tiny checkpoints of one model in the formats that weights come in besides float safetensors.

Run by `cargo xtask goldens`, with two releases of compressed-tensors in folders of their own: DIR OLD NEW. Quantized ones
are folders as in goldens.py; `packed_cases.safetensors` has single weights in more settings; `pickled/` has files of
`torch.save`. Packing follows the formats' descriptions; compressed-tensors packs its own.
"""
import importlib, importlib.util, json, os, sys
import numpy as np
import torch
from safetensors.torch import save_file
import transformers as T

torch.set_num_threads(1)
ROOT, OLD, NEW = sys.argv[1:4]
LLAMA = dict(vocab_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
GPT2 = dict(vocab_size=96, bos_token_id=1, eos_token_id=2, n_embd=32, n_inner=64, n_layer=2, n_head=4, n_positions=32)


def codes_of(w, bits, group, sym, g_idx=None):
    """Rounds to nearest: codes [out, in] from 0, scales f16 and zeros [out, groups]."""
    out, cols = w.shape
    group = cols if group == -1 else group
    g_idx = torch.arange(cols) // group if g_idx is None else g_idx
    groups = int(g_idx.max()) + 1
    scales, zeros = torch.zeros(out, groups), torch.zeros(out, groups, dtype=torch.int64)
    for g in range(groups):
        x = w[:, g_idx == g]
        if sym:
            scales[:, g] = (x.abs().amax(1) / (2 ** (bits - 1) - 0.5)).half().float()
            zeros[:, g] = 2 ** (bits - 1)
        else:
            lo, hi = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
            scales[:, g] = ((hi - lo) / (2 ** bits - 1)).half().float()
            zeros[:, g] = torch.round(-lo / scales[:, g]).clamp(0, 2 ** bits - 1).long()
    q = torch.round(w / scales[:, g_idx] + zeros[:, g_idx]).clamp(0, 2 ** bits - 1).long()
    return q, scales, zeros, g_idx, (q - zeros[:, g_idx]) * scales[:, g_idx]


def words(values, bits, size=32):
    """[lines, n] integers to a bit stream of little-endian words of `size` bits a line."""
    stream = ((values.numpy()[:, :, None] >> np.arange(bits)) & 1).reshape(values.shape[0], -1)
    stream = np.pad(stream, [(0, 0), (0, -stream.shape[1] % size)]).reshape(values.shape[0], -1, size).astype(np.uint64)
    packed = (stream << np.arange(size, dtype=np.uint64)).sum(2)
    return torch.from_numpy(packed.astype({32: np.uint32, 16: np.uint16}[size]).view({32: np.int32, 16: np.int16}[size]))


def gptq(w, bits, group, sym, v2, g_idx=None):
    q, s, z, g_idx, exact = codes_of(w, bits, group, sym, g_idx)
    qzeros = words(z.t().contiguous() - (0 if v2 else 1), bits) if v2 or (z > 0).all() else None
    if qzeros is None:
        # Whole words less 1 in every field: borrows run on, and additions undo them.
        ones = sum(1 << (i * bits) for i in range(32 // bits))
        qzeros = torch.from_numpy((words(z.t().contiguous(), bits).numpy().view(np.uint32) - np.uint32(ones)).view(np.int32))
    return {"qweight": words(q.t().contiguous().t(), bits).t().contiguous(), "qzeros": qzeros, "scales": s.t().contiguous().half(),
            "g_idx": g_idx.int()}, (q, s, z, exact)


def zeros_width(cols, group):
    many = 1 if group >= 128 else {64: 2, 32: 4}[group]
    return -(-(-(-(cols // group) // 8)) // many) * many


def gemv(w, group):
    q, s, z, _, exact = codes_of(w, 4, group, False)
    width = zeros_width(w.shape[1], w.shape[1] if group == -1 else group) * 8
    pad = lambda t: torch.nn.functional.pad(t, (0, width - t.shape[1]))
    return {"qweight": words(q, 4), "qzeros": words(pad(z), 4), "scales": pad(s).half()}, (q, s, z, exact)


def gemv_fast(w, group):
    q, s, z, _, exact = codes_of(w, 4, group, False)
    n, k = q.shape
    # AutoAWQ's order, step by step: pairs of columns that are 8 apart, even before odd, four rows interleaved.
    x = q.reshape(n, k // 32, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(n, k // 32, 4, 4, 2).permute(0, 1, 2, 4, 3).reshape(n, k)
    x = x.reshape(n // 4, 4, k // 64, 64).permute(0, 2, 1, 3).reshape(n // 4, k // 64, 64, 4)
    halfwords = (x[..., 0] | x[..., 1] << 4 | x[..., 2] << 8 | x[..., 3] << 12).reshape(n // 4, k)
    width = zeros_width(k, group) * 8
    pad = lambda t: torch.nn.functional.pad(t.t(), (0, 0, 0, width - t.shape[1])).contiguous()
    return {"qweight": torch.from_numpy(halfwords.numpy().astype(np.uint16).view(np.int16)), "scales": pad(s).half(),
            "qzeros": pad(-(s * z)).half()}, (q, s, z, exact)


def library(folder):
    """`pack_to_int32` of a release of compressed-tensors. Later ones want a later transformers, but not for this file."""
    later = os.path.join(folder, "compressed_tensors/compressors/pack_quantized/helpers.py")
    if os.path.exists(later):
        spec = importlib.util.spec_from_file_location("helpers", later)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, folder)
        module = importlib.import_module("compressed_tensors.compressors.quantized_compressors.pack_quantized")
    return module.pack_to_int32


def compressed(w, bits, strategy, group, sym, pack, scale_type=torch.float16, g_idx=None):
    if strategy == "tensor":
        q, s, z, _, exact = codes_of(w.reshape(1, -1), bits, -1, sym)
        q, exact = q.reshape(w.shape), exact.reshape(w.shape)
        parts = {"weight_scale": s.reshape(1).to(scale_type)}
        if not sym:
            parts["weight_zero_point"] = (z - 2 ** (bits - 1)).reshape(1).to(torch.int8)
        s, z = s.expand(w.shape[0], 1), z.expand(w.shape[0], 1)
    else:
        q, s, z, g_idx2, exact = codes_of(w, bits, group if strategy == "group" else -1, sym, g_idx)
        parts = {"weight_scale": s.to(scale_type)}
        if scale_type == torch.bfloat16:
            s = parts["weight_scale"].float()
            exact = (q - z[:, g_idx2]) * s[:, g_idx2]
        if not sym:
            parts["weight_zero_point"] = pack((z - 2 ** (bits - 1)).to(torch.int8), bits, packed_dim=0).contiguous()
        if g_idx is not None:
            parts["weight_g_idx"] = g_idx.int()
    parts |= {"weight_packed": pack((q - 2 ** (bits - 1)).to(torch.int8), bits), "weight_shape": torch.tensor(w.shape)}
    return parts, (q, s, z, exact)


def scattered(cols, group, seed):
    return (torch.arange(cols) // group)[torch.randperm(cols, generator=torch.Generator().manual_seed(seed))]


def without(made, part):
    """As the first programs wrote it."""
    del made[0][part]
    return made


def ct_config(bits, sym, strategy, group, actorder=None):
    weights = dict(num_bits=bits, type="int", symmetric=sym, strategy=strategy, group_size=group, actorder=actorder, dynamic=False,
                   block_structure=None, observer="minmax", observer_kwargs={})
    return dict(quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed", ignore=["lm_head"],
                kv_cache_scheme=None, global_compression_ratio=None,
                config_groups=dict(group_0=dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None)))


def gptq_config(bits, group, sym, desc_act, v2):
    return dict(quant_method="gptq", bits=bits, group_size=group, sym=sym, desc_act=desc_act, lm_head=False,
                checkpoint_format="gptq_v2" if v2 else "gptq", pack_dtype="int32")


def model(name, config, pack, seed, biases=False, gpt2=False):
    """A folder of the model with every linear of its layers packed, and its outputs with the numbers that this stands for.

    The linears of GPT-2 are [in, out] as floats, and packed as any other."""
    torch.manual_seed(seed)
    made = T.GPT2Config(**GPT2) if gpt2 else T.LlamaConfig(**LLAMA)
    llama = T.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval()
    tensors = {}
    with torch.no_grad():
        for n, p in llama.named_parameters():
            p.copy_((torch.randn_like(p) * (0.2 if p.dim() == 1 else 1.5 / p.shape[-1] ** 0.5) + (p.dim() == 1)).half().float())
            if (".layers." in n or ".h." in n) and p.dim() == 2:
                parts, (_, _, _, exact) = pack((p.t() if gpt2 else p).data.clone(), n)
                p.copy_(exact.t() if gpt2 else exact)
                tensors |= {n.removesuffix("weight") + k: v for k, v in parts.items()}
                if biases:
                    tensors[n.removesuffix("weight") + "bias"] = torch.zeros(p.shape[0], dtype=torch.float16)
            else:
                tensors[n] = p.half()
    folder = os.path.join(ROOT, name)
    os.makedirs(folder, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    settings = llama.config.to_dict() | dict(architectures=[type(llama).__name__], torch_dtype="float16", quantization_config=config)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(settings, f, indent=1, sort_keys=True)
    ids = torch.randint(3, 96, (2, 12))
    with torch.no_grad():
        raw = {}
        hook = (llama.transformer.h if gpt2 else llama.model.layers)[-1].register_forward_hook(lambda m, i, o: raw.update(last=o[0]))
        made = llama(ids, output_hidden_states=True, use_cache=False)
        hook.remove()
        sequence = ids[:1, :6]
        for _ in range(8):
            sequence = torch.cat([sequence, llama(sequence, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    logits, hidden = made.logits, list(made.hidden_states[:-1]) + [raw["last"]]
    save_file({f"hidden.{i}": h.contiguous().clone() for i, h in enumerate(hidden)} | dict(input_ids=ids, logits=logits.contiguous(), generated=sequence[0, 6:].clone()), os.path.join(folder, "expected.safetensors"))
    print(name, "logits std", round(logits.std().item(), 3), flush=True)


def cases(old, new):
    """Single weights: their parts, and the codes, scales and zero points that went in."""
    tensors, settings = {}, {}

    def case(name, config, made):
        parts, (q, s, z, exact) = made
        settings[name] = json.dumps(config)
        tensors.update({f"{name}.{k}": v.contiguous() for k, v in parts.items()})
        tensors.update({f"{name}|codes": q.to(torch.uint8), f"{name}|scales": s.half(), f"{name}|zeros": z.to(torch.uint8)})
        if "order" in name:
            tensors[f"{name}|floats"] = exact.float().contiguous()

    torch.manual_seed(7)
    w = torch.randn(32, 64)
    awq = lambda version, group: dict(quant_method="awq", bits=4, group_size=group, zero_point=True, version=version)
    for group in (32, 64, -1):
        case(f"gemv-{group}", awq("gemv", group), gemv(w, group))
    case("gemv_fast-32", awq("gemv_fast", 32), gemv_fast(w, 32))
    case("gemv_fast-64", awq("gemv_fast", 64), gemv_fast(w, 64))
    for bits in (2, 3, 4, 8):
        for sym in (False, True):
            for v2 in (False, True):
                if bits != 3 or sym or v2:
                    case(f"gptq-{bits}-{sym}-{v2}", gptq_config(bits, 16, sym, False, v2), gptq(w, bits, 16, sym, v2))
    # Zero points of 0.
    case("gptq-positive", gptq_config(4, 16, False, False, False), gptq(w.abs() + torch.tensor([0.0, -9.0] * 16)[:, None] * 0.1, 4, 16, False, False))
    case("gptq-row", gptq_config(4, -1, True, True, False), gptq(w, 4, -1, True, False))
    case("gptq-order", gptq_config(4, 16, False, True, True), gptq(w, 4, 16, False, True, scattered(64, 16, 1)))
    for bits in (2, 3, 4, 8):
        for sym in (False, True):
            # The old release wants a multiple of ten rows.
            for which, pack in (("old", old), ("new", new)):
                if which == "new" or bits == 3:
                    case(f"ct-{bits}-{sym}-{which}", ct_config(bits, sym, "group", 16), compressed(w[:30], bits, "group", 16, sym, pack))
    case("ct-channel", ct_config(4, False, "channel", None), compressed(w, 4, "channel", None, False, new))
    case("ct-tensor", ct_config(8, False, "tensor", None), compressed(w, 8, "tensor", None, False, new))
    case("ct-tensor-symmetric", ct_config(8, True, "tensor", None), compressed(w, 8, "tensor", None, True, new))
    case("ct-bf16", ct_config(4, True, "group", 16), compressed(w, 4, "group", 16, True, new, torch.bfloat16))
    case("ct-order", ct_config(4, False, "group", 16, "group"), compressed(w, 4, "group", 16, False, new, g_idx=scattered(64, 16, 2)))
    save_file(tensors, os.path.join(ROOT, "packed_cases.safetensors"), metadata=settings)


def pickled():
    """Files of `torch.save`, all with the same tensors; `tensors.safetensors` has them as they are."""
    folder = os.path.join(ROOT, "pickled")
    os.makedirs(folder, exist_ok=True)
    torch.manual_seed(9)
    base = torch.randn(6, 8)
    tied = torch.randn(5, 4)
    module = torch.nn.Linear(4, 5, bias=True).to(torch.bfloat16)
    state = dict(f32=base, f16=torch.randn(3, 2).half(), bf16=torch.randn(7).bfloat16(), f64=torch.randn(2, 2).double(), i64=torch.arange(5) - 2,
                 i32=torch.arange(4).int() - 1, i16=torch.arange(3).short() - 1, i8=torch.arange(3).to(torch.int8) - 1, u8=torch.arange(3).to(torch.uint8),
                 bool=torch.tensor([True, False, True]), transposed=base.t(), window=base[2:4, 1:7:2], row=base[3], scalar=torch.tensor(2.5),
                 empty=torch.zeros(0, 3), first=tied, second=tied, parameter=torch.nn.Parameter(torch.randn(2, 3)))
    state |= {f"module.{k}": v for k, v in module.state_dict(keep_vars=True).items()}
    save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, os.path.join(folder, "tensors.safetensors"))
    ordered = module.state_dict()
    ordered.clear()
    ordered.update(state)
    save = lambda value, name, **k: torch.save(value, os.path.join(folder, name), **k)
    save(state, "zip.bin")
    save(ordered, "ordered.pt")
    save(ordered, "old.pth", _use_new_zipfile_serialization=False)
    save(state, "protocol4.pt", pickle_protocol=4)
    save(dict(epoch=3, lr=0.1, big=2 ** 80, args=["a", None, (1, -70000)], model=ordered), "nested.pt")
    save({f"module.{k}": v for k, v in state.items()}, "distributed.pt")


def pickled_model(golden):
    """The golden model as `save_pretrained` wrote it before safetensors."""
    folder = os.path.join(ROOT, "pickled-" + golden)
    model = T.AutoModelForCausalLM.from_pretrained(os.path.join(ROOT, golden), torch_dtype="auto")
    model.save_pretrained(folder, safe_serialization=False)
    os.remove(os.path.join(folder, "generation_config.json"))


if __name__ == "__main__":
    old, new = library(OLD), library(NEW)
    cases(old, new)
    pickled()
    model("awq-gemv-llama", dict(quant_method="awq", bits=4, group_size=64, zero_point=True, version="gemv", modules_to_not_convert=["lm_head"]),
          lambda w, n: gemv(w, 64), 1)
    model("awq-gemv-fast-llama", dict(quant_method="awq", bits=4, group_size=32, zero_point=True, version="gemv_fast", modules_to_not_convert=None),
          lambda w, n: gemv_fast(w, 32), 2)
    model("gptq-llama", gptq_config(4, 32, False, False, False), lambda w, n: gptq(w, 4, 32, False, False), 3, biases=True)
    model("gptq-v2-order-llama", gptq_config(3, 32, True, True, True),
          lambda w, n: gptq(w, 3, 32, True, True, scattered(w.shape[1], 32, 5) if "down" in n else None), 4)
    model("compressed-llama", ct_config(4, False, "group", 32), lambda w, n: compressed(w, 4, "group", 32, False, new), 5)
    model("compressed-8bit-llama", ct_config(8, True, "channel", None), lambda w, n: compressed(w, 8, "channel", None, True, new, torch.bfloat16), 6)
    model("gptq-gpt2", gptq_config(4, 16, True, True, False), lambda w, n: gptq(w, 4, 16, True, False), 8, gpt2=True)
    pickled_model("llama")
