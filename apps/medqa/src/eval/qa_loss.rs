//! The mean loss over the tokens of answers.

use crate::{
    cli::EvalArgs,
    data::{Row, encode},
    model::Loaded,
    recipe::OnTooLong,
};
use anyhow::Result;
use burn::tensor::ElementConversion;
use burn_llama::{Example, Layout, Llama, kernel::Kernels};
use burn_peft::Pass;
use serde_json::{Value, json};

/// The loss over all target tokens, summed, and their number. With `packing` the rows of a batch stand in one, without padding.
pub fn loss<B: Kernels>(
    model: &Llama<B>,
    examples: &[Example],
    (batch_size, packing): (usize, bool),
) -> Result<(f64, usize)> {
    let (mut sum, mut targets) = (0.0, 0);
    for rows in examples.chunks(batch_size.max(1)) {
        let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
        let batch = model.batch(rows, &Layout::of(&lengths, packing), 1.0, Pass::default())?;
        sum += model.batch_loss(&batch).sum().into_scalar().elem::<f64>();
        targets += rows.iter().map(Example::targets).sum::<usize>();
    }
    Ok((sum, targets))
}

pub fn measure<B: Kernels>(loaded: &Loaded<B>, rows: &[Row], args: &EvalArgs) -> Result<Value> {
    let longest = args.max_length.unwrap_or(loaded.model.config().max_position_embeddings);
    let encoded = encode(&loaded.tokenizer, rows, longest, OnTooLong::Truncate)?;
    let (sum, targets) = loss(&loaded.model, &encoded.examples, (args.batch_size.get(), true))?;
    let loss = sum / targets as f64;
    Ok(json!({
        "task": "qa-loss", "rows": encoded.examples.len(), "loss": loss, "perplexity": loss.exp(),
        "target_tokens": targets,
    }))
}
