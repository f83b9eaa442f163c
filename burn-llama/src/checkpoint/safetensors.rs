//! Hugging Face weights: a single `model.safetensors`, or shards listed in `model.safetensors.index.json`.

use super::pages;
use crate::Error;
use burn::tensor::{Bytes, DType, TensorData};
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

/// The memory-mapped safetensors files of a checkpoint.
#[derive(Debug)]
pub struct Shards {
    files: Vec<Shard>,
    /// The position in `files` of the file that holds each tensor.
    index: BTreeMap<String, usize>,
}

/// One memory-mapped safetensors file.
#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Byte offset of the tensor data in the file.
    data_offset: usize,
}

impl Shard {
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
}

impl Shards {
    /// Maps the safetensors files of a directory.
    ///
    /// # Errors
    /// If there are none, a file that the index names is missing, or a file is malformed.
    pub fn open(directory: &Path) -> Result<Self, Error> {
        let (single, index) = (directory.join("model.safetensors"), directory.join("model.safetensors.index.json"));
        let names: BTreeSet<PathBuf> = if single.is_file() || !index.is_file() {
            BTreeSet::from([single])
        } else {
            let text = std::fs::read(&index).map_err(|e| Error::io(&index, e))?;
            let json: serde_json::Value =
                serde_json::from_slice(&text).map_err(|e| Error::format(&index, "content", "JSON", e.to_string()))?;
            let map = json.get("weight_map").and_then(|map| map.as_object());
            let map = map.ok_or_else(|| Error::format(&index, "weight_map", "an object", "none"))?;
            map.values()
                .map(|file| match file.as_str().map(Path::new) {
                    // Only bare file names are accepted: an index must not point outside its directory.
                    Some(name) if name.file_name() == Some(name.as_os_str()) => Ok(directory.join(name)),
                    _ => Err(Error::format(&index, "weight_map", "names of files beside the index", file.to_string())),
                })
                .collect::<Result<_, _>>()?
        };
        let files = names.into_iter().map(Shard::open).collect::<Result<Vec<_>, _>>()?;
        let mut index = BTreeMap::new();
        for (number, shard) in files.iter().enumerate() {
            for name in shard.metadata.tensors().into_keys() {
                if let Some(first) = index.insert(name.clone(), number) {
                    let found = format!("it also in {}", files[first].path.display());
                    return Err(Error::format(&shard.path, name, "each tensor in one file", found));
                }
            }
        }
        Ok(Self { files, index })
    }

    /// Returns the names and shapes of all tensors.
    pub fn shapes(&self) -> BTreeMap<String, Vec<usize>> {
        let shape = |(name, &file): (&String, &usize)| {
            let shape = self.files[file].metadata.info(name).map(|info| info.shape.clone()).unwrap_or_default();
            (name.clone(), shape)
        };
        self.index.iter().map(shape).collect()
    }

    /// Returns true if there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// Returns true if two tensors have the same shape and values, in whatever types they are stored.
    ///
    /// # Errors
    /// If there are no such tensors, or they are stored in types that [`Shards::read`] refuses.
    pub fn same(&self, one: &str, other: &str) -> Result<bool, Error> {
        if let (Some(one), Some(other)) = (self.stored(one), self.stored(other)) {
            if one.0.shape != other.0.shape {
                return Ok(false);
            }
            if one.0.dtype == other.0.dtype {
                let same = one.1 == other.1;
                self.files.iter().for_each(|shard| pages::release(&shard.map, 0, shard.map.len()));
                return Ok(same);
            }
        }
        Ok(self.read(one, DType::F32)? == self.read(other, DType::F32)?)
    }

    /// Returns the entry of a tensor and its bytes.
    fn stored(&self, name: &str) -> Option<(&TensorInfo, &[u8])> {
        let shard = &self.files[*self.index.get(name)?];
        let info = shard.metadata.info(name)?;
        let (start, end) = info.data_offsets;
        Some((info, &shard.map[shard.data_offset + start..shard.data_offset + end]))
    }

    /// Reads one tensor, stored as f32, f16 or bf16, and converts it to `dtype`.
    ///
    /// # Errors
    /// If there is no such tensor, or it is stored in another type.
    pub fn read(&self, name: &str, dtype: DType) -> Result<TensorData, Error> {
        let found =
            self.index.get(name).and_then(|&file| Some((&self.files[file], self.files[file].metadata.info(name)?)));
        let Some((shard, info)) = found else {
            let path = self.files.first().map_or(Path::new("model.safetensors"), |shard| shard.path.as_path());
            return Err(Error::format(path, name, "a tensor of this name", "none"));
        };
        let stored = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => return Err(Error::format(&shard.path, name, "F32, F16 or BF16", format!("{other:?}"))),
        };
        let (start, end) = (shard.data_offset + info.data_offsets.0, shard.data_offset + info.data_offsets.1);
        let bytes = shard.map[start..end].to_vec();
        pages::release(&shard.map, start, end - start);
        let data = TensorData::from_bytes(Bytes::from_bytes_vec(bytes), info.shape.clone(), stored);
        Ok(if stored == dtype { data } else { data.convert_dtype(dtype) })
    }
}
