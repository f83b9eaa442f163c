use super::*;
use crate::{
    comm::{Solo, threads},
    segment::{
        Segments,
        tests::{TestBackend, Toy, ToyBatch, backward_lock, toy_of},
    },
};
use burn::{
    module::Module,
    optim::{AdamConfig, AdamWConfig, SgdConfig},
};

#[derive(Default)]
struct ParameterValues(Vec<Vec<f32>>);

impl ModuleVisitor<TestBackend> for ParameterValues {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<TestBackend, D>>) {
        self.0.push(param.val().into_data().to_vec().unwrap());
    }
}

fn values(model: &Toy<TestBackend>) -> Vec<Vec<f32>> {
    let mut values = ParameterValues::default();
    model.visit(&mut values);
    values.0
}

fn gradients(model: &Toy<TestBackend>, micro: usize) -> GradientsParams {
    let batch = ToyBatch::new(7 * micro as i32, 7 * micro as i32 + 9, 4.0);
    let loss = (0..4).fold(vec![], |values, i| model.forward_segment(i, &batch, values)).remove(0).tensor::<1>();
    GradientsParams::from_grads(loss.sum().backward(), model)
}

/// Runs a plain training loop on one rank.
fn train_sharded<O: ElementWise<<TestBackend as AutodiffBackend>::InnerBackend>>(
    mut optimizer: ShardedOptimizer<O, TestBackend>,
    rank: usize,
    world: usize,
) -> Vec<Vec<f32>> {
    // A plain loop on Burn 0.21 needs new autodiff leaves for every pass.
    let mut model = toy_of(41, 24, true).fork(&Default::default());
    for step in 0..6 {
        if step == 3 {
            let record = Optimizer::<Toy<TestBackend>, TestBackend>::to_record(&optimizer);
            optimizer = Optimizer::<Toy<TestBackend>, TestBackend>::load_record(optimizer, record);
        }
        let grads = gradients(&model, step * world + rank);
        model = optimizer.step(1e-2, model, grads).fork(&Default::default());
    }
    values(&model)
}

/// Runs a plain training loop in one process with Burn's own optimizer, on the mean of all ranks' gradients.
fn train_unsharded<O: SimpleOptimizer<<TestBackend as AutodiffBackend>::InnerBackend>>(
    optimizer: O,
    world: usize,
) -> Vec<Vec<f32>> {
    let mut optimizer = burn::optim::adaptor::OptimizerAdaptor::<O, Toy<TestBackend>, TestBackend>::from(optimizer);
    let mut model = toy_of(41, 24, true).fork(&Default::default());
    for step in 0..6 {
        let mut sum: HashMap<ParamId, DynTensor<_>> = HashMap::new();
        for rank in 0..world {
            let model = model.clone().fork(&Default::default());
            let grads = gradients(&model, step * world + rank).into();
            let mut collect = ModuleGradientCollector::<TestBackend> { grads, path: vec![], gradients: vec![] };
            model.visit(&mut collect);
            for Gradient { id, value, .. } in collect.gradients {
                let value = match sum.remove(&id) {
                    Some(sum) => sum.add(value),
                    None => value,
                };
                sum.insert(id, value);
            }
        }
        let mut mean = MeanGradients { sum, world, grads: GradientsParams::new() };
        model.visit(&mut mean);
        model = optimizer.step(1e-2, model, mean.grads).fork(&Default::default());
    }
    values(&model)
}

struct MeanGradients {
    sum: HashMap<ParamId, DynTensor<<TestBackend as AutodiffBackend>::InnerBackend>>,
    world: usize,
    grads: GradientsParams,
}

impl ModuleVisitor<TestBackend> for MeanGradients {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<TestBackend, D>>) {
        if let Some(sum) = self.sum.remove(&param.id) {
            self.grads.register(param.id, sum.tensor::<D>().mul_scalar(1.0 / self.world as f64));
        }
    }
}

fn assert_equals_unsharded<O: ElementWise<<TestBackend as AutodiffBackend>::InnerBackend>>(
    optimizer: impl Fn() -> O + Sync,
) {
    for world in 1..=3 {
        let expected = train_unsharded(optimizer(), world);
        for stage in [ZeroStage::Disabled, ZeroStage::OptimizerStates, ZeroStage::Gradients] {
            for found in threads::run(world, |group| {
                let (rank, sharding) = (group.rank(), Sharding { stage, bucket_size: 1000 });
                train_sharded(ShardedOptimizer::new(optimizer(), Box::new(group), sharding).unwrap(), rank, world)
            }) {
                assert!(found == expected, "{stage:?} in a world of {world}");
            }
        }
    }
}

#[test]
fn a_plain_loop_in_a_world_is_burn_s_own_bit_for_bit() {
    let _alone = backward_lock();
    assert_equals_unsharded(|| AdamWConfig::new().with_weight_decay(0.1).build());
    assert_equals_unsharded(|| AdamConfig::new().build());
    assert_equals_unsharded(|| SgdConfig::new().build());
}

#[test]
fn stage_three_is_refused() {
    let sharding = Sharding { stage: ZeroStage::Weights, ..Sharding::default() };
    let refused = ShardedOptimizer::<_, TestBackend>::new(AdamWConfig::new().build(), Box::new(Solo), sharding);
    assert!(refused.err().unwrap().to_string().contains("stage 3 needs the engine"));
}
