"""Compares the program `medqa` with transformers, PEFT and llama.cpp on SmolLM2-135M-Instruct, a GGUF file.

Prints one line per check: name, measured value, limit, ok or FAIL. Exits with 1 if a check failed. The script `run` in
this directory creates the environment, fetches the model, builds medqa and starts this program.

    tests/real/run                                                        # what CI runs
    PUBMEDQA=pqal_train.json tests/real/run --only c                      # also the first 50 items of a real file
    tests/real/run --only de --rows train.jsonl valid.jsonl --steps 64    # training on your own questions and answers
"""

import argparse
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import llama_cpp
import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import abstracts
import base
import reference
import rows
import texts
from medqa import Medqa, Run
from report import Report

RECIPE = Path(__file__).resolve().parents[2] / "apps/medqa/recipes/medquad-lora.toml"
ANSWER_TOKENS = 48
SEED = 0


@dataclass
class Comparison:
    """Both sides of the comparison, and the report of the results."""

    options: argparse.Namespace
    report: Report
    medqa: Medqa
    gguf: Path
    folder: Path

    @cached_property
    def directory(self) -> Path:
        """The GGUF file exported as a Hugging Face directory."""
        base.export(self.gguf, self.folder / "base")
        return self.folder / "base"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of transformers."""
        return AutoTokenizer.from_pretrained(self.directory)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model of transformers; no part changes it."""
        return reference.base(self.directory)

    # a

    def logits(self) -> None:
        """Compares logits and ids of two sentences, then ids of difficult texts, also with llama.cpp."""
        for number, text in enumerate(texts.SENTENCES, 1):
            ids, ours = self.medqa.logits(text, self.gguf)
            theirs = reference.logits(self.model, self.tokenizer.encode(text))
            self.report.equal(f"ids of sentence {number}, transformers", ids, self.tokenizer.encode(text))
            self.report.below(f"logits of sentence {number}, transformers", difference(ours, theirs), 5e-3)
        llama = llama_cpp.Llama(str(self.gguf), vocab_only=True, verbose=False)
        self.report.note(f"{sum(map(len, texts.pieces().values()))} awkward pieces in {len(texts.long_texts())} texts")
        for kind, text in texts.long_texts().items():
            ids, _ = self.medqa.logits(text, self.gguf)
            theirs = llama.tokenize(text.encode(), add_bos=False, special=True)
            self.report.equal(f"ids of awkward texts: {kind}, llama.cpp", ids, theirs)
            self.report.equal(f"ids of awkward texts: {kind}, transformers", ids, self.tokenizer.encode(text))

    # b

    def answers(self) -> None:
        """Compares greedy answers token by token."""
        for question in texts.QUESTIONS:
            ours = self.medqa.answer(question, self.gguf, ANSWER_TOKENS)
            theirs = reference.answer(self.model, self.tokenizer, question, ANSWER_TOKENS)
            self.report.equal(f"{ANSWER_TOKENS} greedy tokens: {question}", self.encode(ours), self.encode(theirs))

    def encode(self, text: str) -> list[int]:
        """Encodes a text without adding special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    # c

    def pubmedqa(self) -> None:
        """Compares the log-likelihoods of yes, no and maybe."""
        sources = {"invented items": abstracts.items()}
        if name := os.environ.get("PUBMEDQA"):
            sources["PUBMEDQA"] = dict(list(json.loads(Path(name).read_text()).items())[:50])
        for source, items in sources.items():
            data = self.folder / "items.json"
            data.write_text(json.dumps(items))
            ours = self.medqa.log_likelihoods(data, self.gguf)
            theirs = {pmid: reference.log_likelihoods(self.model, self.tokenizer, item) for pmid, item in items.items()}
            self.report.equal(f"PubMedQA, {source}: ids", list(ours), list(theirs))
            worst = np.abs(np.array(list(ours.values())) - np.array(list(theirs.values()))).max()
            self.report.below(f"PubMedQA, {source}: log-likelihoods of {len(items)}", worst, 2e-3)
            spread = np.ptp(np.array(list(theirs.values())), axis=1).min()
            self.report.above(f"PubMedQA, {source}: least spread of choices", spread, 2e-2)

    # d

    def lora(self) -> None:
        """Compares LoRA training step by step from PEFT's initial values, then each side's adapter on the other."""
        steps = self.options.steps or 16
        changes = self.data(4 * steps, [1, 1, 1, 2, 2, 3, 4, 12]) | {"train.max_steps": steps}
        recipe = reference.recipe(RECIPE, changes)
        model = reference.new_adapter(self.directory, recipe["method"], SEED)
        first, last = self.folder / "adapter-first", self.folder / "adapter-last"
        model.save_pretrained(first)
        ours = self.medqa.train(RECIPE, changes | {"model.path": str(self.gguf), "method.init": str(first)}, "lora")
        theirs = self.train(model, recipe)
        model.save_pretrained(last)
        self.training("LoRA", ours, theirs, 2e-4)
        self.adapter("medqa's adapter, loaded by PEFT", ours.trained)
        self.adapter("PEFT's adapter, loaded by medqa", last)

    def adapter(self, name: str, adapter: Path) -> None:
        """Checks that an adapter gives the same logits on both sides, different from those of the base model."""
        ids, ours = self.medqa.logits(texts.SENTENCES[0], self.gguf, adapter)
        theirs = reference.logits(reference.with_adapter(self.directory, adapter), ids)
        self.report.below(f"{name}: logits", difference(ours, theirs), 1e-3)
        self.report.above(f"{name}: its effect", difference(ours, reference.logits(self.model, ids)), 1e-2)

    # e

    def full(self) -> None:
        """Compares full fine-tuning from the Hugging Face directory, and loads the result into transformers."""
        steps = self.options.steps or 8
        changes = self.data(4 * steps, [1, 1, 2, 3]) | {
            "method.kind": "full",
            "train.max_steps": steps,
            "train.learning_rate": 5e-5,
            "train.scheduler": "cosine",
            "train.warmup": 2,
        }
        ours = self.medqa.train(RECIPE, changes | {"model.path": str(self.directory)}, "full")
        theirs = self.train(reference.base(self.directory), reference.recipe(RECIPE, changes))
        self.training("full fine-tuning", ours, theirs, 2e-3)
        ids, logits = self.medqa.logits(texts.SENTENCES[0], ours.trained)
        self.report.equal("saved model: ids", ids, self.encode(texts.SENTENCES[0]))
        loaded = reference.logits(reference.base(ours.trained), ids)
        self.report.below("saved model, loaded by transformers: logits", difference(logits, loaded), 1e-3)
        self.report.above("saved model: its effect", difference(logits, reference.logits(self.model, ids)), 1e-2)

    # Shared by d and e

    def data(self, count: int, lengths: list[int]) -> dict[str, object]:
        """Returns recipe changes that name the data: the user's rows, or generated ones with the longest truncated."""
        common = {"data.shuffle": False, "data.valid_limit": self.options.valid_rows}
        if self.options.rows:
            train, valid = (str(path.resolve()) for path in self.options.rows)
            return common | {"data.train": train, "data.valid": valid}
        train = rows.write(self.folder / "train.jsonl", rows.make(count, 1, lengths))
        valid = rows.write(self.folder / "valid.jsonl", rows.make(16, 2, lengths))
        return common | {"data.train": str(train), "data.valid": str(valid), "data.max_length": 240}

    def train(self, model: torch.nn.Module, recipe: dict) -> reference.Result:
        """Runs a recipe on the reference side."""
        data, settings = recipe["data"], recipe["train"]
        training = reference.rows(Path(data["train"]), self.tokenizer, data["max_length"])
        validation = reference.rows(Path(data["valid"]), self.tokenizer, data["max_length"])[: data["valid_limit"]]
        training = training[: settings["batch_size"] * settings["max_steps"]]
        return reference.train(model, settings, training, validation)

    def training(self, name: str, ours: Run, theirs: reference.Result, limit: float) -> None:
        """Compares the losses of two runs."""
        steps = len(theirs.losses)
        self.report.equal(f"{name}: number of steps", [len(ours.losses)], [steps])
        worst = np.abs(np.array(ours.losses) - np.array(theirs.losses)).max()
        self.report.below(f"{name}: losses of {steps} steps", worst, limit)
        self.report.below(f"{name}: validation loss before", abs(ours.before - theirs.before), 2e-3)
        self.report.below(f"{name}: validation loss after", abs(ours.after - theirs.after), 2e-3)
        self.report.above(f"{name}: what was learned", theirs.before - theirs.after, 2e-2)
        self.report.note(f"validation loss, medqa: {ours.before:.5f} before, {ours.after:.5f} after")
        self.report.note(f"validation loss, theirs: {theirs.before:.5f} before, {theirs.after:.5f} after")
        self.report.note(f"medqa: {ours.speed:.0f} tokens per second")


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Returns the largest absolute difference of two tensors of the same shape."""
    if ours.shape != theirs.shape:
        raise ValueError(f"expected logits of one shape, found {list(ours.shape)} and {list(theirs.shape)}")
    return (ours - theirs).abs().max().item()


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medqa", type=Path, required=True, help="the medqa program")
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--only", default="abcde", help="parts: a logits and ids, b answers, c PubMedQA, d LoRA, e full")
    parser.add_argument("--rows", type=Path, nargs=2, metavar=("TRAIN", "VALID"), help="JSONL for d and e")
    parser.add_argument("--steps", type=int, help="optimizer steps of d and e; default: 16 and 8")
    parser.add_argument("--valid-rows", type=int, default=100, help="maximum number of rows of VALID; default: 100")
    return parser.parse_args()


def main() -> int:
    """Runs the selected parts."""
    options = arguments()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="medqa-compare-") as folder:
        both = Comparison(options, report, Medqa(options.medqa, Path(folder)), options.model, Path(folder))
        parts = {
            "a": ("a. Logits and token ids", both.logits),
            "b": ("b. Greedy answers", both.answers),
            "c": ("c. PubMedQA by log-likelihood", both.pubmedqa),
            "d": ("d. LoRA", both.lora),
            "e": ("e. Full fine-tuning", both.full),
        }
        for key in options.only:
            report.part(*parts[key])
    print(f"\n{report.checks} checks, {len(report.failed)} failed")
    return 1 if report.failed or not report.checks else 0


if __name__ == "__main__":
    sys.exit(main())
