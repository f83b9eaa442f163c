use super::*;
use crate::{
    comm::{Solo, threads},
    segment::{
        Segments,
        tests::{AB, Toy, ToyBatch, alone, toy_of},
    },
};
use burn::{
    module::Module,
    optim::{AdamConfig, AdamWConfig, SgdConfig},
};

#[derive(Default)]
struct Values(Vec<Vec<f32>>);

impl ModuleVisitor<AB> for Values {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
        self.0.push(param.val().into_data().to_vec().unwrap());
    }
}

fn values(model: &Toy<AB>) -> Vec<Vec<f32>> {
    let mut values = Values::default();
    model.visit(&mut values);
    values.0
}

fn gradients(model: &Toy<AB>, micro: usize) -> GradientsParams {
    let batch = ToyBatch::new(7 * micro as i32, 7 * micro as i32 + 9, 4.0);
    let loss = (0..4).fold(vec![], |values, i| model.forward_segment(i, &batch, values)).remove(0).tensor::<1>();
    GradientsParams::from_grads(loss.sum().backward(), model)
}

/// A plain loop of one rank.
fn looped<O: ElementWise<<AB as AutodiffBackend>::InnerBackend>>(
    mut optimizer: Sharded<O, AB>,
    rank: usize,
    world: usize,
) -> Vec<Vec<f32>> {
    // Fresh leaves for every pass, as a plain loop on Burn 0.21 wants them.
    let mut model = toy_of(41, 24, true).fork(&Default::default());
    for step in 0..6 {
        if step == 3 {
            let record = Optimizer::<Toy<AB>, AB>::to_record(&optimizer);
            optimizer = Optimizer::<Toy<AB>, AB>::load_record(optimizer, record);
        }
        let grads = gradients(&model, step * world + rank);
        model = optimizer.step(1e-2, model, grads).fork(&Default::default());
    }
    values(&model)
}

/// A plain loop of one process with Burn's own optimizer, over the mean of all ranks' gradients.
fn plain<O: SimpleOptimizer<<AB as AutodiffBackend>::InnerBackend>>(optimizer: O, world: usize) -> Vec<Vec<f32>> {
    let mut optimizer = burn::optim::adaptor::OptimizerAdaptor::<O, Toy<AB>, AB>::from(optimizer);
    let mut model = toy_of(41, 24, true).fork(&Default::default());
    for step in 0..6 {
        let mut sum: HashMap<ParamId, Value<_>> = HashMap::new();
        for rank in 0..world {
            let model = model.clone().fork(&Default::default());
            let grads = gradients(&model, step * world + rank).into();
            let mut collect = Collect::<AB> { grads, path: vec![], found: vec![] };
            model.visit(&mut collect);
            for Gradient { id, value, .. } in collect.found {
                let value = match sum.remove(&id) {
                    Some(sum) => sum.add(value),
                    None => value,
                };
                sum.insert(id, value);
            }
        }
        let mut mean = Mean { sum, world, grads: GradientsParams::new() };
        model.visit(&mut mean);
        model = optimizer.step(1e-2, model, mean.grads).fork(&Default::default());
    }
    values(&model)
}

struct Mean {
    sum: HashMap<ParamId, Value<<AB as AutodiffBackend>::InnerBackend>>,
    world: usize,
    grads: GradientsParams,
}

impl ModuleVisitor<AB> for Mean {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
        if let Some(sum) = self.sum.remove(&param.id) {
            self.grads.register(param.id, sum.tensor::<D>().mul_scalar(1.0 / self.world as f64));
        }
    }
}

fn law<O: ElementWise<<AB as AutodiffBackend>::InnerBackend>>(optimizer: impl Fn() -> O + Sync) {
    for world in 1..=3 {
        let expected = plain(optimizer(), world);
        for stage in [Stage::Replicated, Stage::States, Stage::Gradients] {
            for found in threads::run(world, |group| {
                let (rank, sharding) = (group.rank(), Sharding { stage, bucket_size: 1000 });
                looped(Sharded::new(optimizer(), Box::new(group), sharding).unwrap(), rank, world)
            }) {
                assert!(found == expected, "{stage:?} in a world of {world}");
            }
        }
    }
}

#[test]
fn a_plain_loop_in_a_world_is_burn_s_own_bit_for_bit() {
    let _alone = alone();
    law(|| AdamWConfig::new().with_weight_decay(0.1).build());
    law(|| AdamConfig::new().build());
    law(|| SgdConfig::new().build());
}

#[test]
fn stage_three_is_refused() {
    let sharding = Sharding { stage: Stage::Weights, ..Sharding::default() };
    let refused = Sharded::<_, AB>::new(AdamWConfig::new().build(), Box::new(Solo), sharding);
    assert!(refused.err().unwrap().to_string().contains("stage 3 needs the engine"));
}
