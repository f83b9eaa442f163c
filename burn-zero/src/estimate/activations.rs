//! The activation memory of a LLaMA: what one micro-batch saves for the backward pass.

use super::RankStages;
use crate::segment::Checkpointing;
use std::ops::Range;

/// The largest number of logits that exist at a time: the loss is computed in blocks of tokens and vocabulary.
pub const MAX_LOGITS: u64 = 5 << 20;

/// The dimensions of a LLaMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LlamaShape {
    /// The number of layers.
    pub layers: u64,
    /// `hidden_size`.
    pub hidden: u64,
    /// `intermediate_size`.
    pub intermediate: u64,
    /// `num_attention_heads`.
    pub heads: u64,
    /// `num_key_value_heads`.
    pub kv_heads: u64,
    /// The width of a head.
    pub head_dim: u64,
    /// `vocab_size`.
    pub vocabulary: u64,
}

/// A micro-batch, and what of it is kept for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MicroBatch {
    /// The number of tokens.
    pub tokens: u64,
    /// The bytes of one activation value.
    pub value_bytes: u64,
    /// The segments that are recomputed in the backward pass.
    pub checkpointing: Checkpointing,
    /// The index of the first layer with a trained weight: the layers before it run without a graph and save nothing.
    pub first_layer: u64,
}

impl Default for MicroBatch {
    /// Returns a micro-batch without tokens, for activations in f32, of which all are kept.
    fn default() -> Self {
        Self { tokens: 0, value_bytes: 4, checkpointing: Checkpointing::None, first_layer: 0 }
    }
}

/// The activation memory of one rank in bytes, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ActivationMemory {
    /// The inputs of all attention blocks, all MLP blocks and the head.
    pub inputs: u64,
    /// The activations saved inside the blocks, at the peak of the backward pass: those of the blocks that keep theirs,
    /// and of one block that is recomputed.
    pub saved: u64,
    /// The head: normalised hidden states, their gradient, log-sum-exp, and one block of logits.
    pub head: u64,
    /// The gradients inside the block that runs its backward pass.
    pub working: u64,
}

impl ActivationMemory {
    /// Returns the sum of all kinds.
    pub fn total(&self) -> u64 {
        self.inputs + self.saved + self.head + self.working
    }
}

impl LlamaShape {
    /// Returns the number of weights. With `tied` the embedding is also the head.
    pub fn parameters(&self, tied: bool) -> u64 {
        let embedding = self.vocabulary * self.hidden;
        let ends = if tied { embedding } else { 2 * embedding };
        ends + self.layers * (self.attention_parameters() + self.mlp_parameters()) + self.hidden
    }

    /// Returns the number of weights of the largest segment: embedding or head, an attention block or an MLP block.
    pub(crate) fn largest_segment(&self) -> u64 {
        let head = self.vocabulary * self.hidden + self.hidden;
        head.max(self.attention_parameters()).max(self.mlp_parameters())
    }

