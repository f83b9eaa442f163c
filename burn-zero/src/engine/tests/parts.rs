//! A model that is loaded part by part gives the engine of the whole model, bit for bit.

use super::{
    world::{CASES, Case, batch, values},
    *,
};
use crate::{
    comm::threads,
    segment::{Segments, TrainSegments},
    sharding::{ParamShard, ShardLayout},
};
use burn::module::ModuleMapper;
use std::{collections::HashSet, ops::Range};

/// Replaces parameters by placeholders of one element, except for some.
struct Placeholders<'a>(&'a HashSet<ParamId>);

impl ModuleMapper<TestBackend> for Placeholders<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<TestBackend, D>>) -> Param<Tensor<TestBackend, D>> {
        if self.0.contains(&param.id) {
            return param;
        }
        let (id, tensor, mapper) = param.consume();
        let zero = Tensor::zeros([1; D], &tensor.device()).set_require_grad(tensor.is_require_grad());
        Param::from_mapped_value(id, zero, mapper)
    }
}

#[derive(Default)]
struct Ids(HashSet<ParamId>);

impl ModuleVisitor<TestBackend> for Ids {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<TestBackend, D>>) {
        self.0.insert(param.id);
    }
}

/// Returns the model with the parameters of some segments, and placeholders for the others.
fn part(model: &Toy<TestBackend>, range: Range<usize>) -> Toy<TestBackend> {
    let mut held = Ids::default();
    range.for_each(|segment| model.visit_segment(segment, &mut held));
    model.clone().map(&mut Placeholders(&held.0))
}

/// Returns the shards that a rank holds, by bucket.
fn shards(engine: &ToyEngine) -> Vec<Vec<(ParamShard, Vec<f32>)>> {
    let ShardingState { layout, device, weights, .. } = &engine.sharded;
    let read = |index| weights.as_ref().unwrap().read(layout, index, device).unwrap();
    let values = |(shard, value): (ParamShard, DynTensor<_>)| (shard, value.flatten().into_data().to_vec().unwrap());
    (0..layout.buckets.len()).map(|index| read(index).into_iter().map(values).collect()).collect()
}

/// The state of a rank after its engine was created, and its parameters after a step.
#[derive(Debug, PartialEq)]
struct Held {
    layout: ShardLayout,
    shards: Vec<Vec<(ParamShard, Vec<f32>)>>,
    memory: MemoryEstimate,
    output: TrainStepOutput,
    parameters: Vec<Vec<f32>>,
}

fn held(mut engine: ToyEngine) -> Held {
    let (layout, shards, memory) = (engine.sharded.layout.clone(), shards(&engine), engine.memory());
    let output = engine.train_step(&[batch(0, engine.rank())], 1e-3).unwrap();
    Held { layout, shards, memory, output, parameters: engine.with_full_params(values).unwrap() }
}

fn check(case: Case, world: usize, tier: &MemoryTier, parts: &[Range<usize>]) {
    let model = case.model();
    let config = |group| {
        let sharding = Sharding { stage: ZeroStage::Weights, bucket_size: case.bucket_size };
        case.config().with_sharding(sharding).with_weights_in(tier.clone()).with_communicator(Box::new(group))
    };
    let expected = threads::run(world, |group| held(config(group).init(model.clone()).unwrap()));
    let found = threads::run(world, |group| {
        let mut loads = vec![];
        let load = |range: Range<usize>| {
            loads.push(range.clone());
            Ok(part(&model, range))
        };
        let skeleton = part(&model, 0..0);
        let engine = config(group).init_in_parts::<TestBackend, _, Error>(skeleton, parts, load).unwrap();
        assert_eq!(loads, parts, "every part is loaded once");
        held(engine)
    });
    assert!(found == expected, "{world} ranks, {parts:?}, {case:?}: {found:?}, expected {expected:?}");
}

#[test]
fn a_model_in_parts_has_the_shards_of_the_whole() {
    let _alone = backward_lock();
    let folder = tempfile::tempdir().unwrap();
    for case in CASES {
        let segments = Segments::segments(&case.model());
        let each: Vec<_> = (0..segments).map(|segment| segment..segment + 1).collect();
        let cut = |at: &[usize]| at.windows(2).map(|pair| pair[0]..pair[1]).collect::<Vec<_>>();
        let some = [&[0, segments][..], &[0, 1, segments], &[0, segments - 1, segments]];
        for parts in some.map(cut).into_iter().chain([each]) {
            for world in 1..=4 {
                check(case, world, &MemoryTier::Device, &parts);
            }
            check(case, 2, &MemoryTier::Host, &parts);
            check(case, 2, &MemoryTier::File(folder.path().to_owned()), &parts);
        }
    }
}

#[test]
fn parts_that_do_not_make_up_the_model_and_other_stages_are_refused() {
    let _alone = backward_lock();
    let segments = Segments::segments(&toy());
    let error = |stage, parts: &[Range<usize>]| {
        let config = EngineConfig::new(AdamW::default()).with_sharding(Sharding { stage, ..Sharding::default() });
        let engine = config.init_in_parts::<TestBackend, _, Error>(toy(), parts, |_| Ok(toy()));
        engine.err().unwrap().to_string()
    };
    let one = |range: Range<usize>| std::iter::once(range).collect::<Vec<_>>();
    for parts in [vec![], one(0..1), vec![0..2, 1..segments], vec![1..segments, 0..1], one(0..segments + 1)] {
        let found = error(ZeroStage::Weights, &parts);
        assert!(found.contains(&format!("consecutive ranges of all {segments} segments")), "{found}");
    }
    let found = error(ZeroStage::Gradients, &one(0..segments));
    assert!(found.contains("zero_stage") && found.contains("found 2"), "{found}");
}
