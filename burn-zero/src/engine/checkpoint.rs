//! Training checkpoints: everything that is needed to resume bit for bit, in the same world or in another one.

use super::{Engine, OptimizerStates, ShardingState};
use crate::{
    CheckpointError, Error, bucket,
    gather::{PutParams, ShardContext, ShardTensors, WeightStore},
    host_or_device::HostOrDevice,
    offload::{HostOptimizer, OffloadedStates, ParamRef, StateSnapshot},
    optimizer::OptimizerState,
    precision::LossScaler,
    reduce::GradientReducer,
    segment::{DynTensor, TrainSegments},
    sharding::{ALIGN, Bucket, ParamShard, Parameter, RankInfo, ShardLayout, Sharding, device_of},
};
use burn::{
    module::ParamId,
    tensor::{
        DType, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use serde_json::json;
use std::{
    collections::HashMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

mod place;
mod reader;
mod tensors;

pub use reader::consolidate;
use reader::{CheckpointReader, MappedFiles};
use tensors::{CheckpointTensor, CheckpointTensors, TensorSource, TrainableValues, le_bytes};

/// Returns the file of one shard of a sharded checkpoint: `training.safetensors` becomes `training.1-of-4.safetensors`.
fn shard_path(path: &Path, part: usize, parts: usize) -> PathBuf {
    if parts == 1 { path.to_owned() } else { path.with_extension(format!("{part}-of-{parts}.safetensors")) }
}

/// Returns the metadata of a checkpoint file.
fn metadata(steps: usize, scaler: Option<LossScaler>) -> HashMap<String, String> {
    let mut metadata = HashMap::from([("steps".to_owned(), steps.to_string())]);
    metadata.extend(scaler.map(|scaler| ("loss_scaler".to_owned(), json!(scaler).to_string())));
    metadata
}

impl<B: AutodiffBackend, M: TrainSegments<B>> Engine<B, M> {
    /// Writes every trainable parameter in f32 under its path, and its optimizer state: `<path>.exp_avg`,
    /// `<path>.exp_avg_sq` (f32) and `<path>.step` (i64). Tensors leave the device one at a time. Gradients that were
    /// accumulated since the last step are not saved.
    ///
    /// Every rank calls this with the same path. If optimizer states are sharded, or in a pipeline, each rank writes what
    /// it updates into a file of its own next to the path (`training.1-of-4.safetensors`), shards flattened, with the
    /// place of each tensor in the metadata; otherwise rank 0 writes everything. Of several ranks that hold the same, the
    /// first writes it.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the file cannot be written; a partly written file is left for the caller to remove.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        let (layout, stages) = (&self.sharded.layout, self.pipeline.communicator.world_size());
        if layout.num_shards == 1 && self.replica() != 0 {
            return Ok(());
        }
        let (part, parts) = (self.pipeline.rank() * layout.num_shards + layout.shard_index, stages * layout.num_shards);
        let states = self.states.host.as_ref().map(HostOptimizer::lock_states);
        let CheckpointTensors { tensors, places, .. } = self.local_tensors(states.as_deref())?;
        let mut metadata = metadata(self.steps, self.loss_scaler);
        if parts > 1 {
            metadata.insert("places".to_owned(), serde_json::Value::from(places).to_string());
        }
        let path = shard_path(path, part, parts);
        let wrong = |source| Error::Io { path: path.clone(), source };
        safetensors::serialize_to_file(tensors, Some(metadata), &path)
            .map_err(|source| CheckpointError::Safetensors { path: path.clone(), source })?;
        states.map_or(Ok(()), |states| states.check_reads())?;
        File::open(&path).and_then(|file| file.sync_all()).map_err(wrong)
    }

    /// Returns this rank's tensors.
    fn local_tensors<'a>(
        &'a self,
        offloaded: Option<&'a OffloadedStates>,
    ) -> Result<CheckpointTensors<'a, B::InnerBackend>, Error> {
        let ShardingState { layout, device, weights, .. } = &self.sharded;
        let mut resident = TrainableValues::<B::InnerBackend> { values: HashMap::new() };
        self.model.visit(&mut resident);
        let (tensors, places) = (Vec::new(), serde_json::Map::new());
        let mut found = CheckpointTensors { tensors, places, num_shards: layout.num_shards };
        for (index, bucket) in layout.trainable_buckets() {
            let shards = match weights {
                Some(weights) => weights.read(layout, index, device)?,
                None => {
                    let slice = |shard: ParamShard| {
                        let value = resident.values[&layout.parameters[shard.parameter].id].clone();
                        let value = bucket::slice_shard(value, &shard, false, device);
                        (shard, value)
                    };
                    layout.local_param_shards(bucket).into_iter().map(slice).collect()
                }
            };
            for (shard, value) in shards {
                let parameter = &layout.parameters[shard.parameter];
                let value = match self.states.master_weights.get(&parameter.id) {
                    Some(HostOrDevice::Host(values)) => TensorSource::Host(values),
                    Some(HostOrDevice::Device(master)) => TensorSource::Device(master.clone().flatten()),
                    None => TensorSource::Device(value.flatten()),
                };
                found.add(parameter.path.clone(), &shard.range, parameter.dims.clone(), value);
                self.add_optimizer_state(&mut found, parameter, &shard.range, offloaded);
            }
        }
        Ok(found)
    }

    /// Adds the optimizer state of this rank's shard of a parameter, which has the values `range`.
    fn add_optimizer_state<'a>(
        &'a self,
        found: &mut CheckpointTensors<'a, B::InnerBackend>,
        parameter: &Parameter,
        range: &Range<usize>,
        offloaded: Option<&'a OffloadedStates>,
    ) {
        let Parameter { id, path, dims, .. } = parameter;
        let state = self.states.device.get(id);
        let offloaded = offloaded.filter(|offloaded| offloaded.step(*id).is_some());
        for (slot, name) in self.settings.optimizer.slot_names().iter().enumerate() {
            let name = format!("{path}.{name}");
            if let Some(state) = state {
                let values = TensorSource::Device(state.slots[slot].clone().flatten());
                found.add(name, range, dims.clone(), values);
            } else if let Some(offloaded) = offloaded {
                found.add(name.clone(), range, dims.clone(), TensorSource::Offload(offloaded, *id, slot));
                if let Some(scales) = offloaded.scales(*id, slot) {
                    let scales = Tensor::from_floats(scales, &self.sharded.device);
                    let dims = vec![parameter.elements().div_ceil(ALIGN)];
                    found.add(format!("{name}_scale"), &blocks(range), dims, TensorSource::Device(scales));
                }
            }
        }
        let step = state.map(|state| state.step).or(offloaded.and_then(|offloaded| offloaded.step(*id)));
        if let Some(step) = step {
            let step = CheckpointTensor::Step((step as i64).to_le_bytes());
            found.tensors.push((format!("{path}.step"), step));
        }
    }

    /// Loads a checkpoint into the model and this engine; the checkpoint may come from a world of another size, with
    /// another stage or another pipeline. Accumulated gradients are dropped.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if a file cannot be read, and [`CheckpointError::Mismatch`] if the files are not a
    /// complete checkpoint of this very model (a trainable parameter is missing or has another shape, or the checkpoint
    /// contains a tensor that is not trainable here); the engine is unchanged then. Returns [`Error::Io`] also if
    /// states or weights cannot be written to their files.
    pub fn restore(&mut self, path: &Path) -> Result<(), Error> {
        let maps = MappedFiles::open(path)?;
        let mut saved = CheckpointReader::open(path, &maps)?;
        let mut restored =
            RestoredState { values: HashMap::new(), weight_shards: Vec::new(), master: HashMap::new(), states: vec![] };
        for (index, bucket) in self.sharded.layout.trainable_buckets() {
            self.read_bucket(&mut saved, index, bucket, &mut restored)?;
        }
        self.read_other_stages(&mut saved, &mut restored)?;
        saved.check_all_read()?;
        let RestoredState { values, weight_shards, master, states } = restored;
        let ShardingState { layout, device, weights, reducer, .. } = &mut self.sharded;
        self.states.replace(states, device)?;
        self.states.master_weights = master;
        *reducer = GradientReducer::new(layout);
        self.steps = saved.steps;
        self.loss_scaler = self.loss_scaler.map(|scaler| saved.scaler.unwrap_or(scaler));
        let context = ShardContext { layout, communicator: &self.communicator, device };
        match weights {
            Some(weights) => {
                let mut store = weights.as_store(context);
                weight_shards.into_iter().try_for_each(|(index, shards)| store.put(index, shards))?;
            }
            None => self.model = self.model.clone().map(&mut PutParams { values }),
        }
        Ok(())
    }

    /// Reads the parameters of a bucket, and this rank's optimizer states of them.
    fn read_bucket(
        &self,
        saved: &mut CheckpointReader,
        index: usize,
        bucket: &Bucket,
        restored: &mut RestoredState<B::InnerBackend>,
    ) -> Result<(), Error> {
        let ShardingState { layout, device, weights, .. } = &self.sharded;
        let mut shards = layout.local_param_shards(bucket).into_iter().peekable();
        let mut weight_shards = Vec::new();
        for parameter_index in bucket.parameters() {
            let parameter = &layout.parameters[parameter_index];
            let full: DynTensor<B::InnerBackend> = saved.read_parameter(parameter, device)?;
            let shard = shards.next_if(|shard| shard.parameter == parameter_index);
            if let Some(shard) = shard.as_ref().filter(|_| parameter.dtype != DType::F32) {
                let master = bucket::slice_shard(full.clone(), shard, true, device);
                let on_host = self.states.host.is_some();
                let master =
                    if on_host { HostOrDevice::Host(bucket::to_host(master)) } else { HostOrDevice::Device(master) };
                restored.master.insert(parameter.id, master);
            }
            let range = shard.as_ref().map_or(0..0, |shard| shard.range.clone());
            let state = self.read_optimizer_state(saved, parameter, range)?;
            let reference = ParamRef { id: parameter.id, elements: parameter.elements() };
            restored.states.extend(state.map(|state| (reference, state)));
            let value = full.into_dtype(parameter.dtype);
            if weights.is_none() {
                restored.values.insert(parameter.id, value);
            } else if let Some(shard) = shard {
                let value = bucket::slice_shard(value, &shard, true, device);
                weight_shards.push((shard, value));
            }
        }
        restored.weight_shards.push((index, weight_shards));
        Ok(())
    }

    /// Reads the parameters that this rank uses and another rank of the pipeline updates, and leaves out those that it
    /// does not use.
    fn read_other_stages(
        &self,
        saved: &mut CheckpointReader,
        restored: &mut RestoredState<B::InnerBackend>,
    ) -> Result<(), Error> {
        let ShardingState { layout, device, .. } = &self.sharded;
        let others = layout.parameters.iter().filter(|parameter| parameter.trainable && parameter.chunk.is_none());
        for parameter in others {
            if parameter.segments.iter().any(|&segment| self.pipeline.own_chunk(segment).is_some()) {
                let value: DynTensor<B::InnerBackend> = saved.read_parameter(parameter, device)?;
                restored.values.insert(parameter.id, value.into_dtype(parameter.dtype));
            }
            saved.skip(&parameter.path);
        }
        Ok(())
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
        for name in self.settings.optimizer.slot_names() {
            slots.push(saved.read_values(&format!("{path}.{name}"), &parameter.dims, range.clone())?);
            let key = format!("{path}.{name}_scale");
            if saved.contains(&key) {
                let dims = [parameter.elements().div_ceil(ALIGN)];
                scales.push(saved.read_values(&key, &dims, blocks(&range))?);
            }
        }
        let state = SavedOptimizerState { step, slots, scales: scales.try_into().ok() };
        Ok((!range.is_empty()).then_some(state))
    }
}

