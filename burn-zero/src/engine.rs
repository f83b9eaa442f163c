//! Training steps: micro-batches in, an updated model out, in one process or many.

use crate::{
    Error,
    comm::{self, Collectives, Communicator, Queue, Solo, Trace, Traffic},
    ds_config::Stage,
    estimate::Memory,
    gather::{Put, Weights},
    held::Held,
    offload::{Desk, Offload, Tier},
    optimizer::{Groups, Optimizer, State},
    partition::{Layout, Sharding},
    precision::LossScaler,
    reduce::{Gradients, Peak},
    segment::{Checkpointing, TrainSegments, Value},
};
use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    tensor::{
        Device, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use std::{collections::HashMap, path::Path, sync::Arc};

mod checkpoint;
mod pass;
mod step;
mod update;

pub use checkpoint::{consolidate, restore_weights};

/// What a step found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepReport {
    /// The global L2 norm of the step's gradient, before clipping.
    pub grad_norm: f64,
    /// Whether the gradient was scaled down.
    pub clipped: bool,
    /// Whether nothing was updated because gradients overflowed at this loss scale.
    pub skipped: bool,
}

/// One rank that trains a model. An optimizer step is any number of micro-batches: [`Engine::accumulate`] for each, then
/// [`Engine::step`], or [`Engine::accumulate_and_step`] for the last one, which needs less memory where nothing is clipped.
///
/// Ranks hold the same model and take the same number of micro-batches, each its own. What they hold of gradients, optimizer
/// states and weights is what [`Sharding`] says; what they compute does not depend on it: with one micro-batch per rank and
/// step (and with more, where gradients are divided) the parameters are bit for bit those of one rank that takes the
/// micro-batches of all in the order of ranks.
pub struct Engine<B: AutodiffBackend> {
    optimizer: Optimizer,
    groups: Groups,
    max_grad_norm: Option<f64>,
    checkpointing: Checkpointing,
    sharding: Sharding,
    queue: Arc<Queue>,
    division: Option<Division<B>>,
    /// On the device, by parameter: a rank has at most one piece of each.
    states: HashMap<ParamId, State<B::InnerBackend>>,
    /// Off the device.
    desk: Option<Desk>,
    /// This rank's pieces of weights in half precision, in f32, where the states are.
    masters: HashMap<ParamId, Held<B::InnerBackend>>,
    /// Where this rank's part of the weights is in stage 3.
    weights_tier: Tier,
    scaler: Option<LossScaler>,
    /// Whether communication and updates go on beside computation.
    overlap: bool,
    steps: usize,
}

/// What is known once the model has been seen.
struct Division<B: AutodiffBackend> {
    layout: Layout,
    device: Device<B::InnerBackend>,
    gradients: Gradients<B::InnerBackend>,
    /// Stage 3's.
    weights: Option<Weights<B::InnerBackend>>,
}

impl<B: AutodiffBackend> Division<B> {
    /// The gradients so far; from here on the next step's are gathered.
    fn take_gradients(&mut self) -> Gradients<B::InnerBackend> {
        let mut fresh = Gradients::new(&self.layout);
        fresh.peak = self.gradients.peak;
        std::mem::replace(&mut self.gradients, fresh)
    }
}

impl<B: AutodiffBackend> Engine<B> {
    /// An engine in a world of one. `max_grad_norm` is the global norm that gradients are clipped to, if any.
    pub fn new(optimizer: impl Into<Optimizer>, max_grad_norm: Option<f64>, checkpointing: Checkpointing) -> Self {
        Self {
            optimizer: optimizer.into(),
            groups: Groups::default(),
            max_grad_norm,
            checkpointing,
            sharding: Sharding::default(),
            queue: Arc::new(Queue::new(Box::new(Solo))),
            division: None,
            states: HashMap::new(),
            desk: None,
            masters: HashMap::new(),
            weights_tier: Tier::Device,
            scaler: None,
            overlap: true,
            steps: 0,
        }
    }

    /// The engine as one rank of a world.
    pub fn in_world(self, communicator: Box<dyn Communicator>, sharding: Sharding) -> Self {
        Self { sharding, queue: Arc::new(Queue::new(communicator)), ..self }
    }

