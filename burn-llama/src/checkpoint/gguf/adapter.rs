//! Conversion of a llama.cpp adapter file to a PEFT adapter directory.

use super::{
    Gguf, TensorEntry, hugging_face_key,
    permutation::{RowHeads, permuted_row},
    write,
};
use crate::{Error, LlamaConfig, model::build};
use burn::tensor::TensorData;
use burn_peft::{LoraConfig, TargetModules, format};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Converts the GGUF adapter `file` to the PEFT adapter `directory`, in f32: the inverse of [`write::save_adapter`].
/// `config` is the configuration of the base model; its weights are not needed.
///
/// # Errors
/// If the file cannot be read, is not a LoRA adapter, does not fit the model or has several LoRA ranks, or if the
/// directory cannot be written.
pub fn adapter_to_peft(config: &LlamaConfig, file: &Path, directory: &Path) -> Result<(), Error> {
    let gguf = Gguf::open(file)?;
    for (key, expected) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        let found = gguf.text(key)?.unwrap_or("nothing");
        if found != expected {
            return Err(gguf.error(key, expected, found));
        }
    }
    let alpha = |value: &super::MetadataValue| value.as_f64();
    let alpha = gguf.typed("adapter.lora.alpha", "a number", alpha)?.unwrap_or(0.0);
    let matrices = build::parameter_shapes(config).into_iter().filter(|(key, _)| key != "model.embed_tokens.weight");
    let shapes: BTreeMap<String, [usize; 2]> =
        matrices.filter_map(|(key, shape)| Some((key, <[usize; 2]>::try_from(shape).ok()?))).collect();
    let (mut tensors, mut names, mut ranks) = (Vec::new(), BTreeSet::new(), BTreeSet::new());
    for entry in gguf.tensors() {
        let LoraFactor { layer, part, rank, permuted } = lora_factor(&gguf, entry, &shapes)?;
        ranks.insert(rank);
        let mut values = gguf.read(entry)?;
        if let Some(head_dim) = write::permuted_head_dim(config).filter(|_| permuted) {
            values = undo_permutation(&values, entry.shape[1], head_dim);
        }
        names.insert(layer.rsplit('.').next().unwrap_or(&layer).to_owned());
        tensors.push((format::tensor_key(&layer, part), TensorData::new(values, entry.shape.clone())));
    }
    let [r] = ranks.into_iter().collect::<Vec<_>>()[..] else {
        return Err(gguf.error("tensors", "adapters of one rank", "none, or several ranks"));
    };
    // llama.cpp treats an alpha of 0 as a scaling of 1.
    let lora_alpha = if alpha == 0.0 { r as f64 } else { alpha };
    let target_modules = TargetModules::Suffixes(names.into_iter().collect());
    let lora = LoraConfig { r, lora_alpha, target_modules, ..LoraConfig::default() };
    Ok(format::write(directory, &lora.to_json(), tensors)?)
}

/// One LoRA factor, `A` or `B`, of a layer.
struct LoraFactor {
    layer: String,
    part: &'static str,
    rank: usize,
    /// True if the rows are those of query or key heads, which llama.cpp may permute.
    permuted: bool,
}

/// Identifies the LoRA factor that a tensor of the file holds and checks its shape against the weight it adapts.
fn lora_factor(gguf: &Gguf, entry: &TensorEntry, shapes: &BTreeMap<String, [usize; 2]>) -> Result<LoraFactor, Error> {
    let (name, shape) = (entry.name.as_str(), entry.shape.as_slice());
    // `A` has the weight's input features as columns, `B` its output features as rows.
    let a = name.strip_suffix(".lora_a").map(|stem| (stem, "lora_A", 1));
    let found = a.or_else(|| name.strip_suffix(".lora_b").map(|stem| (stem, "lora_B", 0)));
    let known = |key: &String| shapes.contains_key(key);
    let Some(((stem, part, side), weight)) =
        found.and_then(|found| Some((found, hugging_face_key(found.0).filter(known)?)))
    else {
        return Err(gguf.error(name, "lora_a or lora_b of a matrix of the model", "another tensor"));
    };
    let expected = shapes[&weight][side];
    match *shape {
        [rows, columns] if [rows, columns][side] == expected => Ok(LoraFactor {
            layer: weight.trim_end_matches(".weight").to_owned(),
            part,
            rank: [rows, columns][1 - side],
            permuted: side == 0 && RowHeads::from_name(stem).is_some(),
        }),
        _ => {
            let expected = format!("a matrix with {expected} as its dimension {side}, like {weight}");
            Err(gguf.error(name, &expected, &format!("{shape:?}")))
        }
    }
}

/// Undoes llama.cpp's row permutation: returns the rows of `columns` values in the order of the Hugging Face
/// checkpoint.
fn undo_permutation(values: &[f32], columns: usize, head_dim: usize) -> Vec<f32> {
    let rows = values.len() / columns.max(1);
    (0..rows).flat_map(|row| &values[permuted_row(row, head_dim) * columns..][..columns]).copied().collect()
}
