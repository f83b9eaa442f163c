//! What weights, gradients and optimizer states need on one rank.

use crate::ds_config::Stage;

/// The weights of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Weights {
    /// The number of weights that are trained: all of them in full fine-tuning, the adapters' in LoRA.
    pub trained: u64,
    /// The bytes of the frozen weights as they are stored: f32, bf16, 8 or 4 bits. They have no gradients and no states.
    pub frozen_bytes: u64,
    /// The bytes of the largest segment's weights, trained and frozen, in the numbers of the forward pass: with stage 3 they
    /// are gathered while the segment runs.
    pub largest_segment_bytes: u64,
    /// The number of gradients that are reduced at a time.
    pub bucket: u64,
}

/// The numbers that are trained with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// Four bytes for weights and gradients; the optimizer's weights are the model's.
    F32,
    /// Two bytes for weights and gradients of the model; the optimizer has weights of four bytes of its own.
    Mixed,
}

impl Numbers {
    /// Bytes of a weight or gradient of the model.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Mixed => 2,
        }
    }

    /// Bytes of the optimizer's own copy of a weight.
    fn master(self) -> u64 {
        match self {
            Self::F32 => 0,
            Self::Mixed => 4,
        }
    }
}

/// Where the states are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// What is divided among the ranks.
    pub stage: Stage,
    /// The number of ranks.
    pub world: u64,
    /// Whether the optimizer, its states and the gradients it reads are on the host.
    pub offload_optimizer: bool,
    /// Whether each rank's weights are on the host, and on the device only while their segment runs; stage 3 only.
    pub offload_param: bool,
    /// Whether gradients are updated with during the backward pass, so that a bucket of them exists at a time:
    /// [`Engine::accumulate_and_step`](crate::Engine::accumulate_and_step) with one micro-batch per step and without clipping.
    pub early_updates: bool,
}

impl Default for Placement {
    fn default() -> Self {
        let (offload_optimizer, offload_param, early_updates) = (false, false, false);
        Self { stage: Stage::Replicated, world: 1, offload_optimizer, offload_param, early_updates }
    }
}

/// Bytes of one rank, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Trained weights.
    pub parameters: u64,
    /// Frozen weights.
    pub frozen: u64,
    /// Gradients of the trained weights.
    pub gradients: u64,
    /// The optimizer's own weights.
    pub master: u64,
    /// The optimizer's two moments.
    pub moments: u64,
    /// A bucket of gradients, and with stage 3 the gathered segment.
    pub buffers: u64,
    /// What is kept for the backward pass, see [`Shape::activations`](super::Shape::activations); [`states`] leaves it at 0.
    pub activations: u64,
    /// Everything in the host's memory.
    pub host: u64,
}

impl Memory {
    /// Bytes on the device.
    pub fn device(&self) -> u64 {
        self.parameters + self.frozen + self.gradients + self.master + self.moments + self.buffers + self.activations
    }

    /// Bytes on device and host: what a machine needs whose device is its CPU.
    pub fn total(&self) -> u64 {
        self.device() + self.host
    }
}

