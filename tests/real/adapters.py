"""Writes an adapter of every kind that the installed PEFT can write for a small model, and shows what medqa reads.

    python tests/real/adapters.py --medqa target/release/medqa

The model and the adapters are random, and the tokenizer is that of the fixtures, so nothing is downloaded; it takes
about two minutes. The table has a line for each adapter that is read: the largest difference between medqa's logits
and PEFT's, and the adapter's effect. A list has the words with which medqa refuses the others. The program fails if an
adapter that is read differs by 3e-5 or has no effect on the logits, or if a kind that should be read is refused.
"""

import argparse
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
warnings.filterwarnings("ignore")

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from medqa import Medqa

TOKENIZER = Path(__file__).resolve().parents[1] / "fixtures/tokenizer"
TEXT = "Hello world, how are you today? 12345"
VOCABULARY = 384
QV = ["q_proj", "v_proj"]
TOLERANCE = 3e-5
RANK = {"r": 4, "lora_alpha": 6, "target_modules": QV}
SCHEDULE = {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 8, "target_modules": QV}
TOKENS = {"num_virtual_tokens": 5}

# LoRA and its variants: the configuration, and the base ("untied", "tied", "grown": with more rows than on disk).
LORA = {
    "plain": ({}, "untied"),
    "rslora": ({"use_rslora": True}, "untied"),
    "dora": ({"use_dora": True}, "untied"),
    "bias all": ({"bias": "all"}, "untied"),
    "bias lora_only": ({"bias": "lora_only"}, "untied"),
    "lora_bias": ({"lora_bias": True}, "untied"),
    "all-linear": ({"target_modules": "all-linear"}, "untied"),
    "rank_pattern, alpha_pattern": ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}, "untied"),
    "layers_to_transform": ({"layers_to_transform": [1], "layers_pattern": "layers"}, "untied"),
    "exclude_modules": ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "untied"),
    "modules_to_save norm": ({"modules_to_save": ["norm"]}, "untied"),
    "modules_to_save both ends": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "untied"),
    "modules_to_save, tied": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "tied"),
    "modules_to_save, ensure_weight_tying": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, "tied"),
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, "untied"),
    "lm_head, tied": ({"target_modules": ["q_proj", "lm_head"]}, "tied"),
    "embed_tokens": ({"target_modules": ["q_proj", "embed_tokens"]}, "untied"),
    "embed_tokens, tied": ({"target_modules": ["q_proj", "embed_tokens"]}, "tied"),
    "embed_tokens, ensure_weight_tying": (
        {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, "tied"
    ),
    "embed_tokens, dora": ({"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, "untied"),
    "trainable_token_indices": ({"trainable_token_indices": [40, 41]}, "untied"),
    "trainable_token_indices, tied": ({"trainable_token_indices": [40, 41]}, "tied"),
    "trainable_token_indices, lm_head": ({"trainable_token_indices": {"lm_head": [40, 41]}}, "untied"),
    "vocabulary grown": ({}, "grown"),
    "vocabulary grown, tied": ({}, "grown, tied"),
    "vocabulary grown, new tokens": ({"trainable_token_indices": [VOCABULARY, VOCABULARY + 1]}, "grown"),
    "pissa": ({"init_lora_weights": "pissa"}, "untied"),
    "olora": ({"init_lora_weights": "olora"}, "untied"),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, "untied"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "untied"),
    "target_parameters": ({"target_parameters": ["q_proj.weight"], "target_modules": []}, "untied"),
    "adapter_model.bin": ({}, "untied"),
}
# The other kinds, by peft_type: what their configuration needs. Kinds that are not listed get target_modules.
OTHERS = {
    "ADALORA": SCHEDULE,
    "IA3": {},
    "PREFIX_TUNING": TOKENS,
    "PROMPT_TUNING": TOKENS,
    "P_TUNING": TOKENS,
    "TRAINABLE_TOKENS": {"token_indices": [40, 41]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "MULTITASK_PROMPT_TUNING": TOKENS | {"num_tasks": 1},
    "CPT": {"cpt_token_ids": [40, 41], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 1]},
    "CARTRIDGE": TOKENS,
    "OFT": {"target_modules": QV, "oft_block_size": 4, "r": 0},
    "BOFT": {"target_modules": QV, "boft_block_size": 4},
    "C3A": {"target_modules": QV, "block_size": 8},
    "FOURIERFT": {"target_modules": QV, "n_frequency": 16},
    "MISS": {"target_modules": QV, "r": 4},
    "SHIRA": {"target_modules": QV, "r": 2},
    "PSOFT": {"target_modules": QV, "r": 4},
    "ROAD": {"target_modules": QV, "group_size": 8},
    "VBLORA": {"target_modules": QV, "vector_length": 4},
    "WAVEFT": {"target_modules": QV, "n_frequency": 16},
}
# The kinds that medqa reads.
READ = {"LORA", "ADALORA", "IA3", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"}
REFUSED_LORA = {
    "lora_bias", "embed_tokens, dora", "trainable_token_indices, lm_head", "layer_replication", "target_parameters"
}


def make_base(folder, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied, attention_bias=True,
        bos_token_id=0, eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.3 * noise if "norm" in key else 0.2 * noise)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / name, folder / name)


def load(folder, rows=VOCABULARY):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if rows != VOCABULARY:
        torch.manual_seed(2)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0, -len(ids):]


