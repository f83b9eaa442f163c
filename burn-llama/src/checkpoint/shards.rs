//! Hugging Face weights: a single `model.safetensors`, or shards listed in `model.safetensors.index.json`; if there are
//! none, PyTorch's `pytorch_model.bin` or its shards.

use super::pages;
use crate::Error;
use burn::tensor::{Bytes, DType, TensorData};
use burn_peft::format::{align_names, pytorch::PytorchFile};
use memmap2::Mmap;
use safetensors::{
    Dtype, SafeTensors,
    tensor::{Metadata, TensorInfo},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::{Path, PathBuf},
};

/// The memory-mapped files of a checkpoint.
#[derive(Debug)]
pub(crate) struct Shards {
    files: Vec<Shard>,
    /// The place of each tensor, by its name in the model.
    index: BTreeMap<String, Place>,
}

/// The place of a tensor.
#[derive(Debug)]
struct Place {
    /// The position of the file in [`Shards::files`].
    file: usize,
    /// The name in the file.
    name: String,
}

/// One memory-mapped file.
#[derive(Debug)]
enum Shard {
    Safetensors(SafetensorsFile),
    Pytorch(PytorchFile),
}

/// A tensor of a safetensors file.
struct StoredTensor<'a> {
    info: &'a TensorInfo,
    bytes: &'a [u8],
}

/// One memory-mapped safetensors file.
#[derive(Debug)]
struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Byte offset of the tensor data in the file.
    data_offset: usize,
}

impl SafetensorsFile {
    fn open(path: PathBuf) -> Result<Self, Error> {
        let file = File::open(&path).map_err(|e| Error::io(&path, e))?;
        // SAFETY: the map is read-only and the file is opened read-only. A checkpoint must not be modified or truncated
        // while it is mapped; every program that maps checkpoints relies on that.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&path, e))?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|e| Error::format(&path, "header", "a complete safetensors file", e.to_string()))?;
        SafeTensors::deserialize(&map)
            .map_err(|e| Error::format(&path, "content", "a complete safetensors file", e.to_string()))?;
        Ok(Self { path, map, metadata, data_offset: header + 8 })
    }

    fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        let info = self.metadata.info(name);
        let info = info.ok_or_else(|| Error::format(&self.path, name, "a tensor of this name", "none"))?;
        let stored = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(Error::format(&self.path, name, "F32, F16 or BF16", format!("{other:?}"))),
        };
        let (start, end) = (self.data_offset + info.data_offsets.0, self.data_offset + info.data_offsets.1);
        let bytes = self.map[start..end].to_vec();
        pages::release(&self.map, start, end - start);
        let data = TensorData::from_bytes(Bytes::from_bytes_vec(bytes), info.shape.clone(), stored);
        Ok(if stored == dtype { data } else { data.convert_dtype(dtype) })
    }
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self, Error> {
        Ok(match path.extension().is_some_and(|extension| extension == "bin") {
            true => Self::Pytorch(PytorchFile::open(&path)?),
            false => Self::Safetensors(SafetensorsFile::open(path)?),
        })
    }

    fn path(&self) -> &Path {
        match self {
            Self::Safetensors(file) => &file.path,
            Self::Pytorch(file) => file.path(),
        }
    }

    /// Returns the pages of the map to the system.
    fn release(&self) {
        if let Self::Safetensors(file) = self {
            pages::release(&file.map, 0, file.map.len());
        }
    }

    /// Returns the names and shapes of all tensors.
    fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        match self {
            Self::Safetensors(file) => {
                file.metadata.tensors().into_iter().map(|(name, info)| (name, info.shape.clone())).collect()
            }
            Self::Pytorch(file) => file.shapes().map(|(name, shape)| (name.clone(), shape.to_vec())).collect(),
        }
    }

    fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        match self {
            Self::Safetensors(file) => file.read(name, dtype),
            Self::Pytorch(file) => Ok(file.read(name, dtype)?),
        }
    }
}

