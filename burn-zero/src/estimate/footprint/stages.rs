//! The weights and the transient memory of one rank of a pipeline.

use super::{BaseModel, RunFootprint, TrainedWeights};
use crate::estimate::{LlamaShape, MicroBatch, RankStages};

/// The weights of a rank of a pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StageWeights {
    /// The weights of the base model.
    pub base: u64,
    /// The trained weights that the rank updates.
    pub trained: u64,
    /// The weights of a trained table that is embedding and head, of which the rank has a copy: the first stage updates
    /// it.
    pub copied: u64,
}

impl RunFootprint {
    /// Returns the weights of one rank of a pipeline. Adapters are counted as equal in all layers.
    pub(super) fn stage_weights(&self, rank: &RankStages) -> StageWeights {
        let BaseModel { shape, weights, .. } = self.base;
        let tied = weights == shape.parameters(true);
        let (first, last) = (rank.holds(0), rank.holds(shape.segments() - 1));
        let table = shape.vocabulary * shape.hidden;
        let own: u64 = shape.segment_weights().iter().enumerate().filter(|(i, _)| rank.holds(*i)).map(|(_, w)| w).sum();
        let base = if tied && first && last { own - table } else { own };
        let copied = if tied && last && !first { table } else { 0 };
        match self.trained_weights {
            TrainedWeights::All => StageWeights { base, trained: base - copied, copied },
            TrainedWeights::Part | TrainedWeights::Adapters => {
                let from = self.micro_batch.first_layer.min(shape.layers);
                let (own, all) = (half_layers(rank, &shape, from), 2 * (shape.layers - from).max(1));
                StageWeights { base, trained: (self.trained * own).div_ceil(all), copied: 0 }
            }
        }
    }

    /// Returns the bytes of the messages at the end of a step by which the ranks of a trained table that is embedding and
    /// head share its gradients and values. The first of them holds a message and the gradient read from it, the last
    /// one a message.
    pub(super) fn tied_message_bytes(&self, rank: &RankStages) -> u64 {
        let BaseModel { shape, weights, .. } = self.base;
        let tied = self.trained_weights == TrainedWeights::All && weights == shape.parameters(true);
        let tables = match (rank.holds(0), rank.holds(shape.segments() - 1)) {
            (true, false) if tied => 2,
            (false, true) if tied => 1,
            _ => 0,
        };
        4 * tables * shape.vocabulary * shape.hidden
    }

    /// Returns the bytes of the inputs and output gradients of the projections whose weight gradients are put off, at
    /// the peak.
    pub(super) fn deferred_bytes(&self, rank: &RankStages) -> u64 {
        if self.trained_weights == TrainedWeights::Adapters {
            return 0;
        }
        let (shape, MicroBatch { tokens, value_bytes, first_layer, .. }) = (self.base.shape, self.micro_batch);
        let (wide, narrow) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
        let attention = 2 * shape.hidden + 2 * wide + 2 * narrow;
        let mlp = 2 * shape.hidden + 3 * shape.intermediate;
        let blocks = 2 * first_layer.min(shape.layers) as usize + 1..shape.segments() - 1;
        let own = blocks.filter(|&segment| rank.holds(segment));
        let values: u64 = own.map(|segment| if segment % 2 == 1 { attention } else { mlp }).sum();
        rank.of_live(tokens * value_bytes * values, rank.kept - rank.live)
    }
}

