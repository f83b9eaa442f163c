//! Encoding of rows as examples: their tokens, and which of them are learned.

use super::{
    Row, RowContent,
    content::Turn,
    conversation::{EncodedConversation, MissingEnd, encode_conversation},
    pubmedqa_prompt,
};
use crate::recipe::{DataConfig, Learn, OnTooLong};
use anyhow::{Context, Result, bail};
use burn_llama::{Example, Message, Tokenizer};

/// How rows become examples.
#[derive(Debug, Clone, Copy)]
pub struct EncodeOptions {
    /// Maximum number of tokens.
    pub max_length: usize,
    /// Treatment of longer rows.
    pub on_too_long: OnTooLong,
    /// Answers of a conversation that are learned.
    pub learn: Learn,
}

impl From<&DataConfig> for EncodeOptions {
    fn from(data: &DataConfig) -> Self {
        Self { max_length: data.max_length, on_too_long: data.on_too_long, learn: data.learn }
    }
}

/// The examples of a file, and the number of rows that were truncated or left out.
#[derive(Debug, Default)]
pub struct EncodedRows {
    pub examples: Vec<Example>,
    /// Number of rows truncated to the maximum length.
    pub truncated: usize,
    /// Number of rows left out because they are too long.
    pub dropped: usize,
    /// Number of rows left out because none of their tokens is learned.
    pub without_target: usize,
    /// Number of texts of earlier turns, over all rows, that the chat template leaves out of the last answer's prompt.
    pub omitted: usize,
    /// Number of learned answers without a thought after prompts that open one: they close it at once.
    pub empty_thoughts: usize,
}

/// Encodes rows of at most `max_length` tokens. Longer rows are truncated on the right, PubMedQA's on the left, so that
/// the decision stays.
pub fn encode_rows(tokenizer: &Tokenizer, rows: &[Row], options: EncodeOptions) -> Result<EncodedRows> {
    let mut encoded = EncodedRows::default();
    for row in rows {
        encoded.add_row(tokenizer, row, options).with_context(|| row.location.to_string())?;
    }
    Ok(encoded)
}

impl EncodedRows {
    /// Adds the examples of a row. A conversation with several examples is too long if one of them is.
    ///
    /// # Errors
    /// If the row cannot be encoded, or is too long and the limit refuses it.
    pub fn add_row(&mut self, tokenizer: &Tokenizer, row: &Row, options: EncodeOptions) -> Result<()> {
        let EncodeOptions { max_length, on_too_long, learn } = options;
        let EncodedConversation { mut examples, omitted, empty_thoughts } = encode_row(tokenizer, &row.content, learn)?;
        if matches!(row.content, RowContent::Text(_)) {
            examples = examples.iter().flat_map(|example| pieces(example, max_length)).collect();
        }
        self.omitted += omitted;
        self.empty_thoughts += empty_thoughts;
        if let Some(length) = examples.iter().map(|example| example.ids.len()).max().filter(|&n| n > max_length) {
            match on_too_long {
                OnTooLong::Truncate => self.truncated += 1,
                OnTooLong::Drop => {
                    self.dropped += 1;
                    return Ok(());
                }
                OnTooLong::Error => bail!(
                    "{length} tokens are more than `data.max_length` = {max_length}; raise it or set `data.on_too_long` to \
                     \"truncate\" or \"drop\""
                ),
            }
            examples.iter_mut().for_each(|example| truncate(example, &row.content, max_length));
        }
        examples.retain(|example| example.num_targets() > 0);
        self.without_target += usize::from(examples.is_empty());
        self.examples.extend(examples);
        Ok(())
    }

    /// Describes the examples that are longer than the number of positions that the model supports, if it has such a
    /// limit; none if all fit.
    pub fn beyond_positions(&self, limit: Option<usize>) -> Option<String> {
        let lengths = self.examples.iter().map(|example| example.ids.len());
        let beyond: Vec<usize> = lengths.filter(|&length| limit.is_some_and(|limit| length > limit)).collect();
        let (longest, limit) = (beyond.iter().max()?, limit?);
        Some(format!(
            "{} examples are longer than the {limit} positions that the model supports (`max_position_embeddings`), the \
             longest has {longest}; the maximum length should be {limit} at most",
            beyond.len()
        ))
    }

    /// Returns an error if there is no example.
    pub fn require_examples(&self, max_length: usize) -> Result<()> {
        if self.examples.is_empty() {
            match self.truncated + self.dropped {
                0 => bail!("no row has a token to learn"),
                _ => bail!("no row has a token to learn within `max_length` = {max_length} tokens; raise it"),
            }
        }
        Ok(())
    }
}

/// Cuts a text into examples of at most `max_length` tokens, so that none of it is lost.
fn pieces(example: &Example, max_length: usize) -> Vec<Example> {
    let piece = |ids: &[u32]| Example { ids: ids.to_vec(), loss_mask: vec![true; ids.len()] };
    example.ids.chunks(max_length).map(piece).collect()
}

fn truncate(example: &mut Example, content: &RowContent, max_length: usize) {
    if matches!(content, RowContent::PubMedQa { .. }) {
        let prompt = example.loss_mask.iter().take_while(|&&learned| !learned).count();
        let over = example.ids.len().saturating_sub(max_length).min(prompt);
        example.ids.drain(..over);
        example.loss_mask.drain(..over);
    }
    example.ids.truncate(max_length);
    example.loss_mask.truncate(max_length);
}

/// Encodes a row without truncation. Its texts never become control tokens.
pub fn encode_row(tokenizer: &Tokenizer, content: &RowContent, learn: Learn) -> Result<EncodedConversation> {
    match content {
        RowContent::Conversation(conversation) => {
            encode_conversation(tokenizer, conversation, learn, MissingEnd::Refuse)
        }
        RowContent::Answer { prompt, answer } => {
            let messages = prompt.iter().cloned().chain([Message::new("assistant", answer.as_str())]);
            let turns: Vec<Turn> = messages.map(|message| Turn { message, learned: true }).collect();
            encode_conversation(tokenizer, &turns.into(), Learn::Last, MissingEnd::Eos)
        }
        RowContent::Text(text) => {
            let mut ids = tokenizer.encode_plain(text, true)?;
            ids.push(tokenizer.eos().context("the tokenizer has no end token, so texts could not end")?);
            let example = Example { loss_mask: vec![true; ids.len()], ids };
            Ok(EncodedConversation { examples: vec![example], ..EncodedConversation::default() })
        }
        RowContent::PubMedQa { question, contexts, decision } => {
            let decision = decision.as_ref().context("`final_decision` is missing")?;
            let prompt = tokenizer.encode_plain(&pubmedqa_prompt(question, contexts), true)?;
            let mut answer = tokenizer.encode_plain(&format!(" {decision}"), false)?;
            answer.push(tokenizer.eos().context("the tokenizer has no end token, so answers could not end")?);
            let examples = vec![Example::new(&prompt, &answer, usize::MAX)];
            Ok(EncodedConversation { examples, ..EncodedConversation::default() })
        }
    }
}

#[cfg(test)]
#[path = "encode_tests.rs"]
mod tests;
