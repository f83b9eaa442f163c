//! The evaluation task `qa-loss`: the mean loss over the answer tokens.

use super::{EvalArgs, room};
use crate::{
    data::{EncodeOptions, EncodedRows, Row, encode_rows},
    model::LoadedModel,
    recipe::OnTooLong,
};
use anyhow::Result;
use burn::tensor::ElementConversion;
use burn_llama::{Batch, Example, Llama, SequenceLayout, kernel::Kernels};
use burn_peft::ForwardContext;
use serde_json::{Value, json};

/// The form of the batches of an evaluation.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EvalBatching {
    /// Rows per batch.
    pub batch_size: usize,
    /// True if the rows of a batch are concatenated into one sequence without padding.
    pub padding_free: bool,
}

/// The losses of all target tokens together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TotalLoss {
    pub sum: f64,
    pub target_tokens: usize,
}

impl TotalLoss {
    /// Returns the mean loss per target token.
    pub(crate) fn mean(self) -> f64 {
        self.sum / self.target_tokens as f64
    }
}

/// Builds the batches of an evaluation, in which every target token has the weight 1.
pub(crate) fn eval_batches<B: Kernels>(
    model: &Llama<B>,
    examples: &[Example],
    EvalBatching { batch_size, padding_free }: EvalBatching,
) -> Result<Vec<Batch<B>>> {
    let batch = |rows: &[Example]| {
        let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
        let layout = SequenceLayout::from_lengths(&lengths, padding_free);
        Ok(model.batch(rows, &layout, 1.0, ForwardContext::default())?)
    };
    examples.chunks(batch_size.max(1)).map(batch).collect()
}

/// Computes the losses of all target tokens of `examples`.
pub(crate) fn total_loss<B: Kernels>(
    model: &Llama<B>,
    examples: &[Example],
    batching: EvalBatching,
) -> Result<TotalLoss> {
    let batches = eval_batches(model, examples, batching)?;
    let loss = |batch: &Batch<B>| model.batch_loss(batch).sum().into_scalar().elem::<f64>();
    let target_tokens = examples.iter().map(Example::num_targets).sum();
    Ok(TotalLoss { sum: batches.iter().map(loss).sum(), target_tokens })
}

/// Encodes the rows.
///
/// # Errors
/// If a row cannot be encoded; the error names its place.
pub(super) fn encode<B: Kernels>(loaded: &LoadedModel<B>, rows: &[Row], args: &EvalArgs) -> Result<EncodedRows> {
    let longest = args.limits.max_length.unwrap_or_else(|| room(loaded));
    let options = EncodeOptions { max_length: longest, on_too_long: OnTooLong::Truncate, learn: args.rows.learn };
    encode_rows(&loaded.tokenizer, rows, options)
}

pub(super) fn evaluate<B: Kernels>(loaded: &LoadedModel<B>, encoded: &EncodedRows, args: &EvalArgs) -> Result<Value> {
    encoded.require_examples(args.limits.max_length.unwrap_or_else(|| room(loaded)))?;
    let batching = EvalBatching { batch_size: args.limits.batch_size.get(), padding_free: true };
    let total = total_loss(&loaded.model, &encoded.examples, batching)?;
    let loss = total.mean();
    loaded.model.check_finite("loss", loss.is_finite())?;
    Ok(json!({
        "task": "qa-loss", "rows": encoded.examples.len(), "loss": loss, "perplexity": loss.exp(),
        "target_tokens": total.target_tokens,
    }))
}
