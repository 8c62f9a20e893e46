"""Makes tiny checkpoints of the families that take images, with the outputs that PyTorch computes for them.

Run by `cargo xtask goldens`. LLaVA and the parts of VILA are transformers' own; what joins VILA's parts, and OpenFlamingo
besides its language model, is written here after the papers (arXiv 2312.07533; 2308.01390 and 2204.14198), with the
tensor names of the published checkpoints. As `goldens.py`, and: `pixel_values` [N, 3, H, W]; `vision.hidden.K`, what comes
out of the K-th part of the vision side, embeddings first; `image_features`, what comes out of its last part; `prompt`, the
ids that `generated` continues, with the images of row 0.
"""
import json, os, sys
from collections import OrderedDict
import torch
from torch import nn
from safetensors.torch import save_file
import transformers as T

torch.set_num_threads(1)
TEXT = dict(vocab_size=160, bos_token_id=1, eos_token_id=2, pad_token_id=0, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
            num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
# 14 pixels hold three patches of 4 along each side; the rest is cut off.
EYE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=14, patch_size=4)
IMAGE = 159


def randomize(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            gain = ("norm" in name or "ln_" in name or "layrnorm" in name) and name.endswith("weight")
            gain = gain or name.endswith(("layers.1.weight", "ff.0.weight", ".1.0.weight"))
            p.copy_(torch.randn_like(p) * (0.2 if p.dim() == 1 or gain else 1.5 / p.shape[-1] ** 0.5) + (1.0 if gain else 0.0))


def rounded(module):
    """The module as the checkpoint holds it, in float32."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p.half().float())
    return module.float().eval()


def text_with_images(rows, length=18):
    """Two sequences, each with one image of so many rows."""
    ids = torch.randint(3, 150, (2, length))
    ids[0, 2:2 + rows] = IMAGE
    ids[1, 1:1 + rows] = IMAGE
    return ids, 2 + rows + 2


def write(folder, forward, layers, ids, prompt, pixels, vision, features):
    """`forward(ids, pixels)` gives the language model's output with hidden states."""
    raw = {}
    hook = layers[-1].register_forward_hook(lambda m, i, o: raw.update(last=o[0] if isinstance(o, tuple) else o))
    with torch.no_grad():
        out = forward(ids, pixels)
        hidden = list(out.hidden_states[:-1]) + [raw["last"]]
        hook.remove()
        sequence = ids[:1, :prompt]
        mine = pixels[:len(pixels) // len(ids)]
        for _ in range(8):
            sequence = torch.cat([sequence, forward(sequence, mine).logits[:, -1:].argmax(-1)], 1)
    tensors = {f"hidden.{i}": h for i, h in enumerate(hidden)} | {f"vision.hidden.{i}": h for i, h in enumerate(vision)}
    tensors |= dict(input_ids=ids, logits=out.logits, generated=sequence[0, prompt:], prompt=ids[0, :prompt], pixel_values=pixels,
                    image_features=features)
    save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, os.path.join(folder, "expected.safetensors"))
    print(os.path.basename(folder), "logits std", round(out.logits.std().item(), 3), flush=True)


def store(folder, tensors, config):
    os.makedirs(folder, exist_ok=True)
    save_file({k: v.detach().half().clone().contiguous() for k, v in tensors.items()}, os.path.join(folder, "model.safetensors"), dict(format="pt"))
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)


