//! Reads a checkpoint from one file or from the files of its shards.

use super::{
    le_bytes, metadata,
    place::{Place, Run},
    shard_path,
};
use crate::{CheckpointError, Error, bucket, precision::LossScaler, segment::DynTensor, sharding::Parameter};
use burn::tensor::backend::Backend;
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, View, tensor::TensorView};
use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap},
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

/// The memory-mapped files of a checkpoint.
pub(super) struct MappedFiles(Vec<(PathBuf, Mmap)>);

impl MappedFiles {
    /// Maps the file itself or, if it does not exist, the files of all shards next to it.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let paths = if path.exists() { vec![path.to_owned()] } else { shard_paths(path)? };
        let map = |path: PathBuf| {
            let wrong = |source| Error::Io { path: path.clone(), source };
            let file = File::open(&path).map_err(wrong)?;
            // SAFETY: the mapping is read-only and is dropped when loading ends, and a checkpoint file is not modified
            // or truncated after it has been written.
            let map = unsafe { Mmap::map(&file) }.map_err(wrong)?;
            Ok((path, map))
        };
        paths.into_iter().map(map).collect::<Result<_, _>>().map(Self)
    }
}

/// Returns the files of all shards of a sharded checkpoint.
fn shard_paths(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let wrong = |source| Error::Io { path: path.to_owned(), source };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let mut count = None;
    for entry in folder.read_dir().map_err(wrong)? {
        let name = entry.map_err(wrong)?.file_name().to_string_lossy().into_owned();
        let middle = name.strip_prefix(&stem).and_then(|name| name.strip_prefix('.'));
        let middle = middle.and_then(|name| name.strip_suffix(".safetensors"));
        if let Some((_, of)) = middle.and_then(|middle| middle.split_once("-of-")) {
            let of = of.parse::<usize>().ok();
            if count.is_some() && of != count {
                let (expected, found) = ("the shards of one checkpoint".to_owned(), "shards of several".to_owned());
                return Err(CheckpointError::Mismatch {
                    path: path.to_owned(),
                    key: "parts".to_owned(),
                    expected,
                    found,
                }
                .into());
            }
            count = of;
        }
    }
    let count = count.ok_or_else(|| wrong(std::io::ErrorKind::NotFound.into()))?;
    Ok((0..count).map(|part| shard_path(path, part, count)).collect())
}

/// A saved tensor, or a shard of one.
struct SavedShard<'a> {
    place: Place,
    view: TensorView<'a>,
}

/// Reads tensors of a checkpoint by name and keeps track of those not read yet.
pub(super) struct CheckpointReader<'a> {
    path: PathBuf,
    /// The shards of each tensor.
    shards: HashMap<String, Vec<SavedShard<'a>>>,
    /// Names of tensors that have not been read yet.
    unread: BTreeSet<String>,
    /// The number of optimizer steps.
    pub steps: usize,
    /// The loss scaler, if there was one.
    pub scaler: Option<LossScaler>,
}

impl<'a> CheckpointReader<'a> {
    pub(super) fn open(path: &Path, maps: &'a MappedFiles) -> Result<Self, Error> {
        let mut saved =
            Self { path: path.to_owned(), shards: HashMap::new(), unread: BTreeSet::new(), steps: 0, scaler: None };
        for (file, map) in &maps.0 {
            let state = |key: &str, expected: &str, found: String| CheckpointError::Mismatch {
                path: file.clone(),
                key: key.to_owned(),
                expected: expected.to_owned(),
                found,
            };
            let broken =
                |e: safetensors::SafeTensorError| state("header", "a complete safetensors file", e.to_string());
            let (_, header) = SafeTensors::read_metadata(map).map_err(broken)?;
            let tensors = SafeTensors::deserialize(map).map_err(broken)?;
            let metadata = header.metadata().clone().unwrap_or_default();
            let steps = metadata.get("steps").and_then(|steps| steps.parse().ok());
            saved.steps = steps.ok_or_else(|| state("steps", "a number", "none".to_owned()))?;
            if let Some(text) = metadata.get("loss_scaler") {
                let scaler = serde_json::from_str(text);
                saved.scaler = Some(scaler.map_err(|e| state("loss_scaler", "a loss scaler", e.to_string()))?);
            }
            let places: HashMap<String, Place> = match metadata.get("places") {
                Some(text) => {
                    serde_json::from_str(text).map_err(|e| state("places", "places of tensors", e.to_string()))?
                }
                None => HashMap::new(),
            };
            for (name, view) in tensors.tensors() {
                let place = places.get(&name).cloned().unwrap_or_else(|| Place::of_whole(view.shape().to_vec()));
                let values = view.shape().iter().product();
                if !place.fits(values) {
                    let expected = format!("a place for {values} values");
                    return Err(state(&name, &expected, format!("{place:?}")).into());
                }
                saved.unread.insert(name.clone());
                saved.shards.entry(name).or_default().push(SavedShard { place, view });
            }
        }
        Ok(saved)
    }

    fn wrong(&self, key: &str, expected: String, found: String) -> CheckpointError {
        CheckpointError::Mismatch { path: self.path.clone(), key: key.to_owned(), expected, found }
    }

    /// Returns whether the checkpoint contains a tensor of this name.
    pub(super) fn contains(&self, key: &str) -> bool {
        self.shards.contains_key(key)
    }

    /// Reads `range` of the flattened tensor `key`, whose full shape must be `dims`.
    pub(super) fn read_values(&mut self, key: &str, dims: &[usize], range: Range<usize>) -> Result<Vec<f32>, Error> {
        let values = self.values(key, dims, range)?;
        self.unread.remove(key);
        Ok(values)
    }

