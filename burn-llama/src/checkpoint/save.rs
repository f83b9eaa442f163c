//! A model as a Hugging Face directory that `transformers` loads.

use crate::{Error, Llama, kernel::Kernels};
use burn::{
    module::{Module, ModuleVisitor, Param},
    tensor::{DType, Tensor, backend::Backend},
};
use safetensors::{Dtype, View};
use std::{borrow::Cow, collections::HashMap, fs, path::Path};

/// Writes `config.json` and `model.safetensors` (f32) into `directory`. Adapters are not part of it: merge them first.
/// Files are written beside their places, then renamed; tensors leave the device one at a time.
///
/// # Errors
/// If the directory or a file cannot be written.
pub fn save<B: Kernels>(model: &Llama<B>, directory: &Path) -> Result<(), Error> {
    fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
    let mut collect = Collect { path: Vec::new(), tensors: Vec::new() };
    model.visit(&mut collect);
    let path = directory.join("model.safetensors");
    let beside = directory.join("model.safetensors.part");
    let metadata = Some(HashMap::from([("format".to_owned(), "pt".to_owned())]));
    let written = safetensors::serialize_to_file(collect.tensors, metadata, &beside);
    if let Err(error) = written {
        // What was half-written goes; the error that matters is the first one.
        let _ = fs::remove_file(&beside);
        return Err(Error::io(&path, std::io::Error::other(error)));
    }
    fs::rename(&beside, &path).map_err(|e| Error::io(&path, e))?;
    replace(&directory.join("config.json"), format!("{:#}\n", model.config.to_json()).as_bytes())
}

/// Writes beside `path`, then renames, so that a reader sees the old file or the new one.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".part");
    let beside = Path::new(&beside);
    fs::write(beside, bytes).and_then(|()| fs::rename(beside, path)).map_err(|e| {
        // What was half-written goes; the error that matters is the first one.
        let _ = fs::remove_file(beside);
        Error::io(path, e)
    })
}

/// The base model's parameters by path.
struct Collect<B: Backend> {
    path: Vec<String>,
    tensors: Vec<(String, Stored<B>)>,
}

/// A parameter that is fetched from its device when it is written.
struct Stored<B: Backend> {
    shape: Vec<usize>,
    values: Tensor<B, 1>,
}

impl<B: Backend> View for Stored<B> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(self.values.clone().into_data().convert_dtype(DType::F32).as_bytes().to_vec())
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * 4
    }
}

impl<B: Backend> ModuleVisitor<B> for Collect<B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        let path = self.path.join(".");
        if burn_peft::adapter::is_adapter(&path) {
            return;
        }
        let value = param.val();
        let (shape, size) = (value.dims().to_vec(), value.shape().num_elements());
        self.tensors.push((path, Stored { shape, values: value.reshape([size]) }));
    }
}
