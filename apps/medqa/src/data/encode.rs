//! Rows as examples: what is read and what is learned.

use super::{Content, Row, conversation, pubmedqa_prompt};
use crate::{model, recipe::OnTooLong};
use anyhow::{Context, Result, bail};
use burn_llama::{Example, Tokenizer};

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
    for row in rows {
        encoded.add(tokenizer, row, (max_length, on_too_long)).with_context(|| row.place.to_string())?;
    }
    encoded.check(max_length)?;
    Ok(encoded)
}

impl Encoded {
    /// Adds a row's examples. A conversation of several examples is too long if one of them is.
    pub fn add(&mut self, tokenizer: &Tokenizer, row: &Row, (longest, on_too_long): (usize, OnTooLong)) -> Result<()> {
        let mut examples = examples(tokenizer, &row.content)?;
        if let Some(length) = examples.iter().map(|example| example.ids.len()).max().filter(|&n| n > longest) {
            match on_too_long {
                OnTooLong::Truncate => self.truncated += 1,
                OnTooLong::Drop => {
                    self.dropped += 1;
                    return Ok(());
                }
                OnTooLong::Error => bail!(
                    "{length} tokens are more than `data.max_length` = {longest}; raise it or set `data.on_too_long` to \
                     \"truncate\" or \"drop\""
                ),
            }
            examples.iter_mut().for_each(|example| cut(example, &row.content, longest));
        }
        examples.retain(|example| example.targets() > 0);
        self.without_target += usize::from(examples.is_empty());
        self.examples.extend(examples);
        Ok(())
    }

    /// Refuses data that nothing can be learned from.
    pub fn check(&self, max_length: usize) -> Result<()> {
        if self.examples.is_empty() {
            bail!("no row has a token to learn within `max_length` = {max_length} tokens; raise it");
        }
        Ok(())
    }
}

fn cut(example: &mut Example, content: &Content, longest: usize) {
    if matches!(content, Content::PubMedQa { .. }) {
        let prompt = example.learned.iter().take_while(|&&learned| !learned).count();
        let over = example.ids.len().saturating_sub(longest).min(prompt);
        example.ids.drain(..over);
        example.learned.drain(..over);
    }
    example.ids.truncate(longest);
    example.learned.truncate(longest);
}

/// What is read and what is learned of a row, uncut.
pub fn examples(tokenizer: &Tokenizer, content: &Content) -> Result<Vec<Example>> {
    let eos = tokenizer.eos_token().context("the tokenizer has no end token, so answers could not end")?;
    let (prompt, answer) = match content {
        Content::Conversation(turns) => return conversation::examples(tokenizer, turns),
        Content::Answer { prompt, answer } => (model::conversation(tokenizer, prompt)?, format!("{answer}{eos}")),
        Content::PubMedQa { question, contexts, decision } => {
            let decision = decision.as_ref().context("`final_decision` is missing")?;
            (tokenizer.encode(&pubmedqa_prompt(question, contexts), true)?, format!(" {decision}{eos}"))
        }
    };
    Ok(vec![Example::new(&prompt, &tokenizer.encode(&answer, false)?, usize::MAX)])
}
