"""Trains an adapter on a packed GGUF file and applies it to the same file in llama.cpp.

    python tests/real/qlora.py --medqa target/release/medqa --model SmolLM2-135M-Instruct.Q4_1.gguf

Trains QLoRA for a few steps, converts the adapter to llama.cpp's format, and asks the same questions. On float weights
the answers must be equal. On the packed file llama.cpp rounds activations to 8 bits, so the difference of its logits is
compared with the effect of that rounding on the base model. Has the requirements of export.py.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import export
import numpy as np
import rows
from export import Medqa, below, check, difference, equal, llama_answers, llama_logits
from transformers import AutoTokenizer

RECIPE = """
[model]
path = "{model}"
dtype = "packed"
[data]
train = "{train}"
format = "qa"
max_length = 160
[method]
kind = "qlora"
r = 8
alpha = 16
target_modules = "all-linear"
[train]
batch_size = 2
max_steps = {steps}
learning_rate = 2e-3
scheduler = "constant"
warmup = 0
"""


def trained(medqa: Medqa, model: Path, steps: int) -> Path:
    """Trains QLoRA and returns its adapter."""
    data = rows.write(medqa.folder / "train.jsonl", rows.make(2 * steps, 1, [1, 2]))
    recipe = medqa.folder / "run.toml"
    recipe.write_text(RECIPE.format(model=model, train=data, steps=steps))
    medqa("train", recipe, "--dir", medqa.folder / "run")
    return medqa.folder / "run/adapter"


def packed_answers(medqa: Medqa, model: Path, adapter: Path) -> list[str]:
    """Returns our answers on the packed weights of the file."""
    ask = ["chat", "--model", model, "--adapter", adapter, "--weights", "packed", "--max-new-tokens", export.TOKENS, "--prompt"]
    return [medqa(*ask, question).removesuffix("\n") for question in export.QUESTIONS]


def agreement(ours: list[str], theirs: list[str]) -> str:
    """Returns the number of equal characters before the first difference."""
    same = sum(next((i for i, (a, b) in enumerate(zip(x, y)) if a != b), min(len(x), len(y))) for x, y in zip(ours, theirs))
    return f"{same} of {sum(map(len, ours))}"


def packed_is_floats(medqa: Medqa, model: Path) -> None:
    """Checks over a thousand tokens that packed weights give the predictions of their dequantized values, by
    Kullback-Leibler divergence in nats. Token by token, products use integers; all at once, weights are unpacked tile
    by tile, so the results are the same."""
    text = " ".join(row["answer"] for row in rows.make(24, 2, [2, 3]))
    ids, floats = medqa.logits(model, text)
    check("tokens of the text", len(ids), ">= 1000", len(ids) >= 1000)
    for name, by_steps in (("all at once", False), ("by steps", True)):
        _, packed = medqa.logits(model, text, weights="packed", by_steps=by_steps)
        expected, found = (x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), axis=1, keepdims=True) for x in (floats, packed))
        below(f"packed beside floats, {name}: mean divergence", float((np.exp(expected) * (expected - found)).sum(axis=1).mean()), 1e-3)
        same = float((floats.argmax(axis=1) == packed.argmax(axis=1)).mean())
        check(f"packed beside floats, {name}: the same most likely token", f"{same:.4f}", ">= 0.98", same >= 0.98)
        print(f"  largest difference of a logit {np.abs(floats - packed).max():.1e}")


def main() -> int:
    """Trains, converts the adapter and compares answers and logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medqa", type=Path, required=True, help="the medqa program")
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct as a packed GGUF file")
    parser.add_argument("--steps", type=int, default=16)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="medqa-qlora-") as folder:
        medqa, model = Medqa(options.medqa, Path(folder)), options.model
        packed_is_floats(medqa, model)
        adapter = trained(medqa, model, options.steps)
        lora = medqa.folder / "adapter.gguf"
        medqa("adapters", "convert", adapter, lora, "--model", model)
        tokenizer = AutoTokenizer.from_pretrained(medqa.export(model, "base"))
        ours = packed_answers(medqa, model, adapter)
        check("the adapter's effect on the answers", agreement(ours, medqa.answers(model)), "differ", ours != medqa.answers(model))
        equal("answers: packed and as floats, ours", ours, medqa.answers(model, adapter))
        floats = medqa.export(model, "floats.gguf")
        equal("answers: llama.cpp, F32 file with the adapter's file", llama_answers(floats, tokenizer, lora), ours)
        theirs = llama_answers(model, tokenizer, lora)
        print(f"  the packed file in llama.cpp, characters before the first difference: {agreement(ours, theirs)}")
        ids, with_adapter = medqa.logits(model, export.TEXT, adapter)
        _, plain = medqa.logits(model, export.TEXT)
        effect = difference(with_adapter, plain)
        rounding = difference(llama_logits(model, ids), plain)
        found = difference(llama_logits(model, ids, lora), with_adapter)
        below("logits: F32 file in llama.cpp with the adapter's file", difference(llama_logits(floats, ids, lora), with_adapter), 1e-3)
        print(f"  logits: what the adapter changes {effect:.2f}; what llama.cpp's rounding changes without it {rounding:.2f}")
        check("logits: the packed file in llama.cpp, against its rounding", found, f"< {2 * rounding:.2f}", found < 2 * rounding)
    print(f"{len(export.FAILED)} failed")
    return 1 if export.FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
