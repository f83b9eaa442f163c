//! The messages of a conversation.

use minijinja::Value;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The role of the author: `system`, `user`, `assistant`, or another role that the template supports.
    pub role: String,
    /// The text of the message; `None` is null, which some templates expect beside `tool_calls`.
    pub content: Option<String>,
    /// The other keys of the message in their order, such as `reasoning_content`, `tool_calls` or `name`. A template
    /// sees them with their JSON types.
    #[serde(flatten)]
    pub fields: Map<String, Json>,
}

impl Message {
    /// The keys of a message that may hold the thought of an answer. The first one that is present counts.
    pub const REASONING_KEYS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

    /// Creates a message without further fields.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), fields: Map::new() }
    }

    /// Returns the text of the message, which is empty if there is none.
    pub fn text(&self) -> &str {
        self.content.as_deref().unwrap_or_default()
    }

    /// Returns the message as the value that a template sees: `role`, `content`, then the other fields. As in
    /// `transformers`, a template finds the thought of an answer under `reasoning_content` and `thinking`, whichever name
    /// it has here.
    pub(super) fn to_value(&self) -> Value {
        let own = [("role", Value::from(self.role.as_str())), ("content", Value::from(self.content.clone()))];
        let others = self.fields.iter().map(|(key, value)| (key.as_str(), to_value(value)));
        let thought =
            Self::REASONING_KEYS.iter().find_map(|key| self.fields.get(*key).filter(|value| !value.is_null()));
        let thought = thought.map(to_value);
        // Of pairs with one key, the last value counts, at the place of the first.
        let first = thought.clone().map(|thought| ("thinking", thought));
        let last = thought.map(|thought| ("reasoning_content", thought));
        Value::from_pairs(first.into_iter().chain(own).chain(others).chain(last))
    }
}

/// Returns a JSON value as a template sees it, with its type and the order of its keys.
pub(super) fn to_value(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64()),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_value).collect(),
        Json::Object(fields) => Value::from_pairs(fields.iter().map(|(key, value)| (key.as_str(), to_value(value)))),
    }
}

#[cfg(test)]
mod tests {
    use crate::{ChatTemplate, Message};

    /// The expected texts are those of `transformers` 5.23.
    #[test]
    fn a_thought_is_found_under_both_names() {
        let template = ChatTemplate::new("{{ messages[0] | tojson }}", None, None).unwrap();
        for (row, expected) in [
            (
                r#"{"role": "assistant", "content": "4", "reasoning": "2+2"}"#,
                r#"{"thinking": "2+2", "role": "assistant", "content": "4", "reasoning": "2+2", "reasoning_content": "2+2"}"#,
            ),
            (
                r#"{"role": "assistant", "content": "4", "thinking": null, "reasoning_content": ""}"#,
                r#"{"thinking": null, "role": "assistant", "content": "4", "reasoning_content": ""}"#,
            ),
            (r#"{"role": "user", "content": "2+2"}"#, r#"{"role": "user", "content": "2+2"}"#),
        ] {
            let message: Message = serde_json::from_str(row).unwrap();
            assert_eq!(template.render(&[message], None, false).unwrap(), expected);
        }
    }
}
