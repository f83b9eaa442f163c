//! The forgetting probe: the loss on a text that has nothing to do with medicine, without adapters and with each.

use super::loss;
use crate::model::Loaded;
use anyhow::Result;
use burn_llama::{Example, kernel::Kernels};

/// Everyday subjects in plain words, written for this program. The text is fixed, so that figures of any two runs compare.
const TEXT: &str = include_str!("neutral.txt");

/// The mean loss per token of the text, its paragraphs each by itself and cut to the model's length, and the number of tokens.
pub fn neutral<B: Kernels>(loaded: &Loaded<B>) -> Result<(f64, usize)> {
    let (model, mut examples) = (&loaded.model, Vec::new());
    // The adapters must not change what is measured: virtual tokens of usual length leave the same room.
    let longest = (model.config().max_position_embeddings / 2).max(2);
    for paragraph in TEXT.lines().filter(|line| !line.is_empty()) {
        let mut ids = loaded.tokenizer.encode(paragraph, true)?;
        ids.truncate(longest);
        let learned = vec![true; ids.len()];
        examples.push(Example { ids, learned });
    }
    let (sum, targets) = loss(model, &examples, (examples.len(), true))?;
    Ok((sum / targets as f64, targets))
}