impl<B: AutodiffBackend> OptimizerStates<B> {
    /// Replaces all optimizer states.
    fn replace(&mut self, states: Vec<(ParamRef, SavedOptimizerState)>, device: &B::Device) -> Result<(), Error> {
        self.device.clear();
        let mut host = self.host.as_ref().map(HostOptimizer::lock_states);
        host.iter_mut().for_each(|host| host.clear());
        for (parameter, SavedOptimizerState { step, slots, scales }) in states {
            match &mut host {
                Some(host) => {
                    let moments = slots.try_into().unwrap_or_default();
                    host.restore(parameter, StateSnapshot { step, moments, scales })?;
                }
                None => {
                    let slots = slots.into_iter().map(|values| bucket::tensor_from_vec(values, device)).collect();
                    self.device.insert(parameter.id, OptimizerState { step, slots });
                }
            }
        }
        Ok(())
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
    let layout = ShardLayout::new::<B, M>(&model, Sharding::default(), RankInfo { rank: 0, world: 1 }, |_| Some(0));
    let (device, mut values) = (device_of::<B, M>(&model), HashMap::new());
    for index in layout.trainable_buckets().flat_map(|(_, bucket)| bucket.parameters()) {
        let parameter = &layout.parameters[index];
        let value: DynTensor<B::InnerBackend> = saved.read_parameter(parameter, &device)?;
        values.insert(parameter.id, value.into_dtype(parameter.dtype));
    }
    Ok(model.map(&mut PutParams { values }))
}

/// Returns the blocks that contain the values `range` of a parameter.
fn blocks(range: &Range<usize>) -> Range<usize> {
    range.start / ALIGN..range.end.div_ceil(ALIGN)
}

/// The contents of a checkpoint that belong to one rank.
struct RestoredState<B: Backend> {
    /// Full parameters; empty in stage 3.
    values: HashMap<ParamId, DynTensor<B>>,
    /// The weight shards of stage 3, by bucket; without tensors in the other stages.
    weight_shards: Vec<(usize, ShardTensors<B>)>,
    /// The master weights of half-precision parameters.
    master: HashMap<ParamId, HostOrDevice<B>>,
    states: Vec<(ParamRef, SavedOptimizerState)>,
}

/// The saved optimizer state of a shard.
struct SavedOptimizerState {
    step: usize,
    /// The saved tensors, in the order of [`Optimizer::slot_names`](crate::optimizer::Optimizer::slot_names).
    slots: Vec<Vec<f32>>,
    /// The block scales of 8-bit moments.
    scales: Option<[Vec<f32>; 2]>,
}
