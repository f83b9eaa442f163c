//! The evaluation task `qa-loss`: the mean loss over the answer tokens.

use super::{EvalArgs, room};
use crate::{
    data::{Row, encode_rows},
    model::LoadedModel,
    recipe::OnTooLong,
};
use anyhow::Result;
use burn::tensor::ElementConversion;
use burn_llama::{Example, Llama, SequenceLayout, kernel::Kernels};
use burn_peft::ForwardContext;
use serde_json::{Value, json};

/// The form of the batches of an evaluation.
#[derive(Debug, Clone, Copy)]
pub struct EvalBatching {
    /// Rows per batch.
    pub batch_size: usize,
    /// True if the rows of a batch are concatenated into one sequence without padding.
    pub padding_free: bool,
}

/// Returns the sum of the losses of all target tokens, and their number.
pub fn loss_sum<B: Kernels>(
    model: &Llama<B>,
    examples: &[Example],
    EvalBatching { batch_size, padding_free }: EvalBatching,
) -> Result<(f64, usize)> {
    let (mut sum, mut targets) = (0.0, 0);
    for rows in examples.chunks(batch_size.max(1)) {
        let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
        let batch =
            model.batch(rows, &SequenceLayout::from_lengths(&lengths, padding_free), 1.0, ForwardContext::default())?;
        sum += model.batch_loss(&batch).sum().into_scalar().elem::<f64>();
        targets += rows.iter().map(Example::num_targets).sum::<usize>();
    }
    Ok((sum, targets))
}

pub fn evaluate<B: Kernels>(loaded: &LoadedModel<B>, rows: &[Row], args: &EvalArgs) -> Result<Value> {
    let longest = args.limits.max_length.unwrap_or_else(|| room(loaded));
    let encoded = encode_rows(&loaded.tokenizer, rows, longest, OnTooLong::Truncate)?;
    let batching = EvalBatching { batch_size: args.limits.batch_size.get(), padding_free: true };
    let (sum, targets) = loss_sum(&loaded.model, &encoded.examples, batching)?;
    let loss = sum / targets as f64;
    loaded.model.check_finite("loss", loss.is_finite())?;
    Ok(json!({
        "task": "qa-loss", "rows": encoded.examples.len(), "loss": loss, "perplexity": loss.exp(),
        "target_tokens": targets,
    }))
}
