//! Tests of GGUF files: values equal those of gguf-py, token ids those of llama.cpp, and broken files give errors.

use std::path::{Path, PathBuf};

use burn_llama::Error;
use burn_llama::chat::Message;
use burn_llama::checkpoint::gguf::{BlockType, Gguf, MetadataValue, TensorEntry, gguf_name, hugging_face_key};
use burn_llama::tokenizer::Tokenizer;
use safetensors::SafeTensors;
use serde_json::Value as Json;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/gguf");
const VOCABULARIES: [&str; 7] = ["smollm", "llama-bpe", "qwen2", "default", "spm", "spm-bare", "spm-eos"];

fn fixture(name: &str) -> PathBuf {
    Path::new(FIXTURES).join(name)
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(fixture(name)).unwrap()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Writes bytes to a file and opens it.
fn opened(bytes: &[u8]) -> Result<Gguf, Error> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), bytes).unwrap();
    Gguf::open(file.path())
}

/// Encodes a GGUF string.
fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// Builds a file header with the given counts, followed by `rest`.
fn head(tensors: u64, metadata: u64, rest: &[u8]) -> Vec<u8> {
    [b"GGUF", &3u32.to_le_bytes()[..], &tensors.to_le_bytes(), &metadata.to_le_bytes(), rest].concat()
}

/// Encodes an entry of the tensor table.
fn tensor(name: &str, ne: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut out = string(name);
    out.extend((ne.len() as u32).to_le_bytes());
    ne.iter().for_each(|size| out.extend(size.to_le_bytes()));
    out.extend(kind.to_le_bytes());
    out.extend(offset.to_le_bytes());
    out
}

#[test]
fn blocks_dequantize_bit_for_bit_as_in_gguf_py() {
    let file = read("blocks.safetensors");
    let blocks = SafeTensors::deserialize(&file).unwrap();
    for kind in BlockType::ALL {
        let bytes = blocks.tensor(&format!("{kind:?}.bytes")).unwrap().data().to_vec();
        let expected = floats(blocks.tensor(&format!("{kind:?}.values")).unwrap().data());
        let mut values = vec![0.0; expected.len()];
        kind.dequantize(&bytes, &mut values);
        assert_eq!(bits(&values), bits(&expected), "{kind:?}");
    }
}

#[test]
fn tensors_read_in_hugging_faces_names_and_row_order() {
    let gguf = Gguf::open(&fixture("model.gguf")).unwrap();
    let file = read("model.safetensors");
    let expected = SafeTensors::deserialize(&file).unwrap();
    let mut seen = 0;
    for entry in gguf.tensors() {
        let Some(key) = hugging_face_key(&entry.name) else {
            assert_eq!(entry.name, "rope_freqs.weight");
            continue;
        };
        assert_eq!(gguf_name(&key).as_deref(), Some(entry.name.as_str()));
        let tensor = expected.tensor(&key).unwrap();
        assert_eq!(entry.shape, tensor.shape(), "{key}");
        assert_eq!(bits(&gguf.read(entry).unwrap()), bits(&floats(tensor.data())), "{key}");
        assert_eq!(gguf.raw(&entry.name).unwrap().len(), entry.num_bytes());
        seen += 1;
    }
    assert_eq!(seen, expected.len());
    assert!(gguf.raw("nothing").is_err());
    let foreign =
        TensorEntry { name: "output_norm.weight".into(), shape: vec![1 << 40], kind: BlockType::F32, offset: 0 };
    assert!(gguf.read(&foreign).is_err());
}

#[test]
fn metadata_becomes_a_config() {
    let gguf = Gguf::open(&fixture("model.gguf")).unwrap();
    assert_eq!(gguf.metadata("llama.block_count"), Some(&MetadataValue::Unsigned(1)));
    let expected = serde_json::json!({
        "model_type": "llama", "vocab_size": 10, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu",
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": true,
        "attention_bias": true, "mlp_bias": false,
        "rope_scaling": {"rope_type": "factors", "factors": [1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]},
        "bos_token_id": 1, "eos_token_id": 2,
    });
    assert_eq!(gguf.config_json().unwrap(), expected);
    let error = Gguf::open(&fixture("vocab-spm.gguf")).unwrap().config_json().unwrap_err().to_string();
    assert!(error.contains("llama.embedding_length"), "{error}");
}