    /// The engine with other groups of parameters than [`Groups::default`].
    pub fn with_groups(self, groups: Groups) -> Self {
        Self { groups, ..self }
    }

    /// The engine with optimizer states in a tier, and their update on the host where that is not the device. Call it after
    /// [`Engine::in_world`]: a file is a rank's own. States of 8 bits are always on the host, so an engine with
    /// [`Optimizer::AdamW8bit`] needs this.
    ///
    /// # Errors
    /// [`Error::Setting`] for settings that cannot work and for an optimizer that the host cannot compute, [`Error::Path`] if
    /// the file cannot be made.
    pub fn with_states_in(self, tier: &Tier) -> Result<Self, Error> {
        self.optimizer.check()?;
        let device = *tier == Tier::Device && !matches!(self.optimizer, Optimizer::AdamW8bit(_));
        let offload = || Offload::new(self.optimizer, tier, self.queue.rank());
        let desk = if device { None } else { Some(Desk::new(offload()?, &self.queue)) };
        Ok(Self { desk, ..self })
    }

    /// The engine with this rank's part of the weights in a tier (DeepSpeed's `offload_param`): in stage 3 they are on the
    /// device only while their segment runs. The other stages hold all weights on the device and look away.
    pub fn with_weights_in(self, tier: Tier) -> Self {
        Self { weights_tier: tier, ..self }
    }

    /// The engine with a loss scale, for computation in f16: the loss weights of a batch must be multiplied by
    /// [`Engine::loss_scale`]. A step whose gradients overflow on any rank is skipped on all.
    pub fn with_loss_scaler(self, scaler: LossScaler) -> Self {
        Self { scaler: Some(scaler), ..self }
    }

    /// The engine with or without communication and updates beside computation: with, unless this says otherwise. The numbers
    /// are the same; without, every collective is waited for where it starts, and the trace shows what that costs.
    pub fn with_overlap(self, overlap: bool) -> Self {
        Self { overlap, ..self }
    }

    /// What the loss is multiplied by in the next micro-batch; 1 without a scaler.
    pub fn loss_scale(&self) -> f64 {
        self.scaler.map_or(1.0, |scaler| scaler.scale())
    }

    /// Looks at the model for the first time: divides it, and in stage 3 takes this rank's part of the weights.
    fn divide<M: TrainSegments<B>>(&mut self, model: &mut M) -> Result<(), Error> {
        if self.division.is_some() {
            return Ok(());
        }
        let layout = Layout::new::<B, M>(model, self.sharding, (self.queue.rank(), self.queue.world()));
        let mut find = FindDevice::<B>(None);
        model.visit(&mut find);
        let device = find.0.unwrap_or_default();
        let gradients = Gradients::new(&layout);
        let mut weights = None;
        if self.sharding.stage == Stage::Weights {
            let (shell, cut) = Weights::cut(model.clone(), &layout, (&device, &self.weights_tier))?;
            *model = shell;
            weights = Some(cut);
        }
        self.division = Some(Division { layout, device, gradients, weights });
        Ok(())
    }

    /// Lets `look` see the model with all its weights: to evaluate, to save it. In stage 3 they are gathered for it; every rank
    /// must call this.
    ///
    /// # Errors
    /// As [`Engine::accumulate`].
    pub fn with_whole<M: TrainSegments<B>, R>(&mut self, model: &M, look: impl FnOnce(&M) -> R) -> Result<R, Error> {
        let Some(Division { layout, device, weights: Some(weights), .. }) = &self.division else {
            return Ok(look(model));
        };
        let mut values = HashMap::new();
        for (index, bucket) in layout.buckets.iter().enumerate() {
            let whole = weights.gather(layout, index, &self.queue).wait(layout, bucket, device)?;
            values.extend(whole.into_iter().map(|(parameter, value)| (layout.parameters[parameter].id, value)));
        }
        Ok(look(&model.clone().map(&mut Put { values })))
    }