impl Shards {
    /// Maps the files of a directory. Names that differ from those of `parameters` only at their start, all in the same
    /// way (`_orig_mod.` before them, `model.` missing), are taken as these.
    ///
    /// # Errors
    /// If there are none, a file that the index names is missing, or a file is malformed.
    pub(super) fn open(directory: &Path, parameters: &BTreeSet<String>) -> Result<Self, Error> {
        let files = file_names(directory)?.into_iter().map(Shard::open).collect::<Result<Vec<_>, _>>()?;
        let mut index = BTreeMap::new();
        for (file, shard) in files.iter().enumerate() {
            for name in shard.shapes().into_keys() {
                if let Some(Place { file: first, .. }) = index.insert(name.clone(), Place { file, name: name.clone() })
                {
                    let found = format!("it also in {}", files[first].path().display());
                    return Err(Error::format(shard.path(), name, "each tensor in one file", found));
                }
            }
        }
        for (found, name) in align_names(index.keys(), parameters) {
            if let Some(place) = index.remove(&found) {
                index.insert(name, place);
            }
        }
        Ok(Self { files, index })
    }

    /// Returns the names and shapes of all tensors.
    pub(super) fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let files: Vec<_> = self.files.iter().map(Shard::shapes).collect();
        let shape = |(name, place): (&String, &Place)| {
            (name.clone(), files[place.file].get(&place.name).cloned().unwrap_or_default())
        };
        self.index.iter().map(shape).collect()
    }

    /// Returns true if there is a tensor of this name.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Returns true if two tensors have the same shape and values, in whatever types they are stored.
    ///
    /// # Errors
    /// If there are no such tensors, or they are stored in types that [`Shards::read`] refuses.
    pub(super) fn same(&self, one: &str, other: &str) -> Result<bool, Error> {
        if let (Some(one), Some(other)) = (self.stored(one), self.stored(other)) {
            if one.info.shape != other.info.shape {
                return Ok(false);
            }
            if one.info.dtype == other.info.dtype {
                let same = one.bytes == other.bytes;
                self.files.iter().for_each(Shard::release);
                return Ok(same);
            }
        }
        Ok(self.read(one, DType::F32)? == self.read(other, DType::F32)?)
    }

    /// Returns a tensor of a safetensors file as it is stored.
    fn stored(&self, name: &str) -> Option<StoredTensor<'_>> {
        let place = self.index.get(name)?;
        let Shard::Safetensors(file) = &self.files[place.file] else { return None };
        let info = file.metadata.info(&place.name)?;
        let (start, end) = info.data_offsets;
        Some(StoredTensor { info, bytes: &file.map[file.data_offset + start..file.data_offset + end] })
    }

    /// Reads one tensor, stored as a float, and converts it to `dtype`.
    ///
    /// # Errors
    /// If there is no such tensor, or it is stored in another type.
    pub(super) fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        let place = self.index.get(name).ok_or_else(|| Error::config(name, "a tensor of this name", "none"))?;
        self.files[place.file].read(&place.name, dtype)
    }
}

/// Returns the paths of a checkpoint's files: those of safetensors, else those of PyTorch.
fn file_names(directory: &Path) -> Result<BTreeSet<PathBuf>, Error> {
    let is_there = |name: &str| directory.join(name).is_file();
    for single in ["model.safetensors", "pytorch_model.bin"] {
        let index = format!("{single}.index.json");
        if is_there(single) {
            return Ok(BTreeSet::from([directory.join(single)]));
        }
        if is_there(&index) {
            return indexed_files(directory, &directory.join(index));
        }
    }
    Ok(BTreeSet::from([directory.join("model.safetensors")]))
}

/// Returns the paths of the files that an index names.
fn indexed_files(directory: &Path, index: &Path) -> Result<BTreeSet<PathBuf>, Error> {
    let text = std::fs::read(index).map_err(|e| Error::io(index, e))?;
    let json: serde_json::Value =
        serde_json::from_slice(&text).map_err(|e| Error::format(index, "content", "JSON", e.to_string()))?;
    let map = json.get("weight_map").and_then(|map| map.as_object());
    let map = map.ok_or_else(|| Error::format(index, "weight_map", "an object", "none"))?;
    let file = |file: &serde_json::Value| match file.as_str().map(Path::new) {
        // Only bare file names are accepted: an index must not point outside its directory.
        Some(name) if name.file_name() == Some(name.as_os_str()) => Ok(directory.join(name)),
        _ => Err(Error::format(index, "weight_map", "names of files beside the index", file.to_string())),
    };
    map.values().map(file).collect()
}
