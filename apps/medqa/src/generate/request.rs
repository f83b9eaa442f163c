//! Requests: each is a pure function of the recipe, its item, its step and its attempt.

use super::recipe::{GenerateRecipe, ResponseFormat, hex};
use burn_peft::random;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// The text that a method wants a model to answer or to continue.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum PromptText {
    /// The messages of a conversation, with their roles.
    Messages(Vec<PromptMessage>),
    /// The beginning of a text, control tokens included, that the model continues.
    Raw(String),
}

/// One message of a prompt.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct PromptMessage {
    pub role: &'static str,
    pub text: String,
}

/// The prompt of a step, and how its answer is sampled unless the recipe says otherwise.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Prompt {
    pub text: PromptText,
    pub temperature: f64,
    pub max_tokens: u64,
    /// Texts that end the answer.
    pub stop: Vec<String>,
    /// JSON schema of the answer, if it is JSON.
    pub schema: Option<Value>,
}

impl Prompt {
    /// Creates a prompt of one user message.
    pub(super) fn user(text: String, max_tokens: u64) -> Self {
        let text = PromptText::Messages(vec![PromptMessage { role: "user", text }]);
        Self { text, temperature: 1.0, max_tokens, stop: Vec::new(), schema: None }
    }

    /// Sets the JSON schema of the answer.
    pub(super) fn with_schema(self, schema: Value) -> Self {
        Self { schema: Some(schema), ..self }
    }
}

/// The place of a request in a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RequestPlace {
    pub item: u64,
    /// Answers of the item that came before.
    pub step: u64,
    /// Unusable answers to the same step.
    pub attempt: u64,
}

/// A request to a model.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ModelRequest {
    pub place: RequestPlace,
    /// SHA-256 of the request, without the server's address and without the structure that is asked for.
    pub key: String,
    body: Map<String, Value>,
    schema: Option<Value>,
    is_chat: bool,
}

impl ModelRequest {
    /// Creates the request of a prompt at a place.
    pub(super) fn new(prompt: Prompt, recipe: &GenerateRecipe, place: RequestPlace) -> Self {
        let sampling = &recipe.sampling;
        let mut body = Map::new();
        body.insert("model".to_owned(), json!(recipe.api.model));
        let is_chat = match prompt.text {
            PromptText::Messages(messages) => {
                let message = |m: &PromptMessage| json!({"role": m.role, "content": m.text});
                body.insert("messages".to_owned(), messages.iter().map(message).collect());
                true
            }
            PromptText::Raw(text) => {
                body.insert("prompt".to_owned(), json!(text));
                false
            }
        };
        body.insert("temperature".to_owned(), json!(sampling.temperature.unwrap_or(prompt.temperature)));
        body.insert("top_p".to_owned(), json!(sampling.top_p.unwrap_or(1.0)));
        let max_tokens = sampling.max_tokens.unwrap_or(prompt.max_tokens);
        body.insert(recipe.api.max_tokens_field.clone(), json!(max_tokens));
        // Servers read the seed as a signed 32-bit or 64-bit number.
        let seed = random::key(&[recipe.seed, place.item, place.step, place.attempt]) >> 33;
        body.insert("seed".to_owned(), json!(seed));
        if !prompt.stop.is_empty() {
            body.insert("stop".to_owned(), json!(prompt.stop));
        }
        let mut request = Self { place, key: String::new(), body, schema: prompt.schema, is_chat };
        request.key = request.compute_key();
        request
    }

    fn compute_key(&self) -> String {
        let mut sorted: Vec<_> = self.body.iter().collect();
        sorted.sort_by_key(|(name, _)| name.as_str());
        let canonical = json!(["POST", self.path(), sorted, self.schema]);
        hex(&Sha256::digest(canonical.to_string()))
    }