def write(config, base, rows, out, binary):
    """Writes a random adapter; returns PEFT's model."""
    torch.manual_seed(1)
    model = get_peft_model(load(base, rows), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(out, safe_serialization=not binary)
    return model


class Table:
    """The lines of the table, and the faults in them."""

    def __init__(self, medqa, folder):
        self.medqa, self.folder, self.faults = medqa, folder, []
        # The kinds that are refused with the same words, and those that PEFT does not write, by the words.
        self.groups = {}
        self.ids, _ = medqa.logits(TEXT, folder / "untied")
        self.plain = {name: logits(load(folder / name), self.ids) for name in ("untied", "tied")}

    def add(self, kind, name, make_config, base="untied", must_load=False):
        """Writes an adapter and reads it with medqa."""
        tied = "tied" if base.endswith(" tied") or base == "tied" else "untied"
        rows = VOCABULARY + 2 if "grown" in base else VOCABULARY
        out = self.folder / "adapter"
        shutil.rmtree(out, ignore_errors=True)
        try:
            model = write(make_config(), self.folder / tied, rows, out, name == "adapter_model.bin")
            expected = logits(load_again(model, self.folder / tied, rows, out), self.ids)
        except Exception as error:  # PEFT's own limits, which differ from kind to kind.
            self.groups.setdefault("PEFT does not write them for this model", []).append(f"{kind} {name}".strip())
            print(f"{kind} {name}: {str(error).splitlines()[0]}", file=sys.stderr)
            return
        effect = (expected[:, :VOCABULARY] - self.plain[tied]).abs().max().item()
        try:
            _, found = self.medqa.logits(TEXT, self.folder / tied, out)
        except RuntimeError as error:
            words = str(error).replace(str(out), "adapter").split("error: ")[-1]
            self.groups.setdefault(words.replace(f"found {kind}", "found KIND"), []).append(f"{kind} {name}".strip())
            if must_load:
                self.faults.append(f"{kind} {name} is refused")
            return
        difference = (found - expected).abs().max().item()
        print(f"| {kind} | {name} | {difference:.1e} of {effect:.1f} |")
        if difference > TOLERANCE or effect < 1e-3 or not must_load:
            self.faults.append(f"{kind} {name}: {difference}, effect {effect}")


def load_again(model, base, rows, out):
    """Loads an adapter as its users do; where PEFT has to initialize what is not in the file, that is the same."""
    torch.manual_seed(1)
    return PeftModel.from_pretrained(load(base, rows), out) if rows == VOCABULARY else model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medqa", type=Path, required=True, help="the program")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    print(f"PEFT {peft.__version__}, transformers {transformers.__version__}\n")
    print("| kind | adapter | largest difference of logits, of the adapter's effect |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("untied", "tied"):
            make_base(folder / name, name == "tied")
        table = Table(Medqa(arguments.medqa, folder), folder)
        for name, (changes, base) in LORA.items():
            fields = RANK | changes
            must_load = name not in REFUSED_LORA
            table.add("LORA", name, lambda: LoraConfig(task_type="CAUSAL_LM", **fields), base, must_load)
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
            name = getattr(kind, "value", kind)
            if name != "LORA":
                fields = OTHERS.get(name, {"target_modules": QV})
                table.add(name, "", lambda: config(task_type="CAUSAL_LM", **fields), must_load=name in READ)
    print("\nRefused, or not written:\n")
    for words, kinds in table.groups.items():
        print(f"- {', '.join(kinds)}: {words}")
    if table.faults:
        sys.exit("\n".join(table.faults))


if __name__ == "__main__":
    main()
