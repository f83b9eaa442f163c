//! Saving a model as a Hugging Face directory that `transformers` can load.

use super::{
    atomic_write,
    parameters::{Parameter, parameters},
};
use crate::{Error, Llama, kernel::Kernels};
use burn::tensor::{DType, backend::Backend};
use safetensors::{Dtype, View};
use serde_json::json;
use std::{borrow::Cow, collections::HashMap, fs, path::Path};

/// Writes `config.json` and `model.safetensors` (f32) into `directory`. Adapters are not included: merge them first.
/// Each file is written under a temporary name, then renamed; tensors leave the device one at a time.
///
/// # Errors
/// If the directory or a file cannot be written.
pub fn save<B: Kernels>(model: &Llama<B>, directory: &Path) -> Result<(), Error> {
    save_as(model, DType::F32, directory)
}

/// Writes the same files as [`save`], with every tensor stored as `dtype`: f32, f16 or bf16.
///
/// # Errors
/// If the directory or a file cannot be written, `dtype` is another type, or the model's weights are packed.
pub fn save_as<B: Kernels>(model: &Llama<B>, dtype: DType, directory: &Path) -> Result<(), Error> {
    super::parameters::require_dense(model)?;
    let (stored, name) = match dtype {
        DType::F32 => (Dtype::F32, "float32"),
        DType::F16 => (Dtype::F16, "float16"),
        DType::BF16 => (Dtype::BF16, "bfloat16"),
        other => return Err(Error::config("dtype", "f32, f16 or bf16", format!("{other:?}"))),
    };
    fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
    let tensors = parameters(model).into_iter().map(|parameter| {
        let path = parameter.path.clone();
        (path, LazyParameter { parameter, dtype, file_dtype: stored })
    });
    let path = directory.join("model.safetensors");
    let part = directory.join("model.safetensors.part");
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    if let Err(error) = safetensors::serialize_to_file(tensors, metadata, &part) {
        // The incomplete file is removed; the first error is the one to report.
        let _ = fs::remove_file(&part);
        return Err(Error::io(&path, std::io::Error::other(error)));
    }
    fs::rename(&part, &path).map_err(|e| Error::io(&path, e))?;
    let mut config = model.config.to_json();
    (config["dtype"], config["torch_dtype"]) = (json!(name), json!(name));
    atomic_write(&directory.join("config.json"), format!("{config:#}\n").as_bytes())
}

/// A parameter whose values are fetched from the device only when the file is written.
struct LazyParameter<B: Backend> {
    parameter: Parameter<B>,
    dtype: DType,
    file_dtype: Dtype,
}

impl<B: Backend> View for LazyParameter<B> {
    fn dtype(&self) -> Dtype {
        self.file_dtype
    }

    fn shape(&self) -> &[usize] {
        &self.parameter.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.parameter.data(self.dtype).as_bytes().to_vec())
    }

    fn data_len(&self) -> usize {
        self.parameter.shape.iter().product::<usize>() * self.dtype.size()
    }
}
