//! Chat templates: Jinja templates that render messages as the text format a model was fine-tuned on.
//!
//! Rendering equals `apply_chat_template(tokenize=False)` of Hugging Face `transformers`. Its Jinja environment is
//! reproduced here: `trim_blocks`, `lstrip_blocks`, loop controls, Python's string methods, `tojson` without HTML
//! escapes, `raise_exception`, `strftime_now` and the `generation` tag.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, ErrorKind, Output, State, context};
use serde_json::{Map, Value as Json};

use crate::error::Error;

mod message;
mod python;

pub use message::Message;

/// The name of the only template in an environment.
const TEMPLATE_NAME: &str = "chat";

/// A parsed chat template together with the special tokens it can refer to.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
}

impl ChatTemplate {
    /// The variables that the conversation determines.
    pub const VARIABLES: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

    /// Parses a template. `bos_token` and `eos_token` are the values of the template variables with these names; a
    /// variable without a value is undefined and prints nothing.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] with the line number if it does not parse.
    pub fn new(source: &str, bos_token: Option<&str>, eos_token: Option<&str>) -> Result<Self, Error> {
        let mut environment = Environment::new();
        let whitespace = environment.syntax().to_builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(whitespace.map_err(|error| template_error(&error))?);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(write_as_python);
        environment.add_filter("tojson", to_json);
        // MiniJinja treats none as an empty sequence; in Jinja it is not iterable.
        environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        for (name, token) in [("bos_token", bos_token), ("eos_token", eos_token)] {
            if let Some(token) = token {
                environment.add_global(name, token);
            }
        }
        environment
            .add_template_owned(TEMPLATE_NAME, without_generation_tags(source))
            .map_err(|error| template_error(&error))?;
        Ok(Self { environment, source: source.to_owned() })
    }

    /// Returns the source text of the template.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Defines variables of the template besides those that it always has, such as `enable_thinking`: the keyword
    /// arguments of `apply_chat_template`. Values keep their JSON types.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] for one of [`ChatTemplate::VARIABLES`], which the messages determine.
    pub fn with_arguments(mut self, arguments: &Map<String, Json>) -> Result<Self, Error> {
        for (name, value) in arguments {
            if Self::VARIABLES.contains(&name.as_str()) {
                let message =
                    format!("argument {name:?}: expected another name, as the conversation itself sets this one");
                return Err(Error::Template { message });
            }
            self.environment.add_global(name.clone(), message::to_value(value));
        }
        Ok(self)
    }

    /// Returns whether the template searches the text of a message for `word`, as Qwen 3's does for `</think>`.
    pub fn searches_for(&self, word: &str) -> bool {
        let methods = [
            "split",
            "rsplit",
            "partition",
            "rpartition",
            "find",
            "rfind",
            "index",
            "startswith",
            "endswith",
            "replace",
        ];
        ['\'', '"'].iter().any(|quote| {
            let literal = format!("{quote}{word}{quote}");
            self.source.match_indices(&literal).any(|(at, _)| {
                let before = self.source[..at].trim_end();
                let after = self.source[at + literal.len()..].trim_start();
                let called = before.strip_suffix('(').map(str::trim_end);
                called.is_some_and(|call| methods.iter().any(|method| call.ends_with(method)))
                    || ["in ", "not in "].iter().any(|word| after.starts_with(word))
            })
        })
    }

    /// Renders a conversation. `tools` is the list of the tools that the assistant may call. With
    /// `add_generation_prompt` the text ends where the assistant's reply begins.
    ///
    /// The text already contains the special tokens that the model expects: encode it with `add_special_tokens` false.
    /// [`Tokenizer::apply_chat_template`](crate::Tokenizer::apply_chat_template) does both, and keeps texts of control
    /// tokens in the messages from becoming control tokens.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] if the template rejects the messages (`raise_exception`) or fails on them.
    pub fn render(
        &self,
        messages: &[Message],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<String, Error> {
        let template = self.environment.get_template(TEMPLATE_NAME).map_err(|error| template_error(&error))?;
        // Templates test whether tools and documents are none; `transformers` always defines both.
        let context = context! {
            messages => messages.iter().map(Message::to_value).collect::<Value>(),
            tools => tools.map_or(Value::from(()), message::to_value),
            documents => Value::from(()),
            add_generation_prompt,
        };
        template.render(context).map_err(|error| template_error(&error))
    }
}

/// Converts an error of the template engine, with its chain of causes in the message.
fn template_error(error: &minijinja::Error) -> Error {
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        message.push_str(": ");
        message.push_str(&inner.to_string());
        cause = inner.source();
    }
    Error::Template { message }
}

/// Replaces the `generation` tags of `transformers`, which mark the assistant's tokens, by conditions that are always
/// true: these also print their content and trim white space around a tag in the same way.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|end| start + end) else { break };
        let tag = &rest[start..end];
        let replacement = match tag[2..].trim_matches(|c: char| c.is_whitespace() || matches!(c, '-' | '+')) {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_owned(),
        };
        out.push_str(&rest[..start]);
        out.push_str(&replacement);
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}

/// Formats a value like Python's `str` where MiniJinja differs from it.
fn write_as_python(out: &mut Output, state: &mut State, value: &Value) -> Result<(), minijinja::Error> {
    let word = match value.kind() {
        ValueKind::None => "None",
        ValueKind::Bool => match value.is_true() {
            true => "True",
            false => "False",
        },
        _ => return minijinja::escape_formatter(out, state, value),
    };
    out.write_str(word).map_err(minijinja::Error::from)
}