    pub(super) fn attention_parameters(&self) -> u64 {
        self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads) + self.hidden
    }

    pub(super) fn mlp_parameters(&self) -> u64 {
        3 * self.hidden * self.intermediate + self.hidden
    }

    /// Returns the activation memory of a micro-batch.
    ///
    /// An attention block saves its input, queries, keys, values, output and log-sum-exp (four bytes); an MLP block
    /// saves its input, gate and up projections. Normalised inputs and the outputs of the activation function are
    /// recomputed. What only some methods save, such as the products of LoRA's `A` matrices or a P-tuning prefix, is
    /// not counted.
    pub fn activations(&self, micro_batch: MicroBatch) -> ActivationMemory {
        self.activations_of_stages(micro_batch, &RankStages::whole(self.segments()))
    }

    /// Returns the activation memory of one rank of a pipeline: that of the micro-batches between their two passes, of
    /// which one is in its backward pass.
    pub fn activations_of_stages(&self, micro_batch: MicroBatch, rank: &RankStages) -> ActivationMemory {
        let MicroBatch { tokens, value_bytes: bytes, checkpointing, first_layer } = micro_batch;
        let (wide, narrow) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let attention = tokens * (bytes * 2 * (wide + narrow) + 4 * self.heads);
        let mlp = tokens * bytes * 2 * self.intermediate;
        let working = self.hidden + (2 * (wide + narrow)).max(3 * self.intermediate);
        let tracked = 2 * first_layer.min(self.layers) as usize + 1;
        let chunks: Vec<Range<usize>> =
            rank.segments.iter().map(|chunk| chunk.start.max(tracked)..chunk.end.max(tracked)).collect();
        let saved = chunks.iter().map(|chunk| self.saved(chunk.clone(), [attention, mlp], checkpointing));
        let saved: Vec<SavedInBlocks> = saved.collect();
        let kept: u64 = saved.iter().map(|chunk| chunk.kept).sum();
        let inputs: u64 = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        let head = if rank.holds(self.segments() - 1) { tokens * (bytes * 2 * self.hidden + 4) } else { 0 };
        let logits = if head == 0 { 0 } else { 4 * MAX_LOGITS.min(tokens * self.vocabulary) };
        ActivationMemory {
            inputs: rank.of_live(tokens * bytes * self.hidden * inputs, rank.live),
            saved: rank.of_live(kept, rank.live.saturating_sub(1))
                + saved.iter().map(|chunk| chunk.peak).max().unwrap_or(0),
            head: rank.live.div_ceil(rank.segments.len().max(1) as u64) * head + logits,
            working: tokens * bytes * working,
        }
    }

    /// Returns the number of segments: the embedding, two per layer, the head.
    pub fn segments(&self) -> usize {
        2 * self.layers as usize + 2
    }

    /// Returns the activations inside the blocks among some segments. `[attention, mlp]` are the bytes of a block of
    /// each kind.
    fn saved(&self, segments: Range<usize>, blocks: [u64; 2], checkpointing: Checkpointing) -> SavedInBlocks {
        let mut saved = SavedInBlocks { kept: 0, peak: 0 };
        // The embedding is segment 0, then each layer has two; the head is the last.
        for segment in segments.start.max(1)..segments.end.min(self.segments() - 1) {
            let own = blocks[(segment + 1) % 2];
            saved.peak = saved.peak.max(saved.kept + own);
            if checkpointing.keeps_graph(segment, self.segments()) {
                saved.kept += own;
            }
        }
        saved
    }
}

/// The bytes of the activations inside blocks.
struct SavedInBlocks {
    /// The bytes that the blocks keep between the two passes.
    kept: u64,
    /// The most that exist at a time in the backward pass: when it is at a block, those of the blocks before it that
    /// keep theirs, and its own.
    peak: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pass(tokens: u64, value_bytes: u64, checkpointing: Checkpointing) -> MicroBatch {
        MicroBatch { tokens, value_bytes, checkpointing, first_layer: 0 }
    }

    fn shape(sizes: [u64; 7]) -> LlamaShape {
        let [layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary] = sizes;
        LlamaShape { layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary }
    }

    /// The table: (dimensions, tied, parameters of the published checkpoint).
    #[test]
    fn published_models_have_their_number_of_weights() {
        let table = [
            ([22, 2048, 5632, 32, 4, 64, 32000], false, 1_100_048_384),
            ([32, 4096, 11008, 32, 32, 128, 32000], false, 6_738_415_616),
            ([16, 2048, 8192, 32, 8, 64, 128_256], true, 1_235_814_400),
            ([28, 3072, 8192, 24, 8, 128, 128_256], true, 3_212_749_824),
            ([32, 4096, 14336, 32, 8, 128, 128_256], false, 8_030_261_248),
            ([40, 5120, 13824, 40, 40, 128, 32000], false, 13_015_864_320),
        ];
        for (sizes, tied, expected) in table {
            assert_eq!(shape(sizes).parameters(tied), expected, "{sizes:?}");
        }
        assert_eq!(shape(table[0].0).largest_segment(), 32000 * 2048 + 2048);
        assert_eq!(shape([1, 64, 512, 4, 2, 16, 8]).largest_segment(), 3 * 64 * 512 + 64);
    }

