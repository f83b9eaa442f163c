//! ZeRO for a plain training loop: a wrapper around the optimizers of Burn.

use crate::{
    ConfigError, Error, Sharding,
    comm::{AsyncCommunicator, Collectives, Communicator},
    gather::{ReplicatedModel, ShardContext, ShardTensors, WeightStore},
    host_or_device::HostOrDevice,
    reduce::GradientReducer,
    segment::{DynTensor, Gradient},
    sharding::{ParamShard, RankInfo, ShardLayout, device_of},
    stage::ZeroStage,
};
use burn::{
    module::{AutodiffModule, ModuleVisitor, Param, ParamId},
    optim::{
        AdaGrad, Adam, AdamW, Adan, GradientsParams, LearningRate, MultiGradientsParams, Optimizer, RmsProp, Sgd,
        SimpleOptimizer,
        adaptor::{GradAdaptor, OptimizerAdaptor},
        record::AdaptorRecord,
    },
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use std::{collections::HashMap, sync::Arc};

/// Marks optimizers that update a value from its own gradient and state alone, so that any rank can own any part of a
/// tensor. Muon and L-BFGS are not element-wise: they work on whole matrices or on all parameters together.
pub trait ElementWise<B: Backend>: SimpleOptimizer<B> {}

impl<B: Backend> ElementWise<B> for AdaGrad {}
impl<B: Backend> ElementWise<B> for Adam {}
impl<B: Backend> ElementWise<B> for AdamW {}
impl<B: Backend> ElementWise<B> for Adan {}
impl<B: Backend> ElementWise<B> for RmsProp {}
impl<B: Backend> ElementWise<B> for Sgd<B> {}

/// One of Burn's optimizers with its states sharded among the ranks of a world: ZeRO stages 0 to 2. It averages
/// gradients over the ranks, as DeepSpeed and DDP do.
///
/// A plain training loop holds all gradients at once before it passes them on, so stage 2 saves no gradient memory
/// here. The [`Engine`](crate::Engine) runs the backward pass segment by segment and does save it; only the engine has
/// stage 3.
///
/// Burn's optimizer trait cannot return errors: if a rank is lost, the optimizer panics with a message that names it.
///
/// A record holds this rank's shards as flat tensors; it must be loaded by the same rank of a world of the same size.
///
/// An optimizer that is not element-wise does not compile:
///
/// ```
/// # use burn::{backend::{Autodiff, Flex}, optim::AdamW};
/// # use burn_zero::ShardedOptimizer;
/// fn sharded(_: ShardedOptimizer<AdamW, Autodiff<Flex>>) {}
/// ```
/// ```compile_fail
/// # use burn::{backend::{Autodiff, Flex}, optim::Muon};
/// # use burn_zero::ShardedOptimizer;
/// fn sharded(_: ShardedOptimizer<Muon<Flex>, Autodiff<Flex>>) {}
/// ```
pub struct ShardedOptimizer<O, B>
where
    O: ElementWise<B::InnerBackend>,
    B: AutodiffBackend,
{
    optimizer: O,
    sharding: Sharding,
    communicator: Arc<AsyncCommunicator>,
    layout: Option<Arc<ShardLayout>>,
    records: HashMap<ParamId, AdaptorRecord<O, B>>,
}

impl<O, B> Clone for ShardedOptimizer<O, B>
where
    O: ElementWise<B::InnerBackend>,
    B: AutodiffBackend,
{
    fn clone(&self) -> Self {
        let (layout, records) = (self.layout.clone(), self.records.clone());
        Self {
            optimizer: self.optimizer.clone(),
            sharding: self.sharding,
            communicator: self.communicator.clone(),
            layout,
            records,
        }
    }
}

impl<O, B> ShardedOptimizer<O, B>
where
    O: ElementWise<B::InnerBackend>,
    B: AutodiffBackend,
{
    /// Wraps an optimizer as one rank of a world.
    ///
    /// # Errors
    /// Returns [`ConfigError::InvalidValue`] for stage 3.
    pub fn new(optimizer: O, communicator: Box<dyn Communicator>, sharding: Sharding) -> Result<Self, Error> {
        if sharding.stage == ZeroStage::Weights {
            let expected = "stage 0, 1 or 2; stage 3 needs the engine";
            return Err(ConfigError::invalid_value("stage", expected, "stage 3").into());
        }
        let communicator = Arc::new(AsyncCommunicator::new(communicator));
        Ok(Self { optimizer, sharding, communicator, layout: None, records: HashMap::new() })
    }

    fn try_step<M: AutodiffModule<B>>(&mut self, lr: f64, mut module: M, grads: GradAdaptor) -> Result<M, Error> {
        let communicator = self.communicator.clone();
        let rank = RankInfo::from(communicator.as_ref());
        let new = || Arc::new(ShardLayout::for_module::<B, M>(&module, self.sharding, rank));
        let layout = self.layout.take().unwrap_or_else(new);
        let device = &device_of::<B, M>(&module);
        let mut collect = ModuleGradientCollector::<B> { grads, path: Vec::new(), gradients: Vec::new() };
        module.visit(&mut collect);
        let mut gradients = GradientReducer::new(&layout);
        gradients.accumulate(&layout, collect.gradients);
        let flags: Vec<u8> = gradients.has_gradient().iter().map(|&present| u8::from(present)).collect();
        // All gradients arrive at once, so stage 2 is the same as stage 1 here.
        let stage = self.sharding.stage.min(ZeroStage::OptimizerStates);
        let mut reduced = gradients.finish(&layout, stage, &communicator, Some(device))?;
        let all = communicator.submit("share", move |group| group.all_gather_object(&flags)).wait()?;
        let present = |parameter: usize| all.iter().any(|flags| flags.get(parameter).is_some_and(|&flag| flag != 0));
        let share = 1.0 / communicator.world_size() as f64;
        let mut update = |index, shards: ShardTensors<B::InnerBackend>| -> ShardTensors<_> {
            let gradients = reduced.remove(&index).unwrap_or_default();
            let one = |((shard, value), (_, gradient)): (
                (ParamShard, DynTensor<_>),
                (ParamShard, Option<HostOrDevice<_>>),
            )| {
                let Some(gradient) = gradient.filter(|_| present(shard.parameter)) else { return (shard, value) };
                let id = layout.parameters[shard.parameter].id;
                let state = self.records.remove(&id).map(AdaptorRecord::into_state::<1>);
                let gradient = gradient.into_device(device).into_dtype(value.dtype()).tensor::<1>().mul_scalar(share);
                let (value, state) = self.optimizer.step(lr, value.tensor::<1>(), gradient, state);
                self.records.extend(state.map(|state| (id, AdaptorRecord::from_state(state))));
                (shard, DynTensor::new(value))
            };
            shards.into_iter().zip(gradients).map(one).collect()
        };
        let context = ShardContext { layout: &layout, communicator: &communicator, device };
        let mut replicated = ReplicatedModel::take_from(&mut module, context);
        let done = layout.trainable_buckets().try_for_each(|(index, _)| {
            let new = update(index, replicated.take(index)?);
            replicated.put(index, new)
        });
        replicated.put_back(&mut module, done)?;
        self.layout = Some(layout);
        Ok(module)
    }

    fn step_or_panic<M: AutodiffModule<B>>(&mut self, lr: f64, module: M, grads: GradAdaptor) -> M {
        let rank = self.communicator.rank();
        self.try_step(lr, module, grads).unwrap_or_else(|error| panic!("rank {rank}: {error}"))
    }
}

impl<M, O, B> Optimizer<M, B> for ShardedOptimizer<O, B>
where
    M: AutodiffModule<B>,
    O: ElementWise<B::InnerBackend>,
    B: AutodiffBackend,
{
    type Record = <OptimizerAdaptor<O, M, B> as Optimizer<M, B>>::Record;

    fn step(&mut self, lr: LearningRate, module: M, grads: GradientsParams) -> M {
        self.step_or_panic(lr, module, grads.into())
    }

    fn step_multi(&mut self, lr: LearningRate, module: M, grads: MultiGradientsParams) -> M {
        self.step_or_panic(lr, module, grads.into())
    }

    fn to_record(&self) -> Self::Record {
        self.records.iter().map(|(&id, record)| (id, record.clone())).collect()
    }

    fn load_record(mut self, record: Self::Record) -> Self {
        self.records = record.into_iter().collect();
        self
    }
}

/// Collects the gradients of a module's parameters.
struct ModuleGradientCollector<B: AutodiffBackend> {
    grads: GradAdaptor,
    path: Vec<String>,
    gradients: Vec<Gradient<B::InnerBackend>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for ModuleGradientCollector<B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some((gradient, _)) = self.grads.remove::<B::InnerBackend, D>(param.id) {
            let (path, value) = (self.path.join("."), DynTensor::new(gradient));
            self.gradients.push(Gradient { path, id: param.id, value });
        }
    }
}

#[cfg(test)]
mod tests;
