"""Checks files written by `medqa export` with the programs they are for: llama.cpp, transformers, PEFT and gguf-py.

    python tests/real/export.py --medqa target/release/medqa --model SmolLM2-135M-Instruct.Q4_1.gguf

Prints one line per check: name, measured value, limit, ok or FAIL. Exits with 1 if a check failed. Needs torch,
transformers, peft, gguf, sentencepiece, llama-cpp-python and no network; random models are created from fixed seeds.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from llama import llama_cpp
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

QUESTIONS = ["What are the symptoms of asthma?", "How is high blood pressure treated?", "Why do I need vitamin D?"]
TEXT = "Blood pressure of 145/92 mmHg: what's next? 第一 — rest."
TOKENS = 48
CORPUS = [
    "The doctor's patient said it's better; we'll see if they've improved and I'd wait.",
    "aged 12 345 6789 1234 1000 2000 100,000 3.14 5.50  34   56    78",
    "blood pressure, high blood sugar and the heart: the heart rate was 88 at rest",
] * 8
TEXTS = [TEXT, "", " ", "  two  spaces", "\n\tx\r\n", "IT'S 2nd 123456", "<s>a</s> b", "é漢字👍", "a</s>\nb", *CORPUS[:3]]
FAILED = []


def check(name, measured, limit, holds):
    """Prints the line of a check and records a failure."""
    if not holds:
        FAILED.append(name)
    shown = measured if isinstance(measured, str) else f"{measured:.2e}"
    print(f"{name:<66} {shown:>12}  {limit:<8} {'ok' if holds else 'FAIL'}", flush=True)


def below(name, measured, limit):
    """Checks that the measured value is smaller than the limit."""
    check(name, measured, f"< {limit:.0e}", measured < limit)


def equal(name, ours, theirs):
    """Checks that two lists are equal."""
    differing = abs(len(ours) - len(theirs)) + sum(a != b for a, b in zip(ours, theirs))
    check(name, f"{differing} of {len(theirs)}", "= 0", differing == 0 and len(theirs) > 0)
    for a, b in zip(ours, theirs):
        if a != b:
            print(f"  ours   {a!r:.300}\n  theirs {b!r:.300}")


class Medqa:
    """The medqa program, with a folder for the files that it writes."""

    def __init__(self, program, folder):
        self.program, self.folder = program, folder

    def __call__(self, *arguments):
        done = subprocess.run([self.program, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"medqa {arguments[0]}: {done.stderr.strip()}")
        return done.stdout

    def export(self, model, name, *more):
        out = self.folder / name
        assert self("export", "--model", model, "--out", out, *more).strip() == str(out)
        assert not list(self.folder.glob("*.part")), "half-written files are left"
        return out

    @cache
    def answers(self, model, adapter=None):
        more = ["--adapter", adapter] if adapter else []
        ask = ["chat", "--model", model, *more, "--temperature", 0, "--max-new-tokens", TOKENS, "--prompt"]
        return [self(*ask, question).removesuffix("\n") for question in QUESTIONS]

    def logits(self, model, text, adapter=None, weights="f32", by_steps=False):
        out, more = self.folder / "logits.safetensors", ["--weights", weights, *(["--adapter", adapter] if adapter else [])]
        more += ["--by-steps"] if by_steps else []
        self("logits", "--model", model, *more, "--text", text, "--out", out)
        tensors = load_file(out)
        return tensors["ids"].tolist(), tensors["logits"].numpy()


def llama(path, lora=None):
    """Loads the file in llama.cpp with everything in f32."""
    trained = next(v for k, v in gguf_fields(path).items() if k.endswith(".context_length"))
    more = {"lora_path": str(lora)} if lora else {}
    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path), n_ctx=min(trained, 512), logits_all=True, type_k=f32, type_v=f32, flash_attn=False, verbose=False, seed=0, **more
    )


def llama_answers(path, tokenizer, lora=None):
    """Returns greedy answers of llama.cpp, with prompts built from the file's own chat template and vocabulary."""
    model, answers = llama(path, lora), []
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        source = model.metadata["tokenizer.chat_template"]
        prompt = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=True)
        ids, found = model.tokenize(prompt.encode(), add_bos=False, special=True), []
        model.reset()
        for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            if len(found) == TOKENS or llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(model.model), token):
                break
            found.append(token)
        answers.append(model.detokenize(found, special=False).decode("utf-8", "replace"))
    return answers


def llama_logits(path, ids, lora=None):
    """Returns llama.cpp's logits of every token, [tokens, vocabulary]."""
    model = llama(path, lora)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


@torch.no_grad()
def torch_logits(model, ids):
    """Returns the logits of transformers or PEFT, [tokens, vocabulary]."""
    return model(input_ids=torch.tensor([ids])).logits[0].float().numpy()


def difference(a, b):
    """Returns the largest absolute difference."""
    return float(np.abs(a - b).max())


