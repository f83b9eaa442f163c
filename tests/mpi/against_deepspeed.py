"""Compares medqa with DeepSpeed: one ds_config.json, two ranks, the same model and rows, 8 steps; losses, tokens per
second and memory.

    against_deepspeed.py MEDQA MODEL.gguf FOLDER     writes model, rows and configuration into FOLDER and runs both

Not part of CI. Needs the environment of tests/real, with `pip install deepspeed ninja` in addition, and mpirun.
DeepSpeed's ranks are this script, started with RANK; they communicate through gloo. At least half of the time in
medqa's collectives must overlap with computation. Afterwards Adam on the host is compared, DeepSpeed's and torch's with
ours: the example cpu_adam in MEDQA's target folder, or the program in EXAMPLE; an empty EXAMPLE skips it. Run it on an
idle machine: it fails below 1.0 x the speed of torch's fused Adam or 6 x that of its single-tensor one."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

WORLD, STEPS, LENGTH = 2, 8, 192
CONFIG = {
    "train_batch_size": 4,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "optimizer": {  # torch's Adam, so that DeepSpeed does not compile its own kernel first
        "type": "AdamW",
        "params": {"lr": 2e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01, "torch_adam": True},
    },
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 2e-6, "warmup_max_lr": 2e-5, "warmup_num_steps": 4}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e6, "allgather_bucket_size": 5e6},
    "zero_allow_untested_optimizer": True,
}
RECIPE = """[model]
path = "model"
[data]
train = "rows.jsonl"
format = "qa"
max_length = {length}
shuffle = false
packing = false
[method]
kind = "full"
[train]
max_steps = {steps}
"""


def held(process: str = "self") -> int:
    """Returns the peak memory of a process in MiB, including mapped files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) >> 10


