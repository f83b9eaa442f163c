//! The peak memory of one rank of a run.

use super::{
    LlamaShape, MemoryEstimate, MicroBatch, ModelSize, RankStages, StatePlacement, TrainingPrecision, model_states,
};
use crate::ZeroStage;
use stages::StageWeights;

mod stages;

/// The format in which a model's weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightStorage {
    /// Four bytes per weight.
    F32,
    /// f16 or bf16: two bytes per weight.
    Half,
    /// Quantized blocks of 4 to 5 bits per weight. They are no float parameters: every rank keeps all of them on its
    /// device, in every ZeRO stage.
    Quantized,
}

impl WeightStorage {
    /// Returns the bytes of a number of weights, approximately for quantized blocks.
    pub fn bytes(self, weights: u64) -> u64 {
        match self {
            Self::F32 => 4 * weights,
            Self::Half => 2 * weights,
            Self::Quantized => weights * 5 / 8,
        }
    }
}

/// The weights that are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainedWeights {
    /// All weights of the base model.
    All,
    /// Some weights of the base model.
    Part,
    /// The weights of adapters beside the base model, which is frozen.
    Adapters,
}

/// The base model: what there is before a method adds adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseModel {
    /// The dimensions.
    pub shape: LlamaShape,
    /// The number of weights.
    pub weights: u64,
    /// The format of the weights.
    pub storage: WeightStorage,
}

/// The sizes and settings of a run on which the peak memory of one rank depends.
///
/// ```
/// use burn_zero::estimate::*;
///
/// let shape = LlamaShape {
///     layers: 16, hidden: 2048, intermediate: 8192, heads: 32, kv_heads: 8, head_dim: 64, vocabulary: 128_256,
/// };
/// let weights = shape.parameters(true);
/// let run = RunFootprint {
///     base: BaseModel { shape, weights, storage: WeightStorage::Half },
///     trained_weights: TrainedWeights::Adapters,
///     trained: 850_000,
///     precision: TrainingPrecision::F32,
///     placement: StatePlacement::default(),
///     bucket_size: 4 << 20,
///     micro_batch: MicroBatch { tokens: 2048, ..MicroBatch::default() },
/// };
/// assert_eq!(run.peak_memory().frozen, 2 * weights);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunFootprint {
    /// The base model.
    pub base: BaseModel,
    /// The weights that are trained.
    pub trained_weights: TrainedWeights,
    /// The number of trained weights.
    pub trained: u64,
    /// The precision of the trained weights.
    pub precision: TrainingPrecision,
    /// The sharding and the offload of the model states.
    pub placement: StatePlacement,
    /// The number of gradients in a bucket.
    pub bucket_size: u64,
    /// The largest micro-batch.
    pub micro_batch: MicroBatch,
}

impl RunFootprint {
    /// Returns the memory of one rank at its peak, in bytes: [`model_states`], with the gradients in f32, in which the
    /// engine sums them whatever the model computes in, and the transient memory of a step.
    pub fn peak_memory(&self) -> MemoryEstimate {
        self.peak_memory_of_stages(&RankStages::whole(self.base.shape.segments()))
    }

    /// Returns the memory of one rank of a pipeline at its peak, in bytes. The ranks of the placement are those that run
    /// the same stages.
    pub fn peak_memory_of_stages(&self, rank: &RankStages) -> MemoryEstimate {
        let BaseModel { shape, storage, .. } = self.base;
        let StageWeights { base, trained, copied } = self.stage_weights(rank);
        let frozen = match self.trained_weights {
            TrainedWeights::All => 0,
            TrainedWeights::Part => storage.bytes(base.saturating_sub(trained)),
            TrainedWeights::Adapters => storage.bytes(base),
        };
        let (frozen_bytes, blocks, largest_segment_bytes) = match storage {
            WeightStorage::Quantized => (0, frozen, 0),
            WeightStorage::F32 | WeightStorage::Half => (frozen, 0, storage.bytes(shape.largest_segment())),
        };
        let bucket_size = self.bucket_size;
        let size = ModelSize { trained, frozen_bytes, largest_segment_bytes, bucket_size };
        let mut memory = model_states(size, self.precision, self.placement);
        memory.gradients = memory.gradients * 4 / self.precision.bytes_per_weight();
        memory.frozen += blocks;
        memory.parameters += self.precision.bytes_per_weight() * copied;
        memory.gradients += 4 * copied;
        memory.activations = shape.activations_of_stages(self.micro_batch, rank).total() + self.deferred_bytes(rank);
        if self.trained_weights == TrainedWeights::All && rank.holds(0) {
            memory.activations = self.peak_transient_bytes(memory.activations);
        }
        // Activations have been freed when a step ends.
        memory.activations = memory.activations.max(self.tied_message_bytes(rank));
        memory
    }

