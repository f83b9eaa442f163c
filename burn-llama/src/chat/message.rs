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
    /// Creates a message without further fields.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: Some(content.into()), fields: Map::new() }
    }

    /// Returns the text of the message, which is empty if there is none.
    pub fn text(&self) -> &str {
        self.content.as_deref().unwrap_or_default()
    }

    /// Returns the message as the value that a template sees: `role`, `content`, then the other fields.
    pub(super) fn to_value(&self) -> Value {
        let own = [("role", Value::from(self.role.as_str())), ("content", Value::from(self.content.clone()))];
        let others = self.fields.iter().map(|(key, value)| (key.as_str(), to_value(value)));
        Value::from_pairs(own.into_iter().chain(others))
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
