//! PyTorch's `.bin` files: a zip archive of a pickle and the values of the tensors, each in a file of its own.
//!
//! The reader is our own because no crate fits: burn-store 0.21 ignores the strides of tensors and fills what is missing
//! in a file with zeros, so that a transposed or truncated tensor is read wrongly without an error; candle-core depends
//! on a second version of `tokenizers` with a C library; serde-pickle does not know the references to storages.

mod pickle;

use crate::Error;
use burn::tensor::{Bytes, DType, TensorData};
use memmap2::Mmap;
use pickle::Tensor;
use safetensors::SafeTensors;
use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::Read,
    ops::Range,
    path::{Path, PathBuf},
};
use zip::{CompressionMethod, ZipArchive};

/// A memory-mapped file of PyTorch 1.6 or later that contains a dictionary of tensors. Its pickle is parsed and never
/// executed.
#[derive(Debug)]
pub struct PytorchFile {
    path: PathBuf,
    map: Mmap,
    tensors: BTreeMap<String, StoredTensor>,
}

/// The place of a tensor's values in the file. Strides are in elements.
#[derive(Debug)]
struct StoredTensor {
    class: String,
    dtype: Option<DType>,
    shape: Vec<usize>,
    strides: Vec<usize>,
    bytes: Range<usize>,
}

impl PytorchFile {
    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Maps a file.
    ///
    /// # Errors
    /// If it cannot be read, is not such an archive, or contains anything but tensors.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let refuse = |found: String| {
            let expected = format!(
                "a dictionary of tensors that PyTorch 1.6 or later saved (two lines of Python convert it to safetensors: \
                 `from safetensors.torch import save_file; import torch` and `save_file({{name: tensor.clone() for name, \
                 tensor in torch.load({:?}).items()}}, \"{}.safetensors\")`)",
                path.file_name().unwrap_or_default(),
                path.file_stem().unwrap_or_default().to_string_lossy().replace("pytorch_model", "model"),
            );
            Error::format(path, "content", expected, found)
        };
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the map is read-only and the file is opened read-only. A checkpoint must not be modified or truncated
        // while it is mapped; every program that maps checkpoints relies on that.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        let mut archive = ZipArchive::new(file).map_err(|_| {
            refuse(match SafeTensors::read_metadata(&map) {
                Ok(_) => "a safetensors file; rename it so that it ends in .safetensors".to_owned(),
                Err(_) => "another file, or one of an older PyTorch".to_owned(),
            })
        })?;
        let entries = Entries::read(&mut archive).map_err(refuse)?;
        let mut tensors = BTreeMap::new();
        for (name, tensor) in pickle::read_tensors(&entries.pickle).map_err(refuse)? {
            let stored = StoredTensor::new(&tensor, &entries, map.len());
            tensors.insert(name.to_string(), stored.map_err(|found| refuse(format!("{name} with {found}")))?);
        }
        Ok(Self { path: path.to_owned(), map, tensors })
    }

    /// Returns the names and shapes of all tensors.
    pub fn shapes(&self) -> impl Iterator<Item = (&String, &[usize])> {
        self.tensors.iter().map(|(name, tensor)| (name, tensor.shape.as_slice()))
    }

    /// Reads one tensor, stored in a float type, in row-major order and converts it to `dtype`.
    ///
    /// # Errors
    /// If there is no such tensor, or it is stored in another type.
    pub fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        let tensor = self.tensors.get(name);
        let tensor = tensor.ok_or_else(|| Error::format(&self.path, name, "a tensor of this name", "none"))?;
        let stored = tensor.dtype.ok_or_else(|| Error::format(&self.path, name, "a float tensor", &tensor.class))?;
        let bytes = tensor.row_major(&self.map[tensor.bytes.clone()], stored.size());
        let data = TensorData::from_bytes(Bytes::from_bytes_vec(bytes), tensor.shape.clone(), stored);
        Ok(if stored == dtype { data } else { data.convert_dtype(dtype) })
    }
}

