//! The state of training in one file: what it takes to go on bit for bit.

use super::Engine;
use crate::{Error, optimizer::Moments, segment::Value};
use burn::{
    module::{Module, ModuleMapper, ModuleVisitor, Param},
    tensor::{
        DType, Tensor, TensorData,
        backend::{AutodiffBackend, Backend},
    },
};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, View};
use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap},
    fs::File,
    path::Path,
};

impl<B: AutodiffBackend> Engine<B> {
    /// Writes every parameter that learns, in f32 under its path, and what the optimizer remembers of it: `<path>.exp_avg`,
    /// `<path>.exp_avg_sq` (f32) and `<path>.step` (i64). Tensors leave the device one at a time. Gradients that were
    /// accumulated since the last step are not part of it.
    ///
    /// # Errors
    /// [`Error::Path`] if the file cannot be written; what was written of it stays for the caller to remove.
    pub fn save<M: Module<B>>(&self, model: &M, path: &Path) -> Result<(), Error> {
        let mut collect = Collect { engine: self, path: Vec::new(), tensors: Vec::new() };
        model.visit(&mut collect);
        let metadata = HashMap::from([("steps".to_owned(), self.steps.to_string())]);
        let wrong = |source| Error::Path { path: path.to_owned(), source };
        safetensors::serialize_to_file(collect.tensors, Some(metadata), path)
            .map_err(|e| wrong(std::io::Error::other(e)))?;
        File::open(path).and_then(|file| file.sync_all()).map_err(wrong)
    }

    /// Puts a saved state into the model and this engine.
    ///
    /// # Errors
    /// [`Error::Path`] if the file cannot be read, [`Error::State`] if it is not a complete state of this very model: a
    /// parameter that learns is missing or has another shape, or the file holds one that does not learn.
    pub fn restore<M: Module<B>>(&mut self, model: M, path: &Path) -> Result<M, Error> {
        let wrong = |source| Error::Path { path: path.to_owned(), source };
        let file = File::open(path).map_err(wrong)?;
        // SAFETY: the map is read only and gone at the end of this function.
        let map = unsafe { Mmap::map(&file) }.map_err(wrong)?;
        let state = |key: &str, expected: &str, found: String| Error::State {
            path: path.to_owned(),
            key: key.to_owned(),
            expected: expected.to_owned(),
            found,
        };
        let broken = |e: safetensors::SafeTensorError| state("header", "a complete safetensors file", e.to_string());
        let (_, header) = SafeTensors::read_metadata(&map).map_err(broken)?;
        let tensors = SafeTensors::deserialize(&map).map_err(broken)?;
        let steps = header.metadata().as_ref().and_then(|metadata| metadata.get("steps")?.parse().ok());
        let steps = steps.ok_or_else(|| state("steps", "a number", "none".to_owned()))?;
        let left = tensors.names().into_iter().map(str::to_owned).collect();
        let mut restore = Restore { tensors, left, path: Vec::new(), moments: HashMap::new(), error: None };
        let model = model.map(&mut restore);
        if let Some((key, expected, found)) = restore.error {
            return Err(state(&key, &expected, found));
        }
        if let Some(key) = restore.left.first() {
            return Err(state(key, "a parameter that learns", "none of that name in this run".to_owned()));
        }
        (self.moments, self.steps) = (restore.moments, steps);
        self.gradients.clear();
        Ok(model)
    }
}

/// A tensor that is fetched from its device when it is written.
enum Stored<B: Backend> {
    Floats(Vec<usize>, Tensor<B, 1>),
    Step([u8; 8]),
}

impl<B: Backend> View for Stored<B> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Floats(..) => Dtype::F32,
            Self::Step(_) => Dtype::I64,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Floats(shape, _) => shape,
            Self::Step(_) => &[],
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Floats(_, values) => {
                Cow::Owned(values.clone().into_data().convert_dtype(DType::F32).as_bytes().to_vec())
            }
            Self::Step(bytes) => Cow::Borrowed(bytes),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Floats(shape, _) => shape.iter().product::<usize>() * 4,
            Self::Step(bytes) => bytes.len(),
        }
    }
}