    /// The sums over ranks of a few numbers, added in the order of ranks; every rank must call this.
    ///
    /// # Errors
    /// As [`Engine::accumulate`].
    pub fn sum_over_ranks(&self, numbers: &[f64]) -> Result<Vec<f64>, Error> {
        let note: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        let notes = self.queue.submit("share", move |group| group.share(&note)).wait()?;
        let mut sums = vec![0.0; numbers.len()];
        for note in notes {
            let numbers =
                note.chunks_exact(8).map(|b| f64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]));
            sums.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
        }
        Ok(sums)
    }

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// As [`Engine::accumulate`].
    pub fn barrier(&self) -> Result<(), Error> {
        self.queue.submit("barrier", |group| group.barrier()).wait()
    }

    /// The number of steps taken.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// This rank's number.
    pub fn rank(&self) -> usize {
        self.queue.rank()
    }

    /// The number of ranks that train together.
    pub fn world(&self) -> usize {
        self.queue.world()
    }

    /// What this rank has sent.
    pub fn traffic(&self) -> Traffic {
        self.queue.traffic()
    }

    /// When this rank computed, communicated and waited.
    pub fn trace(&self) -> &Trace {
        self.queue.trace()
    }

    /// Writes the timelines of all ranks into one file, as `chrome://tracing` and Perfetto read them; every rank must call this,
    /// the first one writes.
    ///
    /// # Errors
    /// [`Error::Path`] if the file cannot be written, else as [`Engine::accumulate`].
    pub fn write_trace(&self, path: &Path) -> Result<(), Error> {
        let own = serde_json::Value::from(self.trace().events(self.rank())).to_string();
        let all = self.queue.submit("share", move |group| group.share(own.as_bytes())).wait()?;
        if self.rank() != 0 {
            return Ok(());
        }
        let events = all.iter().filter_map(|own| serde_json::from_slice::<Vec<serde_json::Value>>(own).ok());
        comm::write_events(path, &events.flatten().collect::<Vec<_>>())
    }

    /// The most bytes of passing things that were alive at a time, counted from their buffers.
    pub fn peak(&self) -> Peak {
        self.division.as_ref().map_or_else(Peak::default, |division| division.gradients.peak)
    }

    /// Bytes of what this rank holds between two computations, counted from the buffers: weights, gradients that have been
    /// accumulated, masters, moments; under `host` what is off the device.
    pub fn memory<M: Module<B>>(&self, model: &M) -> Memory {
        let mut count = CountWeights::default();
        model.visit(&mut count);
        let (mut parameters, mut frozen, mut gradients) = (count.trained, count.frozen, 0);
        let mut host = self.desk.as_ref().map_or(0, |desk| desk.states().bytes());
        if let Some(division) = &self.division {
            // With the states on the host gradients are there too, once they have been reduced.
            let (whole, parts) = division.gradients.bytes_by_place();
            (gradients, host) = if self.desk.is_some() { (whole, host + parts) } else { (whole + parts, host) };
            for (trainable, count) in [(true, &mut parameters), (false, &mut frozen)] {
                let weights = division.weights.as_ref();
                let (there, here) = weights.map_or((0, 0), |weights| weights.bytes(&division.layout, trainable));
                (*count, host) = (*count + there, host + here);
            }
        }
        let moments: usize = self.states.values().flat_map(|state| &state.slots).map(Value::bytes).sum();
        let masters = self.masters.values().map(Held::bytes).fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
        let (master, host) = (masters.0, (host + masters.1) as u64);
        let (parameters, frozen, gradients, moments) =
            (parameters as u64, frozen as u64, gradients as u64, moments as u64);
        Memory { parameters, frozen, gradients, master: master as u64, moments, host, ..Memory::default() }
    }
}

pub(crate) struct FindDevice<B: Backend>(pub Option<B::Device>);

impl<B: AutodiffBackend> ModuleVisitor<B> for FindDevice<B> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        self.0.get_or_insert_with(|| param.val().device());
    }
}

/// Bytes of float parameters; each once, however many modules share it.
#[derive(Default)]
struct CountWeights {
    trained: usize,
    frozen: usize,
    seen: std::collections::HashSet<ParamId>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for CountWeights {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if self.seen.insert(param.id) {
            let value = param.val();
            let bytes = Value::new(value.clone().inner()).bytes();
            *if value.is_require_grad() { &mut self.trained } else { &mut self.frozen } += bytes;
        }
    }
}

#[cfg(test)]
mod tests;
