//! Checkpoints: Hugging Face directories and GGUF files, read one tensor at a time into the model.

mod atomic_write;
pub mod gguf;
mod pages;
mod parameters;
mod redundant;
mod save;
mod shards;
mod storage;

pub(crate) use atomic_write::{atomic_write, atomic_write_with};
pub use save::{save, save_as};
pub use storage::Storage;
use storage::TensorFormat;

use crate::{Error, HeldSegments, Llama, LlamaConfig, MismatchedTensor, TensorMismatch, kernel::Kernels, model::build};
use burn::tensor::{DType, TensorData};
use gguf::Gguf;
use std::{
    collections::{BTreeMap, HashMap},
    path::{Path, PathBuf},
};

/// An open checkpoint: its files are memory-mapped; no tensor is read yet.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: LlamaConfig,
    files: TensorFiles,
}

/// The mapped files that hold a checkpoint's tensors.
#[derive(Debug)]
enum TensorFiles {
    HuggingFace(shards::Shards),
    Gguf(Box<Gguf>),
}

impl Checkpoint {
    /// Opens a Hugging Face directory (`config.json` beside `model.safetensors` or its shards, or
    /// `pytorch_model.bin` or its shards) or a `.gguf` file. If the configuration ties the output head to the embedding,
    /// but the directory holds another head, the model is untied.
    ///
    /// # Errors
    /// If a file is missing or malformed, or the model is not supported.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (config, files) = if path.is_dir() {
            let config = LlamaConfig::load(&path.join("config.json"))?;
            let parameters = build::parameter_shapes(&config).into_iter().map(|(name, _)| name).collect();
            (config, TensorFiles::HuggingFace(shards::Shards::open(path, &parameters)?))
        } else {
            let gguf = Gguf::open(path)?;
            let config = LlamaConfig::from_json(gguf.config_json()?).map_err(|error| error.in_file(path))?;
            (config, TensorFiles::Gguf(Box::new(gguf)))
        };
        let mut checkpoint = Self { path: path.to_owned(), config, files };
        checkpoint.keep_own_head()?;
        Ok(checkpoint)
    }

    /// Returns the configuration of the checkpoint's model.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Returns the GGUF file if the checkpoint is one, `None` for a Hugging Face directory.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.files {
            TensorFiles::Gguf(gguf) => Some(gguf),
            TensorFiles::HuggingFace(_) => None,
        }
    }

    /// Returns the Hugging Face names and the shapes of all tensors.
    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        match &self.files {
            TensorFiles::HuggingFace(shards) => shards.shapes(),
            TensorFiles::Gguf(gguf) => gguf
                .tensors()
                .filter(|entry| entry.name != "rope_freqs.weight")
                .map(|entry| {
                    let name = gguf::hugging_face_key(&entry.name).unwrap_or_else(|| entry.name.clone());
                    (name, entry.shape.clone())
                })
                .collect(),
        }
    }

    /// Returns the entry in the GGUF tensor table for a Hugging Face name.
    fn entry<'a>(&self, gguf: &'a Gguf, name: &str) -> Result<&'a gguf::TensorEntry, Error> {
        let entry = gguf::gguf_name(name).and_then(|name| gguf.tensor(&name));
        entry.ok_or_else(|| gguf.error(name, "a tensor of this name", "none"))
    }

    /// Reads one tensor, converted to the float type `dtype`.
    fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        match &self.files {
            TensorFiles::HuggingFace(shards) => shards.read(name, dtype),
            TensorFiles::Gguf(gguf) => {
                let entry = self.entry(gguf, name)?;
                let data = TensorData::new(gguf.read(entry)?, entry.shape.clone());
                Ok(if dtype == DType::F32 { data } else { data.convert_dtype(dtype) })
            }
        }
    }

    /// Reads the weight `[out, in]` of the linear layer at `path` (such as `model.layers.0.mlp.up_proj`) as f32. For a
    /// model loaded as NF4 this is the weight before quantization.
    ///
    /// # Errors
    /// If there is no such weight, or it cannot be read.
    pub fn weight(&self, path: &str) -> Result<TensorData, Error> {
        self.read(&format!("{path}.weight"), DType::F32)
    }

    /// Loads the model onto `device`. Matrices are stored as `storage` says (a float [`DType`] converts to one); norms
    /// and biases are f32.
    ///
    /// # Errors
    /// If tensors are missing, unexpected or of the wrong shape (one error lists them all), or if the checkpoint cannot
    /// be loaded with this storage.
    pub fn load<B: Kernels>(&self, storage: impl Into<Storage>, device: &B::Device) -> Result<Llama<B>, Error> {
        self.load_segments(&HeldSegments::all(), storage, device)
    }

    /// Loads the parameters of some segments of the model as [`Checkpoint::load`] loads them all; no other tensor is
    /// read. The others are placeholders with the same paths, ids and trainability.
    ///
    /// # Errors
    /// As for [`Checkpoint::load`].
    pub fn load_segments<B: Kernels>(
        &self,
        held: &HeldSegments,
        storage: impl Into<Storage>,
        device: &B::Device,
    ) -> Result<Llama<B>, Error> {
        let storage = storage.into();
        self.check_storage(storage)?;
        let mismatch = self.mismatch()?;
        if !mismatch.is_empty() {
            return Err(Error::Tensors { path: self.path.clone(), mismatch });
        }
        let shapes: HashMap<String, Vec<usize>> = build::parameter_shapes(&self.config).into_iter().collect();
        let read = |name: &str| {
            let format = match shapes.get(name).map(Vec::as_slice) {
                Some(&[_, features]) => self.matrix_format(name, features, storage)?,
                // Norms and biases (all vectors) are small and sensitive to rounding, so they stay in f32.
                _ => TensorFormat::Floats(DType::F32),
            };
            match held.holds(&self.config, name) {
                true => self.read_as(name, format),
                false => Ok(format.placeholder(&shapes[name])),
            }
        };
        build::build(&self.config, held, &read, device)
    }

    /// Compares the checkpoint's tensors with the parameters that its configuration requires.
    fn mismatch(&self) -> Result<TensorMismatch, Error> {
        let (mut found, mut mismatch) = (self.shapes(), TensorMismatch::default());
        for (name, expected) in build::parameter_shapes(&self.config) {
            match found.remove(&name) {
                None => mismatch.missing.push(name),
                Some(shape) if shape == expected => {}
                Some(shape) => {
                    let [expected, found] = [expected, shape].map(|shape| format!("{shape:?}"));
                    mismatch.mismatched.push(MismatchedTensor { name, expected, found });
                }
            }
        }
        if self.config.tie_word_embeddings {
            // It equals the embedding; another one would have untied the model.
            found.remove("lm_head.weight");
        }
        for name in found.into_keys() {
            match redundant::is_rotary_table(&name) {
                true => self.check_rotary_table(name, &mut mismatch)?,
                false => mismatch.unexpected.push(name),
            }
        }
        Ok(mismatch)
    }
}
