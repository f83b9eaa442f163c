//! Comparison of saved adapter directories with those of PEFT.

use crate::{floats, max_diff};
use burn_peft::format::read_tensors;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Returns the directory for the adapters that tests/fixtures/check_peft.py loads into PEFT, or `otherwise`.
pub fn saved_adapters(otherwise: &Path) -> PathBuf {
    std::env::var_os("SAVED_ADAPTERS").map_or(otherwise.to_owned(), PathBuf::from)
}

/// Returns the fields of a directory's `adapter_config.json` without PEFT's version.
pub fn fields(directory: &Path) -> Value {
    let text = std::fs::read(directory.join("adapter_config.json")).unwrap();
    let mut fields: Value = serde_json::from_slice(&text).unwrap();
    let all = fields.as_object_mut().unwrap();
    all.remove("peft_version");
    // PEFT may write the same number as 6 or as 6.0.
    all.values_mut().filter(|value| value.is_f64()).for_each(|value| *value = value.as_f64().into());
    fields
}

/// Asserts that two adapter directories agree in fields, keys, shapes and types, and in values to within `tolerance`.
pub fn same_files(ours: &Path, theirs: &Path, tolerance: f32, name: &str) {
    assert_eq!(fields(ours), fields(theirs), "{name}");
    let read = |path: &Path| std::fs::read(path.join("adapter_model.safetensors")).unwrap();
    let (our_bytes, their_bytes) = (read(ours), read(theirs));
    let layout = |bytes: &[u8]| {
        let file = safetensors::SafeTensors::deserialize(bytes).unwrap();
        let tensors = file.tensors().into_iter();
        let mut all: Vec<_> = tensors.map(|(key, view)| (key, view.dtype(), view.shape().to_vec())).collect();
        all.sort_by(|(a, ..), (b, ..)| a.cmp(b));
        all
    };
    assert_eq!(layout(&our_bytes), layout(&their_bytes), "{name}");
    let (ours, theirs) = (read_tensors(ours).unwrap(), read_tensors(theirs).unwrap());
    for (key, theirs) in theirs {
        assert!(max_diff(&floats(&ours[&key]), &floats(&theirs)) <= tolerance, "{name}: {key}");
    }
}
