//! Training checkpoints: everything that is needed to resume bit for bit, in the same world or in another one.

use super::Engine;
use crate::{
    CheckpointError, ConfigError, Error, bucket,
    gather::PutParams,
    host_or_device::HostOrDevice,
    offload::{HostOptimizer, OffloadedStates, StateSnapshot},
    optimizer::OptimizerState,
    segment::{DynTensor, TrainSegments},
    sharding::{ALIGN, ParamShard, Parameter, ShardLayout, Sharding},
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

mod reader;

pub use reader::consolidate;
use reader::{CheckpointReader, MappedFiles};

/// Returns the file of one shard of a sharded checkpoint: `training.safetensors` becomes `training.1-of-4.safetensors`.
fn shard_path(path: &Path, part: usize, parts: usize) -> PathBuf {
    if parts == 1 { path.to_owned() } else { path.with_extension(format!("{part}-of-{parts}.safetensors")) }
}

impl<B: AutodiffBackend> Engine<B> {
    /// Writes every trainable parameter in f32 under its path, and its optimizer state: `<path>.exp_avg`,
    /// `<path>.exp_avg_sq` (f32) and `<path>.step` (i64). Tensors leave the device one at a time. Gradients that were
    /// accumulated since the last step are not saved.
    ///
    /// Every rank calls this with the same path. If optimizer states are sharded, each rank writes its shards,
    /// flattened, into a file of its own next to the path (`training.1-of-4.safetensors`), with the position of each
    /// shard in the metadata; otherwise rank 0 writes everything.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file cannot be written; a partly written file is left for the caller to remove.
    pub fn save<M: TrainSegments<B>>(&self, model: &M, path: &Path) -> Result<(), Error> {
        let new;
        let layout = match &self.sharding_state {
            Some(division) => &division.layout,
            None => {
                new = ShardLayout::new::<B, M>(model, self.sharding, (self.rank(), self.world()));
                &new
            }
        };
        if layout.num_shards == 1 && self.rank() != 0 {
            return Ok(());
        }
        let states = self.host_optimizer.as_ref().map(HostOptimizer::lock_states);
        let (tensors, places) = self.local_tensors(model, layout, states.as_deref())?;
        let mut metadata = HashMap::from([("steps".to_owned(), self.steps.to_string())]);
        if let Some(scaler) = &self.loss_scaler {
            metadata.insert("loss_scaler".to_owned(), json!(scaler).to_string());
        }
        if layout.num_shards > 1 {
            metadata.insert("places".to_owned(), places.to_string());
        }
        let path = shard_path(path, layout.shard_index, layout.num_shards);
        let wrong = |source| Error::Io { path: path.clone(), source };
        safetensors::serialize_to_file(tensors, Some(metadata), &path)
            .map_err(|source| CheckpointError::Safetensors { path: path.clone(), source })?;
        states.map_or(Ok(()), |states| states.check_reads())?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(wrong)
    }

    /// Returns this rank's tensors and, for each tensor, the offset of the shard and the shape of the full tensor.
    fn local_tensors<'a, M: TrainSegments<B>>(
        &'a self,
        model: &M,
        layout: &ShardLayout,
        offload: Option<&'a OffloadedStates>,
    ) -> Result<(CheckpointTensors<'a, B>, serde_json::Value), Error> {
        let weights = self.sharding_state.as_ref().and_then(|division| division.weights.as_ref());
        let device = &self.sharding_state.as_ref().map(|division| division.device.clone()).unwrap_or_default();
        let mut read = TrainableValues::<B::InnerBackend> { values: HashMap::new() };
        model.visit(&mut read);
        let (mut tensors, mut places) = (Vec::new(), serde_json::Map::new());
        for (index, bucket) in layout.trainable_buckets() {
            let own = match weights {
                Some(weights) => weights.read(layout, index, device)?,
                None => {
                    let cut = |shard: ParamShard| {
                        let value = read.values[&layout.parameters[shard.parameter].id].clone();
                        let value = bucket::slice_shard(value, &shard, false, device);
                        (shard, value)
                    };
                    layout.local_param_shards(bucket).into_iter().map(cut).collect()
                }
            };
            for (piece, value) in own {
                let parameter = &layout.parameters[piece.parameter];
                let (id, path, length) = (parameter.id, &parameter.path, piece.range.len());
                let mut add = |name: String, (start, length, dims): (usize, usize, Vec<usize>), source| {
                    places.insert(name.clone(), json!([start, dims]));
                    let shape = if layout.num_shards == 1 { dims } else { vec![length] };
                    tensors.push((name, CheckpointTensor::Floats(shape, source)));
                };
                let place = || (piece.range.start, length, parameter.dims.clone());
                let source = match self.master_weights.get(&id) {
                    Some(HostOrDevice::Host(values)) => TensorSource::Host(values),
                    Some(HostOrDevice::Device(master)) => TensorSource::Device(master.clone().flatten()),
                    None => TensorSource::Device(value.flatten()),
                };
                add(path.clone(), place(), source);
                let state = self.device_states.get(&id);
                let offload = offload.filter(|offload| offload.step(id).is_some());
                for (slot, name) in self.optimizer.slot_names().iter().enumerate() {
                    if let Some(state) = state {
                        add(
                            format!("{path}.{name}"),
                            place(),
                            TensorSource::Device(state.slots[slot].clone().flatten()),
                        );
                    } else if let Some(offload) = offload {
                        add(format!("{path}.{name}"), place(), TensorSource::Offload(offload, id, slot));
                        if let Some(scales) = offload.scales(id, slot) {
                            let scales = Tensor::from_floats(scales, device);
                            let blocks = (piece.range.start / ALIGN, length.div_ceil(ALIGN));
                            let whole = vec![parameter.elements().div_ceil(ALIGN)];
                            add(
                                format!("{path}.{name}_scale"),
                                (blocks.0, blocks.1, whole),
                                TensorSource::Device(scales),
                            );
                        }
                    }
                }
                let step = state.map(|state| state.step).or(offload.and_then(|offload| offload.step(id)));
                if let Some(step) = step {
                    tensors.push((format!("{path}.step"), CheckpointTensor::Step((step as i64).to_le_bytes())));
                }
            }
        }
        Ok((tensors, places.into()))
    }

    /// Loads a checkpoint into the model and this engine; the checkpoint may come from a world of another size or from
    /// another stage. Call it before the first micro-batch, with a model that has all its weights.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read, [`CheckpointError::Mismatch`] if the files are not a complete
    /// checkpoint of this very model (a trainable parameter is missing or has another shape, or the checkpoint contains
    /// a tensor that is not trainable here), and [`ConfigError::InvalidValue`] if the engine has already sharded the
    /// model's weights.
    pub fn restore<M: TrainSegments<B>>(&mut self, model: M, path: &Path) -> Result<M, Error> {
        if self.sharding_state.as_ref().is_some_and(|division| division.weights.is_some()) {
            let (expected, found) =
                ("a model that has all its weights", "a model whose weights the engine has sharded");
            return Err(ConfigError::invalid_value("restore", expected, found).into());
        }
        let maps = MappedFiles::open(path)?;
        let mut saved = CheckpointReader::open(path, &maps)?;
        let layout = ShardLayout::new::<B, M>(&model, self.sharding, (self.rank(), self.world()));
        let mut find = super::FindDevice::<B>(None);
        model.visit(&mut find);
        let device = &find.0.unwrap_or_default();
        let (mut values, mut master_weights, mut states) = (HashMap::new(), HashMap::new(), Vec::new());
        for (_, bucket) in layout.trainable_buckets() {
            for &(index, _) in &bucket.param_offsets {
                let parameter = &layout.parameters[index];
                let dims = &parameter.dims;
                let whole = saved.read_values(&parameter.path, dims, 0..parameter.elements())?;
                let value = bucket::tensor_from_vec::<B::InnerBackend>(whole, device).reshape(dims);
                let shard = layout.local_param_shards(bucket).into_iter().find(|piece| piece.parameter == index);
                if let Some(piece) = shard.as_ref().filter(|_| parameter.dtype != DType::F32) {
                    let master = bucket::slice_shard(value.clone(), piece, true, device);
                    let host = self.host_optimizer.is_some();
                    let held =
                        if host { HostOrDevice::Host(bucket::to_host(master)) } else { HostOrDevice::Device(master) };
                    master_weights.insert(parameter.id, held);
                }
                values.insert(parameter.id, value.into_dtype(parameter.dtype));
                let range = shard.map_or(0..0, |piece| piece.range);
                let state = self.read_optimizer_state(&mut saved, parameter, range)?;
                states.extend(state.map(|state| ((parameter.id, parameter.elements()), state)));
            }
        }
        saved.check_all_read()?;
        self.device_states.clear();
        let mut offload = self.host_optimizer.as_ref().map(HostOptimizer::lock_states);
        offload.iter_mut().for_each(|offload| offload.clear());
        for (place, SavedOptimizerState { step, slots, scales }) in states {
            match &mut offload {
                Some(offload) => {
                    let moments = slots.try_into().unwrap_or_default();
                    offload.restore(place, StateSnapshot { step, moments, scales })?;
                }
                None => {
                    let slots = slots.into_iter().map(|values| bucket::tensor_from_vec(values, device)).collect();
                    self.device_states.insert(place.0, OptimizerState { step, slots });
                }
            }
        }
        drop(offload);
        (self.steps, self.master_weights, self.sharding_state) = (saved.steps, master_weights, None);
        self.loss_scaler = self.loss_scaler.map(|scaler| saved.scaler.unwrap_or(scaler));
        Ok(model.map(&mut PutParams { values }))
    }

    /// Reads the optimizer state of this rank's shard of a parameter; none if the parameter has not been updated yet or
    /// if this rank has no shard of it.
    fn read_optimizer_state(
        &self,
        saved: &mut CheckpointReader,
        parameter: &Parameter,
        range: Range<usize>,
    ) -> Result<Option<SavedOptimizerState>, Error> {
        let path = &parameter.path;
        let Some(step) = saved.read_step(&format!("{path}.step"))? else { return Ok(None) };
        let (mut slots, mut scales) = (Vec::new(), Vec::new());
        for name in self.optimizer.slot_names() {
            slots.push(saved.read_values(&format!("{path}.{name}"), &parameter.dims, range.clone())?);
            let key = format!("{path}.{name}_scale");
            if saved.contains(&key) {
                let dims = [parameter.elements().div_ceil(ALIGN)];
                scales.push(saved.read_values(&key, &dims, range.start / ALIGN..range.end.div_ceil(ALIGN))?);
            }
        }
        let state = SavedOptimizerState { step, slots, scales: scales.try_into().ok() };
        Ok((!range.is_empty()).then_some(state))
    }
}