def llava(folder, layer, strategy):
    config = T.LlavaConfig(vision_config=T.CLIPVisionConfig(**EYE), text_config=T.LlamaConfig(**TEXT), image_token_index=IMAGE,
                           vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    model = T.LlavaForConditionalGeneration(config)
    randomize(model)
    model.half().save_pretrained(folder)
    model = T.LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    ids, prompt = text_with_images(10 if strategy == "full" else 9)
    pixels = torch.randn(2, 3, 14, 14)
    with torch.no_grad():
        vision = model.vision_tower(pixels, output_hidden_states=True).hidden_states
        features = model.get_image_features(pixels, layer, strategy)
    run = lambda ids, pixels: model(input_ids=ids, pixel_values=pixels, output_hidden_states=True, use_cache=False)
    write(folder, run, model.language_model.model.layers, ids, prompt, pixels, vision, features)


class Merge(nn.Module):
    """Joins each square of two times two patches; beyond the edge everything is 0."""
    def forward(self, x):
        n, count, c = x.shape
        side = round(count ** 0.5)
        grid = nn.functional.pad(x.view(n, side, side, c), (0, 0, 0, side % 2, 0, side % 2))
        half = grid.shape[1] // 2
        return grid.view(n, half, 2, half, 2, c).transpose(2, 3).reshape(n, half * half, 4 * c)


def vila(folder, clip):
    llm = T.LlamaForCausalLM(T.LlamaConfig(**TEXT))
    eye = T.CLIPVisionModel(T.CLIPVisionConfig(**EYE)) if clip else T.SiglipVisionModel(T.SiglipVisionConfig(**EYE, vision_use_head=False))
    width, hidden = EYE["hidden_size"], TEXT["hidden_size"]
    merged = nn.Sequential(Merge(), nn.LayerNorm(4 * width), nn.Linear(4 * width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    projector = nn.ModuleDict(dict(layers=nn.Linear(width, hidden) if clip else merged))
    for module in (llm, eye, projector):
        randomize(module)
        rounded(module)
    for part, module in (("llm", llm), ("vision_tower", eye)):
        config = json.loads(module.config.to_json_string())
        config.pop("vision_use_head", None)
        store(os.path.join(folder, part), module.state_dict(), config | dict(architectures=[type(module).__name__]))
    kind = "linear" if clip else "mlp_downsample"
    store(os.path.join(folder, "mm_projector"), projector.state_dict(), dict(mm_projector_type=kind, model_type="v2l_projector"))
    feature = "patch" if clip else "cls_patch"
    config = dict(architectures=["LlavaLlamaModel"], model_type="llava_llama", hidden_size=hidden, mm_hidden_size=width, llm_cfg="llm",
                  vision_tower_cfg="vision_tower", mm_projector_cfg="mm_projector", mm_vision_select_layer=-2,
                  mm_vision_select_feature=feature, image_aspect_ratio="resize", s2=False, image_token_index=IMAGE)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
    pixels = torch.randn(2, 3, 14, 14)

    def see(pixels):
        vision = eye(pixels, output_hidden_states=True).hidden_states
        return vision, projector["layers"](vision[-2][:, 1:] if clip else vision[-2])

    def run(ids, pixels):
        x = llm.get_input_embeddings()(ids)
        x[ids == IMAGE] = see(pixels)[1].flatten(0, 1)
        return llm(inputs_embeds=x, output_hidden_states=True, use_cache=False)

    ids, prompt = text_with_images(9 if clip else 4)
    with torch.no_grad():
        vision, features = see(pixels)
    write(folder, run, llm.model.layers, ids, prompt, pixels, vision, features)


class QuickGelu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class EyeBlock(nn.Module):
    def __init__(self, width, inner, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(width, inner), gelu=QuickGelu(), c_proj=nn.Linear(inner, width)))

    def forward(self, x):
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Eye(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, count = c["hidden_size"], (c["image_size"] // c["patch_size"]) ** 2
        self.conv1 = nn.Conv2d(3, width, c["patch_size"], c["patch_size"], bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(count + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = [EyeBlock(width, c["intermediate_size"], c["num_attention_heads"]) for _ in range(c["num_hidden_layers"])]
        self.transformer = nn.ModuleDict(dict(resblocks=nn.ModuleList(blocks)))

    def forward(self, pixels):
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
        states = [self.ln_pre(x)]
        for block in self.transformer["resblocks"]:
            states.append(block(states[-1]))
        return states


def attend(q, k, v, heads):
    split = lambda t: t.unflatten(-1, (heads, -1)).transpose(-3, -2)
    q, k, v = split(q), split(k), split(v)
    scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)


def feed_forward(width):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False))


class Resample(nn.Module):
    def __init__(self, width, heads, size):
        super().__init__()
        self.heads = heads
        self.norm_media, self.norm_latents = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * size, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * size, bias=False)
        self.to_out = nn.Linear(heads * size, width, bias=False)

    def forward(self, patches, latents):
        latents = self.norm_latents(latents)
        k, v = self.to_kv(torch.cat([self.norm_media(patches), latents], 1)).chunk(2, -1)
        return self.to_out(attend(self.to_q(latents), k, v, self.heads))


class Perceiver(nn.Module):
    def __init__(self, width, count, depth, heads, size):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(count, width))
        self.layers = nn.ModuleList(nn.ModuleList([Resample(width, heads, size), feed_forward(width)]) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, patches):
        latents = self.latents.expand(len(patches), -1, -1)
        states = [torch.cat([patches, latents], 1)]
        for attention, mlp in self.layers:
            latents = attention(patches, latents) + latents
            latents = mlp(latents) + latents
            states.append(torch.cat([patches, latents], 1))
        return states, self.norm(latents)


class CrossAttention(nn.Module):
    def __init__(self, width, media, heads, size):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * size, bias=False)
        self.to_kv = nn.Linear(media, 2 * heads * size, bias=False)
        self.to_out = nn.Linear(heads * size, width, bias=False)

    def forward(self, x, media, seen):
        """`media` [B, T, L, M]; `seen` [B, S], how many images came before each token."""
        q = self.to_q(self.norm(x))
        k, v = self.to_kv(media).chunk(2, -1)
        each = torch.stack([attend(q, k[:, t], v[:, t], self.heads) for t in range(media.shape[1])], 1)
        nothing = torch.zeros_like(each[:, :1])
        choice = seen[:, None, :, None].expand(-1, 1, -1, q.shape[-1])
        return self.to_out(torch.cat([nothing, each], 1).gather(1, choice)[:, 0])