    /// Returns the bytes that one rank needs on device and host: for training, or for the whole base model, which every
    /// rank gathers for the result, whichever is more.
    pub fn peak_bytes(&self) -> u64 {
        self.peak_memory().total().max(self.base.storage.bytes(self.base.weights))
    }

    /// Returns the peak of the transient memory: the activations, or the gradient of a trained embedding, the largest
    /// tensor. When the backward pass reaches the embedding, the layers' activations have been freed; the gradient gets
    /// a buffer of its own and is added to that of the tied output head, and with sharded gradients it is whole until
    /// then. If the optimizer steps during the backward pass, the output head's gradient waits for the whole pass.
    fn peak_transient_bytes(&self, activations: u64) -> u64 {
        let StatePlacement { stage, world_size, optimizer_in_backward, .. } = self.placement;
        let bytes = 4 * self.base.shape.vocabulary * self.base.shape.hidden;
        let whole = if stage >= ZeroStage::Gradients { bytes - bytes / world_size } else { 0 };
        let waits = if optimizer_in_backward { bytes } else { 0 };
        activations.max(bytes + whole) + waits
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OffloadDevice;

    const SHAPE: LlamaShape =
        LlamaShape { layers: 3, hidden: 64, intermediate: 176, heads: 4, kv_heads: 2, head_dim: 16, vocabulary: 512 };

    fn run(storage: WeightStorage, trained_weights: TrainedWeights, trained: u64) -> RunFootprint {
        RunFootprint {
            base: BaseModel { shape: SHAPE, weights: SHAPE.parameters(true), storage },
            trained_weights,
            trained,
            precision: TrainingPrecision::F32,
            placement: StatePlacement { stage: ZeroStage::Weights, world_size: 4, ..StatePlacement::default() },
            bucket_size: 0,
            micro_batch: MicroBatch { tokens: 10, ..MicroBatch::default() },
        }
    }

    #[test]
    fn frozen_weights_are_those_that_are_not_trained() {
        let all = SHAPE.parameters(true);
        let frozen = |storage, which, trained| run(storage, which, trained).peak_memory().frozen;
        assert_eq!(frozen(WeightStorage::Half, TrainedWeights::All, all), 0);
        assert_eq!(frozen(WeightStorage::Half, TrainedWeights::Part, 1000), (2 * (all - 1000)).div_ceil(4));
        assert_eq!(frozen(WeightStorage::F32, TrainedWeights::Adapters, 1000), (4 * all).div_ceil(4));
        assert_eq!(frozen(WeightStorage::Quantized, TrainedWeights::Adapters, 1000), all * 5 / 8, "stage 3 too");
    }

    #[test]
    fn moments_in_a_file_take_no_memory() {
        let mut run = run(WeightStorage::F32, TrainedWeights::All, SHAPE.parameters(true));
        let mut host = |device| {
            run.placement.offload_optimizer = device;
            run.peak_memory().host
        };
        assert_eq!(host(OffloadDevice::None), 0);
        assert_eq!(host(OffloadDevice::Cpu), host(OffloadDevice::Nvme) + 8 * SHAPE.parameters(true).div_ceil(4));
    }

    #[test]
    fn a_trained_embedding_has_a_gradient_besides_the_activations() {
        let mut run = run(WeightStorage::F32, TrainedWeights::All, SHAPE.parameters(true));
        let table = 4 * 512 * 64;
        run.micro_batch.tokens = 1;
        assert_eq!(run.peak_memory().activations, table + table - table / 4);
        run.placement = StatePlacement { optimizer_in_backward: true, ..StatePlacement::default() };
        assert_eq!(run.peak_memory().activations, 2 * table);
        run.trained_weights = TrainedWeights::Adapters;
        assert_eq!(run.peak_memory().activations, SHAPE.activations(run.micro_batch).total());
    }
}
