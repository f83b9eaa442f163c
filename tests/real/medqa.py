"""Our side: runs of the program `medqa`, each in a separate process."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file


@dataclass(frozen=True)
class Run:
    """The results that a training run of `medqa` reported."""

    losses: list[float]
    before: float
    after: float
    speed: float
    trained: Path


@dataclass(frozen=True)
class Medqa:
    """The medqa program, with a folder for the files that it writes."""

    program: Path
    folder: Path

    def __call__(self, *arguments: str | Path) -> str:
        """Runs the program and returns its standard output; if it fails, raises an error with its last line."""
        done = subprocess.run([self.program, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise RuntimeError(f"medqa {arguments[0]} ended with {done.returncode}: {last[0]}")
        return done.stdout

    def logits(self, text: str, model: Path, adapter: Path | None = None) -> tuple[list[int], torch.Tensor]:
        """Returns token ids and logits [tokens, vocabulary] of a text."""
        out = self.folder / "logits.safetensors"
        more = ["--adapter", adapter] if adapter else []
        self("logits", "--model", model, *more, f"--text={text}", "--out", out)
        tensors = load_file(out)
        out.unlink()
        return tensors["ids"].tolist(), tensors["logits"]

    def answer(self, question: str, model: Path, tokens: int) -> str:
        """Returns a greedy answer of at most `tokens` tokens."""
        options = ["--temperature", "0", "--max-new-tokens", str(tokens)]
        return self("chat", "--model", model, *options, f"--prompt={question}").removesuffix("\n")

    def log_likelihoods(self, data: Path, model: Path) -> dict[str, list[float]]:
        """Returns the log-likelihoods of yes, no and maybe by PubMed id."""
        out = self.folder / "pubmedqa.json"
        self("eval", "--task", "pubmedqa", "--model", model, "--data", data, "--out", out)
        return {pmid: item["loglikelihood"] for pmid, item in json.loads(out.read_text())["items"].items()}

    def train(self, recipe: Path, changes: dict[str, object], name: str) -> Run:
        """Trains with `recipe` after `changes`, in the folder `name`."""
        folder = self.folder / name
        sets = [f"--set={key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]
        self("train", recipe, *sets, "--dir", folder)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
        trained = next(path for path in (folder / "adapter", folder / "model") if path.is_dir())
        return Run(
            losses=[line["loss"] for line in lines if "loss" in line],
            before=summary["valid_loss_before"],
            after=summary["valid_loss_after"],
            speed=summary["tokens_per_second"],
            trained=trained,
        )
