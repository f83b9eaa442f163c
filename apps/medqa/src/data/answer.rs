//! The text of an answer in a conversation: what `chat` sends before it, and what is learned of it.
//!
//! ```text
//! turns before ─ template with generation prompt ─ what `chat` sends                             not learned
//! the same turns and the answer ─ template ─ the answer, up to its end token                     learned
//! ```
//!
//! A template may write earlier turns differently when an answer follows (Mistral's puts the system text into the last
//! question), so the two texts are never compared as a whole. A marker behind the last question's text shows where
//! the part begins that belongs to the answer, in both of them; a marker in place of the answer shows where it begins
//! and ends, where the two disagree about its turn.

use super::thought::{OpenThought, split_after_thought};
use crate::template;
use anyhow::{Result, bail};
use burn_llama::{ChatTemplate, Message, Tokenizer, tokenizer::EscapedConversation};
use serde_json::Value;

/// A conversation that can be rendered up to each of its answers. Texts are in escaped form: placeholders stand for
/// control tokens that messages spell out.
pub(super) struct ConversationRenderer<'a> {
    tokenizer: &'a Tokenizer,
    template: &'a ChatTemplate,
    chat: EscapedConversation,
    /// Stands behind the text of the message before the answer.
    asked: char,
    /// Stands for the text of the answer.
    said: char,
}

/// The text around an answer's text.
#[derive(Default)]
struct Surroundings {
    opening: String,
    closing: String,
}

/// The text of an answer.
pub(super) struct AnswerText {
    /// The text that `chat` sends.
    pub prompt: String,
    /// The text that is learned after it.
    pub learned: String,
    /// True if `learned` ends with an end token.
    pub ended: bool,
    /// True if `learned` begins with the end of a thought that the prompt opens and the row lacks.
    pub empty_thought: bool,
}

impl<'a> ConversationRenderer<'a> {
    /// Prepares a conversation.
    ///
    /// # Errors
    /// If the tokenizer has no chat template.
    pub(super) fn new(tokenizer: &'a Tokenizer, messages: &[Message], tools: Option<&Value>) -> Result<Self> {
        let template = template::chat_template(tokenizer)?;
        let mut chat = tokenizer.escape_conversation(messages, tools);
        let (asked, said) = (chat.escapes.unused_char(), chat.escapes.unused_char());
        Ok(Self { tokenizer, template, chat, asked, said })
    }

    /// Returns a message in escaped form.
    pub(super) fn message(&self, index: usize) -> &Message {
        &self.chat.messages[index]
    }