class Gated(nn.Module):
    def __init__(self, width, media, heads, size):
        super().__init__()
        self.attn = CrossAttention(width, media, heads, size)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.ff = feed_forward(width)

    def forward(self, x, media, seen):
        x = x + self.attn(x, media, seen) * self.attn_gate.tanh()
        return x + self.ff(x) * self.ff_gate.tanh()


def openflamingo(folder):
    text = T.MptConfig(vocab_size=160, d_model=36, n_heads=6, n_layers=3, max_seq_len=64)
    vision = dict(EYE, num_hidden_layers=2, model_type="clip_vision_model")
    sizes = dict(cross_attn_heads=3, cross_attn_dim_head=8, resampler_depth=2, resampler_heads=2, resampler_dim_head=12, resampler_latents=5)
    every, width = 2, vision["hidden_size"]
    llm = T.AutoModelForCausalLM.from_config(text, attn_implementation="eager")
    eye = Eye(vision)
    perceiver = Perceiver(width, 5, 2, 2, 12)
    gates = nn.ModuleDict({str(i): Gated(36, width, 3, 8) for i in range(3) if (i + 1) % every == 0})
    for module in (llm, eye, perceiver, gates):
        randomize(module)
        rounded(module)
    for gate in gates.values():
        gate.attn_gate.data.fill_(0.75)
        gate.ff_gate.data.fill_(-0.5)
    tensors = {f"vision_encoder.{k}": v for k, v in eye.state_dict().items()}
    tensors |= {f"perceiver.{k}": v for k, v in perceiver.state_dict().items()}
    for name, tensor in llm.state_dict().items():
        if name != "lm_head.weight":
            parts = name.split(".")
            if parts[1] == "blocks":
                parts.insert(3, "decoder_layer")
            tensors["lang_encoder." + ".".join(parts)] = tensor
    for i, gate in gates.items():
        tensors |= {f"lang_encoder.transformer.blocks.{i}.gated_cross_attn_layer.{k}": v for k, v in gate.state_dict().items()}
    store(folder, tensors, dict(architectures=["Flamingo"], model_type="openflamingo", text_config=json.loads(text.to_json_string()),
                                vision_config=vision, media_token_id=IMAGE, cross_attn_every_n_layers=every, **sizes))
    # Two images a sequence, the second sequence with text before the first one.
    ids, prompt = torch.randint(3, 150, (2, 14)), 8
    ids[0, 0] = ids[0, 5] = ids[1, 3] = ids[1, 4] = IMAGE
    pixels = torch.randn(4, 3, 14, 14)
    state = {}
    for i, gate in gates.items():
        before = lambda m, args, gate=gate: (gate(args[0], state["media"], state["seen"]), *args[1:])
        llm.transformer.blocks[int(i)].register_forward_pre_hook(before)

    def see(pixels):
        states = eye(pixels)
        resampled, media = perceiver(states[-1][:, 1:])
        return states + resampled, media

    def run(ids, pixels):
        state.update(media=see(pixels)[1].unflatten(0, (len(ids), -1)), seen=(ids == IMAGE).cumsum(1))
        return llm(ids, output_hidden_states=True, use_cache=False)

    with torch.no_grad():
        vision, media = see(pixels)
    write(folder, run, llm.transformer.blocks, ids, prompt, pixels, vision, media)


MODELS = {
    "llava": lambda folder: llava(folder, -2, "default"),
    "llava-full": lambda folder: llava(folder, 2, "full"),
    "vila": lambda folder: vila(folder, clip=False),
    "vila-clip": lambda folder: vila(folder, clip=True),
    "openflamingo": openflamingo,
}
for seed, (name, make) in enumerate(MODELS.items()):
    torch.manual_seed(100 + seed)
    os.makedirs(os.path.join(sys.argv[1], name), exist_ok=True)
    make(os.path.join(sys.argv[1], name))