def random_adapter(directory, out, **changes):
    """Creates an adapter with PEFT that changes the model's answers but keeps them meaningful."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.02)
    model.save_pretrained(out)
    return out


def real(medqa, source):
    """Checks that the real model gives the same answers in every exported form."""
    folder = medqa.export(source, "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = medqa.export(source, "base-f32.gguf")
    equal("base: F32 GGUF in llama.cpp, greedy answers", llama_answers(base, tokenizer), medqa.answers(source))
    again = medqa.export(folder, "again.gguf")
    same = gguf_fields(again), gguf_fields(base)
    keys = ["tokens", "merges", "token_type", "pre", "model", "bos_token_id", "eos_token_id", "add_bos_token"]
    for key in keys:
        name = f"tokenizer.ggml.{key}"
        holds = same[0][name] == same[1][name]
        check(f"base: {key} of GGUF > folder > GGUF", "same" if holds else "changed", "same", holds)
    equal("base: GGUF > folder > GGUF in llama.cpp, greedy answers", llama_answers(again, tokenizer), medqa.answers(source))
    below("base: folder, weights of GGUF > folder > GGUF", difference(*(tensors(path) for path in (again, base))), 1e-30)

    ids, ours = medqa.logits(source, TEXT)
    equal("base: folder in transformers, ids", tokenizer.encode(TEXT), ids)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    below("base: folder in transformers, logits", difference(torch_logits(theirs, ids), ours), 2e-4)
    half = medqa.export(source, "base-f16", "--dtype", "f16")
    theirs = AutoModelForCausalLM.from_pretrained(half, dtype="auto")
    check("base: f16 folder in transformers, type", str(theirs.dtype), "float16", theirs.dtype == torch.float16)
    below("base: f16 folder in transformers, logits", difference(torch_logits(theirs.float(), ids), ours), 1e-1)

    adapter = random_adapter(folder, medqa.folder / "adapter", use_rslora=True)
    ours = medqa.answers(source, adapter)
    changed = sum(a != b for a, b in zip(ours, medqa.answers(source)))
    check("adapter: answers that it changes", str(changed), "> 0", changed > 0)
    merged = medqa.export(source, "merged-f32.gguf", "--adapter", adapter)
    equal("adapter: merged F32 GGUF in llama.cpp, greedy answers", llama_answers(merged, tokenizer), ours)
    lora = medqa.export(source, "adapter.gguf", "--adapter", adapter, "--adapter-only")
    equal("adapter: its GGUF on the base F32 GGUF, greedy answers", llama_answers(base, tokenizer, lora), ours)
    _, ours = medqa.logits(source, TEXT, adapter)
    below("adapter: merged F32 GGUF in llama.cpp, logits", difference(llama_logits(merged, ids), ours), 1e-3)
    below("adapter: its GGUF on the base F32 GGUF, logits", difference(llama_logits(base, ids, lora), ours), 1e-3)
    short = medqa.export(source, "adapter-f16.gguf", "--adapter", adapter, "--adapter-only", "--dtype", "f16")
    below("adapter: its F16 GGUF on the base F32 GGUF, logits", difference(llama_logits(base, ids, short), ours), 5e-2)
    merged_folder = medqa.export(source, "merged", "--adapter", adapter)
    theirs = AutoModelForCausalLM.from_pretrained(merged_folder, dtype=torch.float32)
    below("adapter: merged folder in transformers, logits", difference(torch_logits(theirs, ids), ours), 5e-4)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
    below("adapter: PEFT on the base folder, logits", difference(torch_logits(theirs, ids), ours), 2e-4)

    exact = {tensor.name: tensor for tensor in gguf.GGUFReader(merged).tensors}
    # llama.cpp also rounds activations: to f16, and to 8 bits.
    for kind, limit in [("f16", 3e-1), ("q8_0", 3.0)]:
        path = medqa.export(source, f"merged-{kind}.gguf", "--adapter", adapter, "--dtype", kind)
        below(f"adapter: merged {kind} GGUF in llama.cpp, logits", difference(llama_logits(path, ids), ours), limit)
        answers = llama_answers(path, tokenizer)
        check(f"adapter: merged {kind} GGUF answers", answers[0][:10], "words", all(len(text) > 20 for text in answers))
        wrong = 0
        for tensor in gguf.GGUFReader(path).tensors:
            expected = gguf.quants.quantize(exact[tensor.name].data, tensor.tensor_type)
            wrong += not np.array_equal(expected.view(np.uint8).ravel(), tensor.data.view(np.uint8).ravel())
        check(f"adapter: merged {kind} GGUF, tensors unlike gguf-py's, bit for bit", str(wrong), "= 0", wrong == 0)


def gguf_fields(path):
    """Returns all metadata of a file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def tensors(path):
    """Returns the values of all tensors of an F32 file, concatenated."""
    return np.concatenate([tensor.data.ravel() for tensor in sorted(gguf.GGUFReader(path).tensors, key=lambda t: t.name)])


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(cuts, normalizer=None, bos=False, ignore_merges=False):
    """Trains a small byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|endoftext|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|begin|>", eos_token="<|endoftext|>")


def sentence_piece():
    """Builds a small tokenizer like Llama 2's: trained by SentencePiece, with merges in the order of its scores."""
    import io

    import sentencepiece

    trained = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=trained, model_type="bpe", vocab_size=400, byte_fallback=True,
        character_coverage=1.0, split_digits=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, num_threads=1, minloglevel=2, allow_whitespace_only_pieces=True,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    ids = {piece: i for i, piece in enumerate(pieces)}
    found = []
    for piece in pieces[259:]:
        splits = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        ways = [(left, right) for left, right in splits if left in ids and right in ids]
        found += [(processor.get_score(ids[piece]), left, right) for left, right in ways]
    found.sort(key=lambda merge: -merge[0])
    merges = [(left, right) for _, left, right in found]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def variants():
    """Returns the model variants: name, tokenizer, configuration class and its fields."""
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)

    def split(regex):
        return [pre_tokenizers.Split(Regex(regex), "isolated"), bytes_only]

    digits = [pre_tokenizers.Digits(individual_digits=True), gpt2]
    llama3 = {
        "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    yarn = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}
    qwen = split(LLAMA3.replace("{1,3}", ""))
    return [
        ("llama 2 (SentencePiece)", sentence_piece(), transformers.LlamaConfig, {"num_key_value_heads": 4}),
        ("llama 3 (llama3 rope)", byte_level(split(LLAMA3), bos=True, ignore_merges=True), transformers.LlamaConfig,
         {"rope_parameters": llama3}),
        ("smollm (tied)", byte_level(digits), transformers.LlamaConfig, {"tie_word_embeddings": True}),
        ("llama with biases", byte_level([gpt2]), transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
        ("llama (linear rope)", byte_level([gpt2]), transformers.LlamaConfig, {"rope_parameters": linear}),
        ("llama (yarn)", byte_level([gpt2]), transformers.LlamaConfig, {"rope_parameters": yarn}),
        ("mistral", sentence_piece(), transformers.MistralConfig, {"sliding_window": None}),
        ("qwen 2", byte_level(qwen, normalizers.NFC()), transformers.Qwen2Config, {}),
        ("qwen 3 (head_dim 32)", byte_level(qwen, normalizers.NFC()), transformers.Qwen3Config, {"head_dim": 32}),
    ]  # fmt: skip


def random_models(medqa):
    """Checks random models of every kind: directories of transformers exported as GGUF files for llama.cpp."""
    for index, (name, tokenizer, kind, changes) in enumerate(variants()):
        torch.manual_seed(index)
        fields = {
            "vocab_size": len(tokenizer) + 4, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
            "initializer_range": 0.3, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
        }  # fmt: skip
        folder = medqa.folder / f"random-{index}"
        model = AutoModelForCausalLM.from_config(kind(**fields | changes)).float().eval()
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.data += torch.randn_like(parameter) * 0.2
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path = medqa.export(folder, f"random-{index}.gguf")
        theirs = llama(path)
        for add in (False, True):
            expected = [tokenizer.encode(text, add_special_tokens=add) for text in TEXTS]
            found = [theirs.tokenize(text.encode(), add_bos=add, special=True) for text in TEXTS]
            equal(f"{name}: llama.cpp's ids, add_special_tokens {add}", found, expected)
        ids = [(7 * i + 3) % fields["vocab_size"] for i in range(40)]
        expected = torch_logits(model, ids)
        size = float(np.abs(expected).max())
        below(f"{name}: llama.cpp's logits (largest {size:.1f})", difference(llama_logits(path, ids), expected), 1e-4 * size)
        back = medqa.export(path, f"random-{index}-back")
        again = AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
        below(f"{name}: GGUF as a folder in transformers, logits", difference(torch_logits(again, ids), expected), 1e-4 * size)
        adapter = random_adapter(folder, medqa.folder / f"random-{index}-adapter")
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), adapter)
        adapted = torch_logits(peft, ids)
        changed = difference(adapted, expected)
        check(f"{name}: change of the logits by an adapter", changed, "> 1e-1", changed > 1e-1)
        lora = medqa.export(folder, f"random-{index}-lora.gguf", "--adapter", adapter, "--adapter-only")
        merged = medqa.export(folder, f"random-{index}-merged.gguf", "--adapter", adapter)
        for what, found in [("adapter GGUF", llama_logits(path, ids, lora)), ("merged GGUF", llama_logits(merged, ids))]:
            below(f"{name}: {what} in llama.cpp, logits", difference(found, adapted), 1e-4 * size)


def main():
    """Runs both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--medqa", required=True, type=Path, help="the medqa program")
    parser.add_argument("--model", type=Path, help="SmolLM2-135M-Instruct as a GGUF file; without it, random models only")
    options = parser.parse_args()
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        medqa = Medqa(options.medqa, Path(folder))
        random_models(medqa)
        if options.model:
            real(medqa, options.model)
    print(f"{len(FAILED)} failed" + "".join(f"\n  {name}" for name in FAILED))
    sys.exit(1 if FAILED else 0)


if __name__ == "__main__":
    main()
