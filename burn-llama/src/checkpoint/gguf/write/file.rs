//! A GGUF file from its metadata and its tensors, each asked for when its turn comes.

use super::{
    super::{BlockType, Value, deinterleaved},
    encode,
};
use crate::{Error, checkpoint::beside};
use std::{io::Write, path::Path};

/// Metadata in the order in which it is written.
pub type Metadata = Vec<(String, Value)>;

/// Where tensor data starts, and each tensor in it, in bytes.
const ALIGNMENT: usize = 32;

/// A tensor to be written.
pub(super) struct Planned<'a> {
    /// The GGUF name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// How it is stored.
    pub kind: BlockType,
    /// The size of the heads whose rows the file keeps in pairs.
    pub head_dim: Option<usize>,
    /// The values, row-major, rows in the order of the Hugging Face checkpoint.
    pub values: Box<dyn Fn() -> Vec<f32> + 'a>,
}

impl Planned<'_> {
    fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() / self.kind.block_len() * self.kind.block_bytes()
    }

    /// Writes the tensor's data, row by row in the file's order.
    fn write(&self, path: &Path, out: &mut impl Write) -> Result<(), Error> {
        let values = (self.values)();
        assert_eq!(values.len(), self.shape.iter().product::<usize>(), "{}: {:?}", self.name, self.shape);
        // The elements of a bias are what its heads' pairs are made of.
        let bias = self.head_dim.is_some() && self.shape.len() == 1;
        let row = if bias { 1 } else { self.shape.last().copied().unwrap_or(1) };
        let mut bytes = Vec::new();
        for stored in 0..values.len() / row.max(1) {
            let index = self.head_dim.map_or(stored, |head_dim| deinterleaved(stored, head_dim));
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

/// Writes the file beside `path`, then renames it.
pub(super) fn write(path: &Path, metadata: &[(String, Value)], tensors: &[Planned<'_>]) -> Result<(), Error> {
    beside(path, |out| {
        let head = head(metadata, tensors);
        out.write_all(&head).map_err(|e| Error::io(path, e))?;
        for tensor in tensors {
            tensor.write(path, out)?;
            let bytes = tensor.bytes();
            let padding = vec![0; bytes.next_multiple_of(ALIGNMENT) - bytes];
            out.write_all(&padding).map_err(|e| Error::io(path, e))?;
        }
        Ok(())
    })
}

/// Everything before the tensor data: counts, metadata, the table of tensors, padding.
fn head(metadata: &[(String, Value)], tensors: &[Planned<'_>]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64 + 1).to_le_bytes());
    let alignment = ("general.alignment".to_owned(), Value::Unsigned(ALIGNMENT as u64));
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
        offset += tensor.bytes().next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT), 0);
    out
}
