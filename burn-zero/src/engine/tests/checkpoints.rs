//! Checkpoints of any pipeline, world and stage resume any other, bit for bit.

use super::{
    world::{CASES, Case, STAGES, batch},
    *,
};
use crate::{
    PipelineConfig, comm::threads, engine::checkpoint::consolidate, pipeline::PipelineKind, segment::Segments,
};
use safetensors::SafeTensors;
use std::{collections::BTreeMap, path::Path};

/// A way to divide the work: ranks of a pipeline, stages per rank, replicas, ZeRO stage.
#[derive(Debug, Clone, Copy)]
struct Division {
    pipeline: usize,
    chunks: usize,
    replicas: usize,
    stage: ZeroStage,
}

/// Returns all divisions that the tests use.
fn divisions() -> Vec<Division> {
    let mut all = Vec::new();
    for [pipeline, chunks, replicas] in [[1, 1, 1], [1, 1, 3], [2, 1, 1], [2, 2, 1], [4, 1, 1], [2, 1, 2]] {
        let stages = STAGES.into_iter().filter(|&stage| pipeline == 1 || stage < ZeroStage::Weights);
        let stages = stages.filter(|&stage| replicas > 1 || stage == ZeroStage::Disabled);
        all.extend(stages.map(|stage| Division { pipeline, chunks, replicas, stage }));
    }
    all
}

impl Division {
    /// Runs `rank` on every rank, with an engine for the case.
    fn run<R: Send>(self, case: Case, rank: impl Fn(ToyEngine) -> R + Sync) -> Vec<R> {
        let Self { pipeline, chunks, replicas, stage } = self;
        threads::run(pipeline * replicas, |group| {
            let model = case.model();
            let (segments, stages) = (Segments::segments(&model), pipeline * chunks);
            let cut = |stage: usize| segments * stage / stages;
            let segments = (0..stages).map(|stage| cut(stage)..cut(stage + 1)).collect();
            let kind = if chunks > 1 { PipelineKind::LoopedBFS } else { PipelineKind::OneFOneB };
            let sharding = Sharding { stage, bucket_size: case.bucket_size };
            let config = case.config().with_communicator(Box::new(group)).with_sharding(sharding);
            let config = config.with_pipeline(PipelineConfig { ranks: pipeline, kind, chunks, segments });
            rank(config.init(model).unwrap())
        })
    }
}

/// Returns the bytes of every tensor of a checkpoint, all files merged.
fn merged(path: &Path) -> BTreeMap<String, (Vec<usize>, Vec<u8>)> {
    if !path.exists() {
        consolidate(path).unwrap();
    }
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.tensors().into_iter().map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec()))).collect()
}

/// Takes two steps of four micro-batches.
fn train(engine: &mut ToyEngine, first: usize) {
    for step in first..first + 2 {
        let own: Vec<_> = (0..4).map(|micro| batch(step, micro * engine.replicas() + engine.replica())).collect();
        engine.train_step(&own, 1e-3).unwrap();
    }
}

#[test]
fn every_division_resumes_every_other() {
    let _alone = backward_lock();
    for case in [CASES[0], CASES[4]] {
        for from in divisions() {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("state.safetensors");
            from.run(case, |mut engine| {
                train(&mut engine, 0);
                engine.save(&path).unwrap();
            });
            let files = std::fs::read_dir(folder.path()).unwrap().count();
            let sharded = if from.stage == ZeroStage::Disabled { 1 } else { from.replicas };
            assert_eq!(files, from.pipeline * sharded, "{from:?}");
            for to in divisions() {
                let again = folder.path().join("again");
                std::fs::create_dir(&again).unwrap();
                let copy = again.join("state.safetensors");
                // Read before the files of `from` are merged.
                let losses = to.run(case, |mut engine| {
                    engine.restore(&path).unwrap();
                    assert_eq!(engine.steps(), 2, "{to:?} from {from:?}");
                    engine.save(&copy).unwrap();
                    let loss = engine.losses(&[batch(5, 0), batch(5, 1)]).unwrap();
                    engine.sum_over_ranks(&[loss]).unwrap()[0] / engine.replicas() as f64
                });
                let mut alone = case.engine();
                alone.restore(&copy).unwrap();
                let expected = alone.losses(&[batch(5, 0), batch(5, 1)]).unwrap();
                let near = |loss: &f64| (loss - expected).abs() <= 1e-6 * expected.abs();
                assert!(losses.iter().all(near), "{to:?} from {from:?}: {losses:?}, expected {expected}");
                let other = tempfile::tempdir().unwrap();
                for entry in folder.path().read_dir().unwrap().map(Result::unwrap).filter(|e| e.path().is_file()) {
                    std::fs::copy(entry.path(), other.path().join(entry.file_name())).unwrap();
                }
                let expected = merged(&other.path().join("state.safetensors"));
                assert!(merged(&copy) == expected, "{case:?}: {to:?} from {from:?}");
                std::fs::remove_dir_all(&again).unwrap();
            }
        }
    }
}
