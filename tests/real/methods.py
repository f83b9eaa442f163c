"""Trains SmolLM2 with every method, by medqa and by PEFT from the same first values, and compares the losses.

`methods` beside this file builds medqa and starts this. The runs of one method come one after the other, so that each
has the machine to itself.
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
    """A method on both sides: changes of the recipe, PEFT's configuration, and a learning rate for both."""

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
    # At higher rates rounding alone drives two runs apart: at 1e-4 P-tuning of PEFT ends 4e-3 from itself with the other attention,
    # at 3e-2 1e-5 in the first losses of a prompt is 1e-2 in the thirtieth.
    "prompt": Method({"method.kind": "prompt"}, lambda: PromptTuningConfig(**COMMON), 3e-3),
    "p-tuning": Method(
        {"method.kind": "p-tuning", "method.encoder_hidden_size": 256},
        lambda: PromptEncoderConfig(**COMMON, encoder_hidden_size=256),
        3e-5,
    ),
}
# Ours: the packed weights. Beside them ours again, LoRA on the file's as floats or on what the nf4 ones hold, or PEFT's LoRA on
# what bitsandbytes rounds to nf4. Limits, the second kind relative to the loss.
QLORA = {
    "qlora": ({"method.kind": "qlora", "model.dtype": "packed"}, 3e-3, None),
    "qlora-nf4": ({"method.kind": "qlora", "model.dtype": "nf4"}, None, 2e-2),
    "qlora-nf4-floats": ({"method.kind": "qlora", "model.dtype": "nf4"}, 3e-3, None),
    "qlora-nf4-peft": ({"method.kind": "qlora", "model.dtype": "nf4"}, None, 5e-3),
}


@dataclass(frozen=True)
class Both:
    """The course of two runs from the same first values."""

    name: str
    ours: Run | reference.Result
    theirs: Run | reference.Result

    def line(self) -> str:
        """For --out."""
        fields = {side: asdict(getattr(self, side)) for side in ("ours", "theirs")}
        return json.dumps({"name": self.name} | fields, default=str)


class Bench:
    """The two sides, their data, and a folder."""

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
        """PEFT's new adapter, and how medqa's recipe gets the same one."""
        torch.manual_seed(SEED)
        model = get_peft_model(reference.base(self.directory, attention), method.theirs())
        if method.from_text:
            self.start_from_text(model)
            return model, {"method.init_text": TEXT}
        if not hasattr(model, "prompt_encoder"):
            model.save_pretrained(self.folder / f"{name}-first")
            return model, {"method.init": str(self.folder / f"{name}-first")}
        # PEFT's own file has what the encoder makes, not the encoder.
        state = self.folder / f"{name}-first.safetensors"
        encoder = model.prompt_encoder["default"].state_dict()
        save_file({key: value.clone() for key, value in encoder.items()}, state)
        return model, {"method.init": str(state)}

    def start_from_text(self, model: PeftModel) -> None:
        """The prefix becomes the keys and values of the text's first tokens."""
        ids = torch.tensor([self.tokenizer.encode(TEXT)[:TOKENS]])
        with torch.no_grad():
            cache = reference.base(self.directory)(ids, use_cache=True).past_key_values
            pairs = [(layer.keys, layer.values) for layer in cache.layers]
            start = prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=TOKENS)
            model.prompt_encoder["default"].embedding.weight.copy_(start)

    def beside_peft(self, name: str) -> Both:
        """The same method on both sides."""
        method = METHODS[name]
        model, start = self.first(name, method)
        changes = self.changes | method.ours | {"train.learning_rate": method.learning_rate}
        if name not in ("lora", "dora"):
            changes |= {"method.num_virtual_tokens": TOKENS}
        recipe = reference.recipe(RECIPE, {key: value for key, value in changes.items() if "method" not in key})
        if self.options.control:
            # The same sums in another order.
            ours = self.their_run(self.first(name, method, "eager")[0], recipe)
        else:
            ours = self.medqa.train(self.recipe(name), changes | start, name)
        return Both(name, ours, self.their_run(model, recipe))

    def recipe(self, name: str) -> Path:
        """The recipe without LoRA's own keys, where it is another method's."""
        if name.startswith(("lora", "dora", "qlora")):
            return RECIPE
        lines = RECIPE.read_text().splitlines()
        kept = [line for line in lines if not line.startswith(("r =", "alpha =", "target_modules ="))]
        path = self.folder / f"{name}.toml"
        path.write_text("\n".join(kept) + "\n")
        return path

    def their_run(self, model: PeftModel, recipe: dict) -> reference.Result:
        """Their run of a recipe."""
        data, settings = recipe["data"], recipe["train"]
        training = reference.rows(Path(data["train"]), self.tokenizer, data["max_length"])
        validation = reference.rows(Path(data["valid"]), self.tokenizer, data["max_length"])[: data["valid_limit"]]
        return reference.train(model, settings, training[: settings["batch_size"] * settings["max_steps"]], validation)

    def beside_lora(self, name: str, floats: reference.Result | Run | None) -> Both:
        """QLoRA, and LoRA on the weights as floats."""
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
    """The projections become what bitsandbytes makes of them with QLoRA's settings."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    for name, weight in model.named_parameters():
        if name.endswith(("proj.weight", "proj.base_layer.weight")):
            weight.copy_(dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)))


def check(report: Report, both: Both, limit: float) -> None:
    """Prints a method's figures."""
    name, ours, theirs = both.name, both.ours, both.theirs
    worst = np.abs(np.array(ours.losses) - np.array(theirs.losses)).max()
    report.note(f"{name}: validation loss {ours.before:.5f} before, {ours.after:.5f} after; losses within {worst:.1e}")
    report.note(f"{name}: beside it        {theirs.before:.5f} before, {theirs.after:.5f} after")
    report.below(f"{name}: validation loss after", abs(ours.after - theirs.after), limit)
    report.above(f"{name}: what was learned", theirs.before - theirs.after, 2e-2)


def results(path: Path | None) -> dict[str, Both]:
    """What was measured before."""
    if path is None or not path.exists():
        return {}
    read = [json.loads(line) for line in path.read_text().splitlines()]
    side = lambda fields: reference.Result(fields["losses"], fields["before"], fields["after"])
    return {line["name"]: Both(line["name"], side(line["ours"]), side(line["theirs"])) for line in read}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medqa", type=Path, required=True, help="the program")
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--rows", type=Path, nargs=2, metavar=("TRAIN", "VALID"), required=True, help="JSONL")
    parser.add_argument("--only", nargs="+", default=[*METHODS, *QLORA], choices=[*METHODS, *QLORA])
    parser.add_argument("--steps", type=int, default=64, help="optimizer steps, each of 4 rows")
    parser.add_argument("--valid-rows", type=int, default=40, help="at most so many rows of VALID")
    parser.add_argument("--control", action="store_true", help="PEFT beside PEFT with the other attention: what rounding does")
    parser.add_argument("--out", type=Path, help="keep results here, and take what is there")
    return parser.parse_args()


def main() -> int:
    """Runs what was asked for and is not there yet."""
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
