"""Trains steps of 1 x 1024 tokens on random models of realistic size: QLoRA of rank 16 on the shape of Llama 3.1 8B in
Q4_K and Q6_K blocks, or LoRA in bf16 on the 1.1 billion weights of TinyLlama. Run by hand: the first takes five
gigabytes of disk space temporarily, eight of memory, and minutes on two cores.

    python tests/real/large.py --medqa target/release/medqa --folder /tmp/large
    python tests/real/large.py --medqa target/release/medqa --folder /tmp/large --shape tinyllama
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind



@dataclass(frozen=True)
class Shape:
    """The sizes of a published model, and whether it is packed."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    packed: bool
    """True for quantized blocks and QLoRA on every projection; else f16 in the file, bf16 in memory, LoRA on two."""


SHAPES = {
    "llama-8b": Shape(4096, 14336, 32, 32, 8, 128256, packed=True),
    "tinyllama": Shape(2048, 5632, 22, 32, 4, 32000, packed=False),
}
RANK, LENGTH = 16, 1024
GIB = 2**30
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def blocks(draw: np.random.Generator, kind: Kind, values: int) -> np.ndarray:
    """Returns random values in the given format, with a standard deviation of about 0.02 around 0."""
    if kind == Kind.F16:
        return (draw.standard_normal(values, dtype=np.float32) * 0.02).astype(np.float16)
    size, n = gguf.GGML_QUANT_SIZES[kind][1], values // 256
    made = np.frombuffer(draw.bytes(n * size), dtype=np.uint8).reshape(n, size).copy()

    def put(at: int, value: float) -> None:
        made[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)

    if kind == Kind.Q4_K:
        put(0, 1.2e-4)
        put(2, 9e-4)
    else:
        put(208, 1.5e-5)
    return made


def tensors(shape: Shape) -> list[tuple[str, list[int], Kind]]:
    """Returns name, shape and format of every tensor; packed formats are mixed as in files of type Q4_K_M."""
    hidden, mlp = shape.hidden, shape.mlp
    kv, last = shape.kv_heads * hidden // shape.heads, shape.layers - 4
    plain = Kind.Q4_K if shape.packed else Kind.F16
    finer = Kind.Q6_K if shape.packed else Kind.F16
    found = [("token_embd.weight", [shape.vocabulary, hidden], plain)]
    for layer in range(shape.layers):
        better = finer if layer < 4 or layer >= last or layer % 3 == 0 else plain
        for name, size, kind in [
            ("attn_norm", [hidden], Kind.F32),
            ("attn_q", [hidden, hidden], plain),
            ("attn_k", [kv, hidden], plain),
            ("attn_v", [kv, hidden], better),
            ("attn_output", [hidden, hidden], plain),
            ("ffn_norm", [hidden], Kind.F32),
            ("ffn_gate", [mlp, hidden], plain),
            ("ffn_up", [mlp, hidden], plain),
            ("ffn_down", [hidden, mlp], better),
        ]:
            found.append((f"blk.{layer}.{name}.weight", size, kind))
    return [*found, ("output_norm.weight", [hidden], Kind.F32), ("output.weight", [shape.vocabulary, hidden], finer)]


def bytes_of(shape: list[int], kind: Kind) -> int:
    """Returns the number of bytes of a tensor in the file."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def write(path: Path, shape: Shape) -> None:
    """Writes the file, one tensor after another."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_vocab_size(shape.vocabulary)
    # A token for every byte in GPT-2's spelling, and tokens that no text contains.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (256 + n for n in range(256))
    spelled = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    words = [*spelled, "ab", *(f"<unused {n}>" for n in range(shape.vocabulary - 257))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words)
    writer.add_token_types([1] * 257 + [3] * (shape.vocabulary - 257))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(shape.vocabulary - 2)
    writer.add_eos_token_id(shape.vocabulary - 1)
    writer.add_chat_template(TEMPLATE)
    plain = {Kind.F32: np.float32, Kind.F16: np.float16}
    for name, size, kind in tensors(shape):
        stored = size if kind in plain else [*size[:-1], bytes_of(size[-1:], kind)]
        raw = None if kind in plain else kind
        writer.add_tensor_info(name, stored, np.dtype(plain.get(kind, np.uint8)), bytes_of(size, kind), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, (_, size, kind) in enumerate(tensors(shape)):
        draw = np.random.default_rng(index)
        values = int(np.prod(size))
        made = np.ones(values, dtype=np.float32) if kind == Kind.F32 else blocks(draw, kind, values)
        writer.write_tensor_data(made)
    writer.close()


def estimate(shape: Shape) -> dict[str, float]:
    """Estimates the peak memory in bytes, with full activation checkpointing."""
    weights = sum(bytes_of(size, kind) for _, size, kind in tensors(shape))
    targets = ("attn_q", "attn_v") if not shape.packed else ("blk.",)
    matrices = [size for name, size, _ in tensors(shape) if len(size) == 2 and any(part in name for part in targets)]
    adapters = RANK * sum(sum(size) for size in matrices)
    states = 4 * LENGTH * shape.hidden
    return {
        "weights": weights,
        "adapters, gradients, two moments": 16 * adapters,
        "inputs of the segments": (2 * shape.layers + 1) * states,
        "one MLP segment, its graph and gradients": 4 * LENGTH * shape.mlp * 8,
    }


def main() -> int:
    """Writes the file, trains, prints the results, and removes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medqa", type=Path, required=True, help="the medqa program")
    parser.add_argument("--folder", type=Path, required=True, help="folder that is created and removed afterwards")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="change of the recipe: KEY=VALUE")
    options = parser.parse_args()
    folder, shape = options.folder, SHAPES[options.shape]
    if folder.exists():
        parser.error(f"{folder} exists already: name a folder that can be created and removed")
    folder.mkdir(parents=True)
    try:
        write(folder / "model.gguf", shape)
        print(f"{(folder / 'model.gguf').stat().st_size / GIB:.2f} GiB written", flush=True)
        text = "The heart is a muscle that moves blood. " * 60
        (folder / "train.jsonl").write_text(json.dumps({"question": "What is the heart?", "answer": text}) + "\n")
        kind, targets = ("qlora", '"all-linear"') if shape.packed else ("lora", '["q_proj", "v_proj"]')
        compute = "f32" if shape.packed else "bf16"
        (folder / "run.toml").write_text(
            f'[model]\npath = "{folder}/model.gguf"\ncompute = "{compute}"\n'
            f'[data]\ntrain = "{folder}/train.jsonl"\nmax_length = {LENGTH}\n'
            f'[method]\nkind = "{kind}"\nr = {RANK}\ntarget_modules = {targets}\n'
            f'[train]\nbatch_size = 1\nmax_steps = {options.steps}\nactivation_checkpointing = "full"\nwarmup = 0\n'
        )
        sets = [f"--set={change}" for change in options.set]
        subprocess.run([options.medqa, "train", folder / "run.toml", *sets, "--dir", folder / "run"], check=True)
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "grad_norm" in line]
        peak = max(line["peak_rss_bytes"] for line in steps)
        for name, size in estimate(shape).items():
            print(f"{size / GIB:6.2f} GiB {name}")
        print(f"{sum(estimate(shape).values()) / GIB:6.2f} GiB estimated, {peak / GIB:.2f} GiB measured at the peak")
        for line in steps:
            seconds = line["tokens"] / line["tokens_per_second"] if line["tokens_per_second"] else float("nan")
            print(f"step {line['step']}: {line['tokens']} tokens, loss {line['loss']:.4f}, {seconds:.0f} s")
        return 0 if peak <= 8 * GIB else 1
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