/// The bytes of one rank for AdamW: 16 per trained weight without sharding, in f32 (4 + 4 + 8) as in mixed precision
/// (2 + 2 + 12), then stage by stage less (ZeRO, arXiv:1910.02054, figure 1). A shard is rounded up to whole weights.
///
/// With the optimizer on the host that is where the rank's share of gradients and moments is, in four bytes each, and of its own
/// weights in mixed precision; the device holds gradients only until they are sent.
///
/// With early updates no gradients are kept: 12 bytes per weight in f32, 14 in mixed precision, and a bucket.
///
/// # Panics
/// If the world has no rank.
pub fn states(weights: Weights, numbers: Numbers, placement: Placement) -> Memory {
    let (all, shard) = (weights.trained, weights.trained.div_ceil(placement.world));
    let divided = |from: Stage| if placement.stage >= from { shard } else { all };
    let whole = placement.stage < Stage::Weights;
    let gradients = if placement.early_updates { 0 } else { 1 };
    let frozen = if whole { weights.frozen_bytes } else { weights.frozen_bytes.div_ceil(placement.world) };
    let mut memory = Memory {
        parameters: numbers.bytes() * divided(Stage::Weights),
        frozen,
        gradients: gradients * numbers.bytes() * divided(Stage::Gradients),
        master: numbers.master() * divided(Stage::States),
        moments: 8 * divided(Stage::States),
        buffers: numbers.bytes() * weights.bucket.min(all),
        ..Memory::default()
    };
    if !whole {
        memory.buffers += weights.largest_segment_bytes;
    }
    if placement.offload_optimizer {
        memory.host += (4 * gradients + numbers.master() + 8) * divided(Stage::States);
        (memory.gradients, memory.master, memory.moments) = (0, 0, 0);
    }
    if placement.offload_param && !whole {
        memory.host += memory.parameters + memory.frozen;
        (memory.parameters, memory.frozen) = (0, 0);
    }
    memory
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAGES: [Stage; 4] = [Stage::Replicated, Stage::States, Stage::Gradients, Stage::Weights];

    fn device(weights: Weights, numbers: Numbers, placement: Placement) -> u64 {
        states(weights, numbers, placement).device()
    }

    #[test]
    fn the_formulas_of_the_paper_hold() {
        let trained = 640;
        let weights = Weights { trained, ..Default::default() };
        for world in [1, 2, 4, 64] {
            let n = trained / world;
            let f32 = [16 * trained, 8 * trained + 8 * n, 4 * trained + 12 * n, 16 * n];
            let mixed = [16 * trained, 4 * trained + 12 * n, 2 * trained + 14 * n, 16 * n];
            for (i, stage) in STAGES.into_iter().enumerate() {
                let placement = Placement { stage, world, ..Default::default() };
                assert_eq!(device(weights, Numbers::F32, placement), f32[i], "f32, {stage:?}, {world}");
                assert_eq!(device(weights, Numbers::Mixed, placement), mixed[i], "mixed, {stage:?}, {world}");
            }
        }
    }

    #[test]
    fn the_numbers_of_the_paper_hold() {
        let weights = Weights { trained: 7_500_000_000, ..Default::default() };
        for (stage, expected) in STAGES.into_iter().zip([120.0, 31.4, 16.6, 1.9]) {
            let bytes = device(weights, Numbers::Mixed, Placement { stage, world: 64, ..Default::default() });
            assert!((bytes as f64 / 1e9 - expected).abs() < 0.05, "{stage:?}: {bytes}");
        }
    }

    #[test]
    fn a_shard_is_rounded_up() {
        let weights = Weights { trained: 5, frozen_bytes: 7, ..Default::default() };
        let placement = Placement { stage: Stage::Weights, world: 4, ..Default::default() };
        assert_eq!(device(weights, Numbers::F32, placement), 16 * 2 + 2);
    }

    #[test]
    fn frozen_weights_have_neither_gradients_nor_states() {
        let weights = Weights { trained: 100, frozen_bytes: 5000, ..Default::default() };
        for stage in STAGES {
            let placement = Placement { stage, world: 2, ..Default::default() };
            let memory = states(weights, Numbers::F32, placement);
            let only_trained = states(Weights { frozen_bytes: 0, ..weights }, Numbers::F32, placement);
            let frozen = if stage == Stage::Weights { 2500 } else { 5000 };
            assert_eq!(memory.frozen, frozen);
            assert_eq!(memory.device(), only_trained.device() + frozen, "{stage:?}");
        }
    }

    #[test]
    fn offload_moves_bytes_to_the_host() {
        let weights = Weights { trained: 1000, frozen_bytes: 300, largest_segment_bytes: 90, bucket: 10 };
        let placement =
            Placement { stage: Stage::Gradients, world: 4, offload_optimizer: true, ..Placement::default() };
        let memory = states(weights, Numbers::Mixed, placement);
        let expected = Memory { parameters: 2000, frozen: 300, buffers: 20, host: 16 * 250, ..Memory::default() };
        assert_eq!(memory, expected);

        let placement = Placement { stage: Stage::Weights, offload_param: true, ..placement };
        let memory = states(weights, Numbers::Mixed, placement);
        let expected = Memory { buffers: 20 + 90, host: 16 * 250 + 2 * 250 + 75, ..Memory::default() };
        assert_eq!(memory, expected);
        assert_eq!(memory.total(), memory.device() + memory.host);
    }

    #[test]
    fn early_updates_keep_no_gradients() {
        let weights = Weights { trained: 1000, bucket: 10, ..Default::default() };
        for stage in STAGES {
            let late = Placement { stage, world: 4, ..Default::default() };
            let early = Placement { early_updates: true, ..late };
            for (numbers, one) in [(Numbers::F32, 12), (Numbers::Mixed, 14)] {
                let (early, late) = (states(weights, numbers, early), states(weights, numbers, late));
                assert_eq!(early, Memory { gradients: 0, ..late });
                assert!(stage > Stage::Replicated || early.device() - early.buffers == one * 1000);
            }
            let off = |placement| states(weights, Numbers::F32, Placement { offload_optimizer: true, ..placement });
            let share = if stage == Stage::Replicated { 1000 } else { 250 };
            assert_eq!(off(late).host - off(early).host, 4 * share);
        }
    }

    /// ZeRO-Offload on one device: 2 bytes per weight there, 16 here.
    #[test]
    fn three_billion_weights_fit_with_offload() {
        let weights = Weights { trained: 3_212_749_824, ..Default::default() };
        let placement = Placement { stage: Stage::Gradients, offload_optimizer: true, ..Default::default() };
        let memory = states(weights, Numbers::Mixed, placement);
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        assert!((gib(memory.device()) - 5.98).abs() < 0.005);
        assert!((gib(memory.host) - 47.87).abs() < 0.005);
    }
}
