//! The configuration of an engine.

use super::{
    Engine, OptimizerStates, ShardingState,
    stages::{Axes, PipelineAxis, PipelineConfig},
};
use crate::{
    ConfigError, Error,
    comm::{Communicator, Solo},
    offload::MemoryTier,
    optimizer::{Optimizer, ParamGroups},
    precision::LossScaler,
    segment::{Checkpointing, Segments, TrainSegments},
    sharding::Sharding,
};
use burn::tensor::backend::AutodiffBackend;

/// The settings of an [`Engine`]. [`EngineConfig::init`] checks them and creates the engine for a model.
///
/// ```
/// use burn_zero::{EngineConfig, MemoryTier, optimizer::AdamW, segment::Checkpointing};
///
/// let config = EngineConfig::new(AdamW::default())
///     .with_max_grad_norm(1.0)
///     .with_checkpointing(Checkpointing::Full)
///     .with_optimizer_states_in(MemoryTier::Host);
/// ```
pub struct EngineConfig {
    settings: EngineSettings,
    communicator: Box<dyn Communicator>,
    pipeline: Option<PipelineConfig>,
    optimizer_tier: MemoryTier,
    weights_tier: MemoryTier,
    loss_scaler: Option<LossScaler>,
}

/// The settings that an engine reads while it trains.
pub(super) struct EngineSettings {
    pub optimizer: Optimizer,
    pub param_groups: ParamGroups,
    pub max_grad_norm: Option<f64>,
    pub checkpointing: Checkpointing,
    pub sharding: Sharding,
    /// True if communication and updates overlap with computation.
    pub overlap: bool,
}

impl EngineConfig {
    /// Returns the default settings: a world of one rank, no clipping, no activation checkpointing, no loss scaling,
    /// and everything on the device.
    pub fn new(optimizer: impl Into<Optimizer>) -> Self {
        Self {
            settings: EngineSettings {
                optimizer: optimizer.into(),
                param_groups: ParamGroups::default(),
                max_grad_norm: None,
                checkpointing: Checkpointing::None,
                sharding: Sharding::default(),
                overlap: true,
            },
            communicator: Box::new(Solo),
            pipeline: None,
            optimizer_tier: MemoryTier::Device,
            weights_tier: MemoryTier::Device,
            loss_scaler: None,
        }
    }

    /// Sets the global norm to which gradients are clipped; with `None` they are not clipped.
    pub fn with_max_grad_norm(mut self, norm: impl Into<Option<f64>>) -> Self {
        self.settings.max_grad_norm = norm.into();
        self
    }

    /// Sets the activation checkpointing.
    pub fn with_checkpointing(mut self, checkpointing: Checkpointing) -> Self {
        self.settings.checkpointing = checkpointing;
        self
    }

    /// Makes the engine one rank of a world.
    pub fn with_communicator(self, communicator: Box<dyn Communicator>) -> Self {
        Self { communicator, ..self }
    }

    /// Divides the model into the stages of a pipeline; the ranks of the world must be a multiple of those of a
    /// pipeline. In a pipeline ZeRO divides among the replicas of a stage.
    pub fn with_pipeline(self, pipeline: PipelineConfig) -> Self {
        Self { pipeline: Some(pipeline), ..self }
    }

    /// Sets what is sharded among the ranks, and the bucket size.
    pub fn with_sharding(mut self, sharding: Sharding) -> Self {
        self.settings.sharding = sharding;
        self
    }

    /// Sets the parameter groups.
    pub fn with_param_groups(mut self, groups: ParamGroups) -> Self {
        self.settings.param_groups = groups;
        self
    }

    /// Keeps the optimizer states in a memory tier; unless that tier is the device, the update runs on the host as
    /// well. 8-bit states are always in host memory.
    pub fn with_optimizer_states_in(self, tier: MemoryTier) -> Self {
        Self { optimizer_tier: tier, ..self }
    }

    /// Keeps this rank's weight shards in a memory tier (DeepSpeed's `offload_param`): in stage 3 the weights are on
    /// the device only while their segment runs. The other stages ignore this setting and hold all weights on the
    /// device.
    pub fn with_weights_in(self, tier: MemoryTier) -> Self {
        Self { weights_tier: tier, ..self }
    }

    /// Adds loss scaling, for computation in f16: the loss weights of a batch must be multiplied by
    /// [`Engine::loss_scale`]. A step whose gradients overflow on any rank is skipped on all ranks.
    pub fn with_loss_scaler(self, scaler: LossScaler) -> Self {
        Self { loss_scaler: Some(scaler), ..self }
    }

    /// Turns the overlap of communication and updates with computation on or off; it is on by default. The results are
    /// the same. Without overlap every collective is waited for where it starts, and the trace shows what that costs.
    pub fn with_overlap(mut self, overlap: bool) -> Self {
        self.settings.overlap = overlap;
        self
    }

    /// Creates the engine, which owns the model from then on. In stage 3 this rank's weight shards are taken out of the
    /// model. The set of trainable parameters is that of `model`; freeze parameters before this call.
    ///
    /// # Errors
    /// Returns [`ConfigError::InvalidValue`] for settings that cannot work and for optimizer states off the device of
    /// an optimizer that cannot run on the host, [`Error::Pipeline`] for a pipeline that does not exist, [`Error::Io`] if
    /// a file of states or weights cannot be created or written, and a communication error if a rank is lost.
    pub fn init<B: AutodiffBackend, M: TrainSegments<B>>(self, model: M) -> Result<Engine<B, M>, Error> {
        let segments = Segments::segments(&model);
        self.build(segments, |sharding, axes, tier| ShardingState::new(model, sharding, axes, tier))
    }

    /// Creates the engine with the model and the sharding that `shard` returns, for a model of so many segments.
    pub(super) fn build<B: AutodiffBackend, M: TrainSegments<B>, E: From<Error>>(
        self,
        segments: usize,
        shard: impl FnOnce(Sharding, Axes<'_>, &MemoryTier) -> Result<(M, ShardingState<B>), E>,
    ) -> Result<Engine<B, M>, E> {
        let Self { settings, communicator, pipeline, optimizer_tier, weights_tier, loss_scaler } = self;
        settings.check()?;
        let pipeline = pipeline.unwrap_or_else(|| PipelineConfig::one_stage(segments));
        pipeline.check(segments, settings.sharding.stage)?;
        let (communicator, pipeline) = PipelineAxis::split(communicator, pipeline)?;
        let rank = pipeline.rank() * communicator.world_size() + communicator.rank();
        let states = OptimizerStates::new(settings.optimizer, &optimizer_tier, &communicator, rank)?;
        let axes = Axes { data: &communicator, pipeline: &pipeline };
        let (model, sharded) = shard(settings.sharding, axes, &weights_tier)?;
        Ok(Engine { model, settings, communicator, pipeline, sharded, states, loss_scaler, steps: 0 })
    }
}

impl EngineSettings {
    fn check(&self) -> Result<(), Error> {
        self.optimizer.check()?;
        match self.max_grad_norm {
            Some(norm) if norm.is_nan() || norm <= 0.0 => {
                let expected = "a number above 0, or none to leave gradients unclipped";
                Err(ConfigError::invalid_value("max_grad_norm", expected, norm.to_string()).into())
            }
            _ => Ok(()),
        }
    }
}