/// Loads the parameters of a checkpoint into a model without any optimizer state, for a model that is used and not
/// trained further. It does not matter which ranks and which stage wrote the checkpoint.
///
/// # Errors
/// Returns the same errors as [`Engine::restore`].
pub fn restore_weights<B: AutodiffBackend, M: TrainSegments<B>>(model: M, path: &Path) -> Result<M, Error> {
    let maps = MappedFiles::open(path)?;
    let mut saved = CheckpointReader::open(path, &maps)?;
    let layout = ShardLayout::new::<B, M>(&model, Sharding::default(), (0, 1));
    let mut find = super::FindDevice::<B>(None);
    model.visit(&mut find);
    let device = &find.0.unwrap_or_default();
    let mut values = HashMap::new();
    for (index, _) in layout.trainable_buckets().flat_map(|(_, bucket)| &bucket.param_offsets) {
        let parameter = &layout.parameters[*index];
        let whole = saved.read_values(&parameter.path, &parameter.dims, 0..parameter.elements())?;
        let value = bucket::tensor_from_vec::<B::InnerBackend>(whole, device).reshape(&parameter.dims);
        values.insert(parameter.id, value.into_dtype(parameter.dtype));
    }
    Ok(model.map(&mut PutParams { values }))
}

/// The saved optimizer state of a shard.
struct SavedOptimizerState {
    step: usize,
    /// The saved tensors, in the order of [`Optimizer::slot_names`](crate::optimizer::Optimizer::slot_names).
    slots: Vec<Vec<f32>>,
    /// The block scales of 8-bit moments.
    scales: Option<[Vec<f32>; 2]>,
}

