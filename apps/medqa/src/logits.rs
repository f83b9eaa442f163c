//! The verb `logits`: computes the logits of a text, for comparison with other programs.

use crate::{
    args::{DeviceArgs, ModelArgs, WeightsArgs},
    backend::with_backend,
    model,
};
use anyhow::{Context, Result};
use burn::tensor::{DType, TensorData};
use burn_llama::{generate, kernel::Kernels};
use clap::Args;
use safetensors::{Dtype, tensor::TensorView};
use std::path::PathBuf;

/// Arguments of `logits`.
#[derive(Args)]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// Text to run through the model; special tokens that it writes out become their ids
    #[arg(long)]
    pub text: String,
    /// Decode token by token with the KV cache, as in generation, instead of one forward pass over the whole text
    #[arg(long)]
    pub by_steps: bool,
    /// Output file in safetensors format, with `ids` (i64) and `logits` [tokens, vocabulary] (f32)
    #[arg(long)]
    pub out: PathBuf,
}

/// Runs the verb `logits`.
pub(crate) fn logits(args: &LogitsArgs) -> Result<()> {
    with_backend!(args.device.device.ensure_ready()?, |B, device| write_logits::<B>(args, device))
}

fn write_logits<B: Kernels>(args: &LogitsArgs, device: &B::Device) -> Result<()> {
    let mut loaded = model::load::<B>(&args.model, args.weights.weights, device)?;
    loaded.model = model::with_compute(loaded.model, args.weights.compute)?;
    let ids = loaded.tokenizer.encode(&args.text, true)?;
    let logits = if args.by_steps {
        let mut values: Vec<f32> = Vec::new();
        generate::logits_by_steps(&loaded.model, &ids, |logits| values.extend_from_slice(logits))?;
        let shape = [ids.len(), values.len() / ids.len().max(1)];
        TensorData::new(values, shape)
    } else {
        generate::logits(&loaded.model, &ids)?.cast(DType::F32).into_data()
    };
    let finite = logits.iter::<f32>().all(f32::is_finite);
    loaded.model.check_finite("logits", finite)?;
    let id_bytes: Vec<u8> = ids.iter().flat_map(|&id| i64::from(id).to_le_bytes()).collect();
    let tensors = [
        ("ids", TensorView::new(Dtype::I64, vec![ids.len()], &id_bytes)?),
        ("logits", TensorView::new(Dtype::F32, logits.shape.to_vec(), logits.as_bytes())?),
    ];
    let bytes = safetensors::serialize(tensors, None).context("logits cannot be serialised")?;
    crate::write::write_atomically(&args.out, &bytes)
}
