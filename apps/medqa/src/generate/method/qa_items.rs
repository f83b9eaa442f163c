//! Questions and answers in an answer of JSON.

use super::super::{
    answer::ModelAnswer,
    draft::{Draft, ItemResult, RejectedText, RequestOrigin},
    json_text::{self, FoundJson},
};
use serde_json::{Map, Value, json};

/// Returns the JSON schema of a list of questions and answers.
pub(super) fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {"items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"question": {"type": "string"}, "answer": {"type": "string"}},
                "required": ["question", "answer"],
                "additionalProperties": false,
            },
        }},
        "required": ["items"],
        "additionalProperties": false,
    })
}

/// Reads the questions and answers of an answer as rows of the format `qa`.
///
/// # Errors
/// The reason why there are none.
pub(super) fn read(answer: &ModelAnswer) -> Result<ItemResult, &'static str> {
    let FoundJson { value, repairs } = json_text::find(&answer.text)?;
    let mut result = ItemResult { repairs, ..ItemResult::default() };
    for object in json_text::objects(value) {
        match (text(&object, &["question", "问题", "q"]), text(&object, &["answer", "答案", "回答", "a"])) {
            (Some(question), Some(text)) => {
                result.drafts.push(Draft::qa(question, text, RequestOrigin::from(answer)));
            }
            _ => result.rejected.push(RejectedText {
                reason: "an item without question or answer".to_owned(),
                text: Value::Object(object).to_string(),
            }),
        }
    }
    if result.drafts.is_empty() { Err("no question and answer in the JSON") } else { Ok(result) }
}

fn text<'a>(object: &'a Map<String, Value>, names: &[&str]) -> Option<&'a str> {
    let named = |name: &&str| object.iter().find(|(key, _)| key.trim().eq_ignore_ascii_case(name));
    names.iter().find_map(|name| named(name)?.1.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_are_read_and_incomplete_ones_are_listed() {
        let answer =
            |text: &str| ModelAnswer { text: text.to_owned(), truncated: false, created: None, key: "k".to_owned() };
        let text = r#"{"items": [{"Question": "a?", "answer": "b"}, {"问题": "c?", "答案": "d"}, {"question": 3},]}"#;
        let result = read(&answer(text)).unwrap();
        let pairs: Vec<_> = result.drafts.iter().map(|d| (d.question.as_str(), d.answer.as_str())).collect();
        assert_eq!(pairs, [("a?", "b"), ("c?", "d")]);
        assert_eq!((result.rejected.len(), result.repairs.as_slice()), (1, &["trailing comma"][..]));
        assert_eq!(read(&answer("[]")), Err("no question and answer in the JSON"));
        assert_eq!(read(&answer("no")), Err("no JSON in the answer"));
    }
}