/// The files of the archive that matter.
struct Entries {
    pickle: Vec<u8>,
    /// The ranges of bytes of the storages, by key.
    storages: HashMap<String, Range<usize>>,
}

impl Entries {
    fn read(archive: &mut ZipArchive<File>) -> Result<Self, String> {
        let (mut pickle, mut storages) = (None, HashMap::new());
        for index in 0..archive.len() {
            let mut entry = archive.by_index(index).map_err(|e| e.to_string())?;
            let name = entry.name().to_owned();
            // Everything is in one folder, whose name is that of the file when it was saved.
            let inner = name.split_once('/').map_or("", |(_, inner)| inner);
            let wanted = inner == "data.pkl" || inner == "byteorder" || inner.starts_with("data/");
            if wanted && entry.compression() != CompressionMethod::Stored {
                return Err(format!("compressed content in {name}"));
            }
            if inner == "data.pkl" {
                let mut bytes = Vec::new();
                entry.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
                pickle = Some(bytes);
            } else if inner == "byteorder" {
                let mut order = String::new();
                entry.read_to_string(&mut order).map_err(|e| e.to_string())?;
                if order.trim() != "little" {
                    return Err(format!("values in {} endian order", order.trim()));
                }
            } else if let Some(key) = inner.strip_prefix("data/") {
                let (start, size) = (entry.data_start() as usize, entry.size() as usize);
                storages.insert(key.to_owned(), start..start.saturating_add(size));
            }
        }
        Ok(Self { pickle: pickle.ok_or("an archive without data.pkl")?, storages })
    }
}

impl StoredTensor {
    /// Finds the values of a tensor in a file of `length` bytes and checks that they are all there.
    fn new(tensor: &Tensor, entries: &Entries, length: usize) -> Result<Self, String> {
        let Tensor { storage, offset, shape, strides } = tensor;
        let (size, dtype) = match storage.class.strip_prefix("torch.").and_then(|name| name.strip_suffix("Storage")) {
            Some("Float") => (4, Some(DType::F32)),
            Some("Half") => (2, Some(DType::F16)),
            Some("BFloat16") => (2, Some(DType::BF16)),
            Some("Double") => (8, Some(DType::F64)),
            _ => (1, None),
        };
        let bytes = entries.storages.get(&*storage.key).filter(|bytes| bytes.end <= length);
        let bytes = bytes.ok_or("values that are not in the file")?;
        let values = bytes.len() / size;
        let count = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        let mut ends = shape.iter().zip(strides).map(|(&n, &stride)| n.saturating_sub(1).checked_mul(stride));
        let last = ends.try_fold(*offset, |sum, end| sum.checked_add(end?));
        let fits = count == Some(0) || last.is_some_and(|last| last < values) && count.is_some_and(|n| n <= values);
        if shape.len() != strides.len() || !fits {
            return Err(format!("the shape {shape:?} and strides {strides:?} in {values} values"));
        }
        let start = if count == Some(0) { bytes.end } else { bytes.start + offset * size };
        Ok(Self {
            class: storage.class.to_string(),
            dtype,
            shape: shape.clone(),
            strides: strides.clone(),
            bytes: start..bytes.end,
        })
    }

    /// Copies the values out of the storage, which begins with the first one, in row-major order.
    fn row_major(&self, storage: &[u8], size: usize) -> Vec<u8> {
        let count: usize = self.shape.iter().product();
        let mut dense = 1;
        let contiguous = self.shape.iter().zip(&self.strides).rev().all(|(&n, &stride)| {
            let fits = n == 1 || stride == dense;
            dense *= n;
            fits
        });
        if contiguous {
            return storage[..count * size].to_vec();
        }
        let mut bytes = Vec::with_capacity(count * size);
        for index in 0..count {
            let (mut rest, mut at) = (index, 0);
            for (&n, &stride) in self.shape.iter().zip(&self.strides).rev() {
                at += rest % n * stride;
                rest /= n;
            }
            bytes.extend_from_slice(&storage[at * size..(at + 1) * size]);
        }
        bytes
    }
}