    /// Returns the path after the base URL.
    pub(super) fn path(&self) -> &'static str {
        if self.is_chat { "/chat/completions" } else { "/completions" }
    }

    /// Returns the body that is sent.
    pub(super) fn body(&self, format: ResponseFormat) -> Value {
        let mut body = self.body.clone();
        let structure = match (&self.schema, format) {
            (None, _) | (_, ResponseFormat::None) => None,
            (Some(_), ResponseFormat::JsonObject) => Some(json!({"type": "json_object"})),
            (Some(schema), ResponseFormat::JsonSchema) => Some(json!({
                "type": "json_schema",
                "json_schema": {"name": "rows", "strict": true, "schema": schema},
            })),
        };
        if let Some(structure) = structure {
            body.insert("response_format".to_owned(), structure);
        }
        Value::Object(body)
    }

    /// Returns whether the request asks for a structure.
    pub(super) fn has_schema(&self) -> bool {
        self.schema.is_some()
    }

    /// Returns the messages, or none if the request continues a text.
    pub(super) fn messages(&self) -> Option<&[Value]> {
        self.body.get("messages").and_then(Value::as_array).map(Vec::as_slice)
    }

    /// Returns the text that the request continues.
    pub(super) fn raw_prompt(&self) -> &str {
        self.text("prompt")
    }

    /// Returns a number of the body, such as `temperature`.
    pub(super) fn number(&self, name: &str) -> Option<f64> {
        self.body.get(name).and_then(Value::as_f64)
    }

    /// Returns the texts that end the answer.
    pub(super) fn stop(&self) -> Vec<&str> {
        let texts = self.body.get("stop").and_then(Value::as_array);
        texts.into_iter().flatten().filter_map(Value::as_str).collect()
    }

    fn text(&self, name: &str) -> &str {
        self.body.get(name).and_then(Value::as_str).unwrap_or_default()
    }

    /// Returns the longest answer in tokens.
    pub(super) fn max_tokens(&self) -> u64 {
        let names = ["max_tokens", "max_completion_tokens"];
        names.iter().find_map(|name| self.body.get(*name)).and_then(Value::as_u64).unwrap_or(0)
    }

    /// Estimates the tokens of the prompt.
    pub(super) fn prompt_tokens(&self) -> u64 {
        let contents = self.messages().into_iter().flatten().filter_map(|m| m["content"].as_str());
        let texts: u64 = contents.map(|text| estimate_tokens(text) + 8).sum();
        let schema = self.schema.as_ref().map_or(0, |schema| estimate_tokens(&schema.to_string()));
        texts + schema + estimate_tokens(self.raw_prompt()) + 8
    }
}

/// Estimates the tokens of a text: a third of its characters, and seven tenths of its Han characters. Texts in other
/// scripts may have more.
pub(super) fn estimate_tokens(text: &str) -> u64 {
    let han = text.chars().filter(|&c| is_han(c)).count();
    let other = text.chars().count() - han;
    (other as f64 / 3.0 + han as f64 * 0.7).ceil() as u64
}

/// Returns whether a character is Chinese.
pub(super) fn is_han(c: char) -> bool {
    matches!(c, '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{2fa1f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_a_function_of_recipe_and_place() {
        let recipe = GenerateRecipe::default();
        let place = RequestPlace { item: 3, step: 0, attempt: 0 };
        let prompt = || Prompt::user("Ask.".to_owned(), 100).with_schema(json!({"type": "object"}));
        let request = ModelRequest::new(prompt(), &recipe, place);
        assert_eq!(request, ModelRequest::new(prompt(), &recipe, place));
        let other = |place| ModelRequest::new(prompt(), &recipe, place).key;
        for place in
            [RequestPlace { item: 4, ..place }, RequestPlace { step: 1, ..place }, RequestPlace { attempt: 1, ..place }]
        {
            assert_ne!(request.key, other(place));
        }
        let mut moved = recipe.clone();
        moved.api.base_url = Some("http://127.0.0.1:1".to_owned());
        assert_eq!(request.key, ModelRequest::new(prompt(), &moved, place).key);
        assert_eq!(request.body(ResponseFormat::JsonObject)["response_format"]["type"], "json_object");
        assert_eq!(request.body(ResponseFormat::None).get("response_format"), None);
        assert_eq!(request.max_tokens(), 100);
    }

    #[test]
    fn han_characters_count_more() {
        assert_eq!(
            (estimate_tokens("abcdef"), estimate_tokens("高血压的症状是什么呢"), estimate_tokens("")),
            (2, 7, 0)
        );
    }
}
