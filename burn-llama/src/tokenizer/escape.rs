//! Texts in which the spelling of a control token is ordinary text.
//!
//! Whoever writes a message must not be able to end their turn by writing `<|im_end|>`: control tokens come from the
//! chat template alone. Each occurrence of a control token in a message becomes a private-use character, its
//! placeholder, before the template is rendered. The tokenizer splits the rendered text at its added tokens, and then
//! every placeholder becomes its text again, before that is split into words and encoded. So a text without control
//! tokens keeps its ids, and the others are encoded as with `split_special_tokens=True` of `transformers`.

use std::collections::HashSet;

use serde_json::Value as Json;
use tokenizers::tokenizer::{Model, OffsetType, PreTokenizer};

use super::{Encoder, Tokenizer};
use crate::chat::{ChatTemplate, Message};
use crate::error::Error;

/// The ranges of private-use characters.
const PRIVATE_USE: [std::ops::RangeInclusive<char>; 3] =
    ['\u{e000}'..='\u{f8ff}', '\u{f0000}'..='\u{ffffd}', '\u{100000}'..='\u{10fffd}'];

/// The control tokens of a tokenizer, as they are written in a text.
#[derive(Debug, Clone, Default)]
pub(super) struct ControlTokens {
    /// The tokens, sorted.
    tokens: Vec<String>,
    /// The tokens read backwards, sorted.
    reversed: Vec<String>,
    /// The number of characters of the longest token.
    longest: usize,
    /// Private-use characters of the vocabulary's added tokens, which cannot be placeholders.
    private_use: HashSet<char>,
}

/// A control token in a text.
pub(super) struct ControlToken<'a> {
    /// The first byte.
    pub start: usize,
    pub token: &'a str,
}

impl ControlTokens {
    /// Collects the control tokens of a vocabulary, and its other tokens that are matched in a text.
    pub(super) fn new(control: impl IntoIterator<Item = String>, others: impl IntoIterator<Item = String>) -> Self {
        // White space alone is never escaped, as templates trim it.
        let mut tokens: Vec<String> = control.into_iter().filter(|token| !token.trim().is_empty()).collect();
        tokens.sort_unstable();
        tokens.dedup();
        let mut reversed: Vec<String> = tokens.iter().map(|token| token.chars().rev().collect()).collect();
        reversed.sort_unstable();
        let longest = tokens.iter().map(|token| token.chars().count()).max().unwrap_or(0);
        let private_use = others.into_iter().flat_map(|token| private_use_chars(&token).collect::<Vec<_>>());
        let private_use = private_use.chain(tokens.iter().flat_map(|token| private_use_chars(token))).collect();
        Self { tokens, reversed, longest, private_use }
    }

    /// Returns the first of the control tokens in a text: the leftmost, and of several there the longest.
    pub(super) fn find_in<'a>(&'a self, text: &str) -> Option<ControlToken<'a>> {
        text.char_indices().find_map(|(start, c)| {
            let rest = &text[start..];
            // Sorted, a token is not after a text that it begins, and not before that text's first character.
            let from = self.tokens.partition_point(|token| token.as_str() < &rest[..c.len_utf8()]);
            let upto = self.tokens.partition_point(|token| token.as_str() <= rest);
            let token = self.tokens[from..upto].iter().rev().find(|token| rest.starts_with(token.as_str()))?;
            Some(ControlToken { start, token })
        })
    }

    /// Returns the length in bytes of the longest end of a text with which a longer control token begins.
    fn unfinished(&self, text: &str) -> usize {
        let ends = text.char_indices().rev().take(self.longest).map(|(at, _)| &text[at..]);
        ends.filter(|end| begins_longer(&self.tokens, end)).last().map_or(0, str::len)
    }

    /// Returns the length in bytes of the longest start of a text with which a longer control token ends.
    fn unbegun(&self, text: &str) -> usize {
        let start: String = text.chars().take(self.longest).collect();
        let reversed: String = start.chars().rev().collect();
        let mut ends = reversed.char_indices().map(|(at, _)| &reversed[at..]);
        ends.find(|end| begins_longer(&self.reversed, end)).map_or(0, str::len)
    }
}

/// Returns the private-use characters of a text.
fn private_use_chars(text: &str) -> impl Iterator<Item = char> {
    text.chars().filter(|c| PRIVATE_USE.iter().any(|range| range.contains(c)))
}

/// Returns whether one of the sorted `tokens` begins with `start` and is longer.
fn begins_longer(tokens: &[String], start: &str) -> bool {
    let at = tokens.partition_point(|token| token.as_str() <= start);
    tokens.get(at).is_some_and(|token| token.starts_with(start))
}

