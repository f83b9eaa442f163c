//! Tokens and chat templates are `transformers`'.

use burn_llama::{ChatTemplate, Message, Tokenizer};
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
