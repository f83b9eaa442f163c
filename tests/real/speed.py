"""Measures medqa against PEFT, transformers and llama.cpp on the same work, taking turns; and QLoRA against LoRA.

The script `speed` in this directory builds medqa and starts this program. Every measurement runs in a process of its
own. There are no limits: the program prints the ratios and their spread.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import base
import reference
from medqa import Medqa

RECIPE = Path(__file__).resolve().parents[2] / "apps/medqa/recipes/medquad-lora.toml"
READ, WRITTEN = 512, 64
WORKS = ["lora", "lora-bf16", "full", "full-bf16", "forward", "decode", "decode-q4", "qlora", "qlora-nf4"]
# These are compared with our own LoRA in f32, all with full activation checkpointing.
QLORA = {"qlora": "packed", "qlora-nf4": "nf4"}


def peak_gib() -> float:
    """Returns the peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def fastest(work, rounds: int = 3) -> float:
    """Returns the seconds of the fastest round, after a warm-up round."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def peft(options: argparse.Namespace) -> float:
    """Measures training with PEFT in tokens per second without padding. Rows are sorted by length before they are
    batched, the fastest common configuration."""
    half = options.work.endswith("bf16")
    model = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16 if half else torch.float32)
    if options.work.startswith("lora"):
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    model.train()
    rows = reference.rows(options.rows, AutoTokenizer.from_pretrained(options.base), options.length)[: options.limit]
    if not options.file_order:
        rows.sort(key=lambda row: len(row[0]))
    batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    # Batches are chosen evenly over all lengths.
    chosen = [batches[step * len(batches) // options.steps] for step in range(options.steps)]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=5e-4, weight_decay=0.0)
    tokens, start = 0, 0.0
    for step, part in enumerate([chosen[0], *chosen]):
        if step == 1:
            start = time.perf_counter()
        model(**reference.batch(part)).loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += sum(len(ids) for ids, _ in part) if step else 0
    return tokens / (time.perf_counter() - start)


@torch.no_grad()
def transformers(options: argparse.Namespace) -> float:
    """Measures the forward pass of transformers, or its greedy decoding after a prompt of 32 tokens, in tokens per
    second."""
    model = reference.base(options.base)
    if options.work == "forward":
        ids = torch.arange(READ)[None] + 100
        return READ / fastest(lambda: model(input_ids=ids).logits)
    prompt = torch.arange(32)[None] + 100
    settings = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}

    def write(n: int) -> float:
        return fastest(lambda: model.generate(prompt, max_new_tokens=n, min_new_tokens=n, **settings))

    return WRITTEN / (write(WRITTEN + 1) - write(1))


def llama_cpp(options: argparse.Namespace) -> float:
    """Measures greedy decoding of llama.cpp after a prompt of 32 tokens, in tokens per second."""
    from llama import llama_cpp as llama

    model = llama.Llama(str(options.model), n_ctx=256, n_threads=2, n_threads_batch=2, verbose=False)

    def write() -> float:
        model.reset()
        model.eval(list(range(100, 132)))
        start = time.perf_counter()
        for _ in range(WRITTEN):
            model.eval([model.sample(temp=0.0)])
        return time.perf_counter() - start

    return WRITTEN / min(write() for _ in range(3))


def theirs(options: argparse.Namespace) -> dict:
    """Measures `options.work` on the other side."""
    side = {"forward": transformers, "decode": transformers, "decode-q4": llama_cpp}.get(options.work, peft)
    return {"speed": side(options), "peak_gib": peak_gib()}


def ours(options: argparse.Namespace, medqa: Medqa, turn: int) -> dict:
    """Measures `options.work` with medqa. Its training steps are the first ones of a shuffled order."""
    if options.work in ("forward", "decode", "decode-q4"):
        weights = "packed" if options.work == "decode-q4" else "f32"
        settings = ["--train", "none", "--length", str(READ), "--new-tokens", str(WRITTEN), "--weights", weights]
        report = json.loads(medqa("bench", "--model", options.model, *settings))
        part = "forward" if options.work == "forward" else "decode"
        return {"speed": report[part]["tokens_per_second"], "peak_gib": report["peak_rss_bytes"] / 2**30}
    changes = {
        "model.path": str(options.base), "model.compute": "bf16" if options.work.endswith("bf16") else "f32",
        "method.kind": "lora" if options.work.startswith("lora") else "full",
    }
    return training(options, medqa, changes, f"{options.work}-{turn}")


def packed(options: argparse.Namespace, medqa: Medqa, turn: int) -> tuple[dict, dict]:
    """Measures QLoRA, and LoRA on float weights."""
    both = {"train.activation_checkpointing": "full", "method.target_modules": "all-linear"}
    lora = both | {"method.kind": "lora", "model.path": str(options.base), "model.dtype": "f32"}
    qlora = both | {"method.kind": "qlora", "model.path": str(options.model), "model.dtype": QLORA[options.work]}
    name = f"{options.work}-{turn}"
    beside = training(options, medqa, lora, f"{name}-lora")
    return training(options, medqa, qlora, name), beside


def training(options: argparse.Namespace, medqa: Medqa, changes: dict, name: str) -> dict:
    """Runs the recipe with `changes` and returns its speed and peak memory."""
    rows = medqa.folder / "rows.jsonl"
    rows.write_text("".join(options.rows.read_text().splitlines(keepends=True)[: options.limit]))
    changes |= {"data.train": str(rows), "data.max_length": options.length, "train.max_steps": options.steps}
    sets = [f"--set={key}={json.dumps(value)}" for key, value in changes.items()]
    folder = medqa.folder / name
    sets += ["--set=data.valid=" + json.dumps(str(rows)), "--set=data.valid_limit=1"]
    medqa("train", RECIPE, *sets, "--dir", folder)
    summary = json.loads((folder / "summary.json").read_text())
    # The first step allocates memory and is not counted, as on the other side.
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "tokens" in line][1:]
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in steps)
    return {"speed": sum(line["tokens"] for line in steps) / seconds, "peak_gib": summary["peak_rss_bytes"] / 2**30}


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medqa", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2's GGUF file")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL with `question` and `answer`")
    parser.add_argument("--only", nargs="*", choices=WORKS, default=WORKS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--limit", type=int, default=256, help="number of rows used")
    parser.add_argument("--length", type=int, default=384, help="longest row, in tokens")
    parser.add_argument("--file-order", action="store_true", help="keep PEFT's rows in the order of the file")
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures both sides in turns and prints the ratios."""
    options = arguments()
    if options.work:
        return print(json.dumps(theirs(options)))
    with tempfile.TemporaryDirectory() as name:
        medqa = Medqa(options.medqa, Path(name))
        options.base = Path(name) / "base"
        base.export(options.model, options.base)
        for work in options.only:
            options.work, found = work, {"medqa": [], "them": []}
            for turn in range(options.turns):
                if work in QLORA:
                    mine, other = packed(options, medqa, turn)
                    found["medqa"].append(mine)
                    found["them"].append(other)
                    continue
                command = [sys.executable, *sys.argv, "--base", str(options.base), "--work", work]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found["them"].append(json.loads(done.stdout.splitlines()[-1]))
                found["medqa"].append(ours(options, medqa, turn))
            pairs = zip(found["medqa"], found["them"])
            ratios = sorted(mine["speed"] / other["speed"] for mine, other in pairs)
            speed, peak = ({side: median(turn[key] for turn in turns) for side, turns in found.items()}
                           for key in ("speed", "peak_gib"))
            print(f"{work:10} {speed['medqa']:7.1f} against {speed['them']:7.1f} tokens/s: {median(ratios):.2f} times "
                  f"({ratios[0]:.2f} to {ratios[-1]:.2f}); {peak['medqa']:.2f} against {peak['them']:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