/// A placeholder and the text that it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Escape {
    placeholder: char,
    text: String,
}

/// The placeholders of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Escapes {
    escapes: Vec<Escape>,
    /// Private-use characters that have a meaning already.
    used: HashSet<char>,
}

impl Escapes {
    fn new(control: &ControlTokens) -> Self {
        Self { escapes: Vec::new(), used: control.private_use.clone() }
    }

    /// Returns a private-use character that occurs nowhere yet.
    pub fn unused_char(&mut self) -> char {
        let mut free = PRIVATE_USE.into_iter().flatten().filter(|c| !self.used.contains(c));
        // A text with all of the 137,468 private-use characters would be needed to leave none.
        let c = free.next().unwrap_or(char::REPLACEMENT_CHARACTER);
        self.used.insert(c);
        c
    }

    /// Returns the placeholder of a text.
    fn placeholder(&mut self, text: &str) -> char {
        if let Some(escape) = self.escapes.iter().find(|escape| escape.text == text) {
            return escape.placeholder;
        }
        let placeholder = self.unused_char();
        self.escapes.push(Escape { placeholder, text: text.to_owned() });
        placeholder
    }

    /// Notes the private-use characters of a text, so that none of them becomes a placeholder.
    fn reserve(&mut self, text: &str) {
        self.used.extend(private_use_chars(text));
    }

    /// Returns the text with every placeholder replaced by what it stands for.
    pub fn restore(&self, text: &str) -> String {
        let mut restored = text.to_owned();
        for Escape { placeholder, text } in &self.escapes {
            if restored.contains(*placeholder) {
                restored = restored.replace(*placeholder, text);
            }
        }
        restored
    }

    fn occur_in(&self, text: &str) -> bool {
        self.escapes.iter().any(|escape| text.contains(escape.placeholder))
    }
}

/// A conversation in which placeholders stand for the texts of control tokens.
#[derive(Debug, Clone)]
pub struct EscapedConversation {
    /// The messages with placeholders in all strings.
    pub messages: Vec<Message>,
    /// The tools, likewise.
    pub tools: Option<Json>,
    /// The placeholders.
    pub escapes: Escapes,
}

/// The state while a conversation is escaped.
struct Escaper<'a> {
    control: &'a ControlTokens,
    escapes: Escapes,
    /// The template, in the assistant's messages: what it searches these for is left as it is.
    template: Option<&'a ChatTemplate>,
}

impl Escaper<'_> {
    /// Escapes the control tokens in a text, and the parts of control tokens at its ends, which the text beside it in
    /// the template could complete.
    fn escape(&mut self, text: &str) -> String {
        let whole = self.escape_tokens(text);
        let tail = whole.len() - self.control.unfinished(&whole);
        let head = self.control.unbegun(&whole).min(tail);
        let mut placeholder = |part: &str| {
            let c = (!part.is_empty()).then(|| self.escapes.placeholder(part));
            c.map(String::from).unwrap_or_default()
        };
        let (start, end) = (placeholder(&whole[..head]), placeholder(&whole[tail..]));
        [&start, &whole[head..tail], &end].concat()
    }

    fn escape_tokens(&mut self, text: &str) -> String {
        let (mut out, mut rest) = (String::with_capacity(text.len()), text);
        while let Some(ControlToken { start, token }) = self.control.find_in(rest) {
            out.push_str(&rest[..start]);
            if self.template.is_some_and(|template| template.searches_for(token)) {
                out.push_str(token);
            } else {
                out.push(self.escapes.placeholder(token));
            }
            rest = &rest[start + token.len()..];
        }
        out + rest
    }

    /// Escapes every string in a JSON value, and its keys.
    fn escape_json(&mut self, value: &Json) -> Json {
        match value {
            Json::String(text) => Json::String(self.escape(text)),
            Json::Array(items) => items.iter().map(|item| self.escape_json(item)).collect(),
            Json::Object(fields) => {
                fields.iter().map(|(key, value)| (self.escape(key), self.escape_json(value))).collect()
            }
            other => other.clone(),
        }
    }

    fn escape_message(&mut self, message: &Message) -> Message {
        let fields = message.fields.iter();
        Message {
            role: self.escape_tokens(&message.role),
            content: message.content.as_deref().map(|text| self.escape(text)),
            fields: fields.map(|(key, value)| (self.escape_tokens(key), self.escape_json(value))).collect(),
        }
    }
}

