//! A saved state as it lies in one file or in parts.

use crate::{Error, precision::LossScaler};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use std::{
    collections::{BTreeSet, HashMap},
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

/// The files of a state, mapped.
pub(super) struct Maps(Vec<(PathBuf, Mmap)>);

impl Maps {
    /// The file itself, or all parts of it that lie beside.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let paths = if path.exists() { vec![path.to_owned()] } else { parts(path)? };
        let map = |path: PathBuf| {
            let wrong = |source| Error::Path { path: path.clone(), source };
            let file = File::open(&path).map_err(wrong)?;
            // SAFETY: the map is read only and gone when the state has been read.
            let map = unsafe { Mmap::map(&file) }.map_err(wrong)?;
            Ok((path, map))
        };
        paths.into_iter().map(map).collect::<Result<_, _>>().map(Self)
    }
}

/// All parts of a divided state.
fn parts(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let wrong = |source| Error::Path { path: path.to_owned(), source };
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
                let (expected, found) = ("the parts of one state".to_owned(), "parts of several".to_owned());
                return Err(Error::State { path: path.to_owned(), key: "parts".to_owned(), expected, found });
            }
            count = of;
        }
    }
    let count = count.ok_or_else(|| wrong(std::io::ErrorKind::NotFound.into()))?;
    Ok((0..count).map(|part| super::part_of(path, part, count)).collect())
}

/// Where a tensor of a file belongs: the first value, and the shape of the whole.
type Place = (usize, Vec<usize>);

/// A state whose tensors are asked for one after the other.
pub(super) struct Saved<'a> {
    path: PathBuf,
    /// The pieces of each tensor.
    pieces: HashMap<String, Vec<(Place, TensorView<'a>)>>,
    /// Names that no parameter has asked for yet.
    left: BTreeSet<String>,
    /// The number of optimizer steps.
    pub steps: usize,
    /// The loss scale, if there was one.
    pub scaler: Option<LossScaler>,
}

impl<'a> Saved<'a> {
    pub fn read(path: &Path, maps: &'a Maps) -> Result<Self, Error> {
        let mut saved =
            Self { path: path.to_owned(), pieces: HashMap::new(), left: BTreeSet::new(), steps: 0, scaler: None };
        for (file, map) in &maps.0 {
            let state = |key: &str, expected: &str, found: String| Error::State {
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
                    serde_json::from_str(text).map_err(|e| state("places", "where pieces start", e.to_string()))?
                }
                None => HashMap::new(),
            };
            for (name, view) in tensors.tensors() {
                let place = places.get(&name).cloned().unwrap_or_else(|| (0, view.shape().to_vec()));
                saved.left.insert(name.clone());
                saved.pieces.entry(name).or_default().push((place, view));
            }
        }
        Ok(saved)
    }

    fn wrong(&self, key: &str, expected: String, found: String) -> Error {
        Error::State { path: self.path.clone(), key: key.to_owned(), expected, found }
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, key: &str) -> bool {
        self.pieces.contains_key(key)
    }

    /// Values of a tensor of this shape.
    pub fn values(&mut self, key: &str, dims: &[usize], range: Range<usize>) -> Result<Vec<f32>, Error> {
        let expected = format!("f32 {dims:?}");
        let Some(pieces) = self.pieces.get(key) else {
            return Err(self.wrong(key, expected, "no such tensor".to_owned()));
        };
        let (mut values, mut found) = (vec![0.0; range.len()], 0);
        for ((start, whole), view) in pieces {
            if view.dtype() != Dtype::F32 || whole != dims {
                return Err(self.wrong(key, expected, format!("{:?} {whole:?}", view.dtype())));
            }
            let (from, to) = (range.start.max(*start), range.end.min(start + view.data().len() / 4));
            if from < to {
                let bytes = &view.data()[(from - start) * 4..(to - start) * 4];
                let read = bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
                values[from - range.start..to - range.start].iter_mut().zip(read).for_each(|(to, from)| *to = from);
                found += to - from;
            }
        }
        if found != range.len() {
            return Err(self.wrong(key, expected, format!("{found} values of {}", range.len())));
        }
        self.left.remove(key);
        Ok(values)
    }

    /// A number of updates, none for a parameter that had none yet.
    pub fn step(&mut self, key: &str) -> Result<Option<usize>, Error> {
        let Some((_, view)) = self.pieces.get(key).and_then(|pieces| pieces.first()) else { return Ok(None) };
        let number = view.data().try_into().ok().and_then(|bytes| usize::try_from(i64::from_le_bytes(bytes)).ok());
        self.left.remove(key);
        let wrong = || self.wrong(key, "a number of updates".to_owned(), format!("{:?}", view.dtype()));
        number.map(Some).ok_or_else(wrong)
    }

    /// Refuses what no parameter has asked for.
    pub fn all_used(&self) -> Result<(), Error> {
        let wrong = |key: &String| {
            let (expected, found) = ("a parameter that learns", "none of that name in this run");
            Err(self.wrong(key, expected.to_owned(), found.to_owned()))
        };
        self.left.first().map_or(Ok(()), wrong)
    }
}

/// Makes one file of the parts of a divided state: what a world of one would have saved.
///
/// # Errors
/// [`Error::Path`] for a file that cannot be read or written, [`Error::State`] for parts that are not complete.
pub fn consolidate(path: &Path) -> Result<(), Error> {
    let maps = Maps::open(path)?;
    let mut saved = Saved::read(path, &maps)?;
    let mut whole: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    for name in saved.left.clone() {
        let (dtype, dims, first) = {
            let ((_, dims), view) = &saved.pieces[&name][0];
            (view.dtype(), dims.clone(), view.data())
        };
        let bytes = if dtype == Dtype::F32 {
            let values = saved.values(&name, &dims, 0..dims.iter().product())?;
            values.iter().flat_map(|value| value.to_le_bytes()).collect()
        } else {
            first.to_vec()
        };
        whole.push((name, dtype, dims, bytes));
    }
    let views = whole.iter().map(|(name, dtype, dims, bytes)| {
        let view = TensorView::new(*dtype, dims.clone(), bytes);
        view.map(|view| (name.as_str(), view))
    });
    let wrong =
        |e: safetensors::SafeTensorError| Error::Path { path: path.to_owned(), source: std::io::Error::other(e) };
    let views = views.collect::<Result<Vec<_>, _>>().map_err(wrong)?;
    let mut metadata = HashMap::from([("steps".to_owned(), saved.steps.to_string())]);
    if let Some(scaler) = saved.scaler {
        metadata.insert("loss_scaler".to_owned(), serde_json::json!(scaler).to_string());
    }
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(wrong)
}
