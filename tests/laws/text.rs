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
            let found = template.render(&messages(&case["messages"]), None, prompt).unwrap();
            assert_eq!(found, case["text"].as_str().unwrap(), "{name}");
        }
        for case in file["errors"].as_array().unwrap() {
            assert!(template.render(&messages(&case["messages"]), None, false).is_err(), "{name}");
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
        let chat = |tokenizer: &Tokenizer| {
            tokenizer.chat_template().unwrap().render(&[Message::new("user", "Hi")], None, true)
        };
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

/// Template with a turn in the shape of ChatML, with the tokens of the fixtures' vocabularies.
const CHAT: &str = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// Returns every kind of tokenizer with the chat template `source`: of GGUF files (byte-level BPE and SentencePiece),
/// and of the `tokenizer.json` that each becomes.
fn tokenizers(source: &str) -> Vec<(String, Tokenizer)> {
    let mut all = Vec::new();
    for name in ["smollm", "llama-bpe", "qwen2", "default", "spm", "spm-bare", "spm-eos"] {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer =
            Tokenizer::from_gguf(&Gguf::open(&fixture(&format!("gguf/vocab-{name}.gguf"))).unwrap()).unwrap();
        tokenizer.save(folder.path()).unwrap();
        all.push((format!("{name}.gguf"), tokenizer));
        all.push((name.to_owned(), Tokenizer::from_dir(folder.path()).unwrap()));
        // The class whose rules `transformers` takes from its own code.
        let config = r#"{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}"#;
        std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        all.push((format!("{name}, Llama's class"), Tokenizer::from_dir(folder.path()).unwrap()));
    }
    all.push(("files".to_owned(), Tokenizer::from_dir(&fixture("tokenizer")).unwrap()));
    let with = |tokenizer: Tokenizer| {
        let template = tokenizer.parse_chat_template(source).unwrap();
        tokenizer.with_chat_template(template)
    };
    all.into_iter().map(|(name, tokenizer)| (name, with(tokenizer))).collect()
}

/// Returns the control tokens among ids: those that are not printed when special tokens are skipped.
fn control_tokens(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u32> {
    let printed = |id: u32, skip| tokenizer.decode(&[id], skip).unwrap();
    ids.iter().copied().filter(|&id| !printed(id, false).is_empty() && printed(id, true).is_empty()).collect()
}

/// Returns the texts of a vocabulary's control tokens.
fn control_texts(tokenizer: &Tokenizer) -> Vec<String> {
    let all: Vec<u32> = (0..tokenizer.vocab_size() as u32).collect();
    let control = control_tokens(tokenizer, &all);
    control.into_iter().filter_map(|id| tokenizer.id_to_token(id)).filter(|text| !text.trim().is_empty()).collect()
}

#[test]
fn the_texts_of_messages_are_never_control_tokens_and_others_keep_their_ids() {
    let (mut kept, mut escaped) = (0, 0);
    for (name, tokenizer) in tokenizers(CHAT) {
        let control = control_texts(&tokenizer);
        assert!(!control.is_empty(), "{name}");
        let chat = |text: &str| [Message::new("system", "s"), Message::new("user", text)];
        let of_template = tokenizer.apply_chat_template(&chat("x"), None, true).unwrap();
        let of_template = control_tokens(&tokenizer, &of_template);
        let attack = |token: &String| {
            [
                format!("Hi{token}\n"),
                format!("{token}{token} {token}a"),
                token[..token.len() - 1].to_owned(),
                token[1..].to_owned(),
            ]
        };
        let attacks = control.iter().filter(|token| token.is_ascii()).flat_map(attack);
        for text in AWKWARD.map(str::to_owned).into_iter().chain(attacks) {
            let rendered = tokenizer.chat_template().unwrap().render(&chat(&text), None, true).unwrap();
            let (parsed, found) = (
                tokenizer.encode(&rendered, false).unwrap(),
                tokenizer.apply_chat_template(&chat(&text), None, true).unwrap(),
            );
            assert_eq!(control_tokens(&tokenizer, &found), of_template, "{name}: {text:?}");
            if control_tokens(&tokenizer, &parsed) == of_template {
                // Parts of control tokens at its ends are escaped and encoded to the same ids.
                assert_eq!(found, parsed, "{name}: {text:?}");
                kept += 1;
            } else {
                // The text is the same; only its tokens are others. A vocabulary may lack tokens for a text.
                let printed = tokenizer.decode(&found, false).unwrap();
                let complete = !found.iter().any(|id| tokenizer.id_to_token(*id).is_some_and(|token| token == "<unk>"));
                let squeezed = |text: &str| text.split_whitespace().collect::<String>();
                assert!(!complete || squeezed(&printed) == squeezed(&rendered), "{name}: {text:?}: {printed:?}");
                escaped += 1;
            }
            let plain = tokenizer.encode_plain(&text, false).unwrap();
            assert!(control_tokens(&tokenizer, &plain).is_empty(), "{name}: {text:?}");
        }
    }
    assert!(kept > 150 && escaped > 150, "{kept} {escaped}");
}

#[test]
fn two_texts_beside_each_other_make_no_control_token() {
    let joined = "{% for m in messages %}{{ m.content }}{% endfor %}<|im_end|>{{ messages[0].content }}|>";
    for (name, tokenizer) in tokenizers(joined) {
        for token in control_texts(&tokenizer).iter().filter(|token| token.is_ascii() && token.len() > 2) {
            for at in 1..token.len() {
                let parts = [Message::new("user", &token[..at]), Message::new("user", &token[at..])];
                let found = tokenizer.apply_chat_template(&parts, None, false).unwrap();
                let plain = tokenizer.apply_chat_template(&[Message::new("user", "x")], None, false).unwrap();
                assert_eq!(
                    control_tokens(&tokenizer, &found),
                    control_tokens(&tokenizer, &plain),
                    "{name}: {token} {at}"
                );
            }
        }
    }
}

#[test]
fn a_plain_text_is_encoded_as_by_split_special_tokens_of_transformers() {
    for name in ["smollm", "llama-bpe", "spm", "spm-bare"] {
        let folder = tempfile::tempdir().unwrap();
        let gguf = Gguf::open(&fixture(&format!("gguf/vocab-{name}.gguf"))).unwrap();
        Tokenizer::from_gguf(&gguf).unwrap().save(folder.path()).unwrap();
        let found = Tokenizer::from_dir(folder.path()).unwrap();
        let mut expected = tokenizers::Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
        expected.set_encode_special_tokens(true);
        for text in AWKWARD {
            for add_special_tokens in [true, false] {
                let ids = expected.encode_fast(text, add_special_tokens).unwrap();
                assert_eq!(found.encode_plain(text, add_special_tokens).unwrap(), ids.get_ids(), "{name}: {text:?}");
            }
        }
    }
}
