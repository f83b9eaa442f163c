//! Writer of a GGUF file from metadata and tensors; the values of a tensor are produced only when it is written.

use super::{
    super::{BlockType, MetadataValue, permutation::original_row, value_type::ALIGNMENT},
    encode,
};
use crate::{Error, checkpoint::atomic_write_with};
use std::{io::Write, path::Path};

/// Metadata entries in the order in which they are written.
pub type Metadata = Vec<(String, MetadataValue)>;

/// A tensor to write.
pub(super) struct PlannedTensor<'a> {
    /// The GGUF name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// The storage format in the file.
    pub kind: BlockType,
    /// The head dimension by which the rows are permuted in the file; `None` if they are not.
    pub head_dim: Option<usize>,
    /// Produces the values in row-major order, with rows in the order of the Hugging Face checkpoint.
    pub values: Box<dyn Fn() -> Vec<f32> + 'a>,
}

impl PlannedTensor<'_> {
    /// Returns the size of the tensor in the file.
    fn num_bytes(&self) -> usize {
        self.shape.iter().product::<usize>() / self.kind.block_len() * self.kind.block_bytes()
    }

    /// Writes the tensor's data row by row, in the order of the file.
    fn write(&self, path: &Path, out: &mut impl Write) -> Result<(), Error> {
        let values = (self.values)();
        assert_eq!(values.len(), self.shape.iter().product::<usize>(), "{}: {:?}", self.name, self.shape);
        // A bias is one row, but the permutation moves its single elements.
        let bias = self.head_dim.is_some() && self.shape.len() == 1;
        let row = if bias { 1 } else { self.shape.last().copied().unwrap_or(1) };
        let mut bytes = Vec::new();
        for stored in 0..values.len() / row.max(1) {
            let index = self.head_dim.map_or(stored, |head_dim| original_row(stored, head_dim));
            bytes.clear();
            self.kind.quantize(&values[index * row..][..row], &mut bytes).map_err(|found| {
                let expected = format!("finite values that fit {:?} (f32 has the widest range)", self.kind);
                Error::format(path, self.name.as_str(), expected, found.to_string())
            })?;
            out.write_all(&bytes).map_err(|e| Error::io(path, e))?;
        }
        Ok(())
    }
}

/// Writes the file under a temporary name next to `path`, then renames it.
pub(super) fn write(
    path: &Path,
    metadata: &[(String, MetadataValue)],
    tensors: &[PlannedTensor<'_>],
) -> Result<(), Error> {
    atomic_write_with(path, |out| {
        let head = encode_header(metadata, tensors);
        out.write_all(&head).map_err(|e| Error::io(path, e))?;
        for tensor in tensors {
            tensor.write(path, out)?;
            let bytes = tensor.num_bytes();
            let padding = vec![0; bytes.next_multiple_of(ALIGNMENT) - bytes];
            out.write_all(&padding).map_err(|e| Error::io(path, e))?;
        }
        Ok(())
    })
}

/// Encodes everything before the tensor data: counts, metadata, the tensor table, padding.
fn encode_header(metadata: &[(String, MetadataValue)], tensors: &[PlannedTensor<'_>]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64 + 1).to_le_bytes());
    let alignment = ("general.alignment".to_owned(), MetadataValue::Unsigned(ALIGNMENT as u64));
    for (key, value) in metadata.iter().chain([&alignment]) {
        encode::string(&mut out, key);
        encode::value(&mut out, value);
    }
    let mut offset = 0;
    for tensor in tensors {
        encode::string(&mut out, &tensor.name);
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&dim| out.extend((dim as u64).to_le_bytes()));
        out.extend(tensor.kind.ggml().to_le_bytes());
        out.extend((offset as u64).to_le_bytes());
        offset += tensor.num_bytes().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}
