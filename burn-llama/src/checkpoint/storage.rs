//! Storage formats of a model's matrices in memory.

use super::{Checkpoint, TensorFiles, gguf};
use crate::{Error, model::build::LoadedTensor};
use burn::tensor::{DType, TensorData};
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

    /// Returns the format in which `storage` keeps a matrix with rows of `features` values.
    pub(super) fn matrix_format(&self, name: &str, features: usize, storage: Storage) -> Result<TensorFormat, Error> {
        let projection = name.ends_with("_proj.weight");
        match (storage, &self.files) {
            (Storage::Dense(dtype), _) => Ok(TensorFormat::Floats(dtype)),
            (Storage::Nf4, TensorFiles::Gguf(file)) if !projection => self.stored_format(file, name),
            (Storage::Packed, TensorFiles::Gguf(file)) => self.stored_format(file, name),
            (Storage::Packed | Storage::Nf4, _) => {
                let codec = if projection { Codec::Nf4 } else { gguf::BlockType::Q8_0.into() };
                let whole = features > 0 && features.is_multiple_of(codec.block_len());
                Ok(if whole { TensorFormat::Quantized(codec) } else { TensorFormat::Floats(DType::BF16) })
            }
        }
    }

    /// Returns the format of a matrix as it is stored in a GGUF file.
    fn stored_format(&self, file: &gguf::Gguf, name: &str) -> Result<TensorFormat, Error> {
        Ok(match self.entry(file, name)?.kind {
            gguf::BlockType::F32 => TensorFormat::Floats(DType::F32),
            gguf::BlockType::F16 => TensorFormat::Floats(DType::F16),
            gguf::BlockType::BF16 => TensorFormat::Floats(DType::BF16),
            kind => TensorFormat::Stored(Codec::Blocks(kind)),
        })
    }

    /// Reads one tensor in the given format.
    pub(super) fn read_as(&self, name: &str, format: TensorFormat) -> Result<LoadedTensor, Error> {
        match (format, &self.files) {
            (TensorFormat::Stored(codec), TensorFiles::Gguf(file)) => {
                let entry = self.entry(file, name)?;
                Ok(LoadedTensor::PackedRows { codec, features: entry.row_len(), bytes: file.rows(entry)? })
            }
            (TensorFormat::Floats(dtype), _) => self.read(name, dtype).map(LoadedTensor::Floats),
            (TensorFormat::Stored(codec) | TensorFormat::Quantized(codec), _) => self.read_quantized(name, codec),
        }
    }

    /// Reads a matrix and quantizes it.
    fn read_quantized(&self, name: &str, codec: Codec) -> Result<LoadedTensor, Error> {
        let data = self.read(name, DType::F32)?;
        let features = data.shape.last().copied().unwrap_or(0);
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

/// The format of a tensor in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TensorFormat {
    /// Floats, converted from what the file holds.
    Floats(DType),
    /// The blocks of the GGUF file.
    Stored(Codec),
    /// Blocks, quantized from what the file holds.
    Quantized(Codec),
}

impl TensorFormat {
    /// Returns the placeholder of a tensor of that shape: one element, or one packed row.
    pub(super) fn placeholder(self, shape: &[usize]) -> LoadedTensor {
        match self {
            Self::Floats(dtype) => {
                let zero = TensorData::zeros::<f32, _>(vec![1; shape.len()]);
                LoadedTensor::Floats(if dtype == DType::F32 { zero } else { zero.convert_dtype(dtype) })
            }
            Self::Stored(codec) | Self::Quantized(codec) => {
                let features = shape.last().copied().unwrap_or(0);
                LoadedTensor::PackedRows { codec, features, bytes: vec![0; codec.row_bytes(features)] }
            }
        }
    }
}