impl Tokenizer {
    /// Replaces the texts of control tokens in all strings of a conversation by placeholders. Only the assistant's
    /// messages keep those that the chat template itself searches them for, such as `</think>` where that is a control
    /// token.
    pub fn escape_conversation(&self, messages: &[Message], tools: Option<&Json>) -> EscapedConversation {
        let template = self.chat_template();
        let mut escapes = Escapes::new(&self.control);
        template.into_iter().for_each(|template| escapes.reserve(template.source()));
        for message in messages {
            escapes.reserve(message.text());
            message.fields.iter().for_each(|(key, value)| {
                escapes.reserve(key);
                reserve_json(&mut escapes, value);
            });
        }
        tools.into_iter().for_each(|tools| reserve_json(&mut escapes, tools));
        let mut escaper = Escaper { control: &self.control, escapes, template: None };
        let mut escape = |message: &Message| {
            escaper.template = template.filter(|_| message.role == "assistant");
            escaper.escape_message(message)
        };
        let messages = messages.iter().map(&mut escape).collect();
        escaper.template = None;
        let tools = tools.map(|tools| escaper.escape_json(tools));
        EscapedConversation { messages, tools, escapes: escaper.escapes }
    }

    /// Encodes a text that holds placeholders: they stand for ordinary text.
    ///
    /// # Errors
    ///
    /// The same as those of [`Tokenizer::encode`].
    pub fn encode_escaped(&self, text: &str, escapes: &Escapes, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        if !escapes.occur_in(text) {
            return self.encode(text, add_special_tokens);
        }
        let encoded = match &self.encoder {
            Encoder::Json(tokenizer) => {
                encode_json(tokenizer, text, escapes, add_special_tokens).map_err(|error| error.to_string())
            }
            Encoder::Gguf(vocabulary) => {
                vocabulary.encode_pieces(text, add_special_tokens, |text| escapes.restore(text))
            }
        };
        encoded.map_err(|message| self.error(message))
    }

    /// Encodes a text in which the texts of control tokens are ordinary text, like `split_special_tokens=True` of
    /// `transformers`.
    ///
    /// # Errors
    ///
    /// The same as those of [`Tokenizer::encode`].
    pub fn encode_plain(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Error> {
        let mut escapes = Escapes::new(&self.control);
        escapes.reserve(text);
        let mut escaper = Escaper { control: &self.control, escapes, template: None };
        let text = escaper.escape_tokens(text);
        self.encode_escaped(&text, &escaper.escapes, add_special_tokens)
    }

    /// Renders a conversation with the chat template and encodes it. Control tokens come from the template alone: their
    /// texts in the messages are ordinary text.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] if there is no template or it fails; the same as those of [`Tokenizer::encode`].
    pub fn apply_chat_template(
        &self,
        messages: &[Message],
        tools: Option<&Json>,
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>, Error> {
        let Some(template) = self.chat_template() else {
            let message = format!("{}: expected a chat template, found none", self.path.display());
            return Err(Error::Template { message });
        };
        let EscapedConversation { messages, tools, escapes } = self.escape_conversation(messages, tools);
        let text = template.render(&messages, tools.as_ref(), add_generation_prompt)?;
        self.encode_escaped(&text, &escapes, false)
    }
}

/// Notes the private-use characters of all strings and keys.
fn reserve_json(escapes: &mut Escapes, value: &Json) {
    match value {
        Json::String(text) => escapes.reserve(text),
        Json::Array(items) => items.iter().for_each(|item| reserve_json(escapes, item)),
        Json::Object(fields) => fields.iter().for_each(|(key, value)| {
            escapes.reserve(key);
            reserve_json(escapes, value);
        }),
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
    }
}

/// Encodes a text as `tokenizers` does, step by step, with the placeholders restored after the text is split at added
/// tokens.
fn encode_json(
    tokenizer: &tokenizers::Tokenizer,
    text: &str,
    escapes: &Escapes,
    add_special_tokens: bool,
) -> tokenizers::Result<Vec<u32>> {
    let mut pieces = tokenizer.get_added_vocabulary().extract_and_normalize(tokenizer.get_normalizer(), text);
    pieces.normalize(|piece| {
        for Escape { placeholder, text } in &escapes.escapes {
            piece.replace(*placeholder, text)?;
        }
        Ok(())
    })?;
    if let Some(pre_tokenizer) = tokenizer.get_pre_tokenizer() {
        pre_tokenizer.pre_tokenize(&mut pieces)?;
    }
    pieces.tokenize(|piece| tokenizer.get_model().tokenize(piece.get()))?;
    let encoding = pieces.into_encoding(None, 0, OffsetType::None)?;
    Ok(tokenizer.post_process(encoding, None, add_special_tokens)?.get_ids().to_vec())
}
