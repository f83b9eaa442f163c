//! Rows as examples: what is read and what is learned.

use super::{Row, pubmedqa_prompt};
use crate::{model::conversation, recipe::OnTooLong};
use anyhow::{Context, Result, bail};
use burn_llama::{Example, Message, Tokenizer};

/// The examples of a file, and what became of the other rows.
#[derive(Debug, Default)]
pub struct Encoded {
    pub examples: Vec<Example>,
    /// Rows cut to the maximal length.
    pub truncated: usize,
    /// Rows left out as too long.
    pub dropped: usize,
    /// Rows left out because no token of them is learned.
    pub without_target: usize,
}

/// Encodes rows of at most `max_length` tokens. Questions are cut at the right, abstracts at the left, so that the decision
/// stays.
pub fn encode(tokenizer: &Tokenizer, rows: &[Row], max_length: usize, on_too_long: OnTooLong) -> Result<Encoded> {
    let mut encoded = Encoded::default();
    for (index, row) in rows.iter().enumerate() {
        let (mut prompt, answer) = tokens(tokenizer, row)?;
        let length = prompt.len() + answer.len();
        if length > max_length {
            match on_too_long {
                OnTooLong::Truncate => encoded.truncated += 1,
                OnTooLong::Drop => {
                    encoded.dropped += 1;
                    continue;
                }
                OnTooLong::Error => bail!(
                    "row {}: {length} tokens are more than `data.max_length` = {max_length}; raise it or set \
                     `data.on_too_long` to \"truncate\" or \"drop\"",
                    index + 1
                ),
            }
            if matches!(row, Row::PubMedQa { .. }) {
                prompt.drain(..(length - max_length).min(prompt.len()));
            }
        }
        let example = Example::new(&prompt, &answer, max_length);
        if example.targets() == 0 {
            encoded.without_target += 1;
        } else {
            encoded.examples.push(example);
        }
    }
    if encoded.examples.is_empty() {
        bail!("no row has a token to learn within `max_length` = {max_length} tokens; raise it");
    }
    Ok(encoded)
}

/// What is read and what is learned of a row.
fn tokens(tokenizer: &Tokenizer, row: &Row) -> Result<(Vec<u32>, Vec<u32>)> {
    let eos = tokenizer.eos_token().context("the tokenizer has no end token, so answers could not end")?;
    match row {
        Row::Qa { question, answer } => {
            let prompt = conversation(tokenizer, &[Message::new("user", question.as_str())])?;
            Ok((prompt, tokenizer.encode(&format!("{answer}{eos}"), false)?))
        }
        Row::PubMedQa { pmid, question, contexts, decision } => {
            let decision = decision.as_ref().with_context(|| format!("{pmid}: `final_decision` is missing"))?;
            let prompt = tokenizer.encode(&pubmedqa_prompt(question, contexts), true)?;
            Ok((prompt, tokenizer.encode(&format!(" {decision}{eos}"), false)?))
        }
    }
}
