//! Shared by the integration tests: fixtures, comparisons, and a lock for backward passes.

pub mod files;
pub mod reference;

use burn::tensor::TensorData;
use safetensors::{Dtype, SafeTensors};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Mutex, MutexGuard},
};

/// Takes the lock that serializes backward passes: concurrent ones in one process can lose gradients in Burn 0.21.
pub fn one_backward_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// Returns the path of a fixture.
pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// Reads the f32 and i64 tensors of a safetensors fixture.
pub fn tensors(name: &str) -> BTreeMap<String, TensorData> {
    let bytes = std::fs::read(fixture(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let read = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let (bytes, shape) = (view.data(), view.shape().to_vec());
        let data = match view.dtype() {
            Dtype::F32 => {
                let values = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
                TensorData::new(values.collect::<Vec<_>>(), shape)
            }
            Dtype::F64 => {
                let values = bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()));
                TensorData::new(values.collect::<Vec<_>>(), shape)
            }
            Dtype::I64 => {
                let values = bytes.chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
                TensorData::new(values.collect::<Vec<_>>(), shape)
            }
            other => panic!("{name}: {other:?}"),
        };
        (name, data)
    };
    file.tensors().into_iter().map(read).collect()
}

/// Returns the values as f32.
pub fn floats(data: &TensorData) -> Vec<f32> {
    data.clone().convert::<f32>().into_vec().unwrap()
}

/// Returns the values as i64.
pub fn integers(data: &TensorData) -> Vec<i64> {
    data.clone().convert::<i64>().into_vec().unwrap()
}

/// Returns the largest absolute value.
pub fn max_abs(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, x| max.max(x.abs()))
}

/// Returns the largest absolute difference; NaN counts as infinite.
pub fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |max, (a, b)| if (a - b).is_nan() { f32::INFINITY } else { max.max((a - b).abs()) })
}

/// The program in the README is compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
