//! Incremental decoding, token by token.

use super::Tokenizer;
use crate::error::Error;

/// An incremental decoder that emits text only at character boundaries.
///
/// The pieces together equal the result of [`Tokenizer::decode`] for all ids with special tokens skipped: a
/// SentencePiece tokenizer drops the leading space here too.
#[derive(Debug, Clone)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The ids of the last emitted piece, followed by the ids whose text is not emitted yet.
    ids: Vec<u32>,
    /// The number of ids at the start of `ids` whose text has been emitted.
    num_emitted: usize,
}

impl<'a> DecodeStream<'a> {
    /// Creates a stream without ids.
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), num_emitted: 0 }
    }

    /// Adds one id and returns the text that it completes, if any.
    ///
    /// # Errors
    ///
    /// The same as those of [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<Option<String>, Error> {
        self.ids.push(id);
        let text = self.pending_text()?;
        // A trailing replacement character is an incomplete character, which later ids may complete.
        if text.is_empty() || text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(None);
        }
        self.ids.drain(..self.num_emitted);
        self.num_emitted = self.ids.len();
        Ok(Some(text))
    }

    /// Returns the text that is not emitted yet, with incomplete characters as U+FFFD.
    ///
    /// # Errors
    ///
    /// The same as those of [`Tokenizer::decode`].
    pub fn finish(self) -> Result<Option<String>, Error> {
        let text = self.pending_text()?;
        Ok((!text.is_empty()).then_some(text))
    }

    /// Returns the text of the ids that are not emitted yet. They are decoded together with the last emitted ids,
    /// because a decoder may treat the first token of a text differently.
    fn pending_text(&self) -> Result<String, Error> {
        let before = self.tokenizer.decode(&self.ids[..self.num_emitted], true)?;
        let mut text = self.tokenizer.decode(&self.ids, true)?;
        Ok(if text.starts_with(&before) { text.split_off(before.len()) } else { String::new() })
    }
}
