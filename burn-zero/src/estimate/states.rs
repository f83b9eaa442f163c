//! The memory of weights, gradients and optimizer states on one rank.

use crate::{OffloadDevice, ZeroStage};

/// The size of a model, as far as the memory of its states depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ModelSize {
    /// The number of trained weights: all of them in full fine-tuning, those of the adapters in LoRA.
    pub trained: u64,
    /// The bytes of the frozen weights in their storage format: f32, bf16, 8 or 4 bits. They have neither gradients nor
    /// optimizer states.
    pub frozen_bytes: u64,
    /// The bytes of the weights of the largest segment, trained and frozen, in the data type of the forward pass: with
    /// stage 3 they are gathered while the segment runs.
    pub largest_segment_bytes: u64,
    /// The number of gradients in a bucket, which is reduced at once.
    pub bucket_size: u64,
}

/// The precision of training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrainingPrecision {
    /// Full precision: four bytes for weights and gradients, and no separate master weights.
    F32,
    /// Mixed precision: two bytes for weights and gradients, and master weights of four bytes in the optimizer.
    Mixed,
}

impl TrainingPrecision {
    /// Returns the bytes of a weight or gradient of the model.
    pub fn bytes_per_weight(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Mixed => 2,
        }
    }

    /// Returns the bytes of a master weight.
    fn master_bytes(self) -> u64 {
        match self {
            Self::F32 => 0,
            Self::Mixed => 4,
        }
    }
}

/// The placement of the model states: how they are sharded and offloaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatePlacement {
    /// The ZeRO stage.
    pub stage: ZeroStage,
    /// The number of ranks.
    pub world_size: u64,
    /// The place of the optimizer, its states and the gradients it reads; in a file only the moments are.
    pub offload_optimizer: OffloadDevice,
    /// The place of the weight shards, stage 3 only; off the device, they are on it only while their segment runs.
    pub offload_param: OffloadDevice,
    /// True if the optimizer updates weights during the backward pass, so that only one bucket of gradients exists at a
    /// time: [`Engine::train_step`](crate::Engine::train_step) with one micro-batch per step and without clipping.
    pub optimizer_in_backward: bool,
}

impl Default for StatePlacement {
    fn default() -> Self {
        Self {
            stage: ZeroStage::Disabled,
            world_size: 1,
            offload_optimizer: OffloadDevice::None,
            offload_param: OffloadDevice::None,
            optimizer_in_backward: false,
        }
    }
}

/// The memory of one rank in bytes, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryEstimate {
    /// The trained weights.
    pub parameters: u64,
    /// The frozen weights.
    pub frozen: u64,
    /// The gradients of the trained weights.
    pub gradients: u64,
    /// The master weights of the optimizer.
    pub master: u64,
    /// The two moments of the optimizer.
    pub moments: u64,
    /// A bucket of gradients and, with stage 3, the gathered weights of a segment.
    pub buffers: u64,
    /// The activations, see [`LlamaShape::activations`](super::LlamaShape::activations); [`model_states`] leaves them
    /// at 0.
    pub activations: u64,
    /// Everything in host memory.
    pub host: u64,
}

impl MemoryEstimate {
    /// Returns the bytes on the device.
    pub fn device(&self) -> u64 {
        self.parameters + self.frozen + self.gradients + self.master + self.moments + self.buffers + self.activations
    }

    /// Returns the bytes on device and host together: what a machine needs whose device is its CPU.
    pub fn total(&self) -> u64 {
        self.device() + self.host
    }
}