/// Returns the number of attention and MLP blocks that the rank runs, from the layer `first` on.
fn half_layers(rank: &RankStages, shape: &LlamaShape, first: u64) -> u64 {
    let blocks = 2 * first as usize + 1..shape.segments() - 1;
    blocks.filter(|&segment| rank.holds(segment)).count() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        estimate::{StatePlacement, TrainingPrecision, WeightStorage},
        pipeline::{PipelineKind, PipelineSchedule, PipelineShape, SendMode},
    };
    use std::ops::Range;

    const SHAPE: LlamaShape =
        LlamaShape { layers: 4, hidden: 64, intermediate: 176, heads: 4, kv_heads: 2, head_dim: 16, vocabulary: 512 };

    fn run(trained_weights: TrainedWeights, tied: bool) -> RunFootprint {
        let weights = SHAPE.parameters(tied);
        RunFootprint {
            base: BaseModel { shape: SHAPE, weights, storage: WeightStorage::F32 },
            trained_weights,
            trained: if trained_weights == TrainedWeights::All { weights } else { 4000 },
            precision: TrainingPrecision::F32,
            placement: StatePlacement::default(),
            bucket_size: 0,
            micro_batch: MicroBatch { tokens: 10, ..MicroBatch::default() },
        }
    }

    fn ranks(kind: PipelineKind, ranks: usize, micro_batches: usize, segments: &[Range<usize>]) -> Vec<RankStages> {
        let shape = PipelineShape::new(ranks, kind.fixed_chunks().unwrap_or(2), micro_batches).unwrap();
        let schedule = PipelineSchedule::new(kind, shape.with_placement(kind.placement())).unwrap();
        RankStages::of_program(&schedule.program(SendMode::Buffered), segments)
    }

    #[test]
    fn the_ranks_of_a_pipeline_have_the_model_together() {
        for (trained, tied) in
            [(TrainedWeights::All, true), (TrainedWeights::All, false), (TrainedWeights::Adapters, true)]
        {
            let run = run(trained, tied);
            let parts = ranks(PipelineKind::OneFOneB, 3, 4, &[0..3, 3..6, 6..10]);
            let weights = parts.iter().map(|rank| run.stage_weights(rank));
            let sum = weights.fold([0; 3], |[base, trained, copied], own| {
                [base + own.base, trained + own.trained, copied + own.copied]
            });
            // The rank of the head holds a table of its own, trained or not.
            let table = if tied { 512 * 64 } else { 0 };
            let copied = if trained == TrainedWeights::All { table } else { 0 };
            assert_eq!(sum, [run.base.weights + table, run.trained, copied]);
        }
        // In a V the first rank has both ends.
        let (full, ends) =
            (run(TrainedWeights::All, true), &ranks(PipelineKind::ZBV, 2, 4, &[0..3, 3..5, 5..7, 7..10])[0]);
        assert_eq!((full.stage_weights(ends).copied, full.tied_message_bytes(ends)), (0, 0));
    }

    #[test]
    fn a_trained_table_of_two_ranks_is_sent_whole() {
        let parts = ranks(PipelineKind::OneFOneB, 3, 4, &[0..3, 3..6, 6..10]);
        let messages =
            |trained, tied| parts.iter().map(|rank| run(trained, tied).tied_message_bytes(rank)).collect::<Vec<_>>();
        let table = 4 * 512 * 64;
        assert_eq!(messages(TrainedWeights::All, true), [2 * table, 0, table]);
        assert_eq!(messages(TrainedWeights::All, false), [0; 3]);
        assert_eq!(messages(TrainedWeights::Adapters, true), [0; 3]);
        // At the end of a step the activations have been freed.
        let peak = run(TrainedWeights::All, true).peak_memory_of_stages(&parts[0]);
        assert_eq!(peak.activations, 2 * table);
    }

    #[test]
    fn early_ranks_keep_more_micro_batches() {
        let run = run(TrainedWeights::Adapters, false);
        let parts = ranks(PipelineKind::OneFOneB, 2, 4, &[0..5, 5..10]);
        let saved = |rank: &RankStages| SHAPE.activations_of_stages(run.micro_batch, rank);
        let (first, last) = (saved(&parts[0]), saved(&parts[1]));
        let layer = 4 * 10 * (2 * (64 + 32) + 4 + 2 * 176);
        assert_eq!((first.inputs, first.saved, first.head), (2 * 4 * 4 * 10 * 64, 2 * 2 * layer, 0));
        assert_eq!((last.inputs, last.saved), (5 * 4 * 10 * 64, 2 * layer));
        assert_eq!(last.head, SHAPE.activations(run.micro_batch).head);
    }

    #[test]
    fn put_off_products_keep_inputs_and_gradients() {
        let full = run(TrainedWeights::All, false);
        let parts = ranks(PipelineKind::ZBH1, 2, 4, &[0..5, 5..10]);
        let layer = 4 * 10 * (2 * 64 + 2 * 64 + 2 * 32 + 2 * 64 + 3 * 176);
        assert_eq!(parts.iter().map(|rank| full.deferred_bytes(rank)).collect::<Vec<_>>(), [0, 2 * layer]);
        assert_eq!(run(TrainedWeights::Adapters, false).deferred_bytes(&parts[1]), 0);
    }
}
