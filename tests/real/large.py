"""QLoRA on a model of Llama 3.1 8B's shape with random Q4_K and Q6_K blocks, one step of 1 x 1024 tokens. By hand: it takes
five gigabytes on the disk for the time being, eight of memory, and a quarter of an hour on two cores.

    python tests/real/large.py --medqa target/release/medqa --folder /tmp/large
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, VOCABULARY = 4096, 14336, 32, 32, 8, 128256
RANK, LENGTH = 16, 1024
GIB = 2**30
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def blocks(draw: np.random.Generator, kind: Kind, values: int) -> np.ndarray:
    """Random blocks whose values are spread by about 0.02 around 0."""
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


def tensors() -> list[tuple[str, list[int], Kind]]:
    """Name, shape and format, mixed as in files of the type Q4_K_M."""
    kv = KV_HEADS * HIDDEN // HEADS
    found = [("token_embd.weight", [VOCABULARY, HIDDEN], Kind.Q4_K)]
    for layer in range(LAYERS):
        better = Kind.Q6_K if layer < 4 or layer >= 28 or layer % 3 == 0 else Kind.Q4_K
        for name, shape, kind in [
            ("attn_norm", [HIDDEN], Kind.F32),
            ("attn_q", [HIDDEN, HIDDEN], Kind.Q4_K),
            ("attn_k", [kv, HIDDEN], Kind.Q4_K),
            ("attn_v", [kv, HIDDEN], better),
            ("attn_output", [HIDDEN, HIDDEN], Kind.Q4_K),
            ("ffn_norm", [HIDDEN], Kind.F32),
            ("ffn_gate", [MLP, HIDDEN], Kind.Q4_K),
            ("ffn_up", [MLP, HIDDEN], Kind.Q4_K),
            ("ffn_down", [HIDDEN, MLP], better),
        ]:
            found.append((f"blk.{layer}.{name}.weight", shape, kind))
    return [*found, ("output_norm.weight", [HIDDEN], Kind.F32), ("output.weight", [VOCABULARY, HIDDEN], Kind.Q6_K)]


def bytes_of(shape: list[int], kind: Kind) -> int:
    """How many a tensor has in the file."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(np.prod(shape)) // block * size


def write(path: Path) -> None:
    """The file, one tensor after the other."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(VOCABULARY)
    # Every byte as GPT-2 spells it, and words that no text has.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (256 + n for n in range(256))
    spelled = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    words = [*spelled, "ab", *(f"<unused {n}>" for n in range(VOCABULARY - 257))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(words)
    writer.add_token_types([1] * 257 + [3] * (VOCABULARY - 257))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(VOCABULARY - 2)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_chat_template(TEMPLATE)
    for name, shape, kind in tensors():
        stored = [*shape[:-1], bytes_of(shape[-1:], kind)] if kind != Kind.F32 else shape
        dtype = np.uint8 if kind != Kind.F32 else np.float32
        writer.add_tensor_info(name, stored, np.dtype(dtype), bytes_of(shape, kind), raw_dtype=None if kind == Kind.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, (_, shape, kind) in enumerate(tensors()):
        draw = np.random.default_rng(index)
        values = int(np.prod(shape))
        made = np.ones(values, dtype=np.float32) if kind == Kind.F32 else blocks(draw, kind, values)
        writer.write_tensor_data(made)
    writer.close()


def estimate() -> dict[str, float]:
    """What should be in memory at the most, in bytes."""
    packed = sum(bytes_of(shape, kind) for _, shape, kind in tensors())
    matrices = [shape for name, shape, _ in tensors() if name.startswith("blk.") and len(shape) == 2]
    adapters = RANK * sum(sum(shape) for shape in matrices)
    states = 4 * LENGTH * HIDDEN
    return {
        "packed weights": packed,
        "adapters, gradients, two moments": 16 * adapters,
        "inputs of the segments": (2 * LAYERS + 1) * states,
        "one MLP segment, its graph and gradients": 4 * LENGTH * MLP * 8,
    }


def main() -> int:
    """Writes the file, trains one step, prints figures, and cleans up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medqa", type=Path, required=True, help="the program")
    parser.add_argument("--folder", type=Path, required=True, help="made and removed")
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    folder = options.folder
    folder.mkdir(parents=True)
    try:
        write(folder / "model.gguf")
        print(f"{(folder / 'model.gguf').stat().st_size / GIB:.2f} GiB written", flush=True)
        text = "The heart is a muscle that moves blood. " * 60
        (folder / "train.jsonl").write_text(json.dumps({"question": "What is the heart?", "answer": text}) + "\n")
        (folder / "run.toml").write_text(
            f'[model]\npath = "{folder}/model.gguf"\ndtype = "packed"\n'
            f'[data]\ntrain = "{folder}/train.jsonl"\nmax_length = {LENGTH}\n'
            f'[method]\nkind = "qlora"\nr = {RANK}\ntarget_modules = "all-linear"\n'
            f'[train]\nbatch_size = 1\nmax_steps = {options.steps}\nactivation_checkpointing = "full"\nwarmup = 0\n'
        )
        subprocess.run([options.medqa, "train", folder / "run.toml", "--dir", folder / "run"], check=True)
        lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "grad_norm" in line]
        peak = max(line["peak_rss_bytes"] for line in steps)
        for name, size in estimate().items():
            print(f"{size / GIB:6.2f} GiB {name}")
        print(f"{sum(estimate().values()) / GIB:6.2f} GiB estimated, {peak / GIB:.2f} GiB measured at the peak")
        for line in steps:
            seconds = line["tokens"] / line["tokens_per_second"] if line["tokens_per_second"] else float("nan")
            print(f"step {line['step']}: {line['tokens']} tokens, loss {line['loss']:.4f}, {seconds:.0f} s")
        return 0 if peak <= 8 * GIB else 1
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