    /// Encodes a text in escaped form.
    pub(super) fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.tokenizer.encode_escaped(text, &self.chat.escapes, false)?)
    }

    /// Replaces placeholders by their texts.
    pub(super) fn restore(&self, text: &str) -> String {
        self.chat.escapes.restore(text)
    }

    /// Returns the text of the answer that is the message `index`.
    ///
    /// # Errors
    /// If the template rejects the turns, or does not print the answer.
    pub(super) fn answer_text(&self, index: usize) -> Result<AnswerText> {
        let (before, answer) = (&self.chat.messages[..index], &self.chat.messages[index]);
        let prompt = self.render(before, true)?;
        let mut turns = before.to_vec();
        if let Some(last) = turns.last_mut() {
            // A template may look at the question, so the marker stands behind it.
            last.content = Some(format!("{}{}", last.text(), self.asked));
        }
        let asked = self.after_question(self.render(&turns, true)?);
        turns.push(answer.clone());
        let told = self.after_question(self.render(&turns, false)?);
        let around = self.around_answer(&mut turns)?.unwrap_or_default();
        let (mut empty_thought, mut learned) = (false, String::new());
        match (told.strip_prefix(&asked), told.strip_prefix(&around.opening)) {
            (Some(rest), _) => {
                learned.push_str(rest);
                empty_thought = OpenThought::at_end_of(&asked).is_some_and(|thought| thought.is_missing_in(answer));
            }
            (None, Some(rest)) => match OpenThought::at_end_of(&asked) {
                Some(thought) => {
                    learned = thought.complete(answer, rest);
                    empty_thought = thought.is_missing_in(answer);
                }
                // The template writes more before the answer than `chat` sends, such as the end of what that has opened.
                None if !asked.trim().is_empty() && around.opening.starts_with(asked.trim_end()) => {
                    bail!(self.not_incremental_error(&asked, &around.opening))
                }
                None => learned.push_str(rest),
            },
            (None, None) => bail!(self.not_incremental_error(&around.opening, &told)),
        }
        let ended = self.end_answer(&mut learned, answer, &around.closing);
        Ok(AnswerText { prompt, learned, ended, empty_thought })
    }

    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        Ok(self.template.render(messages, self.chat.tools.as_ref(), add_generation_prompt)?)
    }

    /// Returns the text after the last question, or all of it if the template does not print the question.
    fn after_question(&self, text: String) -> String {
        match text.rsplit_once(self.asked) {
            Some((_, after)) => after.to_owned(),
            None => text,
        }
    }

    /// Returns the text around the answer's text: from the last question to it, and after it. There is none if the
    /// template does not print it, as beside a call of tools. A thought in the answer's text stays before it. `turns` end
    /// with the answer.
    fn around_answer(&self, turns: &mut [Message]) -> Result<Option<Surroundings>> {
        if let Some(answer) = turns.last_mut() {
            let (thought, _) = split_after_thought(answer.text());
            answer.content = Some(format!("{thought}{}", self.said));
        }
        let text = self.after_question(self.render(turns, false)?);
        let around = text.rsplit_once(self.said);
        Ok(around.map(|(opening, closing)| Surroundings { opening: opening.to_owned(), closing: closing.to_owned() }))
    }

    /// Ends the text of an answer at its end token, or before `closing` if there is none. Returns whether it ends with an
    /// end token.
    fn end_answer(&self, learned: &mut String, answer: &Message, closing: &str) -> bool {
        let token = |id: u32| self.tokenizer.id_to_token(id);
        let own_end = self.tokenizer.end_of_turn_override().and_then(token);
        // Everything that the message spells out is escaped, so these were written by the template.
        let place = |end: String| Some((learned.rfind(&end)?, end.len()));
        let found = self.tokenizer.template_end_of_turn().and_then(token).and_then(|end| {
            // Phi-3.5's template writes another end after that of the last turn.
            let tail = closing.split_once(&end).filter(|_| answer.fields.is_empty() && learned.ends_with(closing));
            tail.map(|(_, tail)| (learned.len() - tail.len() - end.len(), end.len())).or_else(|| place(end))
        });
        let found =
            found.or_else(|| self.tokenizer.eos_ids().iter().copied().filter_map(token).filter_map(place).max());
        let end = match found {
            Some((start, len)) => start + if own_end.is_some() { 0 } else { len },
            None => learned.strip_suffix(closing).map_or(learned.len(), str::len),
        };
        learned.truncate(end);
        learned.push_str(own_end.as_deref().unwrap_or_default());
        found.is_some() || own_end.is_some()
    }

    fn not_incremental_error(&self, opening: &str, told: &str) -> String {
        let same = opening.char_indices().zip(told.chars()).take_while(|((_, a), b)| a == b).count();
        let rest = |text: &str| self.restore(&text.chars().skip(same).take(40).collect::<String>());
        format!(
            "{}: this chat template writes other text before an answer when the answer's text changes, so the tokens to \
             learn are unknown: expected {:?}, found {:?} in its place; use another template",
            self.tokenizer.path().display(),
            rest(opening),
            rest(told)
        )
    }
}

/// Returns the error for an answer that the template ends without an end token.
pub(super) fn missing_end_token_error(tokenizer: &Tokenizer, learned: &str) -> String {
    let ends: Vec<_> = tokenizer.eos_ids().iter().filter_map(|&id| tokenizer.id_to_token(id)).collect();
    let tail: String = learned.chars().skip(learned.chars().count().saturating_sub(40)).collect();
    format!(
        "{}: this chat template ends an answer without an end token, so the model would not learn to stop: expected one of \
         [{}] or another control token, found {tail:?}; name one by `data.end_token`, use another template, or format qa \
         for rows of one question and one answer",
        tokenizer.path().display(),
        ends.join(", ")
    )
}

#[cfg(test)]
#[path = "answer_tests.rs"]
mod tests;
