//! Decoding token by token.

use super::Tokenizer;
use crate::error::Error;

/// Text from ids as they come, cut only where a character ends.
///
/// All pieces together are what [`Tokenizer::decode`] makes of all ids with special tokens skipped: a SentencePiece
/// tokenizer drops the space at the beginning here too.
#[derive(Debug, Clone)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Ids of the last piece that was given out, then those that are still held back.
    ids: Vec<u32>,
    /// How many of them were given out.
    given: usize,
}

impl<'a> DecodeStream<'a> {
    /// A stream at its beginning.
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), given: 0 }
    }

    /// Takes one id and gives the text that it completes, if it completes any.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>, Error> {
        self.ids.push(id);
        let text = self.held()?;
        // A trailing replacement character is an unfinished one: what completes it may still come.
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(None);
        }
        self.ids.drain(..self.given);
        self.given = self.ids.len();
        Ok(Some(text))
    }

    /// What is held back, unfinished characters as U+FFFD.
    ///
    /// # Errors
    ///
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<Option<String>, Error> {
        let text = self.held()?;
        Ok((!text.is_empty()).then_some(text))
    }

    /// The text of the ids that were not given out yet. They are decoded behind the last ones that were, because a
    /// decoder may treat the first token of a text differently.
    fn held(&self) -> Result<String, Error> {
        let before = self.tokenizer.decode(&self.ids[..self.given], true)?;
        let mut text = self.tokenizer.decode(&self.ids, true)?;
        Ok(if text.starts_with(&before) { text.split_off(before.len()) } else { String::new() })
    }
}
