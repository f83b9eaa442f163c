//! llama.cpp's adapter file, read back as PEFT's directory.

use super::{Gguf, hugging_face_key, interleaved, write};
use crate::{Error, LlamaConfig, checkpoint::build};
use burn::tensor::TensorData;
use burn_peft::{LoraConfig, TargetModules, format};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Writes the GGUF adapter `file` as PEFT's adapter `directory`, in f32: the inverse of [`write::save_adapter`]. `config` is the
/// base model's; its weights are not needed.
///
/// # Errors
/// If the file cannot be read, is no LoRA adapter, does not fit the model or has several ranks, or if the directory cannot be
/// written.
pub fn adapter_directory(config: &LlamaConfig, file: &Path, directory: &Path) -> Result<(), Error> {
    let gguf = Gguf::open(file)?;
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        let found = gguf.text(key)?.unwrap_or("nothing");
        if found != expected {
            return Err(gguf.error(key, expected, found));
        }
    }
    let alpha = |value: &super::Value| value.as_f64();
    let alpha = gguf.typed("adapter.lora.alpha", "a number", alpha)?.unwrap_or(0.0);
    let shapes: BTreeMap<String, Vec<usize>> = build::shapes(config).into_iter().collect();
    let (mut tensors, mut names, mut ranks) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for entry in gguf.tensors() {
        let stem = entry.name.strip_suffix(".lora_a").map(|stem| (stem, "lora_A", 1, 0));
        let parts = stem.or_else(|| entry.name.strip_suffix(".lora_b").map(|stem| (stem, "lora_B", 0, 1)));
        let weight = parts.and_then(|(stem, ..)| hugging_face_key(stem)).filter(|key| shapes.contains_key(key));
        let (Some((stem, part, outer, low)), Some(weight)) = (parts, weight) else {
            return Err(gguf.error(&entry.name, "lora_a or lora_b of a weight of the model", "another tensor"));
        };
        // `A` shares the weight's features, `B` its rows.
        let side = shapes[&weight][outer];
        if entry.shape.len() != 2 || entry.shape[outer] != side {
            let expected = format!("a matrix with {side} as its dimension {outer}, like {weight}");
            return Err(gguf.error(&entry.name, &expected, &format!("{:?}", entry.shape)));
        }
        ranks.insert(entry.shape[low]);
        let mut values = gguf.read(entry)?;
        if let Some(head_dim) = write::paired(config).filter(|_| part == "lora_B" && write::in_pairs(stem)) {
            values = unpaired(&values, entry.shape[1], head_dim);
        }
        let layer = weight.trim_end_matches(".weight");
        names.insert(layer.rsplit('.').next().unwrap_or(layer).to_owned());
        tensors.push((format::key(layer, part), TensorData::new(values, entry.shape.clone())));
    }
    let [r] = ranks.into_iter().collect::<Vec<_>>()[..] else {
        return Err(gguf.error("tensors", "adapters of one rank", "none, or several ranks"));
    };
    // llama.cpp takes 0 for a scaling of 1.
    let lora_alpha = if alpha == 0.0 { r as f64 } else { alpha };
    let target_modules = TargetModules::Suffixes(names.into_iter().collect());
    let lora = LoraConfig { r, lora_alpha, target_modules, ..LoraConfig::default() };
    Ok(format::write(directory, &lora.to_json(), tensors)?)
}

/// Rows of `columns` values in the order of the Hugging Face checkpoint.
fn unpaired(values: &[f32], columns: usize, head_dim: usize) -> Vec<f32> {
    let rows = values.len() / columns.max(1);
    (0..rows).flat_map(|row| &values[interleaved(row, head_dim) * columns..][..columns]).copied().collect()
}
