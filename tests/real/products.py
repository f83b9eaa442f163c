"""Measures our matrix products against those of torch (MKL, oneDNN), taking turns, on the shapes of a LLaMA layer.

The script `products` in this directory builds the example of burn-peft-kernels and starts this program. The results are printed
without limits.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

KINDS = ["forward", "inputs", "weights"]
# The same values as in the example.
LAYERS, ROUNDS = 8, 6


def torch_speed(dtype: torch.dtype, sizes: list[int]) -> dict[str, float]:
    """Measures the GFLOP/s of torch for each kind of product."""
    tokens, width, hidden, kv = sizes
    shapes = [(width, width), (kv, width), (kv, width), (width, width), (hidden, width), (hidden, width), (width, hidden)]
    filled = lambda *shape: torch.rand(shape).mul_(2).sub_(1).to(dtype)
    weights = [[filled(n, k) for n, k in shapes] for _ in range(LAYERS)]
    gradients = [[filled(n, k) for n, k in shapes] for _ in range(LAYERS)]
    sides = {size: (filled(tokens, size), filled(tokens, size)) for shape in shapes for size in shape}
    seconds = dict.fromkeys(KINDS, 0.0)
    for turn in range(ROUNDS + 1):
        for layer in range(LAYERS):
            for weight, gradient, (n, k) in zip(weights[layer], gradients[layer], shapes):
                (x, dx), (dy, y) = sides[k], sides[n]
                works = [(x, weight.t(), y), (dy, weight, dx), (dy.t(), x, gradient)]
                for kind, (a, b, out) in zip(KINDS, works):
                    start = time.perf_counter()
                    torch.mm(a, b, out=out)
                    seconds[kind] += time.perf_counter() - start if turn else 0.0
    work = 2 * tokens * sum(n * k for n, k in shapes) * LAYERS * ROUNDS / 1e9
    return {kind: work / seconds[kind] for kind in KINDS}


def main() -> None:
    """Measures both sides in turns and prints the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--example", type=Path, required=True)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--sizes", type=int, nargs=4, default=[768, 576, 1536, 192], metavar=("TOKENS", "WIDTH", "HIDDEN", "KV"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--torch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.torch:
        torch.set_num_threads(os.cpu_count())
        return print(json.dumps(torch_speed(torch.bfloat16 if options.dtype == "bf16" else torch.float32, options.sizes)))
    ours, theirs = [options.example, options.dtype, *map(str, options.sizes)], [sys.executable, *sys.argv, "--torch"]
    found = {"ours": [], "torch": []}
    for _ in range(options.turns):
        for side, command in (("torch", theirs), ("ours", ours)):
            found[side].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    for kind in KINDS:
        ratios = sorted(mine[kind] / other[kind] for mine, other in zip(found["ours"], found["torch"]))
        speeds = [median(turn[kind] for turn in found[side]) for side in ("ours", "torch")]
        print(f"{kind:8} {speeds[0]:6.0f} against {speeds[1]:6.0f} GFLOP/s: {median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
