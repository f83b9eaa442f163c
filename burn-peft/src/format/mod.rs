//! PEFT's adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

mod adalora;
mod names;
pub mod pytorch;

pub(crate) use names::PREFIX;
pub use names::align_names;

use crate::{Error, Loaded, LoraConfig};
use burn::tensor::{DType, TensorData};
use pytorch::PytorchFile;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, btree_map::Entry},
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

/// Gives the tensors the known names from which theirs differ only at their start, all in the same way.
pub(crate) fn align_tensors(
    tensors: BTreeMap<String, TensorData>,
    known: impl Iterator<Item = String>,
) -> BTreeMap<String, TensorData> {
    let mut aligned = names::align_names(tensors.keys(), &known.collect());
    tensors.into_iter().map(|(name, data)| (aligned.remove(&name).unwrap_or(name), data)).collect()
}

/// Checks that `tensors` are exactly the expected ones, by key and shape.
pub(crate) fn check_tensors(
    directory: &Path,
    expected: &[(String, Vec<usize>)],
    tensors: &BTreeMap<String, TensorData>,
) -> Result<(), Error> {
    let (mut missing, mut shapes) = (Vec::new(), Vec::new());
    for (key, shape) in expected {
        match tensors.get(key) {
            Some(tensor) if tensor.shape.as_slice() == shape => {}
            Some(tensor) => shapes.push(format!("{key}: expected {shape:?}, found {:?}", tensor.shape.as_slice())),
            None => missing.push(key.clone()),
        }
    }
    let known: BTreeSet<&String> = expected.iter().map(|(key, _)| key).collect();
    let unexpected: Vec<String> = tensors.keys().filter(|key| !known.contains(key)).cloned().collect();
    missing.sort();
    let mut problems = names::describe_differences(&missing, &unexpected);
    if !shapes.is_empty() {
        problems.push(format!("{} tensors have another shape: {}", shapes.len(), names::examples(&shapes)));
    }
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

/// Reads the directory of a LoRA adapter, or of an AdaLoRA adapter, which becomes plain LoRA with the factors of its
/// ranks in `A`. Tensors in f16 or bf16 are converted to f32.
///
/// # Errors
/// If a file is missing or malformed, or the adapter needs a feature that is not supported.
pub fn read(directory: &Path) -> Result<AdapterFiles, Error> {
    let json = read_config(directory)?;
    let is_adalora = json["peft_type"] == "ADALORA";
    let Loaded { value: mut config, unknown_fields } = LoraConfig::from_json(&directory.join(CONFIG_NAME), json)?;
    let mut tensors = read_tensors(directory)?;
    if is_adalora {
        tensors = adalora::fold(directory, &mut config, tensors)?;
    }
    Ok(AdapterFiles { config, tensors, unknown_fields })
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

/// Reads an adapter directory's tensors in f32, by PEFT's names: segments that `torch.compile` or FSDP inserted and the
/// adapter's name are left out, and the prefix `base_model.model.` stands exactly once.
///
/// # Errors
/// If the file is missing or malformed, or contains one tensor twice.
pub fn read_tensors(directory: &Path) -> Result<BTreeMap<String, TensorData>, Error> {
    let (mut path, old) = (directory.join(SAFETENSORS_WEIGHTS_NAME), directory.join(WEIGHTS_NAME));
    if !path.exists() && old.exists() {
        path = old;
    }
    let mut tensors = BTreeMap::new();
    for (name, data) in read_file(&path)? {
        let key = names::peft_name(&name);
        match tensors.entry(key) {
            Entry::Vacant(entry) => drop(entry.insert(data)),
            // PEFT writes a resized embedding twice if `modules_to_save` names it.
            Entry::Occupied(entry) if *entry.get() == data => {}
            Entry::Occupied(entry) => {
                let expected = "one adapter, whose tensors stand in the file once";
                return Err(Error::format(&path, entry.key(), expected, format!("several, one of which is {name}")));
            }
        }
    }
    Ok(tensors)
}

/// Reads the tensors of a safetensors file, or of a `.bin` file of PyTorch, in f32.
///
/// # Errors
/// If the file is missing or malformed.
pub fn read_file(path: &Path) -> Result<BTreeMap<String, TensorData>, Error> {
    if path.extension().is_some_and(|extension| extension == "bin") {
        let file = PytorchFile::open(path)?;
        return file.shapes().map(|(name, _)| Ok((name.clone(), file.read(name, DType::F32)?))).collect();
    }
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
    write_tensors(&directory.join(SAFETENSORS_WEIGHTS_NAME), tensors)?;
    let json = serde_json::to_string_pretty(config)
        .map_err(|e| Error::format(directory, CONFIG_NAME, "serialisable values", e))?;
    atomic_write(&directory.join(CONFIG_NAME), json.as_bytes())
}

/// Writes tensors in f32 into a safetensors file, which is replaced atomically.
///
/// # Errors
/// If the file cannot be written.
///
/// # Panics
/// Panics if a tensor is not in f32.
pub fn write_tensors(path: &Path, tensors: impl IntoIterator<Item = (String, TensorData)>) -> Result<(), Error> {
    let tensors: Vec<(String, TensorData)> = tensors.into_iter().collect();
    let mut views = Vec::with_capacity(tensors.len());
    for (name, data) in &tensors {
        assert_eq!(data.dtype, DType::F32, "{name}: adapters are f32");
        let view = TensorView::new(Dtype::F32, data.shape.to_vec(), data.as_bytes())
            .map_err(|e| Error::format(path, name, "a tensor", e))?;
        views.push((name.clone(), view));
    }
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    let bytes = safetensors::serialize(views, metadata).map_err(|e| Error::format(path, "content", "tensors", e))?;
    atomic_write(path, &bytes)
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
