//! Checkpoints: Hugging Face directories and GGUF files, read one tensor at a time into the model.

mod beside;
pub(crate) mod build;
pub mod gguf;
mod pages;
mod parameters;
pub mod safetensors;
mod save;
mod storage;

pub(crate) use beside::{beside, replace};
pub use save::{save, save_as};
pub use storage::Storage;

use crate::{Error, Llama, LlamaConfig, Mismatch, kernel::Kernels};
use burn::tensor::{DType, TensorData};
use gguf::Gguf;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// A checkpoint that is open: its tensors are mapped, not read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: LlamaConfig,
    source: Source,
}

#[derive(Debug)]
enum Source {
    HuggingFace(safetensors::Shards),
    Gguf(Box<Gguf>),
}

impl Checkpoint {
    /// Opens a Hugging Face directory (`config.json` beside `model.safetensors` or its shards) or a `.gguf` file.
    ///
    /// # Errors
    /// If a file is missing or malformed, or the model is not supported.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let (config, source) = if path.is_dir() {
            let config = LlamaConfig::load(&path.join("config.json"))?;
            (config, Source::HuggingFace(safetensors::Shards::open(path)?))
        } else {
            let gguf = Gguf::open(path)?;
            let config = LlamaConfig::from_json(gguf.config_json()?).map_err(|error| error.in_file(path))?;
            (config, Source::Gguf(Box::new(gguf)))
        };
        Ok(Self { path: path.to_owned(), config, source })
    }

    /// The model's sizes and variants.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The GGUF file, if it is one.
    pub fn gguf(&self) -> Option<&Gguf> {
        match &self.source {
            Source::Gguf(gguf) => Some(gguf),
            Source::HuggingFace(_) => None,
        }
    }

    /// Names (Hugging Face's) and shapes of all tensors.
    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        match &self.source {
            Source::HuggingFace(shards) => shards.shapes(),
            Source::Gguf(gguf) => gguf
                .tensors()
                .filter(|entry| entry.name != "rope_freqs.weight")
                .map(|entry| {
                    let name = gguf::hugging_face_key(&entry.name).unwrap_or_else(|| entry.name.clone());
                    (name, entry.shape.clone())
                })
                .collect(),
        }
    }

    /// What a GGUF file says of a tensor.
    fn entry<'a>(&self, gguf: &'a Gguf, name: &str) -> Result<&'a gguf::TensorEntry, Error> {
        let entry = gguf::gguf_name(name).and_then(|name| gguf.tensor(&name));
        entry.ok_or_else(|| gguf.error(name, "a tensor of this name", "none"))
    }

    /// One tensor in the given float type.
    fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        match &self.source {
            Source::HuggingFace(shards) => shards.read(name, dtype),
            Source::Gguf(gguf) => {
                let entry = self.entry(gguf, name)?;
                let data = TensorData::new(gguf.read(entry)?, entry.shape.clone());
                Ok(if dtype == DType::F32 { data } else { data.convert_dtype(dtype) })
            }
        }
    }

    /// The weight `[out, in]` of the linear layer at `path`, such as `model.layers.0.mlp.up_proj`, in f32: what a model that is
    /// stored as NF4 was before.
    ///
    /// # Errors
    /// If there is none, or it cannot be read.
    pub fn weight(&self, path: &str) -> Result<TensorData, Error> {
        self.read(&format!("{path}.weight"), DType::F32)
    }

    /// The model on `device`, with matrices stored as asked (a float type will do) and norms and biases in f32.
    ///
    /// # Errors
    /// If tensors are missing, not the model's, or of another shape: all of them in one error; or if they cannot be stored so.
    pub fn load<B: Kernels>(&self, storage: impl Into<Storage>, device: &B::Device) -> Result<Llama<B>, Error> {
        let storage = storage.into();
        self.check(storage)?;
        let mismatch = self.mismatch();
        if !mismatch.is_empty() {
            return Err(Error::Tensors { path: self.path.clone(), mismatch });
        }
        build::build(
            &self.config,
            &|name: &str| {
                // Vectors are norms and biases: small, and sensitive.
                let matrix =
                    name.ends_with("_proj.weight") || name.contains("embed_tokens") || name.starts_with("lm_head");
                if matrix { self.stored(name, storage) } else { self.read(name, DType::F32).map(build::Values::Floats) }
            },
            device,
        )
    }

    fn mismatch(&self) -> Mismatch {
        let (mut found, mut mismatch) = (self.shapes(), Mismatch::default());
        for (name, expected) in build::shapes(&self.config) {
            match found.remove(&name) {
                None => mismatch.missing.push(name),
                Some(shape) if shape == expected => {}
                Some(shape) => mismatch.misshapen.push((name, format!("{expected:?}"), format!("{shape:?}"))),
            }
        }
        // A tied head may be stored again, and old files keep rotary tables; both change nothing.
        let harmless = |name: &String| {
            (self.config.tie_word_embeddings && name == "lm_head.weight") || name.ends_with("rotary_emb.inv_freq")
        };
        mismatch.extra = found.into_keys().filter(|name| !harmless(name)).collect();
        mismatch
    }
}
