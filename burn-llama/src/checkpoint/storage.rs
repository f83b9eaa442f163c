//! How a model's matrices are held in memory.

use super::{Checkpoint, Source, build::Values, gguf};
use crate::Error;
use burn::tensor::DType;
use burn_peft::packed::{Codec, nf4};

/// How the matrices of a model are stored: its projections, its embedding and its head. Vectors are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    /// As float parameters: f32, f16 or bf16.
    Dense(DType),
    /// As the GGUF file has them: blocks stay packed and frozen; what the file holds as floats keeps its type.
    Packed,
    /// Projections packed and frozen as NF4, made from whatever the file holds. The embedding and the head, which QLoRA leaves in 16
    /// bits, are the file's blocks, or Q8_0. A matrix whose rows are no whole blocks is bf16.
    Nf4,
}

impl From<DType> for Storage {
    fn from(dtype: DType) -> Self {
        Self::Dense(dtype)
    }
}

impl Checkpoint {
    /// Refuses a storage that the checkpoint cannot have.
    pub(super) fn check(&self, storage: Storage) -> Result<(), Error> {
        match (&self.source, storage) {
            (Source::HuggingFace(_), Storage::Packed) => {
                let found = "a Hugging Face directory, which has none (NF4 can be made of it)";
                Err(Error::format(&self.path, "weights", "a GGUF file, whose blocks can stay packed", found))
            }
            _ => Ok(()),
        }
    }

    /// One matrix.
    pub(super) fn stored(&self, name: &str, storage: Storage) -> Result<Values, Error> {
        match (storage, &self.source) {
            (Storage::Dense(dtype), _) => self.read(name, dtype).map(Values::Floats),
            (Storage::Packed, Source::Gguf(file)) => {
                let entry = self.entry(file, name)?;
                let dtype = match entry.kind {
                    gguf::BlockType::F32 => DType::F32,
                    gguf::BlockType::F16 => DType::F16,
                    gguf::BlockType::BF16 => DType::BF16,
                    kind => {
                        let (codec, bytes) = (Codec::Blocks(kind), file.rows(entry)?);
                        return Ok(Values::Rows { codec, features: entry.row_len(), bytes });
                    }
                };
                self.read(name, dtype).map(Values::Floats)
            }
            (Storage::Nf4, Source::Gguf(_)) if !name.ends_with("_proj.weight") => self.stored(name, Storage::Packed),
            (Storage::Packed | Storage::Nf4, _) => self.quantized(name),
        }
    }

    /// A projection as NF4, another matrix as Q8_0.
    fn quantized(&self, name: &str) -> Result<Values, Error> {
        let data = self.read(name, DType::F32)?;
        let features = data.shape.last().copied().unwrap_or(0);
        let codec = if name.ends_with("_proj.weight") { Codec::Nf4 } else { gguf::BlockType::Q8_0.into() };
        if features == 0 || !features.is_multiple_of(codec.block_len()) {
            return Ok(Values::Floats(data.convert_dtype(DType::BF16)));
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
        Ok(Values::Rows { codec, features, bytes })
    }
}
