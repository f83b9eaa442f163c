//! The state of training in files: what it takes to go on bit for bit, in this world or another.

use super::Engine;
use crate::{
    Error, bucket,
    gather::Put,
    held::Held,
    offload::{Desk, Offload, Snapshot},
    optimizer::State,
    partition::{ALIGN, Layout, Parameter, Piece, Sharding},
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
    ops::Range,
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
        let states = self.desk.as_ref().map(Desk::states);
        let (tensors, places) = self.stored(model, layout, states.as_deref())?;
        let mut metadata = HashMap::from([("steps".to_owned(), self.steps.to_string())]);
        if let Some(scaler) = &self.scaler {
            metadata.insert("loss_scaler".to_owned(), json!(scaler).to_string());
        }
        if layout.parts > 1 {
            metadata.insert("places".to_owned(), places.to_string());
        }
        let path = part_of(path, layout.part, layout.parts);
        let wrong = |source| Error::Path { path: path.clone(), source };
        safetensors::serialize_to_file(tensors, Some(metadata), &path).map_err(|e| wrong(std::io::Error::other(e)))?;
        states.map_or(Ok(()), |states| states.check_reads())?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(wrong)
    }

    /// This rank's tensors, and for each that is a piece where it starts and the shape of the whole.
    fn stored<'a, M: TrainSegments<B>>(
        &'a self,
        model: &M,
        layout: &Layout,
        offload: Option<&'a Offload>,
    ) -> Result<(Tensors<'a, B>, serde_json::Value), Error> {
        let weights = self.division.as_ref().and_then(|division| division.weights.as_ref());
        let device = &self.division.as_ref().map(|division| division.device.clone()).unwrap_or_default();
        let mut read = Read::<B::InnerBackend> { values: HashMap::new() };
        model.visit(&mut read);
        let (mut tensors, mut places) = (Vec::new(), serde_json::Map::new());
        for (index, bucket) in layout.trained() {
            let own = match weights {
                Some(weights) => weights.look(layout, index, device)?,
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
                let (id, path, length) = (parameter.id, &parameter.path, piece.range.len());
                let mut add = |name: String, (start, length, dims): (usize, usize, Vec<usize>), source| {
                    places.insert(name.clone(), json!([start, dims]));
                    let shape = if layout.parts == 1 { dims } else { vec![length] };
                    tensors.push((name, Stored::Floats(shape, source)));
                };
                let place = || (piece.range.start, length, parameter.dims.clone());
                let source = match self.masters.get(&id) {
                    Some(Held::Host(values)) => Source::Host(values),
                    Some(Held::Device(master)) => Source::Device(master.clone().flatten()),
                    None => Source::Device(value.flatten()),
                };
                add(path.clone(), place(), source);
                let state = self.states.get(&id);
                let offload = offload.filter(|offload| offload.step(id).is_some());
                for (slot, name) in self.optimizer.slots().iter().enumerate() {
                    if let Some(state) = state {
                        add(format!("{path}.{name}"), place(), Source::Device(state.slots[slot].clone().flatten()));
                    } else if let Some(offload) = offload {
                        add(format!("{path}.{name}"), place(), Source::Offload(offload, id, slot));
                        if let Some(scales) = offload.scales(id, slot) {
                            let scales = Tensor::from_floats(scales, device);
                            let blocks = (piece.range.start / ALIGN, length.div_ceil(ALIGN));
                            let whole = vec![parameter.elements().div_ceil(ALIGN)];
                            add(format!("{path}.{name}_scale"), (blocks.0, blocks.1, whole), Source::Device(scales));
                        }
                    }
                }
                let step = state.map(|state| state.step).or(offload.and_then(|offload| offload.step(id)));
                if let Some(step) = step {
                    tensors.push((format!("{path}.step"), Stored::Step((step as i64).to_le_bytes())));
                }
            }
        }
        Ok((tensors, places.into()))
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
        let (mut values, mut masters, mut states) = (HashMap::new(), HashMap::new(), Vec::new());
        for (_, bucket) in layout.trained() {
            for &(index, _) in &bucket.slots {
                let parameter = &layout.parameters[index];
                let dims = &parameter.dims;
                let whole = saved.values(&parameter.path, dims, 0..parameter.elements())?;
                let value = bucket::from_vec::<B::InnerBackend>(whole, device).reshape(dims);
                let piece = layout.pieces(bucket).into_iter().find(|piece| piece.parameter == index);
                if let Some(piece) = piece.as_ref().filter(|_| parameter.dtype != DType::F32) {
                    let master = bucket::cut(value.clone(), piece, true, device);
                    let host = self.desk.is_some();
                    let held = if host { Held::Host(bucket::to_host(master)) } else { Held::Device(master) };
                    masters.insert(parameter.id, held);
                }
                values.insert(parameter.id, value.into_dtype(parameter.dtype));
                let range = piece.map_or(0..0, |piece| piece.range);
                let state = self.saved_state(&mut saved, parameter, range)?;
                states.extend(state.map(|state| ((parameter.id, parameter.elements()), state)));
            }
        }
        saved.all_used()?;
        self.states.clear();
        let mut offload = self.desk.as_ref().map(Desk::states);
        offload.iter_mut().for_each(|offload| offload.clear());
        for (place, SavedState { step, slots, scales }) in states {
            match &mut offload {
                Some(offload) => {
                    let moments = slots.try_into().unwrap_or_default();
                    offload.restore(place, Snapshot { step, moments, scales })?;
                }
                None => {
                    let slots = slots.into_iter().map(|values| bucket::from_vec(values, device)).collect();
                    self.states.insert(place.0, State { step, slots });
                }
            }
        }
        drop(offload);
        (self.steps, self.masters, self.division) = (saved.steps, masters, None);
        self.scaler = self.scaler.map(|scaler| saved.scaler.unwrap_or(scaler));
        Ok(model.map(&mut Put { values }))
    }

    /// What was saved of this rank's piece of a parameter; none for one that has not been updated yet, or is not this rank's.
    fn saved_state(
        &self,
        saved: &mut Saved,
        parameter: &Parameter,
        range: Range<usize>,
    ) -> Result<Option<SavedState>, Error> {
        let path = &parameter.path;
        let Some(step) = saved.step(&format!("{path}.step"))? else { return Ok(None) };
        let (mut slots, mut scales) = (Vec::new(), Vec::new());
        for name in self.optimizer.slots() {
            slots.push(saved.values(&format!("{path}.{name}"), &parameter.dims, range.clone())?);
            let key = format!("{path}.{name}_scale");
            if saved.has(&key) {
                let dims = [parameter.elements().div_ceil(ALIGN)];
                scales.push(saved.values(&key, &dims, range.start / ALIGN..range.end.div_ceil(ALIGN))?);
            }
        }
        let state = SavedState { step, slots, scales: scales.try_into().ok() };
        Ok((!range.is_empty()).then_some(state))
    }
}