def prepare(model: Path, folder: Path) -> None:
    import base
    import rows

    if not (folder / "model").exists():
        base.export(model, folder / "model")
    rows.write(folder / "rows.jsonl", rows.make(WORLD * 2 * STEPS, 7, [2, 3, 4]))
    (folder / "ds_config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "recipe.toml").write_text(RECIPE.format(length=LENGTH, steps=STEPS))


def theirs(folder: Path) -> None:
    """Runs one rank of DeepSpeed; rank 0 prints a line of JSON."""
    import deepspeed
    import reference
    import torch
    from transformers import AutoTokenizer

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    model = reference.base(folder / "model").train()
    groups = [  # norms and biases have no weight decay
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=json.loads((folder / "ds_config.json").read_text()))
    examples = reference.rows(folder / "rows.jsonl", AutoTokenizer.from_pretrained(folder / "model"), LENGTH)
    losses, tokens, seconds = [], 0, 0.0
    for step in range(STEPS):
        chosen = examples[4 * step : 4 * step + 4]
        learned = sum(label != reference.IGNORED for _, labels in chosen for label in labels[1:])
        part = reference.batch(chosen[2 * rank : 2 * rank + 2])
        start = time.perf_counter()
        # The loss is the mean over the targets of all ranks; DeepSpeed divides the sum over ranks by their number.
        own = (part["labels"][:, 1:] != reference.IGNORED).sum()
        loss = engine(**part).loss * own / learned
        engine.backward(loss * WORLD)
        engine.step()
        seconds += time.perf_counter() - start
        total = loss.detach().clone()
        torch.distributed.all_reduce(total)
        losses.append(total.item())
        tokens += sum(len(ids) for ids, _ in chosen)
    if rank == 0:
        print(json.dumps({"losses": losses, "tokens_per_second": tokens / seconds, "peak_mib": held()}))


def deepspeed_run(folder: Path) -> dict:
    env = os.environ | {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "rank", folder],
            env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    outputs = [process.communicate()[0] for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit(f"DeepSpeed ended with {[process.returncode for process in ranks]}")
    return json.loads(outputs[0].strip().splitlines()[-1])


def ours(program: Path, folder: Path) -> dict:
    subprocess.run(["rm", "-rf", folder / "run"], check=True)
    command = ["mpirun", "--oversubscribe", "--allow-run-as-root", "--bind-to", "none", "-n", str(WORLD), program]
    command += ["train", "recipe.toml", "--dir", "run", "--deepspeed", "ds_config.json", "--trace", "trace.json"]
    env = os.environ | {"RAYON_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"medqa ended with {done.returncode}: {done.stderr}")
    hidden = re.search(r"(\d+) % of the time in collectives overlaps computation", done.stderr)
    if not hidden:
        raise SystemExit(f"medqa does not say how much of its collectives lies inside computation: {done.stderr}")
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    seconds = sum(line["tokens"] / line["tokens_per_second"] for line in steps)
    return {
        "losses": [line["loss"] for line in steps],
        "tokens_per_second": sum(line["tokens"] for line in steps) / seconds,
        "peak_mib": max(line["peak_rss_bytes"] for line in steps) >> 20,
        "hidden": int(hidden[1]),
    }


def cpu_adam(example: str) -> list[str]:
    """Measures Adam on 20 M weights with 2 threads, 28 bytes of traffic per weight, the best of 20 updates in three
    turns; returns the limits that are missed."""
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    n, best = 20_000_000, {}
    torch.set_num_threads(2)
    parameter = torch.nn.Parameter(torch.randn(n))
    parameter.grad = torch.randn(n)
    settings = {"lr": 1e-3, "weight_decay": 0.01}
    others = {
        "DeepSpeedCPUAdam": DeepSpeedCPUAdam([parameter], **settings),
        "torch fused": torch.optim.AdamW([parameter], fused=True, **settings),
        "torch single-tensor": torch.optim.AdamW([parameter], foreach=False, fused=False, **settings),
    }
    for _ in range(3):
        for name, optimizer in others.items():
            for _ in range(20):
                start = time.perf_counter()
                optimizer.step()
                best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
        env = os.environ | {"RAYON_NUM_THREADS": "2"}
        text = subprocess.run([example, "20"], env=env, capture_output=True, text=True, check=True).stdout
        best["burn-zero"] = min(best.get("burn-zero", 1e9), float(text.split()[0]) / 1e3)
    for name, seconds in best.items():
        times = seconds / best["burn-zero"]
        print(f"{name:20} {seconds * 1e3:7.2f} ms {28 * n / seconds / 1e9:6.1f} GB/s {times:5.2f} x burn-zero's time")
    wanted = {"torch fused": 1.0, "torch single-tensor": 6.0}
    return [
        f"expected {times} x the speed of {name}" for name, times in wanted.items() if best[name] < times * best["burn-zero"]
    ]


def main() -> None:
    if sys.argv[1] == "rank":
        return theirs(Path(sys.argv[2]))
    program, model, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), Path(sys.argv[3]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(model, folder)
    results = {"DeepSpeed": deepspeed_run(folder), "medqa": ours(program, folder)}
    for name, result in results.items():
        losses = " ".join(f"{loss:.5f}" for loss in result["losses"])
        print(f"{name:10} {result['tokens_per_second']:7.1f} tokens/s, {result['peak_mib']} MiB per rank, losses {losses}")
    pairs = zip(*(result["losses"] for result in results.values()), strict=True)
    apart = max(abs(a - b) for a, b in pairs)
    print(f"losses differ by {apart:.1e} at most")
    hidden = results["medqa"]["hidden"]
    print(f"{hidden} % of the time in medqa's collectives lies inside computation")
    example = os.environ.get("EXAMPLE", str(program.parent / "examples/cpu_adam"))
    failures = cpu_adam(example) if example else []
    if apart > 1e-4:
        failures.append("expected losses within 1e-4")
    if hidden < 50:
        failures.append("expected half of the collectives inside computation")
    if failures:
        raise SystemExit("\n".join(failures))


sys.path.insert(0, str(Path(__file__).parent.parent / "real"))
# DeepSpeed needs ninja on PATH to compile; pip installs it next to Python.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
if __name__ == "__main__":
    main()