type CheckpointTensors<'a, B> = Vec<(String, CheckpointTensor<'a, <B as AutodiffBackend>::InnerBackend>)>;

/// A tensor of a checkpoint that is fetched from device, host or file when it is written.
enum CheckpointTensor<'a, B: Backend> {
    Floats(Vec<usize>, TensorSource<'a, B>),
    Step([u8; 8]),
}

enum TensorSource<'a, B: Backend> {
    Device(Tensor<B, 1>),
    Host(&'a [f32]),
    /// One of the two moments of a shard in host memory or in the offload file.
    Offload(&'a OffloadedStates, ParamId, usize),
}

impl<B: Backend> View for CheckpointTensor<'_, B> {
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
            Self::Floats(_, TensorSource::Device(values)) => {
                Cow::Owned(values.clone().into_data().convert_dtype(DType::F32).as_bytes().to_vec())
            }
            Self::Floats(_, TensorSource::Host(values)) => {
                Cow::Owned(values.iter().flat_map(|value| value.to_le_bytes()).collect())
            }
            Self::Floats(_, TensorSource::Offload(offload, id, slot)) => {
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

/// Collects the values of trainable parameters.
struct TrainableValues<B: Backend> {
    values: HashMap<ParamId, DynTensor<B>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for TrainableValues<B::InnerBackend> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if param.is_require_grad() {
            self.values.insert(param.id, DynTensor::new(param.val().inner()));
        }
    }
}
