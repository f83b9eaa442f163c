//! Token ids and rendered chat templates equal those of `transformers`.

use burn_llama::{ChatTemplate, Message, Tokenizer, checkpoint::gguf::Gguf};
use laws::fixture;
use serde_json::Value;

fn json(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(fixture(name)).unwrap()).unwrap()
}

fn messages(value: &Value) -> Vec<Message> {
    let text = |message: &Value, key: &str| message[key].as_str().unwrap().to_owned();
    let list = value.as_array().unwrap().iter();
    list.map(|message| Message::new(text(message, "role"), text(message, "content"))).collect()
}

#[test]
fn ids_and_texts_are_those_of_transformers() {
    let tokenizer = Tokenizer::from_dir(&fixture("tokenizer")).unwrap();
    let cases = json("tokenizer/cases.json");
    let cases = cases.as_array().unwrap();
    assert!(cases.len() >= 10);
    for case in cases {
        let text = case["text"].as_str().unwrap();
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids("ids"), "{text:?}");
        assert_eq!(tokenizer.encode(text, false).unwrap(), ids("ids_no_special"), "{text:?}");
        assert_eq!(tokenizer.decode(&ids("ids"), false).unwrap(), case["decoded"].as_str().unwrap());
        assert_eq!(tokenizer.decode(&ids("ids"), true).unwrap(), case["decoded_skip_special"].as_str().unwrap());
    }
}

#[test]
fn templates_render_as_in_transformers_and_refuse_what_it_refuses() {
    let mut refused = 0;
    for name in ["llama3", "chatml", "llama2"] {
        let file = json(&format!("templates/{name}.json"));
        let source = file["template"].as_str().unwrap();
        let template = ChatTemplate::new(source, file["bos_token"].as_str(), file["eos_token"].as_str()).unwrap();
        for case in file["cases"].as_array().unwrap() {
            let prompt = case["add_generation_prompt"].as_bool().unwrap();
            let found = template.render(&messages(&case["messages"]), prompt).unwrap();
            assert_eq!(found, case["text"].as_str().unwrap(), "{name}");
        }
        for case in file["errors"].as_array().unwrap() {
            assert!(template.render(&messages(&case["messages"]), false).is_err(), "{name}");
            refused += 1;
        }
    }
    assert!(refused > 0);
}

/// Returns a GGUF file with one more string in its metadata.
fn with_metadata(gguf: &[u8], key: &str, text: &str) -> Vec<u8> {
    let count = u64::from_le_bytes(gguf[16..24].try_into().unwrap()) + 1;
    let string = |text: &str| [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat();
    [&gguf[..16], &count.to_le_bytes(), &string(key), &8u32.to_le_bytes(), &string(text), &gguf[24..]].concat()
}

const AWKWARD: [&str; 12] = [
    "The heart's 4 chambers beat 100,000 times; 0.5 mg/kg b.i.d., 2024-05-17.",
    "   three before, three  within   and after   ",
    "\ttab\r\nlines\n\n\n  indented\u{a0}no-break\u{3000}wide",
    "na\u{ef}ve caf\u{e9} cafe\u{301} \u{5fc3}\u{81d3}\u{75c5} \u{441}\u{435}\u{440}\u{434}\u{446}\u{435} \u{642}\u{644}\u{628}",
    "\u{1f468}\u{200d}\u{2695}\u{fe0f} \u{1f3f3}\u{fe0f}\u{200d}\u{1f308}\u{1f44d}\u{1f3fd}",
    "\u{663}\u{664}\u{665} \u{bd} \u{2163} \u{1d7d8} 12345678901234567890",
    "<s>system</s><|im_start|>user\n a <|im_end|> b<tool> c</tool><|im_start|>",
    "<|im_start <s <unk> <0x41> </s",
    "\u{2581}low\u{2581}\u{2581}line and space",
    "aaaaaaaaaaaaaaaaaaaaaaa                                 aaaaa",
    "'S 'Re 'LL 'll d'accord DON'T don't",
    "\u{0}\u{7f}\u{feff}\u{fffd}\u{10ffff}",
];

#[test]
fn a_gguf_file_s_tokenizer_written_as_files_gives_the_same_ids_and_chats() {
    let source =
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}\n{% endfor %}";
    let mut texts = 0;
    for name in ["smollm", "llama-bpe", "qwen2", "default", "spm", "spm-bare", "spm-eos"] {
        let folder = tempfile::tempdir().unwrap();
        let gguf = std::fs::read(fixture(&format!("gguf/vocab-{name}.gguf"))).unwrap();
        let file = folder.path().join("vocabulary.gguf");
        std::fs::write(&file, with_metadata(&gguf, "tokenizer.chat_template", source)).unwrap();
        let expected = Tokenizer::from_gguf(&Gguf::open(&file).unwrap()).unwrap();
        expected.save(folder.path()).unwrap();
        let found = Tokenizer::from_dir(folder.path()).unwrap();
        let cases = json(&format!("gguf/vocab-{name}.json"));
        let cases: Vec<&str> =
            cases["cases"].as_array().unwrap().iter().filter_map(|case| case["text"].as_str()).collect();
        for text in cases.into_iter().chain(AWKWARD) {
            for add_special_tokens in [true, false] {
                let ids = expected.encode(text, add_special_tokens).unwrap();
                assert_eq!(found.encode(text, add_special_tokens).unwrap(), ids, "{name}: {text:?}");
                let printed = [true, false].map(|skip| expected.decode(&ids, skip).unwrap());
                assert_eq!([true, false].map(|skip| found.decode(&ids, skip).unwrap()), printed, "{name}: {text:?}");
            }
            texts += 1;
        }
        assert_eq!((found.bos(), found.eos(), found.pad()), (expected.bos(), expected.eos(), expected.pad()), "{name}");
        assert_eq!(found.eos_ids(), expected.eos_ids(), "{name}");
        assert_eq!(found.vocab_size(), expected.vocab_size(), "{name}");
        let chat =
            |tokenizer: &Tokenizer| tokenizer.chat_template().unwrap().render(&[Message::new("user", "Hi")], true);
        assert_eq!(chat(&found).unwrap(), chat(&expected).unwrap(), "{name}");
        // A tokenizer read from a directory is saved by copying its files.
        let copy = tempfile::tempdir().unwrap();
        found.save(copy.path()).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let read = |folder: &std::path::Path| std::fs::read(folder.join(file)).unwrap();
            assert_eq!(read(copy.path()), read(folder.path()), "{name}: {file}");
        }
    }
    assert!(texts > 250, "{texts}");
}
