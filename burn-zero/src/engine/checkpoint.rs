//! The state of training in files: what it takes to go on bit for bit, in this world or another.

use super::Engine;
use crate::{
    Error, bucket,
    gather::Put,
    optimizer::Moments,
    partition::{Layout, Piece},
    segment::{TrainSegments, Value},
};
use burn::{
    module::{ModuleVisitor, Param, ParamId},
    tensor::{
        DType, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use safetensors::{Dtype, View};
use serde_json::json;
use std::{
    borrow::Cow,
    collections::HashMap,
    fs::File,
    path::{Path, PathBuf},
};

mod saved;

pub use saved::consolidate;
use saved::{Maps, Saved};

/// The file of one part of a state that is divided: `training.safetensors` becomes `training.1-of-4.safetensors`.
fn part_of(path: &Path, part: usize, parts: usize) -> PathBuf {
    if parts == 1 { path.to_owned() } else { path.with_extension(format!("{part}-of-{parts}.safetensors")) }
}

impl<B: AutodiffBackend> Engine<B> {
    /// Writes every parameter that learns, in f32 under its path, and what the optimizer remembers of it: `<path>.exp_avg`,
    /// `<path>.exp_avg_sq` (f32) and `<path>.step` (i64). Tensors leave the device one at a time. Gradients that were
    /// accumulated since the last step are not part of it.
    ///
    /// Every rank calls this with the same path. Where states are divided, each writes its pieces, flat, into a file of its own
    /// beside the path (`training.1-of-4.safetensors`), whose metadata says where they belong; else rank 0 writes all.
    ///
    /// # Errors
    /// [`Error::Path`] if the file cannot be written; what was written of it stays for the caller to remove.
    pub fn save<M: TrainSegments<B>>(&self, model: &M, path: &Path) -> Result<(), Error> {
        let new;
        let layout = match &self.division {
            Some(division) => &division.layout,
            None => {
                new = Layout::new::<B, M>(model, self.sharding, (self.rank(), self.world()));
                &new
            }
        };
        if layout.parts == 1 && self.rank() != 0 {
            return Ok(());
        }
        let (tensors, places) = self.stored(model, layout);
        let mut metadata = HashMap::from([("steps".to_owned(), self.steps.to_string())]);
        if layout.parts > 1 {
            metadata.insert("places".to_owned(), places.to_string());
        }
        let path = part_of(path, layout.part, layout.parts);
        let wrong = |source| Error::Path { path: path.clone(), source };
        safetensors::serialize_to_file(tensors, Some(metadata), &path).map_err(|e| wrong(std::io::Error::other(e)))?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(wrong)
    }

    /// This rank's tensors, and for each that is a piece where it starts and the shape of the whole.
    fn stored<M: TrainSegments<B>>(&self, model: &M, layout: &Layout) -> (Tensors<B>, serde_json::Value) {
        let weights = self.division.as_ref().and_then(|division| division.weights.as_ref());
        let device = &self.division.as_ref().map(|division| division.device.clone()).unwrap_or_default();
        let mut read = Read::<B::InnerBackend> { values: HashMap::new() };
        model.visit(&mut read);
        let (mut tensors, mut places) = (Vec::new(), serde_json::Map::new());
        for (index, bucket) in layout.trained() {
            let own = match weights {
                Some(weights) => weights.pieces[&index].clone(),
                None => {
                    let cut = |piece: Piece| {
                        let value = read.values[&layout.parameters[piece.parameter].id].clone();
                        let value = bucket::cut(value, &piece, false, device);
                        (piece, value)
                    };
                    layout.pieces(bucket).into_iter().map(cut).collect()
                }
            };
            for (piece, value) in own {
                let parameter = &layout.parameters[piece.parameter];
                let shape = if layout.parts == 1 { parameter.dims.clone() } else { vec![piece.range.len()] };
                let mut add = |name: String, value: Tensor<B::InnerBackend, 1>| {
                    places.insert(name.clone(), json!([piece.range.start, parameter.dims]));
                    tensors.push((name, Stored::Floats(shape.clone(), value)));
                };
                let path = &parameter.path;
                add(path.clone(), value.flatten());
                let Some(moments) = self.moments.get(&parameter.id) else { continue };
                add(format!("{path}.exp_avg"), moments.exp_avg.clone().flatten());
                add(format!("{path}.exp_avg_sq"), moments.exp_avg_sq.clone().flatten());
                tensors.push((format!("{path}.step"), Stored::Step((moments.step as i64).to_le_bytes())));
            }
        }
        (tensors, places.into())
    }

    /// Puts a saved state into the model and this engine: one that was saved here or in a world of another size or another
    /// stage. Call it before the first micro-batch, with a model that has all its weights.
    ///
    /// # Errors
    /// [`Error::Path`] if a file cannot be read, [`Error::State`] if they are not a complete state of this very model: a
    /// parameter that learns is missing or has another shape, or there is one that does not learn; [`Error::Setting`] if
    /// the engine holds the model's weights already.
    pub fn restore<M: TrainSegments<B>>(&mut self, model: M, path: &Path) -> Result<M, Error> {
        if self.division.as_ref().is_some_and(|division| division.weights.is_some()) {
            let (expected, found) =
                ("a model that has all its weights", "one whose weights the engine divided".to_owned());
            return Err(Error::Setting { field: "restore", expected, found });
        }
        let maps = Maps::open(path)?;
        let mut saved = Saved::read(path, &maps)?;
        let layout = Layout::new::<B, M>(&model, self.sharding, (self.rank(), self.world()));
        let mut find = super::FindDevice::<B>(None);
        model.visit(&mut find);
        let device = &find.0.unwrap_or_default();
        let (mut values, mut moments) = (HashMap::new(), HashMap::new());
        for (_, bucket) in layout.trained() {
            for &(index, _) in &bucket.slots {
                let parameter = &layout.parameters[index];
                let (path, dims) = (&parameter.path, &parameter.dims);
                let whole = saved.values(path, dims, 0..parameter.elements())?;
                let value = bucket::from_host::<B::InnerBackend>(&whole, device).reshape(dims);
                values.insert(parameter.id, value.into_dtype(parameter.dtype));
                let piece = layout.pieces(bucket).into_iter().find(|piece| piece.parameter == index);
                let range = piece.map_or(0..0, |piece| piece.range);
                // A parameter that has not been updated yet has no moments.
                let Some(step) = saved.step(&format!("{path}.step"))? else { continue };
                let mut read = |name| saved.values(&format!("{path}.{name}"), dims, range.clone());
                let (exp_avg, exp_avg_sq) = (read("exp_avg")?, read("exp_avg_sq")?);
                if !exp_avg.is_empty() {
                    let (exp_avg, exp_avg_sq) =
                        (bucket::from_host(&exp_avg, device), bucket::from_host(&exp_avg_sq, device));
                    moments.insert(parameter.id, Moments { step, exp_avg, exp_avg_sq });
                }
            }
        }
        saved.all_used()?;
        (self.moments, self.steps) = (moments, saved.steps);
        self.division = None;
        Ok(model.map(&mut Put { values }))
    }
}

type Tensors<B> = Vec<(String, Stored<<B as AutodiffBackend>::InnerBackend>)>;

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

/// The parameters that learn.
struct Read<B: Backend> {
    values: HashMap<ParamId, Value<B>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Read<B::InnerBackend> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if param.is_require_grad() {
            self.values.insert(param.id, Value::new(param.val().inner()));
        }
    }
}
