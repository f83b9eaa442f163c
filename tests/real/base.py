"""Conversion of the GGUF file to a Hugging Face directory with gguf-py, without any of our own code."""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGUFReader
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CONTROL = 3  # GGUF's token type of special tokens such as <|im_end|>

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def export(path: Path, directory: Path) -> None:
    """Writes configuration, f32 weights and tokenizer of the GGUF file `path` into `directory`."""
    reader = GGUFReader(path)
    field = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF.")}
    directory.mkdir(parents=True, exist_ok=True)
    tensors = weights(reader, field["llama.attention.head_count"], field["llama.attention.head_count_kv"])
    config = configuration(field, tied="lm_head.weight" not in tensors)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer(field).save_pretrained(directory)


def configuration(field: dict, tied: bool) -> dict:
    """Builds config.json from the file's metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(field["tokenizer.ggml.tokens"]),
        "hidden_size": field["llama.embedding_length"],
        "intermediate_size": field["llama.feed_forward_length"],
        "num_hidden_layers": field["llama.block_count"],
        "num_attention_heads": field["llama.attention.head_count"],
        "num_key_value_heads": field["llama.attention.head_count_kv"],
        "head_dim": field["llama.rope.dimension_count"],
        "max_position_embeddings": field["llama.context_length"],
        "rms_norm_eps": field["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": field["llama.rope.freq_base"],
        "tie_word_embeddings": tied,
        "bos_token_id": field["tokenizer.ggml.bos_token_id"],
        "eos_token_id": field["tokenizer.ggml.eos_token_id"],
        "pad_token_id": field["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
    }


def weights(reader: GGUFReader, heads: int, kv_heads: int) -> dict[str, np.ndarray]:
    """Dequantizes every tensor to f32 under its Hugging Face name."""
    tensors = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if ".attn_q." in tensor.name:
            value = halves(value, heads)
        elif ".attn_k." in tensor.name:
            value = halves(value, kv_heads)
        tensors[hugging_face_name(tensor.name)] = np.ascontiguousarray(value)
    return tensors


def hugging_face_name(name: str) -> str:
    """Translates a GGUF name: `blk.3.attn_q.weight` becomes `model.layers.3.self_attn.q_proj.weight`."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{IN_BLOCK[parts[2]]}.{parts[3]}"
    return f"{OUTER[parts[0]]}.{parts[1]}"


def halves(value: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the row permutation of GGUF files of architecture llama: they store rows i and i + d/2 of a head next to
    each other, while transformers applies RoPE to the two halves of a head."""
    rows, columns = value.shape
    return value.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def tokenizer(field: dict) -> PreTrainedTokenizerFast:
    """Builds the tokenizer of SmolLM2: digits are split one by one, followed by byte-level BPE."""
    if field["tokenizer.ggml.pre"] != "smollm":
        raise ValueError(f"expected a vocabulary of the type smollm, found {field['tokenizer.ggml.pre']}")
    tokens = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    inner = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    inner.decoder = decoders.ByteLevel()
    types = field["tokenizer.ggml.token_type"]
    controls = [token for token, kind in zip(tokens, types) if kind == CONTROL]
    inner.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in controls])
    named = {name: tokens[field[f"tokenizer.ggml.{key}_token_id"]] for name, key in SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        chat_template=field["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **named,
    )


SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
