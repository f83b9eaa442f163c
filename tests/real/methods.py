"""Trains SmolLM2 with every method, with medqa and with PEFT from the same initial values, and compares the losses.

The script `methods` in this directory builds medqa and starts this program. The runs of one method are sequential, so
that each has the machine to itself.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from safetensors.torch import save_file
from transformers import AutoTokenizer

import base
import reference
from medqa import Medqa, Run
from report import Report

RECIPE = Path(__file__).resolve().parents[2] / "apps/medqa/recipes/medquad-lora.toml"
SEED = 0
TOKENS = 20
TEXT = (
    "You are a careful assistant for medical questions. Answer in plain words: say what the condition is, what causes "
    "it, how it is found and treated, and when someone should see a doctor."
)
COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": TOKENS}
LORA = {"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Method:
    """A method on both sides: recipe changes, PEFT's configuration, and the learning rate of both."""

    ours: dict[str, object]
    theirs: Callable[[], PeftConfig]
    learning_rate: float
    from_text: bool = False


METHODS = {
    "lora": Method({"method.kind": "lora"}, lambda: LoraConfig(**LORA), 5e-4),
    "dora": Method({"method.kind": "dora"}, lambda: LoraConfig(**LORA, use_dora=True), 5e-4),
    "prefix": Method({"method.kind": "p-tuning-v2"}, lambda: PrefixTuningConfig(**COMMON), 5e-3),
    "prefix-text": Method({"method.kind": "p-tuning-v2"}, lambda: PrefixTuningConfig(**COMMON), 5e-3, from_text=True),
    "prefix-projection": Method(
        {"method.kind": "p-tuning-v2", "method.prefix_projection": True, "method.encoder_hidden_size": 128},
        lambda: PrefixTuningConfig(**COMMON, prefix_projection=True, encoder_hidden_size=128),
        1e-3,
    ),
    # At higher learning rates rounding alone makes two runs diverge. At 1e-4, P-tuning in PEFT ends 4e-3 away from the
    # same run with the other attention implementation; at 3e-2, a difference of 1e-5 in the first losses of prompt
    # tuning grows to 1e-2 by step 30.
    "prompt": Method({"method.kind": "prompt"}, lambda: PromptTuningConfig(**COMMON), 3e-3),
    "p-tuning": Method(
        {"method.kind": "p-tuning", "method.encoder_hidden_size": 256},
        lambda: PromptEncoderConfig(**COMMON, encoder_hidden_size=256),
        3e-5,
    ),
}
# Our QLoRA on packed weights, with its absolute limit or its limit relative to the loss. It is compared with our own
# LoRA on the file's weights as floats, with our own LoRA on the dequantized nf4 weights, or with PEFT's LoRA on weights
# that bitsandbytes has rounded to nf4.
QLORA = {
    "qlora": ({"method.kind": "qlora", "model.dtype": "packed"}, 3e-3, None),
    "qlora-nf4": ({"method.kind": "qlora", "model.dtype": "nf4"}, None, 2e-2),
    "qlora-nf4-floats": ({"method.kind": "qlora", "model.dtype": "nf4"}, 3e-3, None),
    "qlora-nf4-peft": ({"method.kind": "qlora", "model.dtype": "nf4"}, None, 5e-3),
}


@dataclass(frozen=True)
class Both:
    """The losses of two runs from the same initial values."""

    name: str
    ours: Run | reference.Result
    theirs: Run | reference.Result

    def line(self) -> str:
        """Returns the line for the file of --out."""
        fields = {side: asdict(getattr(self, side)) for side in ("ours", "theirs")}
        return json.dumps({"name": self.name} | fields, default=str)


