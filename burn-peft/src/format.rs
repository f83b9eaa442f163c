//! PEFT's adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

use crate::{Error, Loaded, LoraConfig};
use burn::tensor::{DType, TensorData};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::Path,
};

pub(crate) const CONFIG_NAME: &str = "adapter_config.json";
const SAFETENSORS_WEIGHTS_NAME: &str = "adapter_model.safetensors";
/// The file name that older versions of PEFT wrote.
const WEIGHTS_NAME: &str = "adapter_model.bin";

/// Returns PEFT's key for the tensor `part` (`lora_A`, `lora_B`, `lora_magnitude_vector`) of the layer at `path`.
pub fn tensor_key(path: &str, part: &str) -> String {
    let end = if part == "lora_magnitude_vector" { "" } else { ".weight" };
    format!("base_model.model.{path}.{part}{end}")
}

/// Checks that `tensors` are exactly the expected ones, by key and shape.
pub(crate) fn check_tensors(
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

/// The content of a LoRA adapter's directory.
#[derive(Debug, Clone)]
pub struct AdapterFiles {
    /// The configuration.
    pub config: LoraConfig,
    /// The tensors in f32, by key.
    pub tensors: BTreeMap<String, TensorData>,
    /// The names of unknown configuration fields, about which the caller should warn.
    pub unknown_fields: Vec<String>,
}

/// Reads a LoRA adapter's directory. Tensors in f16 or bf16 are converted to f32.
///
/// # Errors
/// If a file is missing or malformed, or the adapter needs a feature that is not supported.
pub fn read(directory: &Path) -> Result<AdapterFiles, Error> {
    let config = LoraConfig::from_json(&directory.join(CONFIG_NAME), read_config(directory)?)?;
    let Loaded { value: config, unknown_fields } = config;
    Ok(AdapterFiles { config, tensors: read_tensors(directory)?, unknown_fields })
}

/// Reads an adapter directory's `adapter_config.json`.
///
/// # Errors
/// If the file is missing or is not JSON.
pub fn read_config(directory: &Path) -> Result<Value, Error> {
    let path = directory.join(CONFIG_NAME);
    let text = fs::read(&path).map_err(|e| Error::io(&path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::format(&path, "content", "JSON", e))
}

/// Reads an adapter directory's tensors, by key; those in f16 or bf16 are converted to f32.
///
/// # Errors
/// If the file is missing or malformed.
pub fn read_tensors(directory: &Path) -> Result<BTreeMap<String, TensorData>, Error> {
    let (path, old) = (directory.join(SAFETENSORS_WEIGHTS_NAME), directory.join(WEIGHTS_NAME));
    if !path.exists() && old.exists() {
        let expected = "adapter_model.safetensors, to which PEFT converts it: \
            PeftModel.from_pretrained(model, directory).save_pretrained(directory)";
        return Err(Error::format(&old, "content", expected, "a PyTorch pickle"));
    }
    read_file(&path)
}

/// Reads the tensors of a safetensors file in f32, like [`read_tensors`].
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

/// Writes an adapter directory. Each file is replaced atomically; the configuration comes last.
///
/// # Errors
/// If the directory or a file cannot be written.
pub fn write(
    directory: &Path,
    config: &Value,
    tensors: impl IntoIterator<Item = (String, TensorData)>,
) -> Result<(), Error> {
    fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
    let tensors: Vec<(String, TensorData)> = tensors.into_iter().collect();
    let mut views = Vec::with_capacity(tensors.len());
    for (name, data) in &tensors {
        assert_eq!(data.dtype, DType::F32, "{name}: adapters are f32");
        let view = TensorView::new(Dtype::F32, data.shape.to_vec(), data.as_bytes())
            .map_err(|e| Error::format(directory, name, "a tensor", e))?;
        views.push((name.clone(), view));
    }
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    let bytes = safetensors::serialize(views, metadata)
        .map_err(|e| Error::format(directory, SAFETENSORS_WEIGHTS_NAME, "tensors", e))?;
    atomic_write(&directory.join(SAFETENSORS_WEIGHTS_NAME), &bytes)?;
    let json = serde_json::to_string_pretty(config)
        .map_err(|e| Error::format(directory, CONFIG_NAME, "serialisable values", e))?;
    atomic_write(&directory.join(CONFIG_NAME), json.as_bytes())
}

/// Replaces a file atomically, by writing a temporary file and renaming it: a reader sees the old file or the new one.
fn atomic_write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    let beside = Path::new(&beside);
    let result = fs::write(beside, bytes).and_then(|()| fs::rename(beside, path));
    result.map_err(|e| {
        // Remove the partial file; report the first error, not one of the removal.
        let _ = fs::remove_file(beside);
        Error::io(path, e)
    })
}
