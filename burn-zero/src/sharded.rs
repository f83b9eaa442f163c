//! ZeRO for a plain training loop: a wrapper around Burn's optimizers.

use crate::{
    Error, Sharding,
    comm::{Collectives, Communicator, Queue},
    ds_config::Stage,
    engine::FindDevice,
    gather::{Pieces, Place, Store, Whole},
    held::Held,
    partition::{Layout, Piece},
    reduce::Gradients,
    segment::{Gradient, Value},
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

/// Optimizers that update a value by its own gradient and history alone, so that any rank can own any part of a tensor. Muon
/// and L-BFGS look at whole matrices, or at all of them: they are not.
pub trait ElementWise<B: Backend>: SimpleOptimizer<B> {}

impl<B: Backend> ElementWise<B> for AdaGrad {}
impl<B: Backend> ElementWise<B> for Adam {}
impl<B: Backend> ElementWise<B> for AdamW {}
impl<B: Backend> ElementWise<B> for Adan {}
impl<B: Backend> ElementWise<B> for RmsProp {}
impl<B: Backend> ElementWise<B> for Sgd<B> {}

/// One of Burn's optimizers, its states divided among the ranks of a world: stages 0 to 2 of ZeRO. It takes the mean of the
/// ranks' gradients, as DeepSpeed and DDP do.
///
/// A plain loop holds all gradients at once before it hands them over, so stage 2 saves no gradient memory here; the
/// [`Engine`](crate::Engine), which walks the model segment by segment, does, and it alone has stage 3.
///
/// Burn's trait knows no errors: a lost rank is a panic that names it.
///
/// A record holds this rank's pieces as flat tensors: it is loaded by the same rank of a world of the same size.
///
/// An optimizer that is not element-wise does not compile:
///
/// ```
/// # use burn::{backend::{Autodiff, Flex}, optim::AdamW};
/// # use burn_zero::Sharded;
/// fn divided(_: Sharded<AdamW, Autodiff<Flex>>) {}
/// ```
/// ```compile_fail
/// # use burn::{backend::{Autodiff, Flex}, optim::Muon};
/// # use burn_zero::Sharded;
/// fn divided(_: Sharded<Muon<Flex>, Autodiff<Flex>>) {}
/// ```
pub struct Sharded<O, B>
where
    O: ElementWise<B::InnerBackend>,
    B: AutodiffBackend,
{
    optimizer: O,
    sharding: Sharding,
    queue: Arc<Queue>,
    layout: Option<Arc<Layout>>,
    records: HashMap<ParamId, AdaptorRecord<O, B>>,
}

impl<O, B> Clone for Sharded<O, B>
where
    O: ElementWise<B::InnerBackend>,
    B: AutodiffBackend,
{
    fn clone(&self) -> Self {
        let (layout, records) = (self.layout.clone(), self.records.clone());
        Self { optimizer: self.optimizer.clone(), sharding: self.sharding, queue: self.queue.clone(), layout, records }
    }
}

impl<O, B> Sharded<O, B>
where
    O: ElementWise<B::InnerBackend>,
    B: AutodiffBackend,
{
    /// The optimizer as one rank of a world.
    ///
    /// # Errors
    /// [`Error::Setting`] for stage 3.
    pub fn new(optimizer: O, communicator: Box<dyn Communicator>, sharding: Sharding) -> Result<Self, Error> {
        if sharding.stage == Stage::Weights {
            let (expected, found) = ("stage 0, 1 or 2; stage 3 needs the engine", "stage 3".to_owned());
            return Err(Error::Setting { field: "stage", expected, found });
        }
        let queue = Arc::new(Queue::new(communicator));
        Ok(Self { optimizer, sharding, queue, layout: None, records: HashMap::new() })
    }

    fn update<M: AutodiffModule<B>>(&mut self, lr: f64, mut module: M, grads: GradAdaptor) -> Result<M, Error> {
        let queue = self.queue.clone();
        let new = || Arc::new(Layout::of_module::<B, M>(&module, self.sharding, (queue.rank(), queue.world())));
        let layout = self.layout.take().unwrap_or_else(new);
        let mut find = FindDevice::<B>(None);
        module.visit(&mut find);
        let device = &find.0.unwrap_or_default();
        let mut collect = Collect::<B> { grads, path: Vec::new(), found: Vec::new() };
        module.visit(&mut collect);
        let mut gradients = Gradients::new(&layout);
        gradients.add(&layout, collect.found);
        let flags: Vec<u8> = gradients.present().iter().map(|&present| u8::from(present)).collect();
        // Stage 2 reduces as early as stage 1 where all gradients come at once.
        let mut reduced = gradients.finish(&layout, (self.sharding.stage.min(Stage::States), &queue), Some(device))?;
        let all = queue.submit("share", move |group| group.share(&flags)).wait()?;
        let present = |parameter: usize| all.iter().any(|flags| flags.get(parameter).is_some_and(|&flag| flag != 0));
        let share = 1.0 / queue.world() as f64;
        let mut update = |index, pieces: Pieces<B::InnerBackend>| -> Pieces<_> {
            let gradients = reduced.remove(&index).unwrap_or_default();
            let one = |((piece, value), (_, gradient)): ((Piece, Value<_>), (Piece, Option<Held<_>>))| {
                let Some(gradient) = gradient.filter(|_| present(piece.parameter)) else { return (piece, value) };
                let id = layout.parameters[piece.parameter].id;
                let state = self.records.remove(&id).map(AdaptorRecord::into_state::<1>);
                let gradient = gradient.on(device).into_dtype(value.dtype()).tensor::<1>().mul_scalar(share);
                let (value, state) = self.optimizer.step(lr, value.tensor::<1>(), gradient, state);
                self.records.extend(state.map(|state| (id, AdaptorRecord::from_state(state))));
                (piece, Value::new(value))
            };
            pieces.into_iter().zip(gradients).map(one).collect()
        };
        let mut whole = Whole::out_of(&mut module, Place { layout: &layout, queue: &queue, device });
        let done = layout.trained().try_for_each(|(index, _)| {
            let new = update(index, whole.take(index)?);
            whole.put(index, new)
        });
        whole.back_into(&mut module, done)?;
        self.layout = Some(layout);
        Ok(module)
    }

    fn step_or_panic<M: AutodiffModule<B>>(&mut self, lr: f64, module: M, grads: GradAdaptor) -> M {
        let rank = self.queue.rank();
        self.update(lr, module, grads).unwrap_or_else(|error| panic!("rank {rank}: {error}"))
    }
}

impl<M, O, B> Optimizer<M, B> for Sharded<O, B>
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

/// Takes the gradients of a module's parameters.
struct Collect<B: AutodiffBackend> {
    grads: GradAdaptor,
    path: Vec<String>,
    found: Vec<Gradient<B::InnerBackend>>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for Collect<B> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
        if let Some((gradient, _)) = self.grads.remove::<B::InnerBackend, D>(param.id) {
            let (path, value) = (self.path.join("."), Value::new(gradient));
            self.found.push(Gradient { path, id: param.id, value });
        }
    }
}

#[cfg(test)]
mod tests;
