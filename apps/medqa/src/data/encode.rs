//! Encoding of rows as examples: their tokens, and which of them are learned.

use super::{Row, RowContent, conversation, pubmedqa_prompt};
use crate::{model, recipe::OnTooLong};
use anyhow::{Context, Result, bail};
use burn_llama::{Example, Tokenizer};

/// The maximum length of a row, and the treatment of longer ones.
#[derive(Debug, Clone, Copy)]
pub struct LengthLimit {
    /// Maximum number of tokens.
    pub max_length: usize,
    /// Treatment of longer rows.
    pub on_too_long: OnTooLong,
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
}

/// Encodes rows of at most `max_length` tokens. Longer rows are truncated on the right, PubMedQA's on the left, so that
/// the decision stays.
pub fn encode_rows(
    tokenizer: &Tokenizer,
    rows: &[Row],
    max_length: usize,
    on_too_long: OnTooLong,
) -> Result<EncodedRows> {
    let (mut encoded, limit) = (EncodedRows::default(), LengthLimit { max_length, on_too_long });
    for row in rows {
        encoded.add_row(tokenizer, row, limit).with_context(|| row.location.to_string())?;
    }
    encoded.require_examples(max_length)?;
    Ok(encoded)
}

impl EncodedRows {
    /// Adds the examples of a row. A conversation with several examples is too long if one of them is.
    ///
    /// # Errors
    /// If the row cannot be encoded, or is too long and the limit refuses it.
    pub fn add_row(&mut self, tokenizer: &Tokenizer, row: &Row, limit: LengthLimit) -> Result<()> {
        let LengthLimit { max_length, on_too_long } = limit;
        let mut examples = encode_row(tokenizer, &row.content)?;
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
            bail!("no row has a token to learn within `max_length` = {max_length} tokens; raise it");
        }
        Ok(())
    }
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

/// Encodes a row without truncation.
pub fn encode_row(tokenizer: &Tokenizer, content: &RowContent) -> Result<Vec<Example>> {
    let eos = tokenizer.eos_token().context("the tokenizer has no end token, so answers could not end")?;
    let (prompt, answer) = match content {
        RowContent::Conversation(turns) => return conversation::encode_conversation(tokenizer, turns),
        RowContent::Answer { prompt, answer } => {
            (model::apply_chat_template(tokenizer, prompt)?, format!("{answer}{eos}"))
        }
        RowContent::PubMedQa { question, contexts, decision } => {
            let decision = decision.as_ref().context("`final_decision` is missing")?;
            (tokenizer.encode(&pubmedqa_prompt(question, contexts), true)?, format!(" {decision}{eos}"))
        }
    };
    Ok(vec![Example::new(&prompt, &tokenizer.encode(&answer, false)?, usize::MAX)])
}
