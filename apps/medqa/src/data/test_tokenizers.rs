//! Small tokenizers with any chat template, for tests.

use burn_llama::Tokenizer;
use serde_json::{Value, json};
use std::{fs, path::Path};

pub(super) fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(name)
}

/// Returns the fixture's byte-level tokenizer with additional special tokens, a chat template, and the named bos and
/// eos tokens.
pub(super) fn byte_level(template: &str, [bos, eos]: [&str; 2], special: &[&str]) -> Tokenizer {
    let folder = tempfile::tempdir().unwrap();
    let mut words: Value = serde_json::from_slice(&fs::read(fixture("tokenizer/tokenizer.json")).unwrap()).unwrap();
    let base = words["model"]["vocab"].as_object().unwrap().len();
    for (index, token) in special.iter().enumerate() {
        let mut added = words["added_tokens"][0].clone();
        (added["content"], added["id"]) = (json!(token), json!(base + index));
        words["added_tokens"].as_array_mut().unwrap().push(added);
    }
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "chat_template": template,
    });
    fs::write(folder.path().join("tokenizer.json"), words.to_string()).unwrap();
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_dir(folder.path()).unwrap()
}

/// Returns the fixture's SentencePiece tokenizer from a GGUF file, with a chat template.
pub(super) fn sentencepiece(template: &str) -> Tokenizer {
    let bytes = fs::read(fixture("gguf/vocab-spm.gguf")).unwrap();
    let count = u64::from_le_bytes(bytes[16..24].try_into().unwrap()) + 1;
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    let pair = [&string("tokenizer.chat_template")[..], &8u32.to_le_bytes(), &string(template)].concat();
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), [&bytes[..16], &count.to_le_bytes(), &pair, &bytes[24..]].concat()).unwrap();
    Tokenizer::from_gguf(&burn_llama::checkpoint::gguf::Gguf::open(file.path()).unwrap()).unwrap()
}
