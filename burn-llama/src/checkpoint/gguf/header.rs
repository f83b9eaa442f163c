//! Parser of the header of a GGUF file: metadata and tensor table, read from untrusted bytes.
//!
//! Every length is compared with the rest of the file before memory is allocated for it.

use std::collections::HashMap;
use std::path::Path;

use super::{BlockType, value_type as types};
use crate::error::Error;

/// One metadata value. Integer widths are widened to 64 bits and `f32` to `f64`, both without loss.
#[derive(Debug, Clone, PartialEq)]
pub enum MetadataValue {
    /// `u8`, `u16`, `u32` or `u64`.
    Unsigned(u64),
    /// `i8`, `i16`, `i32` or `i64`.
    Signed(i64),
    /// `f32` or `f64`.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// Several values of one type. Nested arrays do not occur in model files and are rejected.
    Array(MetadataArray),
}

/// The elements of an array value, widened like scalar values.
#[derive(Debug, Clone, PartialEq)]
pub enum MetadataArray {
    /// `u8`, `u16`, `u32` or `u64` elements.
    Unsigned(Vec<u64>),
    /// `i8`, `i16`, `i32` or `i64` elements.
    Signed(Vec<i64>),
    /// `f32` or `f64` elements.
    Float(Vec<f64>),
    /// Booleans.
    Bool(Vec<bool>),
    /// UTF-8 strings.
    String(Vec<String>),
}

impl MetadataValue {
    /// Returns the value as an unsigned integer, if it is a non-negative integer.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            Self::Unsigned(value) => Some(*value),
            Self::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Returns the value as a float, if it is one.
    pub fn as_f64(&self) -> Option<f64> {
        if let Self::Float(value) = self { Some(*value) } else { None }
    }

    /// Returns the value as a boolean, if it is one.
    pub fn as_bool(&self) -> Option<bool> {
        if let Self::Bool(value) = self { Some(*value) } else { None }
    }

    /// Returns the value as a string slice, if it is a string.
    pub fn as_str(&self) -> Option<&str> {
        if let Self::String(value) = self { Some(value) } else { None }
    }

    /// Describes the value for error messages: `unsigned 3`, `array of 12 strings`.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Unsigned(value) => format!("unsigned {value}"),
            Self::Signed(value) => format!("signed {value}"),
            Self::Float(value) => format!("float {value}"),
            Self::Bool(value) => format!("boolean {value}"),
            Self::String(value) => format!("text {:?}", value.chars().take(60).collect::<String>()),
            Self::Array(MetadataArray::Unsigned(values)) => format!("array of {} unsigned integers", values.len()),
            Self::Array(MetadataArray::Signed(values)) => format!("array of {} signed integers", values.len()),
            Self::Array(MetadataArray::Float(values)) => format!("array of {} floats", values.len()),
            Self::Array(MetadataArray::Bool(values)) => format!("array of {} booleans", values.len()),
            Self::Array(MetadataArray::String(values)) => format!("array of {} strings", values.len()),
        }
    }
}

/// One entry of the file's tensor table. Its bytes have been checked to lie inside the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// The GGUF name, for example `blk.0.attn_q.weight`.
    pub name: String,
    /// Row-major shape, outermost dimension first: the reverse of GGUF's `ne`.
    pub shape: Vec<usize>,
    /// The storage format of the elements.
    pub kind: BlockType,
    /// Offset of the first byte from the start of the file.
    pub offset: usize,
}

impl TensorEntry {
    /// Returns the number of elements.
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the number of bytes in the file.
    pub fn num_bytes(&self) -> usize {
        self.num_elements() / self.kind.block_len() * self.kind.block_bytes()
    }

    /// Returns the length of a row (the innermost dimension) in elements.
    pub fn row_len(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }
}

/// The parsed header of a file.
#[derive(Debug)]
pub(super) struct Header {
    pub metadata: HashMap<String, MetadataValue>,
    pub tensors: Vec<TensorEntry>,
}

