//! Vocabularies keep their ids from one kind of file to the other.

use super::*;

const VOCABULARIES: [&str; 7] = ["smollm", "llama-bpe", "qwen2", "default", "spm", "spm-bare", "spm-eos"];

/// Writes a file with the tokenizer metadata and an arbitrary model, and opens it.
fn with_tokens(tokens: write::Metadata, path: &Path) -> Gguf {
    write::save(&model("mha"), tokens, BlockType::F32, path).unwrap();
    Gguf::open(path).unwrap()
}

fn texts(name: &str) -> Vec<String> {
    let bytes = std::fs::read(fixture(&format!("gguf/vocab-{name}.json"))).unwrap();
    let cases: Json = serde_json::from_slice(&bytes).unwrap();
    cases["cases"].as_array().unwrap().iter().map(|case| case["text"].as_str().unwrap().to_owned()).collect()
}

/// Returns the ids of every text, without and with special tokens added.
fn ids(tokenizer: &Tokenizer, texts: &[String]) -> Vec<[Vec<u32>; 2]> {
    texts.iter().map(|text| [false, true].map(|add| tokenizer.encode(text, add).unwrap())).collect()
}

#[test]
fn a_vocabulary_survives_file_folder_and_file() {
    let directory = tempfile::tempdir().unwrap();
    for name in VOCABULARIES {
        let source = Gguf::open(&fixture(&format!("gguf/vocab-{name}.gguf"))).unwrap();
        let tokenizer = Tokenizer::from_gguf(&source).unwrap();
        let rows = tokenizer.vocab_size();
        // GGUF to GGUF: every key is unchanged.
        let copy = with_tokens(tokenizer.gguf_metadata(rows).unwrap(), &directory.path().join("copy.gguf"));
        let own = |gguf: &Gguf| -> BTreeMap<String, MetadataValue> {
            let all = gguf.all_metadata().filter(|(key, _)| key.starts_with("tokenizer."));
            all.map(|(key, value)| (key.to_owned(), value.clone())).collect()
        };
        assert_eq!(own(&copy), own(&source), "{name}");
        // GGUF to directory, and back to GGUF: all ids and stop ids are unchanged.
        let (folder, texts) = (directory.path().join(name), texts(name));
        std::fs::create_dir(&folder).unwrap();
        tokenizer.save(&folder).unwrap();
        let json = Tokenizer::from_dir(&folder).unwrap();
        let back = with_tokens(json.gguf_metadata(rows).unwrap(), &directory.path().join("back.gguf"));
        let back = Tokenizer::from_gguf(&back).unwrap();
        let expected = ids(&tokenizer, &texts);
        for (what, other) in [("folder", &json), ("file", &back)] {
            assert_eq!(other.vocab_size(), rows, "{name}, {what}");
            assert_eq!(other.eos_ids(), tokenizer.eos_ids(), "{name}, {what}");
            assert_eq!((other.bos(), other.eos()), (tokenizer.bos(), tokenizer.eos()), "{name}, {what}");
            for ((text, expected), found) in texts.iter().zip(&expected).zip(ids(other, &texts)) {
                assert_eq!(&found, expected, "{name}, {what}: {text:?}");
            }
        }
        for [_, whole] in &expected {
            assert_eq!(json.decode(whole, true).unwrap(), tokenizer.decode(whole, true).unwrap(), "{name}");
        }
        // Saving a tokenizer that came from a directory copies its files.
        let again = directory.path().join(format!("{name}-again"));
        std::fs::create_dir(&again).unwrap();
        json.save(&again).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            assert_eq!(std::fs::read(again.join(file)).unwrap(), std::fs::read(folder.join(file)).unwrap());
        }
    }
}

#[test]
fn a_tokenizer_of_transformers_gives_its_ids_from_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::from_dir(&fixture("tokenizer")).unwrap();
    let rows = tokenizer.vocab_size() + 3;
    let gguf = with_tokens(tokenizer.gguf_metadata(rows).unwrap(), &directory.path().join("tokens.gguf"));
    assert_eq!(gguf.metadata("tokenizer.ggml.pre").and_then(MetadataValue::as_str), Some("gpt-2"));
    let Some(MetadataValue::Array(MetadataArray::Signed(kinds))) = gguf.metadata("tokenizer.ggml.token_type") else {
        panic!("token types");
    };
    assert_eq!((kinds.len(), &kinds[..4], &kinds[rows - 3..]), (rows, &[3; 4][..], &[5; 3][..]));
    let found = Tokenizer::from_gguf(&gguf).unwrap();
    assert_eq!((found.bos(), found.eos(), found.pad()), (tokenizer.bos(), tokenizer.eos(), tokenizer.pad()));
    let cases: Json = serde_json::from_slice(&std::fs::read(fixture("tokenizer/cases.json")).unwrap()).unwrap();
    for case in cases.as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        for (field, add) in [("ids", true), ("ids_no_special", false)] {
            let expected: Vec<u32> = serde_json::from_value(case[field].clone()).unwrap();
            assert_eq!(found.encode(text, add).unwrap(), expected, "{text:?}");
        }
    }
}
