//! Encoding of conversations with the model's chat template; it marks the tokens that are learned.

use super::{
    answer::{ConversationRenderer, missing_end_token_error},
    content::Conversation,
    thought::without_tags,
};
use crate::recipe::Learn;
use anyhow::{Context, Result, bail};
use burn_llama::{Example, Message, Tokenizer};
use serde_json::Value;

/// Keys whose strings templates need not print: identifiers, such as those of tool calls.
const IDENTIFIERS: [&str; 4] = ["id", "type", "index", "tool_call_id"];

/// The examples of a conversation.
#[derive(Debug, Default, PartialEq)]
pub struct EncodedConversation {
    /// At most one example per answer; each has a token to learn.
    pub examples: Vec<Example>,
    /// Number of texts of earlier turns that the template leaves out of the prompt of the last answer.
    pub omitted: usize,
    /// Number of learned answers without a thought after prompts that open one: they close it at once.
    pub empty_thoughts: usize,
}

/// The tokens of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerTokens {
    /// The tokens that `chat` sends.
    pub prompt: Vec<u32>,
    /// The tokens that are learned after them, up to the end token.
    pub answer: Vec<u32>,
}

/// The end of an answer whose template writes no end token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MissingEnd {
    /// It is an error: the template would go on without one in the next turn.
    Refuse,
    /// The tokenizer's EOS token ends the answer, which is the last of its row.
    Eos,
}

/// Encodes a conversation as examples in which the assistant's turns are learned. The tokens before an answer are those
/// that `chat` sends there. As a rule, each turn continues the tokens of the earlier turns, and the conversation is one
/// example. A new example begins where a template renders an earlier turn differently (Qwen3 drops the thoughts of past
/// turns), or the tokenizer splits the text differently.
///
/// # Errors
/// If the template rejects the turns, does not print all of an answer that is learned, or ends it without an end token.
pub(super) fn encode_conversation(
    tokenizer: &Tokenizer,
    conversation: &Conversation,
    learn: Learn,
    missing_end: MissingEnd,
) -> Result<EncodedConversation> {
    let messages = conversation.messages();
    let renderer = ConversationRenderer::new(tokenizer, &messages, conversation.tools.as_ref())?;
    let answers = || conversation.turns.iter().enumerate().filter(|(_, turn)| turn.message.role == "assistant");
    let last = answers().next_back().map(|(index, _)| index);
    let (mut encoded, mut example) = (EncodedConversation::default(), Example::default());
    for (index, turn) in answers() {
        let learned = turn.learned && (learn == Learn::All || Some(index) == last);
        let turn_name = || format!("turn {}", index + 1);
        let text = renderer.answer_text(index).with_context(turn_name)?;
        if learned {
            encoded.empty_thoughts += usize::from(text.empty_thought);
            check_printed(renderer.message(index), &text.learned).with_context(turn_name)?;
        }
        encoded.omitted = (0..index).map(|turn| missing_texts(renderer.message(turn), &text.prompt).count()).sum();
        let AnswerTokens { prompt, mut answer } = encode_answer(&renderer, &text.prompt, &text.learned)?;
        if !text.ended {
            match (missing_end, tokenizer.eos()) {
                (MissingEnd::Eos, Some(eos)) => answer.push(eos),
                _ => bail!(missing_end_token_error(tokenizer, &renderer.restore(&text.learned))),
            }
        }
        if !prompt.starts_with(&example.ids) {
            encoded.examples.push(std::mem::take(&mut example));
        }
        let from = example.ids.len();
        push_tokens(&mut example, &prompt[from..], false);
        push_tokens(&mut example, &answer, learned);
    }
    encoded.examples.push(example);
    encoded.examples.retain(|example| example.num_targets() > 0);
    Ok(encoded)
}

fn push_tokens(example: &mut Example, ids: &[u32], learned: bool) {
    example.ids.extend(ids);
    example.loss_mask.resize(example.ids.len(), learned);
}

/// Returns the tokens of the last message, which is the assistant's.
///
/// # Errors
/// If the template rejects the turns, does not print all of the answer, or ends it without an end token.
pub fn answer_tokens(tokenizer: &Tokenizer, messages: &[Message]) -> Result<AnswerTokens> {
    let last = messages.len().checked_sub(1).context("expected an answer, found no message")?;
    let renderer = ConversationRenderer::new(tokenizer, messages, None)?;
    let text = renderer.answer_text(last)?;
    check_printed(renderer.message(last), &text.learned)?;
    if !text.ended {
        bail!(missing_end_token_error(tokenizer, &renderer.restore(&text.learned)));
    }
    encode_answer(&renderer, &text.prompt, &text.learned)
}

fn encode_answer(renderer: &ConversationRenderer, prompt: &str, learned: &str) -> Result<AnswerTokens> {
    let (ids, whole) = (renderer.encode(prompt)?, renderer.encode(&format!("{prompt}{learned}"))?);
    let answer = match whole.strip_prefix(ids.as_slice()) {
        Some(rest) => rest.to_vec(),
        // The answer's first characters would merge with the prompt's last ones, but `chat` has sent the prompt by
        // then.
        None => renderer.encode(learned)?,
    };
    Ok(AnswerTokens { prompt: ids, answer })
}

/// Refuses an answer of which the template does not print a text.
fn check_printed(message: &Message, learned: &str) -> Result<()> {
    if let Some(missing) = missing_texts(message, learned).next() {
        let found: String = missing.text.chars().take(40).collect();
        bail!(
            "`{}`: expected the chat template to print it in the answer that is learned, found {found:?} nowhere there; \
             remove the key from the rows, or use a template that prints it (`model.chat_template`) or arguments with which it \
             does (`data.template_arguments`)",
            missing.key
        );
    }
    Ok(())
}

/// A text of a message that is not printed.
struct MissingText<'a> {
    key: &'a str,
    text: &'a str,
}

/// Returns the texts of a message, the first one of each key, that `printed` does not contain, neither as they are nor
/// as JSON.
fn missing_texts<'a>(message: &'a Message, printed: &'a str) -> impl Iterator<Item = MissingText<'a>> {
    let content = ("content", without_tags(message.text()));
    let fields = message.fields.iter().filter(|(key, _)| !IDENTIFIERS.contains(&key.as_str()));
    let fields = fields.map(|(key, value)| (key.as_str(), strings(value)));
    std::iter::once(content).chain(fields).filter_map(move |(key, texts)| {
        let missing = texts.into_iter().map(str::trim).find(|text| !contains(printed, text))?;
        Some(MissingText { key, text: missing })
    })
}

fn contains(printed: &str, text: &str) -> bool {
    let json = || Value::from(text).to_string();
    printed.contains(text) || printed.contains(json().trim_matches('"'))
}

/// Returns the strings inside a value, without identifiers.
fn strings(value: &Value) -> Vec<&str> {
    match value {
        Value::String(text) => vec![text],
        Value::Array(items) => items.iter().flat_map(strings).collect(),
        Value::Object(fields) => {
            let texts = fields.iter().filter(|(key, _)| !IDENTIFIERS.contains(&key.as_str()));
            texts.flat_map(|(_, value)| strings(value)).collect()
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => Vec::new(),
    }
}

#[cfg(test)]
#[path = "conversation_tests.rs"]
mod tests;
