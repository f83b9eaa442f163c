//! Checks of the model's computations.

use super::CheckSubject;
use crate::{data::encode_row, model};
use anyhow::{Context, Result, bail};
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_llama::{Example, Generation, GenerationConfig, KvCache, Message, SequenceLayout, generate, kernel::Kernels};
use burn_peft::ForwardContext;

/// Length of the test sequence in tokens, at most.
const MAX_TOKENS: usize = 48;

/// Tolerance for rounding, relative to the largest value.
const ROUNDING_TOLERANCE: f32 = 1e-4;

/// Checks that the model's vocabulary contains every token of the rows.
pub(super) fn vocabulary<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let model = &subject.loaded.model;
    let all = subject.rows.iter().map(|row| encode_row(&subject.loaded.tokenizer, &row.content, subject.learn));
    let all: Vec<_> = all.collect::<Result<_>>()?;
    let all: Vec<Example> = all.into_iter().flat_map(|row| row.examples).collect();
    model.check_examples(&all)?;
    Ok(format!("{} tokens, {} in the model", subject.loaded.tokenizer.vocab_size(), model.config().vocab_size))
}

/// Checks that no logit of the test sequence is infinite or NaN.
pub(super) fn finite_logits<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let logits = to_f32_vec(generate::logits(&subject.loaded.model, &test_sequence(subject)?)?)?;
    if let Some(place) = logits.iter().position(|logit| !logit.is_finite()) {
        let size = subject.loaded.model.config().vocab_size;
        bail!("token {}, logit {}: expected a finite number, found {}", place / size, place % size, logits[place]);
    }
    Ok(format!("{} numbers, the largest {:.2}", logits.len(), max_abs(&logits)))
}

/// Checks that greedy generation gives the same tokens twice.
pub(super) fn deterministic_generation<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let settings = GenerationConfig { max_new_tokens: 12, ..GenerationConfig::default() };
    let answer = || -> Result<Vec<Vec<u32>>> {
        Ok(Generation::new(&subject.loaded.model, &[test_sequence(subject)?], &settings)?.finish()?)
    };
    let (first, again) = (answer()?, answer()?);
    if first != again {
        bail!("expected {first:?} again, found {again:?}");
    }
    Ok(format!("{} tokens", first.iter().map(Vec::len).sum::<usize>()))
}

/// Checks that the KV cache changes no logits: half of the sequence at once and the rest token by token give the logits
/// of one forward pass over the whole.
pub(super) fn cached_logits<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let (model, ids, context) = (&subject.loaded.model, test_sequence(subject)?, ForwardContext::default());
    let expected = to_f32_vec(generate::logits(model, &ids)?)?;
    let mut cache = KvCache::new(model.config().num_hidden_layers, 1);
    let (mut found, mut from) = (Vec::new(), 0);
    while from < ids.len() {
        let new = if from == 0 { &ids[..ids.len().div_ceil(2)] } else { &ids[from..from + 1] };
        let mut layout = SequenceLayout::padded(&[new.len()]);
        layout.positions.iter_mut().for_each(|position| *position += from as i32);
        let tokens: Vec<i32> = new.iter().map(|&id| id as i32).collect();
        let tokens = TensorData::new(tokens, [1, new.len()]);
        let tokens = Tensor::<B, 2, Int>::from_data(tokens, (&model.device(), DType::I32));
        let hidden = model.hidden_states(model.embed(tokens), &layout, Some(&mut cache), &context)?;
        found.extend(to_f32_vec(model.head(hidden, &context))?);
        from += new.len();
    }
    compare(&found, &expected, ROUNDING_TOLERANCE)
}

/// Checks that the loss of every token is the same for separate rows, a padded batch and packed rows.
pub(super) fn packed_losses<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let model = &subject.loaded.model;
    let whole = test_sequence(subject)?;
    // Rows of different lengths, so that padding and packing differ.
    let parts = [&whole[..], &whole[whole.len() / 2..], &whole[..whole.len().div_ceil(3).max(2)]];
    let rows = parts.map(|ids| Example { ids: ids.to_vec(), loss_mask: vec![true; ids.len()] });
    let losses = |rows: &[Example], packing: bool| -> Result<Vec<f32>> {
        let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
        let batch =
            model.batch(rows, &SequenceLayout::from_lengths(&lengths, packing), 1.0, ForwardContext::default())?;
        model.batch_loss(&batch).cast(DType::F32).into_data().into_vec().map_err(|e| anyhow::anyhow!("{e:?}"))
    };
    let alone = rows.iter().map(|row| losses(std::slice::from_ref(row), false));
    let alone = alone.collect::<Result<Vec<_>>>()?.concat();
    compare(&losses(&rows, false)?, &alone, ROUNDING_TOLERANCE).context("padded")?;
    compare(&losses(&rows, true)?, &alone, ROUNDING_TOLERANCE)
}

/// Returns the test sequence: the beginning of the first row with at least 8 tokens, or else of a built-in question.
pub(super) fn test_sequence<B: Kernels>(subject: &CheckSubject<B>) -> Result<Vec<u32>> {
    let tokenizer = &subject.loaded.tokenizer;
    let rows = subject
        .rows
        .iter()
        .flat_map(|row| encode_row(tokenizer, &row.content, subject.learn).unwrap_or_default().examples);
    let mut ids = match rows.map(|example| example.ids).find(|ids| ids.len() >= 8) {
        Some(ids) => ids,
        None => {
            model::apply_chat_template(tokenizer, &[Message::new("user", "What is diabetes, and how is it treated?")])?
        }
    };
    ids.truncate(MAX_TOKENS);
    Ok(ids)
}

/// Returns the values of a tensor as f32.
pub(super) fn to_f32_vec<B: Kernels>(tensor: Tensor<B, 2>) -> Result<Vec<f32>> {
    tensor.cast(DType::F32).into_data().into_vec().map_err(|e| anyhow::anyhow!("expected f32 values, found {e:?}"))
}

fn max_abs(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

/// Compares two lists of numbers within a tolerance relative to the largest expected value.
pub(super) fn compare(found: &[f32], expected: &[f32], tolerance: f32) -> Result<String> {
    if found.len() != expected.len() {
        bail!("expected {} numbers, found {}", expected.len(), found.len());
    }
    let differences: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
    let (difference, scale) = (max_abs(&differences), max_abs(expected).max(1e-3));
    // A comparison with NaN is false, so the check fails.
    let close = difference <= tolerance * scale && differences.iter().all(|difference| difference.is_finite());
    if !close {
        bail!("expected numbers up to {scale:.2} that differ only by rounding, found a difference of {difference:.1e}");
    }
    Ok(format!("{} numbers up to {scale:.2} differ by {difference:.1e} at most", found.len()))
}
