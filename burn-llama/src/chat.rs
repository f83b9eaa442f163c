//! Chat templates: Jinja templates that render messages as the text format a model was fine-tuned on.
//!
//! Rendering equals `apply_chat_template(tokenize=False)` of Hugging Face `transformers`. Its Jinja environment is
//! reproduced here: `trim_blocks`, `lstrip_blocks`, loop controls, Python's methods and output, `tojson` without HTML
//! escapes, `raise_exception`, `strftime_now` and the `generation` tag.

use jiff::civil::DateTime;
use minijinja::value::{Serde, Value};
use minijinja::{Environment, context};
use serde::Serialize;
use serde_json::{Map, Value as Json};

use crate::error::Error;

mod arguments;
mod clock;
mod environment;
mod filters;
mod generators;
mod json;
mod message;
mod methods;
mod repr;
mod source;
mod text;

pub use message::Message;

/// The name of the only template in an environment.
const TEMPLATE_NAME: &str = "chat";

/// A parsed chat template together with the special tokens it can refer to.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    source: String,
    time: DateTime,
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
        let mut environment = environment::environment().map_err(|error| template_error(&error))?;
        for (name, token) in [("bos_token", bos_token), ("eos_token", eos_token)] {
            if let Some(token) = token {
                environment.add_global(name, token);
            }
        }
        environment
            .add_template_owned(TEMPLATE_NAME, source::prepared(source))
            .map_err(|error| template_error(&error))?;
        let time = clock::now();
        environment::set_time(&mut environment, time);
        Ok(Self { environment, source: source.to_owned(), time })
    }

    /// Defines further special tokens, by the names of their variables, such as `pad_token`.
    pub(crate) fn with_special_tokens(mut self, tokens: &[(&'static str, String)]) -> Self {
        tokens.iter().for_each(|(name, text)| self.environment.add_global(*name, text.as_str().to_owned()));
        self
    }

    /// Sets the local time that the template sees, such as `2024-02-29T23:59:59`. Without it that is the time at which
    /// the template was parsed, so that every text of one template has the same date.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] if the text is not a date and time.
    pub fn with_time(mut self, time: &str) -> Result<Self, Error> {
        self.time = time.parse().map_err(|error| Error::Template {
            message: format!("the time {time:?} is not a date and time such as 2024-02-29T23:59:59: {error}"),
        })?;
        environment::set_time(&mut self.environment, self.time);
        Ok(self)
    }

    /// Returns the local time that the template sees, in the format that [`ChatTemplate::with_time`] reads.
    pub fn time(&self) -> String {
        self.time.to_string()
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
        // Templates test whether tools and documents are none; `transformers` always defines both.
        self.render_context(context! {
            messages => messages.iter().map(Message::to_value).collect::<Value>(),
            tools => tools.map_or(Value::from(()), message::to_value),
            documents => Value::from(()),
            add_generation_prompt,
        })
    }

    /// Renders the template with the variables of `context`, a map, as they are.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] if the template rejects the variables (`raise_exception`) or fails on them.
    pub fn render_context(&self, context: impl Serialize) -> Result<String, Error> {
        let template = self.environment.get_template(TEMPLATE_NAME).map_err(|error| template_error(&error))?;
        template.render(Value::from(Serde(context))).map_err(|error| template_error(&error))
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