    fn values(&self, key: &str, dims: &[usize], range: Range<usize>) -> Result<Vec<f32>, Error> {
        let expected = format!("f32 {dims:?}");
        let Some(shards) = self.shards.get(key) else {
            return Err(self.wrong(key, expected, "no such tensor".to_owned()).into());
        };
        let (mut values, mut found) = (vec![0.0; range.len()], 0);
        for SavedShard { place, view } in shards {
            if view.dtype() != Dtype::F32 || place.whole != dims {
                return Err(self.wrong(key, expected, format!("{:?} {:?}", view.dtype(), place.whole)).into());
            }
            for Run { whole, piece } in place.runs(view.data().len() / 4) {
                let (from, to) = (range.start.max(whole.start), range.end.min(whole.end));
                if from < to {
                    let first = piece + from - whole.start;
                    let bytes = &view.data()[first * 4..(first + to - from) * 4];
                    let read = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                    values[from - range.start..to - range.start].iter_mut().zip(read).for_each(|(to, from)| *to = from);
                    found += to - from;
                }
            }
        }
        if found != range.len() {
            return Err(self.wrong(key, expected, format!("{found} of {} values", range.len())).into());
        }
        Ok(values)
    }

    /// Leaves out a parameter and its optimizer state, which another rank reads.
    pub(super) fn skip(&mut self, path: &str) {
        let state = format!("{path}.");
        self.unread.retain(|name| name != path && !name.starts_with(&state));
    }

    /// Reads a full parameter, in f32.
    pub(super) fn read_parameter<B: Backend>(
        &mut self,
        parameter: &Parameter,
        device: &B::Device,
    ) -> Result<DynTensor<B>, Error> {
        let values = self.read_values(&parameter.path, &parameter.dims, 0..parameter.elements())?;
        Ok(bucket::tensor_from_vec::<B>(values, device).reshape(&parameter.dims))
    }

    /// Reads the number of updates of a parameter; none if it had no update yet.
    pub(super) fn read_step(&mut self, key: &str) -> Result<Option<usize>, Error> {
        let Some(SavedShard { view, .. }) = self.shards.get(key).and_then(|shards| shards.first()) else {
            return Ok(None);
        };
        let number = view.data().try_into().ok().and_then(|bytes| usize::try_from(i64::from_le_bytes(bytes)).ok());
        self.unread.remove(key);
        let wrong = || self.wrong(key, "a number of updates".to_owned(), format!("{:?}", view.dtype()));
        Ok(Some(number.ok_or_else(wrong)?))
    }

    /// Returns an error if a tensor of the checkpoint has not been read.
    pub(super) fn check_all_read(&self) -> Result<(), CheckpointError> {
        let wrong = |key: &String| {
            let (expected, found) = ("a trainable parameter", "none of that name in this run");
            Err(self.wrong(key, expected.to_owned(), found.to_owned()))
        };
        self.unread.first().map_or(Ok(()), wrong)
    }
}

/// Merges the files of a sharded checkpoint into one file, the same as a world of one rank would have saved. One tensor at
/// a time is in memory.
///
/// # Errors
/// Returns [`Error::Io`] for a file that cannot be read or written, [`CheckpointError::Mismatch`] if the shards are
/// incomplete.
pub fn consolidate(path: &Path) -> Result<(), Error> {
    let maps = MappedFiles::open(path)?;
    let saved = CheckpointReader::open(path, &maps)?;
    let mut merged = Vec::new();
    for name in &saved.unread {
        let SavedShard { place, view } = &saved.shards[name][0];
        // An incomplete tensor is found before anything is written.
        if view.dtype() == Dtype::F32 {
            saved.values(name, &place.whole, 0..place.whole.iter().product())?;
        }
        merged.push((name, MergedTensor { saved: &saved, name, dims: &place.whole, view }));
    }
    // The file may be one of those that are mapped, so it is replaced and not written into.
    let part = path.with_extension("part");
    let wrong = |source| CheckpointError::Safetensors { path: part.clone(), source };
    let metadata = Some(metadata(saved.steps, saved.scaler));
    let written = safetensors::serialize_to_file(merged, metadata, &part).map_err(wrong).map_err(Error::from);
    let renamed = || std::fs::rename(&part, path).map_err(|source| Error::Io { path: path.to_owned(), source });
    // The first error is the one to report.
    written.and_then(|()| renamed()).inspect_err(|_| drop(std::fs::remove_file(&part)))
}

/// A tensor that is merged from the shards of all ranks when it is written.
struct MergedTensor<'a> {
    saved: &'a CheckpointReader<'a>,
    name: &'a str,
    dims: &'a [usize],
    view: &'a TensorView<'a>,
}

impl View for MergedTensor<'_> {
    fn dtype(&self) -> Dtype {
        self.view.dtype()
    }

    fn shape(&self) -> &[usize] {
        self.dims
    }

    fn data(&self) -> Cow<'_, [u8]> {
        if self.view.dtype() != Dtype::F32 {
            return Cow::Borrowed(self.view.data());
        }
        // The tensor was read once before, so it is complete.
        let values = self.saved.values(self.name, self.dims, 0..self.dims.iter().product());
        Cow::Owned(le_bytes(&values.unwrap_or_default()))
    }

    fn data_len(&self) -> usize {
        match self.view.dtype() {
            Dtype::F32 => self.dims.iter().product::<usize>() * 4,
            _ => self.view.data().len(),
        }
    }
}