class Bench:
    """Both sides of the comparison, their data, and a working folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.medqa = Medqa(options.medqa, folder)
        self.directory = folder / "base"
        base.export(options.model, self.directory)
        self.tokenizer = AutoTokenizer.from_pretrained(self.directory)
        train, valid = (str(path.resolve()) for path in options.rows)
        self.changes = {
            "data.train": train, "data.valid": valid, "data.shuffle": False, "data.valid_limit": options.valid_rows,
            "train.max_steps": options.steps, "model.path": str(options.model),
        }

    def first(self, name: str, method: Method, attention: str = "sdpa") -> tuple[PeftModel, dict[str, object]]:
        """Creates an adapter with PEFT; returns its model, and recipe changes that give medqa the same adapter."""
        torch.manual_seed(SEED)
        model = get_peft_model(reference.base(self.directory, attention), method.theirs())
        if method.from_text:
            self.start_from_text(model)
            return model, {"method.init_text": TEXT}
        if not hasattr(model, "prompt_encoder"):
            model.save_pretrained(self.folder / f"{name}-first")
            return model, {"method.init": str(self.folder / f"{name}-first")}
        # PEFT's adapter file holds the output of the encoder, not the encoder.
        state = self.folder / f"{name}-first.safetensors"
        encoder = model.prompt_encoder["default"].state_dict()
        save_file({key: value.clone() for key, value in encoder.items()}, state)
        return model, {"method.init": str(state)}

    def start_from_text(self, model: PeftModel) -> None:
        """Initializes the prefix with the keys and values of the text's first tokens."""
        ids = torch.tensor([self.tokenizer.encode(TEXT)[:TOKENS]])
        with torch.no_grad():
            cache = reference.base(self.directory)(ids, use_cache=True).past_key_values
            pairs = [(layer.keys, layer.values) for layer in cache.layers]
            start = prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=TOKENS)
            model.prompt_encoder["default"].embedding.weight.copy_(start)

    def beside_peft(self, name: str) -> Both:
        """Trains the same method on both sides."""
        method = METHODS[name]
        model, start = self.first(name, method)
        changes = self.changes | method.ours | {"train.learning_rate": method.learning_rate}
        if name not in ("lora", "dora"):
            changes |= {"method.num_virtual_tokens": TOKENS}
        recipe = reference.recipe(RECIPE, {key: value for key, value in changes.items() if "method" not in key})
        if self.options.control:
            # The other attention implementation computes the same sums in another order.
            ours = self.their_run(self.first(name, method, "eager")[0], recipe)
        else:
            ours = self.medqa.train(self.recipe(name), changes | start, name)
        return Both(name, ours, self.their_run(model, recipe))

    def recipe(self, name: str) -> Path:
        """Returns the recipe, without LoRA's own keys for other methods."""
        if name.startswith(("lora", "dora", "qlora")):
            return RECIPE
        lines = RECIPE.read_text().splitlines()
        kept = [line for line in lines if not line.startswith(("r =", "alpha =", "target_modules ="))]
        path = self.folder / f"{name}.toml"
        path.write_text("\n".join(kept) + "\n")
        return path

    def their_run(self, model: PeftModel, recipe: dict) -> reference.Result:
        """Runs a recipe on the reference side."""
        data, settings = recipe["data"], recipe["train"]
        training = reference.rows(Path(data["train"]), self.tokenizer, data["max_length"])
        validation = reference.rows(Path(data["valid"]), self.tokenizer, data["max_length"])[: data["valid_limit"]]
        return reference.train(model, settings, training[: settings["batch_size"] * settings["max_steps"]], validation)

    def beside_lora(self, name: str, floats: reference.Result | Run | None) -> Both:
        """Trains QLoRA, and LoRA on the same weights as floats."""
        model, start = self.first("lora", METHODS["lora"])
        changes = self.changes | start | {"train.learning_rate": METHODS["lora"].learning_rate}
        lora = changes | {"method.kind": "lora"}
        if name == "qlora-nf4-peft":
            round_to_nf4(model)
            recipe = reference.recipe(RECIPE, {key: value for key, value in changes.items() if "method" not in key})
            ours = self.medqa.train(RECIPE, changes | QLORA[name][0], name)
            return Both(name, ours, self.their_run(model, recipe))
        if name == "qlora-nf4-floats":
            lora["model.path"] = str(self.folder / "nf4")
            self.medqa("export", "--model", self.options.model, "--nf4", "--out", lora["model.path"])
            floats = None
        floats = floats or self.medqa.train(RECIPE, lora, f"{name}-lora")
        return Both(name, self.medqa.train(RECIPE, changes | QLORA[name][0], name), floats)


@torch.no_grad()
def round_to_nf4(model: PeftModel) -> None:
    """Rounds the projections to nf4 with bitsandbytes and QLoRA's settings."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, weight in model.named_parameters():
        if name.endswith(("proj.weight", "proj.base_layer.weight")):
            weight.copy_(dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)))


def check(report: Report, both: Both, limit: float) -> None:
    """Prints and checks the results of a method."""
    name, ours, theirs = both.name, both.ours, both.theirs
    worst = np.abs(np.array(ours.losses) - np.array(theirs.losses)).max()
    report.note(f"{name}: validation loss {ours.before:.5f} before, {ours.after:.5f} after; losses within {worst:.1e}")
    report.note(f"{name}: beside it        {theirs.before:.5f} before, {theirs.after:.5f} after")
    report.below(f"{name}: validation loss after", abs(ours.after - theirs.after), limit)
    report.above(f"{name}: what was learned", theirs.before - theirs.after, 2e-2)


def results(path: Path | None) -> dict[str, Both]:
    """Reads the results of earlier runs."""
    if path is None or not path.exists():
        return {}
    read = [json.loads(line) for line in path.read_text().splitlines()]
    side = lambda fields: reference.Result(fields["losses"], fields["before"], fields["after"])
    return {line["name"]: Both(line["name"], side(line["ours"]), side(line["theirs"])) for line in read}


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medqa", type=Path, required=True, help="the medqa program")
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--rows", type=Path, nargs=2, metavar=("TRAIN", "VALID"), required=True, help="JSONL")
    parser.add_argument("--only", nargs="+", default=[*METHODS, *QLORA], choices=[*METHODS, *QLORA])
    parser.add_argument("--steps", type=int, default=64, help="optimizer steps, each of 4 rows")
    parser.add_argument("--valid-rows", type=int, default=40, help="maximum number of rows of VALID")
    parser.add_argument("--control", action="store_true", help="PEFT against PEFT with the other attention: effect of rounding")
    parser.add_argument("--out", type=Path, help="file in which results are kept; results already there are reused")
    return parser.parse_args()


def main() -> int:
    """Runs the selected methods that have no results yet."""
    options, report = arguments(), Report()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = results(options.out)
    with tempfile.TemporaryDirectory(prefix="medqa-methods-") as folder:
        bench = Bench(options, Path(folder))

        def one(name: str) -> None:
            if name not in found:
                lora = found["lora"].ours if "lora" in found else None
                found[name] = bench.beside_peft(name) if name in METHODS else bench.beside_lora(name, lora)
                if options.out:
                    with options.out.open("a") as out:
                        out.write(found[name].line() + "\n")
            _, absolute, relative = QLORA.get(name, (None, 5e-3, None))
            check(report, found[name], absolute or relative * found[name].theirs.after)

        for name in options.only:
            report.part(name, lambda name=name: one(name))
    if {"prefix", "prefix-text"} <= found.keys():
        gain = found["prefix"].ours.after - found["prefix-text"].ours.after
        report.above("a prefix from a text, below a random one by", gain, 2e-2)
    print(f"\n{report.checks} checks, {len(report.failed)} failed")
    return 1 if report.failed or not report.checks else 0


if __name__ == "__main__":
    sys.exit(main())