struct Collect<'a, B: AutodiffBackend> {
    engine: &'a Engine<B>,
    path: Vec<String>,
    tensors: Vec<(String, Stored<B::InnerBackend>)>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Collect<'_, B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if !param.is_require_grad() {
            return;
        }
        let (path, value) = (self.path.join("."), param.val().inner());
        let shape = value.dims().to_vec();
        let mut add = |name: String, values| self.tensors.push((name, Stored::Floats(shape.clone(), values)));
        if let Some(moments) = self.engine.moments.get(&param.id) {
            add(format!("{path}.exp_avg"), moments.exp_avg.clone().flatten());
            add(format!("{path}.exp_avg_sq"), moments.exp_avg_sq.clone().flatten());
        }
        add(path.clone(), Value::new(value).flatten());
        if let Some(moments) = self.engine.moments.get(&param.id) {
            self.tensors.push((format!("{path}.step"), Stored::Step((moments.step as i64).to_le_bytes())));
        }
    }
}

struct Restore<'a, B: Backend> {
    tensors: SafeTensors<'a>,
    /// Names that no parameter has asked for yet.
    left: BTreeSet<String>,
    path: Vec<String>,
    moments: HashMap<burn::module::ParamId, Moments<B>>,
    /// The first thing that does not fit: key, expected, found.
    error: Option<(String, String, String)>,
}

impl<B: Backend> Restore<'_, B> {
    /// The values of a tensor of this shape; what does not fit is noted.
    fn floats<const D: usize>(&mut self, key: &str, dims: [usize; D], device: &B::Device) -> Option<Tensor<B, D>> {
        let expected = format!("f32 {dims:?}");
        let found = match self.tensors.tensor(key) {
            Ok(view) if view.dtype() == Dtype::F32 && view.shape() == dims => {
                self.left.remove(key);
                let values: Vec<f32> =
                    view.data().chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
                return Some(Tensor::from_data(TensorData::new(values, dims), (device, DType::F32)));
            }
            Ok(view) => format!("{:?} {:?}", view.dtype(), view.shape()),
            Err(_) => "no such tensor".to_owned(),
        };
        self.error.get_or_insert((key.to_owned(), expected, found));
        None
    }

    fn step(&mut self, key: &str) -> Option<usize> {
        let bytes = self.tensors.tensor(key).ok()?.data().try_into().ok()?;
        self.left.remove(key);
        usize::try_from(i64::from_le_bytes(bytes)).ok()
    }
}

impl<B: AutodiffBackend> ModuleMapper<B> for Restore<'_, B::InnerBackend> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if !param.is_require_grad() || self.error.is_some() {
            return param;
        }
        let path = self.path.join(".");
        let (id, old, mapper) = param.consume();
        let (dims, device, dtype) = (old.dims(), old.device(), old.dtype());
        let Some(value) = self.floats(&path, dims, &device) else {
            return Param::from_mapped_value(id, old, mapper);
        };
        drop(old);
        // A parameter that has not been updated yet has no moments.
        if let Some(step) = self.step(&format!("{path}.step")) {
            let exp_avg = self.floats(&format!("{path}.exp_avg"), dims, &device);
            let exp_avg_sq = self.floats(&format!("{path}.exp_avg_sq"), dims, &device);
            if let (Some(exp_avg), Some(exp_avg_sq)) = (exp_avg, exp_avg_sq) {
                let moments = Moments { step, exp_avg: Value::new(exp_avg), exp_avg_sq: Value::new(exp_avg_sq) };
                self.moments.insert(id, moments);
            }
        }
        let value = if dtype == DType::F32 { value } else { value.cast(dtype) };
        Param::from_mapped_value(id, Tensor::from_inner(value).require_grad(), mapper)
    }
}