/// Puts the parameters of a saved state into a model, and nothing of what the optimizer remembers: for a model that is to be
/// used, not trained on. Which ranks and which stage have saved it does not matter.
///
/// # Errors
/// As [`Engine::restore`].
pub fn restore_weights<B: AutodiffBackend, M: TrainSegments<B>>(model: M, path: &Path) -> Result<M, Error> {
    let maps = Maps::open(path)?;
    let mut saved = Saved::read(path, &maps)?;
    let layout = Layout::new::<B, M>(&model, Sharding::default(), (0, 1));
    let mut find = super::FindDevice::<B>(None);
    model.visit(&mut find);
    let device = &find.0.unwrap_or_default();
    let mut values = HashMap::new();
    for (index, _) in layout.trained().flat_map(|(_, bucket)| &bucket.slots) {
        let parameter = &layout.parameters[*index];
        let whole = saved.values(&parameter.path, &parameter.dims, 0..parameter.elements())?;
        let value = bucket::from_vec::<B::InnerBackend>(whole, device).reshape(&parameter.dims);
        values.insert(parameter.id, value.into_dtype(parameter.dtype));
    }
    Ok(model.map(&mut Put { values }))
}

/// The state of a piece as it was saved.
struct SavedState {
    step: usize,
    /// In the order of the optimizer's slots.
    slots: Vec<Vec<f32>>,
    /// The scales of 8-bit moments.
    scales: Option<[Vec<f32>; 2]>,
}

type Tensors<'a, B> = Vec<(String, Stored<'a, <B as AutodiffBackend>::InnerBackend>)>;

/// A tensor that is fetched from where it is when it is written.
enum Stored<'a, B: Backend> {
    Floats(Vec<usize>, Source<'a, B>),
    Step([u8; 8]),
}

enum Source<'a, B: Backend> {
    Device(Tensor<B, 1>),
    Host(&'a [f32]),
    /// A moment of a piece.
    Offload(&'a Offload, ParamId, usize),
}

impl<B: Backend> View for Stored<'_, B> {
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
            Self::Floats(_, Source::Device(values)) => {
                Cow::Owned(values.clone().into_data().convert_dtype(DType::F32).as_bytes().to_vec())
            }
            Self::Floats(_, Source::Host(values)) => {
                Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect())
            }
            Self::Floats(_, Source::Offload(offload, id, slot)) => {
                let values = offload.moment(*id, *slot);
                Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect())
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
