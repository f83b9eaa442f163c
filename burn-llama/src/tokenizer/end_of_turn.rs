//! The token with which a chat template ends the assistant's turn.

use super::Tokenizer;
use crate::chat::{ChatTemplate, Message};
use crate::error::Error;

impl Tokenizer {
    /// Returns the id of the token with which the chat template ends the assistant's turn: the control token that it
    /// writes after the text of a message, even where no file lists it as an end of generation (the template of
    /// Qwen2.5's base models writes `<|im_end|>`, their `eos_token` is `<|endoftext|>`). It is one of
    /// [`Tokenizer::eos_ids`].
    pub fn end_of_turn(&self) -> Option<u32> {
        self.end_of_turn_override.or(self.template_end_of_turn)
    }

    /// Returns the end-of-turn token that the chat template writes.
    pub fn template_end_of_turn(&self) -> Option<u32> {
        self.template_end_of_turn
    }

    /// Returns the end-of-turn token that replaces the one of the chat template.
    pub fn end_of_turn_override(&self) -> Option<u32> {
        self.end_of_turn_override
    }

    /// Makes the token `token` the end of the assistant's turn, whatever the chat template writes, and one of
    /// [`Tokenizer::eos_ids`].
    ///
    /// # Errors
    ///
    /// [`Error::Tokenizer`] if the vocabulary has no such token.
    pub fn with_end_of_turn(mut self, token: &str) -> Result<Self, Error> {
        let id = self.token_to_id(token);
        let id = id.ok_or_else(|| {
            self.error(format!("end token {token:?}: expected a token of the vocabulary, found none"))
        })?;
        self.end_of_turn_override = Some(id);
        self.add_stop_id(id);
        Ok(self)
    }

    /// Adds ids at which generation stops.
    pub fn with_stop_ids(mut self, ids: impl IntoIterator<Item = u32>) -> Self {
        ids.into_iter().for_each(|id| self.add_stop_id(id));
        self
    }

    /// Replaces the chat template, and with it the end-of-turn token.
    pub fn with_chat_template(mut self, template: ChatTemplate) -> Self {
        self.template_replaced |= self.chat_template.as_ref().is_none_or(|own| own.source() != template.source());
        self.set_chat_template(Some(template));
        self
    }

    /// Parses a chat template whose variables `bos_token`, `eos_token` and so on are those of this tokenizer.
    ///
    /// # Errors
    ///
    /// [`Error::Template`] with the line number if it does not parse.
    pub fn parse_chat_template(&self, source: &str) -> Result<ChatTemplate, Error> {
        self.special.parse_template(source)
    }

    pub(super) fn set_chat_template(&mut self, template: Option<ChatTemplate>) {
        self.chat_template = template;
        self.template_end_of_turn = self.find_end_of_turn();
        self.template_end_of_turn.into_iter().for_each(|id| self.add_stop_id(id));
    }

    fn add_stop_id(&mut self, id: u32) {
        let stop_ids = &mut self.special.stop_ids;
        if let Err(at) = stop_ids.binary_search(&id) {
            stop_ids.insert(at, id);
        }
    }

    /// Returns the control token that the template writes after an answer: the first one that ends a generation, or
    /// else the first one. There is none if the template refuses a question with its answer.
    fn find_end_of_turn(&self) -> Option<u32> {
        let template = self.chat_template.as_ref()?;
        let asked = [Message::new("user", "?")];
        let mut escapes = self.escape_conversation(&asked, None).escapes;
        let answer = escapes.unused_char();
        let [question] = asked;
        let messages = [question, Message::new("assistant", answer)];
        let text = template.render(&messages, None, false).ok()?;
        let mut rest = text.rsplit_once(answer)?.1;
        let mut first = None;
        while let Some(found) = self.control.find_in(rest) {
            let id = self.token_to_id(found.token)?;
            if self.special.stop_ids.contains(&id) {
                return Some(id);
            }
            first.get_or_insert(id);
            rest = &rest[found.start + found.token.len()..];
        }
        first
    }
}