fn ids(case: &Json, field: &str) -> Vec<u32> {
    case[field].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn ids_equal_those_of_llama_cpp() {
    let mut wrong = Vec::new();
    for name in VOCABULARIES {
        let tokenizer = Tokenizer::from_gguf(&Gguf::open(&fixture(&format!("vocab-{name}.gguf"))).unwrap()).unwrap();
        let expected: Json = serde_json::from_slice(&read(&format!("vocab-{name}.json"))).unwrap();
        assert_eq!(tokenizer.eos_ids(), ids(&expected, "stop"), "{name}");
        for case in expected["cases"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            for (field, add) in [("plain", false), ("whole", true)] {
                let found = tokenizer.encode(text, add).unwrap();
                if found != ids(case, field) {
                    wrong.push(format!("{name} {field} {text:?}\n  {:?}\n  {found:?}", ids(case, field)));
                }
            }
            let printed = case["printed"].as_str().unwrap();
            let decoded = tokenizer.decode(&ids(case, "plain"), false).unwrap();
            // llama.cpp decodes token by token and therefore keeps the space that SentencePiece adds before a text.
            let added = name != "spm-bare" && name.starts_with("spm") && printed.len() == decoded.len() + 1;
            let expected = if added { &printed[1..] } else { printed };
            if decoded != expected {
                wrong.push(format!("{name} decode {expected:?} {decoded:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_stream_gives_what_decoding_gives_in_whole_characters() {
    for name in VOCABULARIES {
        let tokenizer = Tokenizer::from_gguf(&Gguf::open(&fixture(&format!("vocab-{name}.gguf"))).unwrap()).unwrap();
        let expected: Json = serde_json::from_slice(&read(&format!("vocab-{name}.json"))).unwrap();
        for case in expected["cases"].as_array().unwrap() {
            let all = ids(case, "whole");
            let mut stream = tokenizer.stream();
            let mut text = String::new();
            for id in &all {
                let piece = stream.push(*id).unwrap().unwrap_or_default();
                assert!(!piece.ends_with('\u{fffd}'), "{name}");
                text += &piece;
            }
            text += &stream.finish().unwrap().unwrap_or_default();
            assert_eq!(text, tokenizer.decode(&all, true).unwrap(), "{name}");
        }
    }
}

#[test]
fn special_tokens_are_found_by_id_and_name() {
    let tokenizer = Tokenizer::from_gguf(&Gguf::open(&fixture("vocab-llama-bpe.gguf")).unwrap()).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.bos_token()), (Some(1), Some("<s>")));
    assert_eq!((tokenizer.eos(), tokenizer.eos_token()), (Some(2), Some("</s>")));
    assert_eq!((tokenizer.pad(), tokenizer.vocab_size()), (None, 630));
    assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(4));
    assert_eq!(tokenizer.id_to_token(4).as_deref(), Some("<|im_end|>"));
    assert_eq!(tokenizer.id_to_token(630), None);
    assert!(tokenizer.chat_template().is_none());
}

#[test]
fn unknown_tokenizers_are_named() {
    let metadata = |pre: &str, model: &str| {
        let mut rest = [string("tokenizer.ggml.model"), 8u32.to_le_bytes().to_vec(), string(model)].concat();
        rest.extend([string("tokenizer.ggml.pre"), 8u32.to_le_bytes().to_vec(), string(pre)].concat());
        rest.extend(
            [string("tokenizer.ggml.tokens"), 9u32.to_le_bytes().to_vec(), 8u32.to_le_bytes().to_vec()].concat(),
        );
        rest.extend(1u64.to_le_bytes());
        rest.extend(string("a"));
        let gguf = opened(&head(0, 3, &rest)).unwrap();
        Tokenizer::from_gguf(&gguf).unwrap_err().to_string()
    };
    let error = metadata("gemma4", "gpt2");
    assert!(error.contains("gemma4") && error.contains("tekken") && error.contains("llama-bpe"), "{error}");
    let error = metadata("default", "bert");
    assert!(error.contains("bert") && error.contains("gpt2 or llama"), "{error}");
}

#[test]
fn a_chat_template_in_the_file_renders() {
    // The model fixture has no vocabulary, so its template is read from the metadata directly.
    let gguf = Gguf::open(&fixture("model.gguf")).unwrap();
    let source = gguf.metadata("tokenizer.chat_template").and_then(MetadataValue::as_str).unwrap();
    let template = burn_llama::chat::ChatTemplate::new(source, None, None).unwrap();
    let text = template.render(&[Message::new("user", "Hi")], None, true).unwrap();
    assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
}

#[test]
fn a_file_cut_anywhere_is_an_error() {
    for name in ["model.gguf", "vocab-spm.gguf"] {
        let whole = read(name);
        let gguf = opened(&whole).unwrap();
        let end = gguf.tensors().map(|entry| entry.offset + entry.num_bytes()).max();
        let step = |at: usize| if at < 4096 { 1 } else { 97 };
        let mut at = 0;
        // A vocabulary-only file has no tensors and ends with its metadata, possibly followed by padding.
        while at < end.unwrap_or(whole.len() - 64) {
            assert!(matches!(opened(&whole[..at]), Err(Error::Format { .. })), "{name} cut at {at}");
            at += step(at);
        }
    }
}

#[test]
fn a_file_with_any_byte_changed_never_panics() {
    let whole = read("model.gguf");
    for at in 0..2048 {
        for flip in [0x01, 0x80, 0xff] {
            let mut broken = whole.clone();
            broken[at] ^= flip;
            let Ok(gguf) = opened(&broken) else { continue };
            let _ = gguf.config_json();
            let _ = Tokenizer::from_gguf(&gguf);
            for entry in gguf.tensors() {
                let _ = gguf.read(entry);
            }
        }
    }
}

#[test]
fn impossible_heads_say_what_is_wrong() {
    let u32_key =
        |value: u32, kind: u32| [string("k"), kind.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat();
    let huge_array =
        [string("k"), 9u32.to_le_bytes().to_vec(), 0u32.to_le_bytes().to_vec(), u64::MAX.to_le_bytes().to_vec()];
    for (bytes, expected) in [
        (vec![], "24 bytes"),
        (b"GGUX\x03\0\0\0aaaaaaaaaaaaaaaaaaa".to_vec(), "magic"),
        ([b"GGUF\0\0\0\x03".to_vec(), vec![0; 16]].concat(), "big-endian"),
        ([b"GGUF\x01\0\0\0".to_vec(), vec![0; 16]].concat(), "version 2 or 3"),
        (head(u64::MAX, 0, &[]), "tensor name"),
        (head(0, u64::MAX, &[]), "metadata key"),
        (head(0, 1, &u64::MAX.to_le_bytes()), "metadata key"),
        (head(0, 1, &u32_key(1, 99)), "value type"),
        (head(0, 1, &huge_array.concat()), "bytes to the file's end"),
        (head(0, 2, &u32_key(1, 4).repeat(2)), "a second time"),
        (head(1, 0, &tensor("t", &[256], 13, 0)), "Q5_K"),
        (head(1, 0, &tensor("t", &[1 << 40, 1 << 40], 0, 0)), "fits memory"),
        (head(1, 0, &tensor("t", &[33], 2, 0)), "multiple of 32"),
        (head(1, 0, &tensor("t", &[32], 0, u64::MAX - 8)), "complete"),
        (head(1, 0, &tensor("t", &[32], 0, 0)), "complete"),
        (head(1, 0, &tensor("t", &[1, 1, 1, 1, 1], 0, 0)), "4 dimensions"),
        (head(2, 0, &[tensor("t", &[0], 0, 0).repeat(2), vec![0; 32]].concat()), "each tensor once"),
    ] {
        let error = opened(&bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
