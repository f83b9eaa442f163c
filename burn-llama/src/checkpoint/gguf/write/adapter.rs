//! Export of a LoRA adapter as a GGUF file that llama.cpp applies to the base model at run time.

use super::{
    super::{BlockType, MetadataValue, gguf_name, permutation::RowHeads},
    check_kind, config,
    file::{self, PlannedTensor},
    general_metadata,
};
use crate::{Error, LlamaConfig, model::build};
use burn::tensor::TensorData;
use burn_peft::format::{self, AdapterFiles};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

/// Writes the PEFT adapter `directory` as a GGUF file with matrices stored as `kind` (F32 or F16). The tensors are
/// `….lora_a [r, in]` and `….lora_b [out, r]`, named after the weight they adapt; rows of query and key heads are in
/// the order of the base model's file. `config` is the configuration of the base model; its weights are not needed.
///
/// llama.cpp scales by `adapter.lora.alpha / r`, so with rank stabilisation the alpha written is `lora_alpha · √r`.
/// Returns the names of configuration fields that were not recognized.
///
/// # Errors
/// If the adapter cannot be read, does not fit the model or has no effect, or if the file cannot be written.
pub fn save_adapter(
    config: &LlamaConfig,
    directory: &Path,
    kind: BlockType,
    path: &Path,
) -> Result<Vec<String>, Error> {
    check_kind(kind, &[BlockType::F32, BlockType::F16])?;
    let AdapterFiles { config: lora, tensors, unknown_fields } = format::read(directory)?;
    if !lora.is_plain() {
        let expected =
            "one rank and one scaling on an unchanged base: no patterns, bias, modules_to_save, DoRA or PiSSA";
        return Err(Error::format(directory, "adapter_config.json", expected, "an adapter that llama.cpp cannot hold"));
    }
    let alpha = (lora.scaling() * lora.r as f64) as f32;
    if alpha == 0.0 {
        // llama.cpp treats 0 as "not given" and scales by 1, which would be a different adapter.
        let expected = "a number other than 0 (an adapter with alpha 0 has no effect)";
        return Err(Error::format(directory, "lora_alpha", expected, lora.lora_alpha.to_string()));
    }
    let planned = plan_tensors(config, directory, lora.r, &tensors, kind)?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut metadata = general_metadata(config::architecture(config), "adapter", name, kind);
    metadata.push(("adapter.type".to_owned(), MetadataValue::String("lora".to_owned())));
    metadata.push(("adapter.lora.alpha".to_owned(), MetadataValue::Float(f64::from(alpha))));
    file::write(path, &metadata, &planned)?;
    Ok(unknown_fields)
}

/// Lists the tensors to write, each `A`/`B` pair checked against the weight it adapts.
fn plan_tensors<'a>(
    config: &LlamaConfig,
    directory: &Path,
    r: usize,
    tensors: &'a BTreeMap<String, TensorData>,
    kind: BlockType,
) -> Result<Vec<PlannedTensor<'a>>, Error> {
    let matrices = build::parameter_shapes(config).into_iter().filter_map(|(key, shape)| {
        let layer = key.strip_suffix(".weight").filter(|layer| *layer != "model.embed_tokens")?;
        Some((layer.to_owned(), <[usize; 2]>::try_from(shape).ok()?))
    });
    let head_dim = config::permuted_head_dim(config);
    let mut left: BTreeSet<&str> = tensors.keys().map(String::as_str).collect();
    let (mut planned, mut problems) = (Vec::new(), Vec::new());
    for (layer, [out, features]) in matrices {
        let pair = [("lora_A", "lora_a", [r, features]), ("lora_B", "lora_b", [out, r])]
            .map(|(part, suffix, shape)| (format::tensor_key(&layer, part), suffix, shape));
        let adapted = pair.iter().any(|(key, ..)| tensors.contains_key(key));
        let Some(name) = gguf_name(&format!("{layer}.weight")).filter(|_| adapted) else { continue };
        for (key, suffix, expected) in pair {
            left.remove(key.as_str());
            match tensors.get(&key).map(|tensor| (tensor, tensor.shape.as_slice())) {
                None => problems.push(format!("{key} is missing")),
                Some((tensor, shape)) if shape == expected => planned.push(PlannedTensor {
                    name: format!("{name}.{suffix}"),
                    shape: expected.to_vec(),
                    kind,
                    head_dim: head_dim.filter(|_| suffix == "lora_b" && RowHeads::from_name(&name).is_some()),
                    values: Box::new(|| tensor.iter::<f32>().collect()),
                }),
                Some((_, found)) => problems.push(format!("{key}: expected {expected:?}, found {found:?}")),
            }
        }
    }
    problems.extend(left.into_iter().map(|key| format!("{key} belongs to no layer")));
    problems.extend((planned.is_empty() && problems.is_empty()).then(|| "it has no tensors".to_owned()));
    if problems.is_empty() {
        return Ok(planned);
    }
    Err(burn_peft::Error::Mismatch { path: directory.to_owned(), message: problems.join("; ") }.into())
}
