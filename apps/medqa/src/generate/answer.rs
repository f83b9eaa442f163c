//! Answers of a model: the text of a response body, or the reason why there is none.

use serde_json::{Value, json};

/// The usable answer of a model.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ModelAnswer {
    /// Text without thoughts.
    pub text: String,
    /// True if the answer was cut off at the limit of tokens.
    pub truncated: bool,
    /// Time at which the server made the answer, in seconds since 1970, if it says so.
    pub created: Option<u64>,
    /// Key of the request.
    pub key: String,
}

/// Tokens of a request and its answer, as the server counted them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct TokenUsage {
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    /// Tokens of the prompt that the server had cached.
    #[serde(default)]
    pub cached_tokens: u64,
}

impl TokenUsage {
    /// Reads the usage of a response body, if it has one.
    pub(super) fn of(body: &Value) -> Option<Self> {
        let usage = body.get("usage")?;
        let count = |value: &Value| value.as_u64();
        Some(Self {
            prompt_tokens: count(&usage["prompt_tokens"])?,
            completion_tokens: count(&usage["completion_tokens"])?,
            cached_tokens: count(&usage["prompt_tokens_details"]["cached_tokens"]).unwrap_or(0),
        })
    }
}

impl ModelAnswer {
    /// Reads the answer in a response body.
    ///
    /// # Errors
    /// The reason why the body holds no usable answer, for the counts of the report.
    pub(super) fn read(body: &Value, key: &str) -> Result<Self, &'static str> {
        let choice = match body["choices"].as_array().map(Vec::as_slice) {
            Some([choice]) => choice,
            Some([]) | None => return Err("no choice in the response"),
            Some(_) => return Err("several choices in the response"),
        };
        let message = &choice["message"];
        let finish = choice["finish_reason"].as_str().unwrap_or_default();
        let content = message["content"].as_str().or_else(|| choice["text"].as_str());
        let text = without_thought(content.unwrap_or_default());
        if finish == "content_filter" {
            return Err("stopped by the content filter");
        }
        match text {
            None => Err("a thought without an end"),
            Some(text) if !text.trim().is_empty() => Ok(Self {
                text: text.to_owned(),
                truncated: finish == "length",
                created: body["created"].as_u64(),
                key: key.to_owned(),
            }),
            Some(_) if message["refusal"].as_str().is_some_and(|text| !text.is_empty()) => Err("refused by the model"),
            Some(_) if ["reasoning_content", "reasoning"].iter().any(|key| message[*key].is_string()) => {
                Err("a thought without an answer")
            }
            Some(_) => Err("an empty answer"),
        }
    }
}

/// Returns a text without the thought before it; none if the thought does not end.
fn without_thought(text: &str) -> Option<&str> {
    match text.rsplit_once("</think>") {
        Some((_, answer)) => Some(answer),
        None if text.trim_start().starts_with("<think>") => None,
        None => Some(text),
    }
}

/// Puts the pieces of a stream of events together to one response body. Servers send a stream although none was asked
/// for. Returns none if the text is no such stream.
pub(super) fn join_events(text: &str) -> Option<Value> {
    let (mut content, mut body) = (String::new(), Value::Null);
    for line in text.lines() {
        let Some(data) = line.strip_prefix("data:").map(str::trim).filter(|data| *data != "[DONE]") else { continue };
        let event: Value = serde_json::from_str(data).ok()?;
        let choice = &event["choices"][0];
        content += choice["delta"]["content"].as_str().or_else(|| choice["text"].as_str()).unwrap_or_default();
        if body.is_null() {
            body = json!({"choices": [{"message": {}, "finish_reason": null}], "created": event["created"]});
        }
        if choice["finish_reason"].is_string() {
            body["choices"][0]["finish_reason"] = choice["finish_reason"].clone();
        }
        if event["usage"].is_object() {
            body["usage"] = event["usage"].clone();
        }
    }
    if body.is_null() {
        return None;
    }
    body["choices"][0]["message"]["content"] = Value::from(content);
    Some(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(message: Value, finish: &str) -> Result<String, &'static str> {
        let body = json!({"choices": [{"message": message, "finish_reason": finish}]});
        ModelAnswer::read(&body, "k").map(|answer| answer.text)
    }

    #[test]
    fn answers_that_are_none_have_a_reason() {
        for (message, finish, expected) in [
            (json!({"content": "Yes."}), "stop", Ok("Yes.")),
            (json!({"content": "<think>Hm.</think>Yes."}), "stop", Ok("Yes.")),
            (json!({"content": "<think>Hm."}), "length", Err("a thought without an end")),
            (json!({"content": null, "refusal": "No."}), "stop", Err("refused by the model")),
            (json!({"content": null, "reasoning_content": "Hm."}), "stop", Err("a thought without an answer")),
            (json!({"content": " \n"}), "stop", Err("an empty answer")),
            (json!({"content": "Ye"}), "content_filter", Err("stopped by the content filter")),
        ] {
            assert_eq!(read(message, finish).as_deref(), expected.as_ref().copied());
        }
        let body = |choices| json!({"choices": choices});
        assert_eq!(ModelAnswer::read(&body(json!([])), "k"), Err("no choice in the response"));
        assert_eq!(ModelAnswer::read(&json!({}), "k"), Err("no choice in the response"));
        assert_eq!(ModelAnswer::read(&body(json!([{}, {}])), "k"), Err("several choices in the response"));
        let raw = json!({"created": 5, "choices": [{"text": "on", "finish_reason": "length"}]});
        let answer = ModelAnswer::read(&raw, "k").unwrap();
        assert_eq!((answer.text.as_str(), answer.truncated, answer.created), ("on", true, Some(5)));
    }

    #[test]
    fn events_are_joined() {
        let text = "data: {\"created\":3,\"choices\":[{\"delta\":{\"content\":\"Ye\"}}]}\n\n\
                    data: {\"choices\":[{\"delta\":{\"content\":\"s\"},\"finish_reason\":\"stop\"}]}\n\ndata: [DONE]\n";
        let answer = ModelAnswer::read(&join_events(text).unwrap(), "k").unwrap();
        assert_eq!((answer.text.as_str(), answer.created), ("Yes", Some(3)));
        assert_eq!(join_events("<html>"), None);
    }
}
