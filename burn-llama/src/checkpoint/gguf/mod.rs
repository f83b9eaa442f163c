//! GGUF files: memory-mapped, checked when opened, dequantized tensor by tensor.
//!
//! The format is described in ggml's `docs/gguf.md`. A file is not trusted: the lengths it states are compared with its
//! size, and invalid content gives an [`Error`] that names the key or the tensor.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use rayon::prelude::*;

use super::pages;
use crate::error::Error;
use permutation::{RowHeads, is_permuted, permuted_row};

mod adapter;
mod config;
mod header;
mod names;
mod permutation;
mod value_type;
pub mod write;

pub use adapter::adapter_to_peft;
pub use burn_peft_kernels::BlockType;
pub use header::{MetadataArray, MetadataValue, TensorEntry};
pub use names::{gguf_name, hugging_face_key};

/// An open GGUF file.
///
/// The file stays memory-mapped as long as this value lives. Truncating the file in the meantime crashes the process,
/// as with any memory map.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Mmap,
    metadata: HashMap<String, MetadataValue>,
    tensors: Vec<TensorEntry>,
    index: HashMap<String, usize>,
}

impl Gguf {
    /// Opens a little-endian GGUF file of version 2 or 3 and checks its header.
    ///
    /// # Errors
    ///
    /// [`Error::Io`] if it cannot be opened, [`Error::Format`] if it is truncated or malformed, or has a tensor of a
    /// type that is not in [`BlockType`].
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| Error::io(path, source))?;
        let size = file.metadata().map_err(|source| Error::io(path, source))?.len();
        if size < 24 {
            return Err(Error::format(path, "size", "a GGUF header of 24 bytes or more", format!("{size} bytes")));
        }
        // SAFETY: the map is read-only and the file is opened read-only. That nobody truncates it while it is mapped is
        // required of the caller in the documentation of `Gguf`.
        let map = unsafe { Mmap::map(&file) }.map_err(|source| Error::io(path, source))?;
        let header::Header { metadata, tensors } = header::Header::parse(path, &map)?;
        let mut index = HashMap::new();
        for (position, entry) in tensors.iter().enumerate() {
            if index.insert(entry.name.clone(), position).is_some() {
                return Err(Error::format(path, entry.name.as_str(), "each tensor once", "a second time"));
            }
        }
        Ok(Self { path: path.to_owned(), map, metadata, tensors, index })
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the metadata value of a key, for example `llama.block_count`.
    pub fn metadata(&self, key: &str) -> Option<&MetadataValue> {
        self.metadata.get(key)
    }

    /// Returns all metadata, sorted by key.
    pub fn all_metadata(&self) -> impl Iterator<Item = (&str, &MetadataValue)> {
        let mut all: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        all.sort_by_key(|(key, _)| *key);
        all.into_iter()
    }

    /// Returns the entries of all tensors, in the order of the file.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorEntry> {
        self.tensors.iter()
    }

    /// Returns the entry of the tensor with a GGUF name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.index.get(name).map(|position| &self.tensors[*position])
    }

    /// Returns the stored bytes of a tensor, with rows in the order of the file (for architecture `llama`, the query
    /// and key rows are still permuted).
    ///
    /// # Errors
    ///
    /// [`Error::Format`] if there is no such tensor.
    pub fn raw(&self, name: &str) -> Result<&[u8], Error> {
        let entry = self.tensor(name).ok_or_else(|| self.error(name, "a tensor of this name", "none"))?;
        self.bytes(entry)
    }

    /// Reads and dequantizes a tensor: its values in row-major order, with rows in the order of the Hugging Face
    /// checkpoint.
    ///
    /// Files of architecture `llama` interleave the two halves of each query and key head (llama.cpp applies RoPE to
    /// adjacent pairs); this method undoes that permutation. Other architectures are not permuted.
    ///
    /// # Errors
    ///
    /// [`Error::Format`] if the entry belongs to another file, or the head count does not divide the rows.
    pub fn read(&self, entry: &TensorEntry) -> Result<Vec<f32>, Error> {
        let bytes = self.bytes(entry)?;
        let rotated = self.permuted_head_dim(entry)?;
        // A bias is one row in the file, but the permutation moves its single elements.
        let row = if rotated.is_some() && entry.shape.len() == 1 { 1 } else { entry.row_len() };
        if !row.is_multiple_of(entry.kind.block_len()) {
            return Err(self.error(&entry.name, "a bias that is not packed", &format!("{:?}", entry.kind)));
        }
        let mut values = vec![0.0; entry.num_elements()];
        if values.is_empty() {
            return Ok(values);
        }
        let row_bytes = row / entry.kind.block_len() * entry.kind.block_bytes();
        values.par_chunks_mut(row).enumerate().for_each(|(index, out)| {
            let stored = rotated.map_or(index, |head_dim| permuted_row(index, head_dim));
            entry.kind.dequantize(&bytes[stored * row_bytes..][..row_bytes], out);
        });
        pages::release(&self.map, entry.offset, entry.num_bytes());
        Ok(values)
    }

    /// Returns the stored bytes of the tensor's rows, back to back, in the order of the Hugging Face checkpoint.
    ///
    /// # Errors
    ///
    /// The same as those of [`Gguf::read`].
    pub fn rows(&self, entry: &TensorEntry) -> Result<Vec<u8>, Error> {
        let bytes = self.bytes(entry)?;
        let mut rows = Vec::with_capacity(bytes.len());
        match self.permuted_head_dim(entry)? {
            None => rows.extend_from_slice(bytes),
            Some(head_dim) => {
                let row = entry.row_len() / entry.kind.block_len() * entry.kind.block_bytes();
                let stored = (0..bytes.len() / row.max(1)).map(|index| permuted_row(index, head_dim) * row);
                stored.for_each(|from| rows.extend_from_slice(&bytes[from..from + row]));
            }
        }
        pages::release(&self.map, entry.offset, entry.num_bytes());
        Ok(rows)
    }

    /// Returns the stored bytes of an entry. The caller may have built the entry by hand, so it is compared with the
    /// file's own.
    fn bytes(&self, entry: &TensorEntry) -> Result<&[u8], Error> {
        match self.tensor(&entry.name) {
            Some(own) if own == entry => Ok(&self.map[own.offset..][..own.num_bytes()]),
            _ => Err(self.error(&entry.name, "an entry of this file", "another")),
        }
    }

    /// Returns the head dimension by which the rows of this tensor are permuted, or `None` if they are not.
    fn permuted_head_dim(&self, entry: &TensorEntry) -> Result<Option<usize>, Error> {
        let permuted = self.text("general.architecture")?.is_some_and(is_permuted);
        let Some(row_heads) = RowHeads::from_name(&entry.name).filter(|_| permuted) else { return Ok(None) };
        let all = self.integer("llama.attention.head_count")?;
        let heads = match row_heads {
            RowHeads::Query => all,
            RowHeads::Key => self.integer("llama.attention.head_count_kv")?.or(all),
        };
        let rows = entry.shape.first().copied().unwrap_or(1);
        match heads {
            Some(heads) if heads > 0 && rows.is_multiple_of(heads.saturating_mul(2)) => Ok(Some(rows / heads)),
            _ => {
                let expected = format!("a head count by which {rows} rows divide into pairs");
                Err(self.error(&entry.name, &expected, &format!("{heads:?}")))
            }
        }
    }

    /// Returns a metadata integer; an error if the key holds another type.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<usize>, Error> {
        self.typed(key, "a non-negative integer", |value| value.as_u64().and_then(|value| usize::try_from(value).ok()))
    }

    /// Returns a metadata string; an error if the key holds another type.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "text", MetadataValue::as_str)
    }

    /// Returns a metadata value converted by `as_type`; an error if the key holds another type.
    pub(crate) fn typed<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        as_type: impl Fn(&'a MetadataValue) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.metadata(key) else { return Ok(None) };
        match as_type(value) {
            Some(typed) => Ok(Some(typed)),
            None => Err(self.error(key, expected, &value.describe())),
        }
    }

    /// Builds an error about a key or tensor of this file.
    pub(crate) fn error(&self, key: &str, expected: &str, found: &str) -> Error {
        Error::format(&self.path, key, expected, found)
    }
}
