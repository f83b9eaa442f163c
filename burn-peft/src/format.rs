//! PEFT's adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

use crate::{Error, LoraConfig};
use burn::tensor::{DType, TensorData};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::Path,
};

pub(crate) const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT wrote before.
const OLD_WEIGHTS: &str = "adapter_model.bin";

/// PEFT's key for a part (`lora_A`, `lora_B`, `lora_magnitude_vector`) of the adapter of the layer at `path`.
pub fn key(path: &str, part: &str) -> String {
    let end = if part == "lora_magnitude_vector" { "" } else { ".weight" };
    format!("base_model.model.{path}.{part}{end}")
}

/// Refuses tensors that are not exactly the expected ones.
pub(crate) fn fits(
    directory: &Path,
    expected: &[(String, Vec<usize>)],
    tensors: &BTreeMap<String, TensorData>,
) -> Result<(), Error> {
    let mut problems = Vec::new();
    for (key, shape) in expected {
        match tensors.get(key) {
            Some(tensor) if tensor.shape.as_slice() == shape => {}
            Some(tensor) => problems.push(format!("{key}: expected {shape:?}, found {:?}", tensor.shape.as_slice())),
            None => problems.push(format!("{key} is missing")),
        }
    }
    let known: BTreeSet<&String> = expected.iter().map(|(key, _)| key).collect();
    let extra = tensors.keys().filter(|key| !known.contains(key));
    problems.extend(extra.map(|key| format!("{key} belongs to no selected layer")));
    if problems.is_empty() {
        return Ok(());
    }
    Err(Error::Mismatch { path: directory.to_owned(), message: problems.join("; ") })
}

/// An adapter directory's configuration, its tensors in f32 by key, and the configuration fields that are not known here.
pub type Adapter = (LoraConfig, BTreeMap<String, TensorData>, Vec<String>);

/// Reads a LoRA adapter's directory. Tensors in f16 or bf16 are widened.
///
/// # Errors
/// If a file is missing or malformed, or the adapter needs a feature that is not supported.
pub fn read(directory: &Path) -> Result<Adapter, Error> {
    let (config, unknown) = LoraConfig::from_json(&directory.join(CONFIG), read_config(directory)?)?;
    Ok((config, read_tensors(directory)?, unknown))
}

/// The content of an adapter directory's `adapter_config.json`.
///
/// # Errors
/// If the file is missing or no JSON.
pub fn read_config(directory: &Path) -> Result<Value, Error> {
    let path = directory.join(CONFIG);
    let text = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::format(&path, "content", "JSON", e))
}

/// An adapter directory's tensors by key, in f32; those in f16 or bf16 are widened.
///
/// # Errors
/// If the file is missing or malformed.
pub fn read_tensors(directory: &Path) -> Result<BTreeMap<String, TensorData>, Error> {
    let (path, old) = (directory.join(WEIGHTS), directory.join(OLD_WEIGHTS));
    if !path.exists() && old.exists() {
        let expected = "adapter_model.safetensors, which PEFT writes for it: \
            PeftModel.from_pretrained(model, directory).save_pretrained(directory)";
        return Err(Error::format(&old, "content", expected, "a pickle of torch"));
    }
    read_file(&path)
}

/// The tensors of a safetensors file, as [`read_tensors`].
pub(crate) fn read_file(path: &Path) -> Result<BTreeMap<String, TensorData>, Error> {
    let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| Error::format(path, "header", "safetensors", e))?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        let values = widen(&view)
            .ok_or_else(|| Error::format(path, &name, "F32, F16 or BF16", format!("{:?}", view.dtype())))?;
        tensors.insert(name, TensorData::new(values, view.shape().to_vec()));
    }
    Ok(tensors)
}

fn widen(view: &TensorView<'_>) -> Option<Vec<f32>> {
    let bytes = view.data();
    let half = |value: fn([u8; 2]) -> f32| bytes.chunks_exact(2).map(|b| value([b[0], b[1]])).collect();
    Some(match view.dtype() {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::F16 => half(|b| half::f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => half(|b| half::bf16::from_le_bytes(b).to_f32()),
        _ => return None,
    })
}

/// Writes an adapter directory: each file beside its place, then renamed, the configuration last.
///
/// # Errors
/// If the directory or a file cannot be written.
pub fn write(directory: &Path, config: &Value, tensors: Vec<(String, TensorData)>) -> Result<(), Error> {
    fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
    let mut views = Vec::with_capacity(tensors.len());
    for (name, data) in &tensors {
        assert_eq!(data.dtype, DType::F32, "{name}: adapters are f32");
        let view = TensorView::new(Dtype::F32, data.shape.to_vec(), data.as_bytes())
            .map_err(|e| Error::format(directory, name, "a tensor", e))?;
        views.push((name.clone(), view));
    }
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    let bytes = safetensors::serialize(views, metadata).map_err(|e| Error::format(directory, WEIGHTS, "tensors", e))?;
    replace(&directory.join(WEIGHTS), &bytes)?;
    let json =
        serde_json::to_string_pretty(config).map_err(|e| Error::format(directory, CONFIG, "serialisable values", e))?;
    replace(&directory.join(CONFIG), json.as_bytes())
}

/// Writes beside `path`, then renames, so that a reader sees the old file or the new one.
fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    let beside = Path::new(&beside);
    let result = fs::write(beside, bytes).and_then(|()| fs::rename(beside, path));
    result.map_err(|e| {
        // What was half-written goes; the error that matters is the first one.
        let _ = fs::remove_file(beside);
        Error::io(path, e)
    })
}
