"""The reference side: transformers and PEFT, with a plain training loop in torch."""

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

CHOICES = ["yes", "no", "maybe"]
# Settings that a recipe may omit: the common defaults of AdamW in torch and medqa, and medqa's gradient clipping.
ADAMW = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
MAX_GRAD_NORM = 1.0
IGNORED = -100  # label with which transformers excludes a token from the loss

Row = tuple[list[int], list[int]]  # token ids, and labels of the same length


@dataclass(frozen=True)
class Result:
    """The losses that a training run reported."""

    losses: list[float]
    before: float
    after: float


def base(directory: Path, attention: str = "sdpa") -> PreTrainedModel:
    """Loads a model in f32 for evaluation."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).eval()


def with_adapter(directory: Path, adapter: Path) -> PeftModel:
    """Loads a model with a trained adapter through PEFT."""
    return PeftModel.from_pretrained(base(directory), adapter).eval()


def new_adapter(directory: Path, method: dict, seed: int) -> PeftModel:
    """Loads a model with a new adapter that PEFT initializes for the recipe's table `method`."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=method["r"], lora_alpha=method["alpha"], target_modules=method["target_modules"], task_type="CAUSAL_LM"
    )
    return get_peft_model(base(directory), config)


@torch.no_grad()
def logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Returns the logits of every token of one text: [tokens, vocabulary]."""
    return model(input_ids=torch.tensor([ids])).logits[0]


@torch.no_grad()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, tokens: int) -> str:
    """Generates a greedy answer of at most `tokens` tokens."""
    prompt = torch.tensor([tokenizer.encode(chat(tokenizer, question), add_special_tokens=False)])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens)
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


def chat(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Renders the question with the model's chat template, up to where the answer begins."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def log_likelihoods(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: dict) -> list[float]:
    """Returns the log-likelihood of each choice, with the prompt of lm-evaluation-harness's task pubmedqa: context and
    choice are encoded together, and the tokens after the context's own number of tokens are the choice."""
    context = f"Abstract: {chr(10).join(item['CONTEXTS'])}\nQuestion: {item['QUESTION']}\nAnswer:"
    start = len(tokenizer.encode(context))
    scores = []
    for choice in CHOICES:
        ids = tokenizer.encode(f"{context} {choice}")
        predicted = torch.log_softmax(logits(model, ids[:-1])[start - 1 :].double(), dim=-1)
        scores.append(predicted.gather(1, torch.tensor(ids[start:])[:, None]).sum().item())
    return scores


def rows(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Encodes questions with the chat template and answers with an end token. Only answers have labels, and long rows
    are truncated."""
    encoded = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer.encode(chat(tokenizer, row["question"]), add_special_tokens=False)
        target = tokenizer.encode(row["answer"] + tokenizer.eos_token, add_special_tokens=False)
        ids, labels = prompt + target, [IGNORED] * len(prompt) + target
        if len(prompt) < max_length:
            encoded.append((ids[:max_length], labels[:max_length]))
    return encoded


def batch(chosen: list[Row]) -> dict[str, torch.Tensor]:
    """Pads rows on the right to the length of the longest."""
    longest = max(len(ids) for ids, _ in chosen)

    def padded(lists: list[list[int]], by: int) -> torch.Tensor:
        return torch.tensor([items + [by] * (longest - len(items)) for items in lists])

    return {
        "input_ids": padded([ids for ids, _ in chosen], 0),
        "attention_mask": padded([[1] * len(ids) for ids, _ in chosen], 0),
        "labels": padded([labels for _, labels in chosen], IGNORED),
    }


@torch.no_grad()
def mean_loss(model: torch.nn.Module, examples: list[Row], size: int) -> float:
    """Returns the mean loss over all tokens with labels."""
    model.eval()
    total = tokens = 0
    for i in range(0, len(examples), size):
        part = batch(examples[i : i + size])
        learned = (part["labels"][:, 1:] != IGNORED).sum().item()
        total += model(**part).loss.item() * learned
        tokens += learned
    model.train()
    return total / tokens


def train(model: torch.nn.Module, settings: dict, training: list[Row], validation: list[Row]) -> Result:
    """Trains on the rows in their order with the settings of the recipe's table `train`."""
    size, steps = settings["batch_size"], settings["max_steps"]
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings["learning_rate"], **ADAMW)
    schedule = get_scheduler(settings["scheduler"], optimizer, settings["warmup"], steps)
    losses, before = [], mean_loss(model, validation, size)
    per_epoch = -(-len(training) // size)
    for step in range(steps):
        first = step % per_epoch * size
        loss = model(**batch(training[first : first + size])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return Result(losses, before, mean_loss(model, validation, size))


def recipe(path: Path, changes: dict[str, object]) -> dict:
    """Reads a recipe's tables and applies changes such as `train.max_steps`."""
    tables = tomllib.loads(path.read_text())
    for key, value in changes.items():
        table, name = key.split(".")
        tables[table][name] = value
    return tables
