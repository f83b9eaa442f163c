//! Converts adapters whose initialization changed the base weights (PiSSA, OLoRA) into plain LoRA.

use super::{linears::Linears, lora::collect_state_dict};
use crate::{
    Error, LoraConfig,
    config::InitLoraWeights,
    format::{self, AdapterFiles},
};
use burn::{
    module::Module,
    tensor::{DType, Tensor, TensorData},
};
use burn_peft_kernels::LinearKernels;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Writes the named adapter, whose initialization subtracted `s·B₀·A₀` from the weights, as plain LoRA of twice the
/// rank for the original weights: `B·A - B₀·A₀ = [B, -B₀]·[A; A₀]`. `initial` is the adapter's directory as it was
/// saved right after [`attach`](super::attach).
///
/// # Errors
/// If `initial` cannot be read or belongs to another adapter, or the directory cannot be written.
pub fn save_mutated_as_lora<B: LinearKernels, M: Linears<B> + Module<B>>(
    model: &M,
    name: &str,
    initial: &Path,
    directory: &Path,
) -> Result<(), Error> {
    write_converted::<B>(collect_state_dict(model, name)?, initial, directory, &B::Device::default())
}

/// Does the same as [`save_mutated_as_lora`] for an adapter in the directory `trained`, without a model.
///
/// # Errors
/// If a directory cannot be read or written, if `initial` does not belong to the adapter in `trained`, or if that is
/// plain LoRA already.
pub fn convert_mutated_to_lora<B: LinearKernels>(
    trained: &Path,
    initial: &Path,
    directory: &Path,
    device: &B::Device,
) -> Result<(), Error> {
    let files = format::read(trained)?;
    let init = &files.config.init_lora_weights;
    if !init.mutates_base_weights() {
        let found = json!(init);
        return Err(Error::format(
            trained,
            "init_lora_weights",
            "pissa or olora, which subtract the initial adapter from the weights",
            found,
        ));
    }
    write_converted::<B>(files, initial, directory, device)
}

fn write_converted<B: LinearKernels>(
    files: AdapterFiles,
    initial: &Path,
    directory: &Path,
    device: &B::Device,
) -> Result<(), Error> {
    let AdapterFiles { config, mut tensors, .. } = files;
    if let Some(key) = tensors.keys().find(|key| key.contains(".lora_embedding_")) {
        return Err(Error::format(initial, key, "PiSSA or OLoRA of linear layers alone", "LoRA of the embedding"));
    }
    let start = format::read_tensors(initial)?;
    let expected: Vec<_> = tensors.iter().map(|(key, data)| (key.clone(), data.shape.to_vec())).collect();
    format::check_tensors(initial, &expected, &start)?;
    for (key, data) in &mut tensors {
        let before = start[key.as_str()].clone();
        *data = match key.ends_with("lora_A.weight") {
            true => concat_initial::<B>([data.clone(), before], 0, device),
            false if key.ends_with("lora_B.weight") => concat_initial::<B>([data.clone(), before], 1, device),
            false => data.clone(),
        };
    }
    let scale = if config.use_rslora { 2f64.sqrt() } else { 2.0 };
    let times = |map: Map<String, Value>, by: &dyn Fn(&Value) -> Value| -> Map<String, Value> {
        map.into_iter().map(|(key, value)| (key, by(&value))).collect()
    };
    let config = LoraConfig {
        r: 2 * config.r,
        lora_alpha: scale * config.lora_alpha,
        rank_pattern: times(config.rank_pattern, &|r| json!(2 * r.as_u64().unwrap_or(0))),
        alpha_pattern: times(config.alpha_pattern, &|alpha| json!(scale * alpha.as_f64().unwrap_or(0.0))),
        init_lora_weights: InitLoraWeights::True,
        ..config
    };
    format::write(directory, &config.to_json(), tensors)
}

/// Concatenates the trained matrix `now` and its initial values along `dim`; those of a `B` are negated.
fn concat_initial<B: LinearKernels>([now, start]: [TensorData; 2], dim: usize, device: &B::Device) -> TensorData {
    let tensor = |data| Tensor::<B, 2>::from_data(data, (device, DType::F32));
    let start = if dim == 1 { tensor(start).neg() } else { tensor(start) };
    Tensor::cat(vec![tensor(now), start], dim).into_data()
}
