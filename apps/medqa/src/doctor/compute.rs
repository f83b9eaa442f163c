//! Laws about what the model computes.

use super::Subject;
use crate::{data::examples, model};
use anyhow::{Context, Result, bail};
use burn::tensor::{DType, Int, Tensor, TensorData};
use burn_llama::{Example, Generate, Layout, Message, Past, Settings, generate, kernel::Kernels};
use burn_peft::Pass;

/// So much of a sequence is computed.
const TOKENS: usize = 48;

/// The largest difference that rounding makes, relative to the largest value.
const ROUNDING: f32 = 1e-4;

/// The model takes the tokens of every row.
pub fn vocabulary<B: Kernels>(subject: &Subject<B>) -> Result<String> {
    let model = &subject.loaded.model;
    let all = subject.rows.iter().map(|row| examples(&subject.loaded.tokenizer, &row.content));
    let all: Vec<Example> = all.collect::<Result<Vec<_>>>()?.concat();
    model.accepts(&all)?;
    Ok(format!("{} tokens, {} in the model", subject.loaded.tokenizer.vocab_size(), model.config().vocab_size))
}

/// No logit of a row is infinite or no number.
pub fn finite<B: Kernels>(subject: &Subject<B>) -> Result<String> {
    let logits = values(generate::logits(&subject.loaded.model, &sequence(subject)?)?)?;
    if let Some(place) = logits.iter().position(|logit| !logit.is_finite()) {
        let size = subject.loaded.model.config().vocab_size;
        bail!("token {}, logit {}: expected a finite number, found {}", place / size, place % size, logits[place]);
    }
    Ok(format!("{} numbers, the largest {:.2}", logits.len(), largest(&logits)))
}

/// The likeliest words are the same twice.
pub fn repeatable<B: Kernels>(subject: &Subject<B>) -> Result<String> {
    let settings = Settings { max_new_tokens: 12, ..Settings::default() };
    let answer = || -> Result<Vec<Vec<u32>>> {
        Ok(Generate::new(&subject.loaded.model, &[sequence(subject)?], &settings)?.finish()?)
    };
    let (first, again) = (answer()?, answer()?);
    if first != again {
        bail!("expected {first:?} again, found {again:?}");
    }
    Ok(format!("{} tokens", first.iter().map(Vec::len).sum::<usize>()))
}

/// Half a sequence at once and the rest token by token, on the keys and values kept, gives the logits of the whole.
pub fn cached<B: Kernels>(subject: &Subject<B>) -> Result<String> {
    let (model, ids, pass) = (&subject.loaded.model, sequence(subject)?, Pass::default());
    let expected = values(generate::logits(model, &ids)?)?;
    let mut past = Past::new(model.config().num_hidden_layers, 1);
    let (mut found, mut from) = (Vec::new(), 0);
    while from < ids.len() {
        let new = if from == 0 { &ids[..ids.len().div_ceil(2)] } else { &ids[from..from + 1] };
        let mut layout = Layout::padded(&[new.len()]);
        layout.positions.iter_mut().for_each(|position| *position += from as i32);
        let tokens: Vec<i32> = new.iter().map(|&id| id as i32).collect();
        let tokens = TensorData::new(tokens, [1, new.len()]);
        let tokens = Tensor::<B, 2, Int>::from_data(tokens, (&model.device(), DType::I32));
        let hidden = model.hidden(model.embed(tokens), &layout, Some(&mut past), &pass)?;
        found.extend(values(model.head(hidden, &pass))?);
        from += new.len();
    }
    same(&found, &expected, ROUNDING)
}

/// The loss of every token is the same whether rows stand alone, padded, or one after the other without padding.
pub fn packed<B: Kernels>(subject: &Subject<B>) -> Result<String> {
    let model = &subject.loaded.model;
    let whole = sequence(subject)?;
    // Of several lengths, so that padding and packing differ.
    let parts = [&whole[..], &whole[whole.len() / 2..], &whole[..whole.len().div_ceil(3).max(2)]];
    let rows = parts.map(|ids| Example { ids: ids.to_vec(), learned: vec![true; ids.len()] });
    let losses = |rows: &[Example], packing: bool| -> Result<Vec<f32>> {
        let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
        let batch = model.batch(rows, &Layout::of(&lengths, packing), 1.0, Pass::default())?;
        model.batch_loss(&batch).cast(DType::F32).into_data().into_vec().map_err(|e| anyhow::anyhow!("{e:?}"))
    };
    let alone = rows.iter().map(|row| losses(std::slice::from_ref(row), false));
    let alone = alone.collect::<Result<Vec<_>>>()?.concat();
    same(&losses(&rows, false)?, &alone, ROUNDING).context("padded")?;
    same(&losses(&rows, true)?, &alone, ROUNDING)
}

/// The start of the first row that has enough tokens, or of a question.
pub fn sequence<B: Kernels>(subject: &Subject<B>) -> Result<Vec<u32>> {
    let tokenizer = &subject.loaded.tokenizer;
    let rows = subject.rows.iter().flat_map(|row| examples(tokenizer, &row.content).unwrap_or_default());
    let mut ids = match rows.map(|example| example.ids).find(|ids| ids.len() >= 8) {
        Some(ids) => ids,
        None => model::conversation(tokenizer, &[Message::new("user", "What is diabetes, and how is it treated?")])?,
    };
    ids.truncate(TOKENS);
    Ok(ids)
}

pub fn values<B: Kernels>(tensor: Tensor<B, 2>) -> Result<Vec<f32>> {
    tensor.cast(DType::F32).into_data().into_vec().map_err(|e| anyhow::anyhow!("expected f32 values, found {e:?}"))
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |largest, value| largest.max(value.abs()))
}

/// Whether two lists of numbers are equal up to `apart`, relative to the largest.
pub fn same(found: &[f32], expected: &[f32], apart: f32) -> Result<String> {
    if found.len() != expected.len() {
        bail!("expected {} numbers, found {}", expected.len(), found.len());
    }
    let differences: Vec<f32> = found.iter().zip(expected).map(|(a, b)| a - b).collect();
    let (difference, scale) = (largest(&differences), largest(expected).max(1e-3));
    // A comparison with no number is false, so that it fails.
    let close = difference <= apart * scale && differences.iter().all(|difference| difference.is_finite());
    if !close {
        bail!("expected equal numbers up to {scale:.2} but for rounding, found a difference of {difference:.1e}");
    }
    Ok(format!("{} numbers up to {scale:.2} differ by {difference:.1e} at most", found.len()))
}
