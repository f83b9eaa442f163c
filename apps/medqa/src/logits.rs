//! The verb `logits`: computes the logits of a text, for comparison with other programs.

use crate::{
    backend::{Device, with_backend},
    cli::{ModelArgs, WeightsArgs},
    model,
};
use anyhow::{Context, Result};
use burn::tensor::{DType, TensorData};
use burn_llama::{generate, kernel::Kernels};
use safetensors::{Dtype, tensor::TensorView};
use std::path::Path;

/// Runs the verb `logits`.
pub fn logits(
    (args, weights): (&ModelArgs, WeightsArgs),
    device: &Device,
    (text, by_steps): (&str, bool),
    out: &Path,
) -> Result<()> {
    with_backend!(device.ensure_ready()?, |B, device| write_logits::<B>((args, weights), device, (text, by_steps), out))
}

fn write_logits<B: Kernels>(
    (args, weights): (&ModelArgs, WeightsArgs),
    device: &B::Device,
    (text, by_steps): (&str, bool),
    out: &Path,
) -> Result<()> {
    let mut loaded = model::load::<B>(args, weights.weights, device)?;
    loaded.model = model::with_compute(loaded.model, weights.compute)?;
    let ids = loaded.tokenizer.encode(text, true)?;
    let logits = if by_steps {
        let mut values: Vec<f32> = Vec::new();
        generate::logits_by_steps(&loaded.model, &ids, |logits| values.extend_from_slice(logits))?;
        let shape = [ids.len(), values.len() / ids.len().max(1)];
        TensorData::new(values, shape)
    } else {
        generate::logits(&loaded.model, &ids)?.cast(DType::F32).into_data()
    };
    let id_bytes: Vec<u8> = ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
    let tensors = [
        ("ids", TensorView::new(Dtype::I64, vec![ids.len()], &id_bytes)?),
        ("logits", TensorView::new(Dtype::F32, logits.shape.to_vec(), logits.as_bytes())?),
    ];
    let bytes = safetensors::serialize(tensors, None).context("logits cannot be serialised")?;
    crate::write::write_atomically(out, &bytes)
}
