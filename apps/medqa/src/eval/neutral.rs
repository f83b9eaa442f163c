//! Probe for forgetting: the loss on a text that has nothing to do with medicine, without adapters and with each of
//! them.

use super::{EvalBatching, TotalLoss, total_loss};
use crate::model::LoadedModel;
use anyhow::Result;
use burn_llama::{Example, kernel::Kernels};

/// A text about everyday subjects, written for this program. It never changes, so that the losses of any two runs can
/// be compared.
const TEXT: &str = include_str!("neutral.txt");

/// Computes the losses of the tokens of the text. Each paragraph is a sequence of its own,
/// truncated to half the model's maximum length.
pub(super) fn neutral_loss<B: Kernels>(loaded: &LoadedModel<B>) -> Result<TotalLoss> {
    let (model, mut examples) = (&loaded.model, Vec::new());
    // The other half leaves room for virtual tokens, so that the text is the same for every adapter.
    let longest = (model.config().max_position_embeddings / 2).max(2);
    for paragraph in TEXT.lines().filter(|line| !line.is_empty()) {
        let mut ids = loaded.tokenizer.encode(paragraph, true)?;
        ids.truncate(longest);
        let learned = vec![true; ids.len()];
        examples.push(Example { ids, loss_mask: learned });
    }
    let total = total_loss(model, &examples, EvalBatching { batch_size: examples.len(), padding_free: true })?;
    model.check_finite("loss on the neutral text", total.mean().is_finite())?;
    Ok(total)
}