/// Implements the filter `tojson`: `json.dumps` with `ensure_ascii=False` by default, and the keywords `indent`,
/// `separators` and `sort_keys`.
fn to_json(value: &Value, keywords: Kwargs) -> Result<String, minijinja::Error> {
    let indent: Option<usize> = keywords.get("indent")?;
    let sort_keys: Option<bool> = keywords.get("sort_keys")?;
    let separators: Option<Vec<String>> = keywords.get("separators")?;
    let ensure_ascii: Option<bool> = keywords.get("ensure_ascii")?;
    keywords.assert_all_used()?;
    // With `indent`, Python writes no space after the comma at the end of a line.
    let item = if indent.is_some() { "," } else { ", " };
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        _ => (item.to_owned(), ": ".to_owned()),
    };
    let style = python::JsonDumps {
        indent,
        item_separator: item,
        key_separator: key,
        sort_keys: sort_keys.unwrap_or(false),
        ensure_ascii: ensure_ascii.unwrap_or(false),
    };
    style.dumps(value)
}

/// Implements the function `raise_exception`, with which a template rejects messages.
fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
}

/// Returns the current time in a `strftime` format, in UTC, because the standard library has no time zones.
fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
    python::strftime(format, seconds)
        .map_err(|directive| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {directive}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Renders a template for a single user message.
    fn rendered(source: &str) -> Result<String, Error> {
        ChatTemplate::new(source, Some("<s>"), None)?.render(&[Message::new("user", " hé <b>\n")], None, true)
    }

    #[test]
    fn templates_print_what_transformers_prints() {
        for (source, expected) in [
            ("{% for m in messages %}\n  {{ m.role }}:{{ m['content'].strip() }}\n{% endfor %}\n", "  user:hé <b>\n"),
            ("{{ bos_token }}|{{ eos_token }}|{{ tools }}|{{ add_generation_prompt }}", "<s>||None|True"),
            ("{{ messages | tojson }}", r#"[{"role": "user", "content": " hé <b>\n"}]"#),
            (
                "{{ {'b': 1, 'a': [1.0, none]} | tojson(indent=1, sort_keys=true) }}",
                "{\n \"a\": [\n  1.0,\n  null\n ],\n \"b\": 1\n}",
            ),
            ("{% for m in messages[::-1] %}{% if m.role == 'user' %}{% continue %}{% endif %}x{% endfor %}", ""),
            ("a\n {%- generation -%} \nb\n{% endgeneration %}\nc", "ab\nc"),
            ("{{ tools is iterable }}|{{ messages is iterable }}|{{ 1 is iterable }}", "False|True|False"),
            ("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 2 %}{{ ns.n }}", "2"),
            ("{{ 'x</think>\n\ny'.split('</think>')[-1].lstrip('\n') }}", "y"),
        ] {
            assert_eq!(rendered(source).unwrap(), expected, "{source}");
        }
    }

    #[test]
    fn every_key_of_a_message_tools_and_arguments_reach_the_template_with_their_types() {
        let source = "{{ messages | tojson }}|{{ tools[0].b is none }}|{{ think is false }}|{{ m is undefined }}";
        let arguments = serde_json::json!({"think": false});
        let template = ChatTemplate::new(source, None, None).unwrap().with_arguments(arguments.as_object().unwrap());
        let row = r#"{"role":"assistant","content":null,"z":[1,1.5,{"y":"é","x":null}],"a":"<b>"}"#;
        let message: Message = serde_json::from_str(row).unwrap();
        let tools = serde_json::json!([{"b": null}]);
        let text = template.unwrap().render(std::slice::from_ref(&message), Some(&tools), false).unwrap();
        let spaced = row.replace("\\u00e9", "é").replace(":", ": ").replace(",", ", ");
        assert_eq!(text, format!("[{spaced}]|True|True|True"));
        assert_eq!(serde_json::to_string(&message).unwrap(), row);
        let taken = serde_json::json!({"tools": []});
        let error = ChatTemplate::new("", None, None).unwrap().with_arguments(taken.as_object().unwrap()).unwrap_err();
        assert!(error.to_string().contains("argument \"tools\""), "{error}");
    }

    #[test]
    fn a_template_searches_for_the_words_of_its_string_operations() {
        let source =
            "{% if '<a>' in m.content %}{{ m.content.split( \"<b>\" )[-1] + '<c>' }}{% endif %}{{ x == '<d>' }}";
        let template = ChatTemplate::new(source, None, None).unwrap();
        assert_eq!(["<a>", "<b>", "<c>", "<d>"].map(|word| template.searches_for(word)), [true, true, false, false]);
    }

    #[test]
    fn a_template_refuses_with_its_own_words() {
        let refused = rendered("{{ raise_exception('roles must alternate') }}").unwrap_err().to_string();
        assert!(refused.contains("roles must alternate"), "{refused}");
        assert!(rendered("{% for %}").is_err());
        assert!(rendered("{{ strftime_now('%Q') }}").is_err());
        assert_eq!(rendered("{{ strftime_now('%d %b %Y') }}").unwrap().len(), 11);
    }
}
