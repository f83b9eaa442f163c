//! Ranks that load their stages alone train what one process trains.

use super::*;
use burn::tensor::DType;
use burn_llama::{Checkpoint, HeldSegments, checkpoint};

/// Returns the stages of a rank: with two chunks in a V, its first and the one that mirrors it.
fn stages_of(rank: usize, ranks: usize, chunks: usize) -> Vec<usize> {
    if chunks == 1 { vec![rank] } else { vec![rank, 2 * ranks - 1 - rank] }
}

#[test]
fn ranks_that_load_their_stages_alone_are_one_process() {
    let _lock = one_backward_at_a_time();
    for case in CASES {
        let (one, folder) = (one_process(case, Checkpointing::None), tempfile::tempdir().unwrap());
        checkpoint::save(&base(case), folder.path()).unwrap();
        for (kind, chunks, ranks) in
            [(PipelineKind::OneFOneB, 1, 2), (PipelineKind::ZBH1, 1, 4), (PipelineKind::ZBV, 2, 2)]
        {
            let found = threads::run(ranks, |group| {
                let (rank, division) = (burn_zero::comm::Communicator::rank(&group), pipeline(ranks, kind, chunks));
                let own = stages_of(rank, ranks, chunks).into_iter().map(|stage| division.segments[stage].clone());
                let file = Checkpoint::open(folder.path()).unwrap();
                let part = file.load_segments(&HeldSegments::of(own), DType::F32, &Default::default()).unwrap();
                let model = learning(case, part);
                let batches = micro_batches(&model, 0..MICRO_BATCHES);
                let config = config(Checkpointing::None).with_communicator(Box::new(group));
                let mut engine = config.with_pipeline(division).init(model).unwrap();
                step(&mut engine, &batches)
            });
            let tied = (case == Case::Tied).then_some("model.embed_tokens.weight");
            assert_equal(&found, &one, tied, &format!("{case:?}, {kind}, {ranks} ranks"));
        }
    }
}