impl Header {
    /// Parses the header of `bytes`, the whole file at `path`.
    pub(super) fn parse(path: &Path, bytes: &[u8]) -> Result<Self, Error> {
        let mut reader = HeaderReader { path, bytes, position: 0 };
        if reader.take(4, "magic")? != b"GGUF" {
            return Err(Error::format(path, "magic", "GGUF", format!("{:02x?}", &bytes[..4])));
        }
        let version = reader.u32("version")?;
        if !(2..=3).contains(&version) {
            // In a big-endian file the bytes of the version are swapped.
            let kind = if matches!(version.swap_bytes(), 1..=3) { " (a big-endian file)" } else { "" };
            let found = format!("version {version:#x}{kind}");
            return Err(Error::format(path, "version", "little-endian GGUF version 2 or 3", found));
        }
        let tensor_count = reader.u64("tensor count")?;
        let metadata_count = reader.u64("metadata count")?;
        let mut metadata = HashMap::new();
        for _ in 0..metadata_count {
            let key = reader.string("metadata key")?;
            let value = reader.value(&key)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(Error::format(path, key, "each metadata key once", "a second time"));
            }
        }
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            tensors.push(reader.tensor()?);
        }
        let alignment = alignment(path, &metadata)?;
        let start = reader.position.next_multiple_of(alignment);
        for entry in &mut tensors {
            resolve_offset(path, entry, start, bytes.len())?;
        }
        Ok(Self { metadata, tensors })
    }
}

/// Returns the alignment of tensor data in bytes: `general.alignment`, or the default if absent.
fn alignment(path: &Path, metadata: &HashMap<String, MetadataValue>) -> Result<usize, Error> {
    const KEY: &str = "general.alignment";
    let Some(value) = metadata.get(KEY) else { return Ok(types::ALIGNMENT) };
    match value.as_u64() {
        Some(bytes @ 1..=65536) if bytes.is_power_of_two() => Ok(bytes as usize),
        _ => Err(Error::format(path, KEY, "a power of two up to 65536", value.describe())),
    }
}

/// Converts an offset relative to the data section into one from the start of the file, and checks that the tensor
/// fits.
fn resolve_offset(path: &Path, entry: &mut TensorEntry, start: usize, file: usize) -> Result<(), Error> {
    let bytes = entry.num_bytes();
    let end = start.checked_add(entry.offset).and_then(|first| first.checked_add(bytes));
    if end.is_none_or(|end| end > file) {
        let expected = format!("{bytes} bytes at {} of the data that starts at {start}", entry.offset);
        let found = format!("a file of {file} bytes; is it complete?");
        return Err(Error::format(path, entry.name.clone(), expected, found));
    }
    entry.offset += start;
    Ok(())
}

/// A cursor over untrusted bytes.
struct HeaderReader<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    position: usize,
}

