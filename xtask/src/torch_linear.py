"""What PyTorch reaches in f16 on this machine's device, to stand beside the packed kernels: linears of given shapes, a
large product, a copy, and a decoder's linears one token after the other. Prints one JSON object.

    python3 torch_linear.py --shapes 4096x4096,11008x4096 --tokens 1,16 --config CONFIG.json

Weights are used in turn, so that no cache holds them; launches are captured in a graph, so that only the device's time
counts; every number is the median of several graphs. `--device cpu` is for trying the program out.
"""

import argparse
import json
import statistics
import sys
import time

import torch

parser = argparse.ArgumentParser()
parser.add_argument("--device", default="cuda")
parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008", help="rows x columns of weights")
parser.add_argument("--tokens", default="1,2,4,8,16,32,512")
parser.add_argument("--config", action="append", default=[], help="config.json of a decoder")
parser.add_argument("--rotate", type=int, default=512 << 20, help="bytes of weights that are used in turn")
parser.add_argument("--products", type=int, default=128, help="products of a graph")
parser.add_argument("--square", type=int, default=8192, help="size of the large product")
parser.add_argument("--copy", type=int, default=256 << 20, help="bytes of the copy")
args = parser.parse_args()

cuda = args.device == "cuda"
if cuda and not torch.cuda.is_available():
    sys.exit("torch finds no CUDA device")
device = torch.device(args.device)
SAMPLES = 9


def seconds(work):
    """The median time of `work`, captured in a graph."""
    work()
    if not cuda:
        return statistics.median(once(work) for _ in range(SAMPLES))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    times = []
    for _ in range(SAMPLES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return statistics.median(times)


def once(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def noise(*shape):
    return (torch.randn(*shape, device=device) * 0.02).half()


def linear(rows, cols, tokens):
    """A row of the report: y = x Wᵀ in f16."""
    copies = min(64, max(2, -(-args.rotate // (2 * rows * cols))))
    weights = [noise(rows, cols) for _ in range(copies)]
    x = noise(tokens, cols)
    products = max(args.products, copies) if cuda else copies

    def work():
        for i in range(products):
            torch.nn.functional.linear(x, weights[i % copies])

    took = seconds(work) / products
    return {
        "rows": rows,
        "cols": cols,
        "tokens": tokens,
        "microseconds": 1e6 * took,
        "gigabytes_per_second": 2e-9 * rows * cols / took,
        "teraops": 2e-12 * rows * cols * tokens / took,
    }


def decoder(path):
    """Milliseconds that the linears of a Llama-shaped decoder take for one token, attention and norms left out."""
    with open(path) as file:
        config = json.load(file)
    hidden, ffn, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    query, kv = heads * head, (config.get("num_key_value_heads") or heads) * head
    shapes = [(query + 2 * kv, hidden), (hidden, query), (2 * ffn, hidden), (hidden, ffn)]
    weights = [[noise(rows, cols) for rows, cols in shapes] for _ in range(layers)]
    output = noise(config["vocab_size"], hidden)
    x, attended, gated = noise(1, hidden), noise(1, query), noise(1, ffn)

    def work():
        for qkv, o, up, down in weights:
            torch.nn.functional.linear(x, qkv)
            torch.nn.functional.linear(attended, o)
            torch.nn.functional.linear(x, up)
            torch.nn.functional.linear(gated, down)
        torch.nn.functional.linear(x, output)

    count = layers * sum(rows * cols for rows, cols in shapes) + config["vocab_size"] * hidden
    return {"config": path, "milliseconds": 1e3 * seconds(work), "bytes": 2 * count}


def square():
    """10¹² operations a second of a large product."""
    a, b = noise(args.square, args.square), noise(args.square, args.square)
    return 2e-12 * args.square**3 / seconds(lambda: torch.matmul(a, b))


def copy():
    """Gigabytes a second, read and written, of a copy on the device."""
    source = torch.zeros(args.copy, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return 2e-9 * args.copy / seconds(lambda: target.copy_(source))


def numbers(text):
    return [int(n) for n in text.split(",")]


with torch.no_grad():
    shapes = [tuple(int(n) for n in shape.split("x")) for shape in args.shapes.split(",")]
    report = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "copy_gigabytes_per_second": copy(),
        "square_teraops": square(),
        "linears": [linear(rows, cols, tokens) for rows, cols in shapes for tokens in numbers(args.tokens)],
    }
    report["decoders"] = []
    for path in args.config:
        try:
            report["decoders"].append(decoder(path))
        except torch.OutOfMemoryError as error:
            print(f"{path}: {error}", file=sys.stderr)
        if cuda:
            torch.cuda.empty_cache()
print(json.dumps(report))