/// Computes the memory of one rank for AdamW. Without sharding it is 16 bytes per trained weight, in f32 (4 + 4 + 8) as
/// in mixed precision (2 + 2 + 12); every ZeRO stage needs less (ZeRO, arXiv:1910.02054, figure 1). A shard is rounded
/// up to whole weights.
///
/// With an offloaded optimizer, the host holds the rank's shard of gradients and moments, four bytes each, and of the
/// master weights in mixed precision; the device holds gradients only until they are transferred. Moments and weight
/// shards in a file take no memory.
///
/// With the optimizer step in the backward pass no gradients are kept: 12 bytes per weight in f32, 14 in mixed
/// precision, plus a bucket.
///
/// # Panics
/// If the number of ranks is 0.
pub fn model_states(weights: ModelSize, numbers: TrainingPrecision, placement: StatePlacement) -> MemoryEstimate {
    let (all, shard) = (weights.trained, weights.trained.div_ceil(placement.world_size));
    let divided = |from: ZeroStage| if placement.stage >= from { shard } else { all };
    let whole = placement.stage < ZeroStage::Weights;
    let gradients = if placement.optimizer_in_backward { 0 } else { 1 };
    let frozen = if whole { weights.frozen_bytes } else { weights.frozen_bytes.div_ceil(placement.world_size) };
    let mut memory = MemoryEstimate {
        parameters: numbers.bytes_per_weight() * divided(ZeroStage::Weights),
        frozen,
        gradients: gradients * numbers.bytes_per_weight() * divided(ZeroStage::Gradients),
        master: numbers.master_bytes() * divided(ZeroStage::OptimizerStates),
        moments: 8 * divided(ZeroStage::OptimizerStates),
        buffers: numbers.bytes_per_weight() * weights.bucket_size.min(all),
        ..MemoryEstimate::default()
    };
    if !whole {
        memory.buffers += weights.largest_segment_bytes;
    }
    if placement.offload_optimizer != OffloadDevice::None {
        let moments = if placement.offload_optimizer == OffloadDevice::Nvme { 0 } else { 8 };
        memory.host += (4 * gradients + numbers.master_bytes() + moments) * divided(ZeroStage::OptimizerStates);
        (memory.gradients, memory.master, memory.moments) = (0, 0, 0);
    }
    if placement.offload_param != OffloadDevice::None && !whole {
        let in_file = placement.offload_param == OffloadDevice::Nvme;
        memory.host += if in_file { 0 } else { memory.parameters + memory.frozen };
        (memory.parameters, memory.frozen) = (0, 0);
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAGES: [ZeroStage; 4] =
        [ZeroStage::Disabled, ZeroStage::OptimizerStates, ZeroStage::Gradients, ZeroStage::Weights];

    fn device(weights: ModelSize, numbers: TrainingPrecision, placement: StatePlacement) -> u64 {
        model_states(weights, numbers, placement).device()
    }

    #[test]
    fn the_formulas_of_the_paper_hold() {
        let trained = 640;
        let weights = ModelSize { trained, ..Default::default() };
        for world in [1, 2, 4, 64] {
            let n = trained / world;
            let f32 = [16 * trained, 8 * trained + 8 * n, 4 * trained + 12 * n, 16 * n];
            let mixed = [16 * trained, 4 * trained + 12 * n, 2 * trained + 14 * n, 16 * n];
            for (i, stage) in STAGES.into_iter().enumerate() {
                let placement = StatePlacement { stage, world_size: world, ..Default::default() };
                assert_eq!(device(weights, TrainingPrecision::F32, placement), f32[i], "f32, {stage:?}, {world}");
                assert_eq!(device(weights, TrainingPrecision::Mixed, placement), mixed[i], "mixed, {stage:?}, {world}");
            }
        }
    }

    #[test]
    fn the_numbers_of_the_paper_hold() {
        let weights = ModelSize { trained: 7_500_000_000, ..Default::default() };
        for (stage, expected) in STAGES.into_iter().zip([120.0, 31.4, 16.6, 1.9]) {
            let bytes = device(
                weights,
                TrainingPrecision::Mixed,
                StatePlacement { stage, world_size: 64, ..Default::default() },
            );
            assert!((bytes as f64 / 1e9 - expected).abs() < 0.05, "{stage:?}: {bytes}");
        }
    }

    #[test]
    fn a_shard_is_rounded_up() {
        let weights = ModelSize { trained: 5, frozen_bytes: 7, ..Default::default() };
        let placement = StatePlacement { stage: ZeroStage::Weights, world_size: 4, ..Default::default() };
        assert_eq!(device(weights, TrainingPrecision::F32, placement), 16 * 2 + 2);
    }

    #[test]
    fn frozen_weights_have_neither_gradients_nor_states() {
        let weights = ModelSize { trained: 100, frozen_bytes: 5000, ..Default::default() };
        for stage in STAGES {
            let placement = StatePlacement { stage, world_size: 2, ..Default::default() };
            let memory = model_states(weights, TrainingPrecision::F32, placement);
            let only_trained =
                model_states(ModelSize { frozen_bytes: 0, ..weights }, TrainingPrecision::F32, placement);
            let frozen = if stage == ZeroStage::Weights { 2500 } else { 5000 };
            assert_eq!(memory.frozen, frozen);
            assert_eq!(memory.device(), only_trained.device() + frozen, "{stage:?}");
        }
    }

    #[test]
    fn offload_moves_bytes_to_the_host() {
        let weights = ModelSize { trained: 1000, frozen_bytes: 300, largest_segment_bytes: 90, bucket_size: 10 };
        let placement = StatePlacement {
            stage: ZeroStage::Gradients,
            world_size: 4,
            offload_optimizer: OffloadDevice::Cpu,
            ..StatePlacement::default()
        };
        let memory = model_states(weights, TrainingPrecision::Mixed, placement);
        let expected =
            MemoryEstimate { parameters: 2000, frozen: 300, buffers: 20, host: 16 * 250, ..MemoryEstimate::default() };
        assert_eq!(memory, expected);

        let placement = StatePlacement { stage: ZeroStage::Weights, offload_param: OffloadDevice::Cpu, ..placement };
        let memory = model_states(weights, TrainingPrecision::Mixed, placement);
        let expected = MemoryEstimate { buffers: 20 + 90, host: 16 * 250 + 2 * 250 + 75, ..MemoryEstimate::default() };
        assert_eq!(memory, expected);
        assert_eq!(memory.total(), memory.device() + memory.host);
    }

    #[test]
    fn early_updates_keep_no_gradients() {
        let weights = ModelSize { trained: 1000, bucket_size: 10, ..Default::default() };
        for stage in STAGES {
            let late = StatePlacement { stage, world_size: 4, ..Default::default() };
            let early = StatePlacement { optimizer_in_backward: true, ..late };
            for (numbers, one) in [(TrainingPrecision::F32, 12), (TrainingPrecision::Mixed, 14)] {
                let (early, late) = (model_states(weights, numbers, early), model_states(weights, numbers, late));
                assert_eq!(early, MemoryEstimate { gradients: 0, ..late });
                assert!(stage > ZeroStage::Disabled || early.device() - early.buffers == one * 1000);
            }
            let off = |placement| {
                model_states(
                    weights,
                    TrainingPrecision::F32,
                    StatePlacement { offload_optimizer: OffloadDevice::Cpu, ..placement },
                )
            };
            let share = if stage == ZeroStage::Disabled { 1000 } else { 250 };
            assert_eq!(off(late).host - off(early).host, 4 * share);
        }
    }

    /// ZeRO-Offload on one device: 2 bytes per weight on the device, 16 on the host.
    #[test]
    fn three_billion_weights_fit_with_offload() {
        let weights = ModelSize { trained: 3_212_749_824, ..Default::default() };
        let placement =
            StatePlacement { stage: ZeroStage::Gradients, offload_optimizer: OffloadDevice::Cpu, ..Default::default() };
        let memory = model_states(weights, TrainingPrecision::Mixed, placement);
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        assert!((gib(memory.device()) - 5.98).abs() < 0.005);
        assert!((gib(memory.host) - 47.87).abs() < 0.005);
    }
}