impl<'a> HeaderReader<'a> {
    /// Reads the next `count` bytes.
    fn take(&mut self, count: usize, key: &str) -> Result<&'a [u8], Error> {
        let left = &self.bytes[self.position..];
        let Some(taken) = left.get(..count) else {
            let expected = format!("{count} bytes at {}", self.position);
            return Err(Error::format(self.path, key, expected, format!("{} bytes to the file's end", left.len())));
        };
        self.position += count;
        Ok(taken)
    }

    /// Reads the next `N` bytes as an array.
    fn array<const N: usize>(&mut self, key: &str) -> Result<[u8; N], Error> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, key)?);
        Ok(out)
    }

    fn u32(&mut self, key: &str) -> Result<u32, Error> {
        Ok(u32::from_le_bytes(self.array(key)?))
    }

    fn u64(&mut self, key: &str) -> Result<u64, Error> {
        Ok(u64::from_le_bytes(self.array(key)?))
    }

    /// Reads a length, which must fit the address space of this machine.
    fn len(&mut self, key: &str) -> Result<usize, Error> {
        let len = self.u64(key)?;
        usize::try_from(len).map_err(|_| Error::format(self.path, key, "a length below 2^64", len.to_string()))
    }

    fn string(&mut self, key: &str) -> Result<String, Error> {
        let len = self.len(key)?;
        let bytes = self.take(len, key)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(Error::format(self.path, key, "UTF-8 text", error.to_string())),
        }
    }

    fn value(&mut self, key: &str) -> Result<MetadataValue, Error> {
        Ok(match self.u32(key)? {
            types::U8 => MetadataValue::Unsigned(u64::from(self.array::<1>(key)?[0])),
            types::I8 => MetadataValue::Signed(i64::from(i8::from_le_bytes(self.array(key)?))),
            types::U16 => MetadataValue::Unsigned(u64::from(u16::from_le_bytes(self.array(key)?))),
            types::I16 => MetadataValue::Signed(i64::from(i16::from_le_bytes(self.array(key)?))),
            types::U32 => MetadataValue::Unsigned(u64::from(self.u32(key)?)),
            types::I32 => MetadataValue::Signed(i64::from(i32::from_le_bytes(self.array(key)?))),
            types::F32 => MetadataValue::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            types::BOOL => MetadataValue::Bool(self.array::<1>(key)?[0] != 0),
            types::STRING => MetadataValue::String(self.string(key)?),
            types::ARRAY => MetadataValue::Array(self.array_value(key)?),
            types::U64 => MetadataValue::Unsigned(self.u64(key)?),
            types::I64 => MetadataValue::Signed(i64::from_le_bytes(self.array(key)?)),
            types::F64 => MetadataValue::Float(f64::from_le_bytes(self.array(key)?)),
            other => return Err(Error::format(self.path, key, "a value type from 0 to 12", other.to_string())),
        })
    }

    fn array_value(&mut self, key: &str) -> Result<MetadataArray, Error> {
        let kind = self.u32(key)?;
        let len = self.len(key)?;
        Ok(match kind {
            types::U8 => MetadataArray::Unsigned(self.fixed_size_elements(len, key, |[b]| b.into())?),
            types::I8 => MetadataArray::Signed(self.fixed_size_elements(len, key, |b| i8::from_le_bytes(b).into())?),
            types::U16 => {
                MetadataArray::Unsigned(self.fixed_size_elements(len, key, |b| u16::from_le_bytes(b).into())?)
            }
            types::I16 => MetadataArray::Signed(self.fixed_size_elements(len, key, |b| i16::from_le_bytes(b).into())?),
            types::U32 => {
                MetadataArray::Unsigned(self.fixed_size_elements(len, key, |b| u32::from_le_bytes(b).into())?)
            }
            types::I32 => MetadataArray::Signed(self.fixed_size_elements(len, key, |b| i32::from_le_bytes(b).into())?),
            types::F32 => MetadataArray::Float(self.fixed_size_elements(len, key, |b| f32::from_le_bytes(b).into())?),
            types::BOOL => MetadataArray::Bool(self.fixed_size_elements(len, key, |[b]| b != 0)?),
            types::STRING => {
                // Nothing is reserved up front. Each string takes at least eight bytes of the file, so its size bounds
                // the vector.
                let mut texts = Vec::new();
                for _ in 0..len {
                    texts.push(self.string(key)?);
                }
                MetadataArray::String(texts)
            }
            types::U64 => MetadataArray::Unsigned(self.fixed_size_elements(len, key, u64::from_le_bytes)?),
            types::I64 => MetadataArray::Signed(self.fixed_size_elements(len, key, i64::from_le_bytes)?),
            types::F64 => MetadataArray::Float(self.fixed_size_elements(len, key, f64::from_le_bytes)?),
            other => {
                let expected = "an element type from 0 to 12 that is not an array";
                return Err(Error::format(self.path, key, expected, other.to_string()));
            }
        })
    }

    /// Reads `len` elements of `N` bytes each.
    fn fixed_size_elements<const N: usize, T>(
        &mut self,
        len: usize,
        key: &str,
        parse: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, Error> {
        let bytes = self.take(len.saturating_mul(N), key)?;
        let (chunks, _) = bytes.as_chunks::<N>();
        Ok(chunks.iter().map(|chunk| parse(*chunk)).collect())
    }

    /// Reads one entry of the tensor table; its `offset` is still relative to the data section.
    fn tensor(&mut self) -> Result<TensorEntry, Error> {
        let name = self.string("tensor name")?;
        let dims = self.u32(&name)?;
        if dims > 4 {
            return Err(Error::format(self.path, name, "at most 4 dimensions", dims.to_string()));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.push(self.len(&name)?);
        }
        shape.reverse();
        let kind = BlockType::from_ggml(self.u32(&name)?)
            .map_err(|found| Error::format(self.path, name.as_str(), BlockType::supported(), found))?;
        let offset = self.len(&name)?;
        // Later code multiplies dimensions without checks; this is the only place that rules out an overflow.
        let elements = shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim));
        if elements.is_none_or(|elements| elements.checked_mul(kind.block_bytes()).is_none()) {
            return Err(Error::format(self.path, name, "a shape that fits memory", format!("{shape:?}")));
        }
        let entry = TensorEntry { name, shape, kind, offset };
        if !entry.row_len().is_multiple_of(kind.block_len()) {
            let expected = format!("rows of a multiple of {} elements for {kind:?}", kind.block_len());
            return Err(Error::format(self.path, entry.name, expected, format!("shape {:?}", entry.shape)));
        }
        Ok(entry)
    }
}
