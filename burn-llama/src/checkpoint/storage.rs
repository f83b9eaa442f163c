//! Storage formats of a model's matrices in memory.

use super::{Checkpoint, TensorFiles, gguf};
use crate::{Error, model::build::LoadedTensor};
use burn::tensor::DType;
use burn_peft_kernels::{Codec, packed::nf4};

/// The storage format of a model's matrices: its projections, its embedding and its head. Vectors are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// Float parameters: f32, f16 or bf16.
    Dense(DType),
    /// As stored in the GGUF file: quantized blocks stay packed and frozen, float matrices keep their type.
    Packed,
    /// Projections quantized to NF4 from whatever the file holds, packed and frozen. The embedding and the head, which
    /// QLoRA leaves in 16 bits, keep the GGUF file's blocks, or become Q8_0 for a Hugging Face directory. A matrix
    /// whose row length is not a multiple of the block length is bf16.
    Nf4,
}

impl From<DType> for Storage {
    fn from(dtype: DType) -> Self {
        Self::Dense(dtype)
    }
}

impl Checkpoint {
    /// Returns an error if the checkpoint cannot be loaded with this storage.
    pub(super) fn check_storage(&self, storage: Storage) -> Result<(), Error> {
        match (&self.files, storage) {
            (TensorFiles::HuggingFace(_), Storage::Packed) => {
                let found = "a Hugging Face directory, which has no blocks (it can be loaded as nf4 instead)";
                Err(Error::format(&self.path, "weights", "a GGUF file, whose blocks can stay packed", found))
            }
            _ => Ok(()),
        }
    }

    /// Reads one matrix in the format that `storage` asks for.
    pub(super) fn read_matrix(&self, name: &str, storage: Storage) -> Result<LoadedTensor, Error> {
        match (storage, &self.files) {
            (Storage::Dense(dtype), _) => self.read(name, dtype).map(LoadedTensor::Floats),
            (Storage::Packed, TensorFiles::Gguf(file)) => {
                let entry = self.entry(file, name)?;
                let dtype = match entry.kind {
                    gguf::BlockType::F32 => DType::F32,
                    gguf::BlockType::F16 => DType::F16,
                    gguf::BlockType::BF16 => DType::BF16,
                    kind => {
                        let (codec, bytes) = (Codec::Blocks(kind), file.rows(entry)?);
                        return Ok(LoadedTensor::PackedRows { codec, features: entry.row_len(), bytes });
                    }
                };
                self.read(name, dtype).map(LoadedTensor::Floats)
            }
            (Storage::Nf4, TensorFiles::Gguf(_)) if !name.ends_with("_proj.weight") => {
                self.read_matrix(name, Storage::Packed)
            }
            (Storage::Packed | Storage::Nf4, _) => self.read_quantized(name),
        }
    }

    /// Reads a matrix and quantizes it: a projection to NF4, any other matrix to Q8_0.
    fn read_quantized(&self, name: &str) -> Result<LoadedTensor, Error> {
        let data = self.read(name, DType::F32)?;
        let features = data.shape.last().copied().unwrap_or(0);
        let codec = if name.ends_with("_proj.weight") { Codec::Nf4 } else { gguf::BlockType::Q8_0.into() };
        if features == 0 || !features.is_multiple_of(codec.block_len()) {
            return Ok(LoadedTensor::Floats(data.convert_dtype(DType::BF16)));
        }
        let values = data.as_slice::<f32>().map_err(|e| Error::config(name, "f32 values", format!("{e:?}")))?;
        let bytes = match codec {
            Codec::Nf4 => nf4::encode(values, features),
            Codec::Blocks(kind) => {
                let mut bytes = Vec::new();
                kind.quantize(values, &mut bytes).map(|()| bytes)
            }
        };
        let expected = format!("finite values that fit {codec}");
        let bytes = bytes.map_err(|found| Error::format(&self.path, name, expected, found.to_string()))?;
        Ok(LoadedTensor::PackedRows { codec, features, bytes })
    }
}