    #[test]
    fn every_kept_tensor_is_counted() {
        let shape = shape([3, 64, 176, 4, 2, 16, 512]);
        let tokens = 10;
        let found = shape.activations(pass(tokens, 4, Checkpointing::None));
        let attention = [64, 32, 32, 64, 4]; // q, k, v, output, log-sum-exp
        let mlp = [176, 176]; // gate, up
        let layer: u64 = attention.iter().chain(&mlp).sum();
        assert_eq!(found.inputs, 4 * tokens * 64 * 7);
        assert_eq!(found.saved, 3 * 4 * tokens * layer);
        assert_eq!(found.head, 4 * tokens * (2 * 64 + 1) + 4 * tokens * 512);
        assert_eq!(found.working, 4 * tokens * (64 + 3 * 176));
        assert_eq!(found.total(), found.inputs + found.saved + found.head + found.working);
    }

    #[test]
    fn recomputing_keeps_the_inputs_and_one_block() {
        let shape = shape([3, 64, 176, 4, 2, 16, 512]);
        let (all, none) =
            (shape.activations(pass(10, 4, Checkpointing::None)), shape.activations(pass(10, 4, Checkpointing::Full)));
        assert_eq!(none.saved, 4 * 10 * 2 * 176);
        assert_eq!(ActivationMemory { saved: all.saved, ..none }, all);
    }

    #[test]
    fn every_second_segment_keeps_every_second_block() {
        let shape = shape([3, 64, 176, 4, 2, 16, 512]);
        let saved = |checkpointing| shape.activations(pass(10, 4, checkpointing)).saved;
        let (attention, mlp) = (10 * 4 * (64 + 32 + 32 + 64 + 4), 10 * 4 * 2 * 176);
        // Segments 2, 4 and 6 are MLP blocks, 3 is the attention block of the second layer.
        assert_eq!(saved(Checkpointing::Every(2)), 3 * attention + mlp);
        assert_eq!(saved(Checkpointing::Every(3)), 2 * attention + 2 * mlp + mlp);
        assert_eq!(saved(Checkpointing::Every(1)), saved(Checkpointing::Full));
        assert_eq!(saved(Checkpointing::Every(0)), saved(Checkpointing::None));
        assert_eq!(saved(Checkpointing::All), saved(Checkpointing::Full));
        assert_eq!(saved(Checkpointing::Every(100)), saved(Checkpointing::None));
    }

    #[test]
    fn layers_before_the_first_trained_one_save_nothing() {
        let whole = shape([3, 64, 176, 4, 2, 16, 512]);
        for checkpointing in [Checkpointing::None, Checkpointing::Full, Checkpointing::Every(2)] {
            let two = MicroBatch { first_layer: 1, ..pass(10, 4, checkpointing) };
            let expected = LlamaShape { layers: 2, ..whole }.activations(pass(10, 4, checkpointing));
            assert_eq!(whole.activations(two), expected, "{checkpointing:?}");
        }
    }

    #[test]
    fn half_the_bytes_need_half_the_memory_but_for_sums_and_logits() {
        let shape = shape([3, 64, 176, 4, 2, 16, 512]);
        let (full, half) =
            (shape.activations(pass(8, 4, Checkpointing::None)), shape.activations(pass(8, 2, Checkpointing::None)));
        assert_eq!(full.inputs, 2 * half.inputs);
        assert_eq!(full.saved + 3 * 8 * 4 * 4, 2 * half.saved);
        assert_eq!(full.working, 2 * half.working);
    }

    #[test]
    fn logits_never_take_more_than_a_block() {
        let shape = shape([1, 8, 8, 1, 1, 8, 128_256]);
        let rest = |tokens| tokens * (4 * 2 * 8 + 4);
        for (tokens, logits) in [(1, 128_256), (40, 40 * 128_256), (41, MAX_LOGITS), (100_000, MAX_LOGITS)] {
            let found = shape.activations(pass(tokens, 4, Checkpointing::None)).head;
            assert_eq!(found, rest(tokens) + 4 * logits, "{tokens} tokens");
        }
    }
}
