//! Memory of mixed precision by count: a rank's bytes per weight in every stage, from the engine's own buffers, as Markdown:
//! `mpirun -n 4 masters`, from `tests/mpi/memory`; alone it is a world of one.
//!
//! ZeRO's paper (arXiv:1910.02054, section 3.1) counts 2 bytes for a weight, 2 for its gradient and 12 for the optimizer's f32
//! copy and two moments: 16. This engine sums gradients in f32, which makes 18. Updates on the way of the backward pass keep no
//! gradient: 14.

use burn::{
    backend::{Autodiff, Flex},
    module::{Module, ModuleVisitor, Param},
    tensor::{
        DType, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_zero::{
    Engine, Error, Sharding,
    comm::{Collectives, Communicator, Group, mpi},
    ds_config::Stage,
    estimate::Memory,
    optimizer::AdamW,
    segment::{Checkpointing, Segments, TrainSegments, Value},
};

type Train = Autodiff<Flex>;

/// Large enough that padding, a block of 256 values per matrix and rank, is nothing.
const SIZE: usize = 512;
const LAYERS: usize = 6;
const WEIGHTS: usize = LAYERS * SIZE * SIZE;
const STAGES: [Stage; 4] = [Stage::Replicated, Stage::States, Stage::Gradients, Stage::Weights];

/// Square matrices in bf16, one after the other.
#[derive(Module, Debug)]
struct Stack<B: Backend> {
    layers: Vec<Param<Tensor<B, 2>>>,
}

fn stack() -> Stack<Train> {
    let layer = |number: usize| {
        let value = |i: usize| ((number * 7919 + i * 104_729) % 1009) as f32 / 1009.0 / 16.0 - 0.03;
        let values: Vec<f32> = (0..SIZE * SIZE).map(value).collect();
        let flat = Tensor::<Flex, 1>::from_floats(values.as_slice(), &Default::default());
        let matrix = flat.reshape([SIZE, SIZE]).cast(DType::BF16);
        Param::from_tensor(Tensor::<Train, 2>::from_inner(matrix).require_grad())
    };
    Stack { layers: (0..LAYERS).map(layer).collect() }
}

impl<B: Backend> Segments<B> for Stack<B> {
    type Batch = Tensor<B, 2>;

    fn segments(&self) -> usize {
        LAYERS
    }

    fn forward_segment(&self, segment: usize, batch: &Self::Batch, inputs: Vec<Value<B>>) -> Vec<Value<B>> {
        let x = inputs.into_iter().next().map_or_else(|| batch.clone(), Value::tensor::<2>);
        vec![Value::new(x.matmul(self.layers[segment].val().cast(DType::F32)).tanh())]
    }
}

impl<B: AutodiffBackend> TrainSegments<B> for Stack<B> {
    fn inner_batch(batch: &Tensor<B, 2>) -> Tensor<B::InnerBackend, 2> {
        batch.clone().inner()
    }

    fn visit_segment<V: ModuleVisitor<B>>(&self, segment: usize, visitor: &mut V) {
        visitor.enter_module("layers", "");
        visitor.enter_module(&segment.to_string(), "");
        visitor.visit_float(&self.layers[segment]);
        visitor.exit_module(&segment.to_string(), "");
        visitor.exit_module("layers", "");
    }
}

/// What a rank holds when the gradients of the second step are there, and when they pass, and the most gradients alive at a time.
fn counted(group: Box<dyn Communicator>, stage: Stage, early: bool) -> Result<(Memory, usize), Error> {
    let engine = Engine::<Train>::new(AdamW::default(), None, Checkpointing::Full);
    let mut engine = engine.in_world(group, Sharding { stage, bucket_size: SIZE * SIZE });
    let (mut model, batch) = (stack(), Tensor::ones([1, SIZE], &Default::default()));
    engine.accumulate_and_step(&mut model, &batch, 1e-3)?;
    if early {
        engine.accumulate_and_step(&mut model, &batch, 1e-3)?;
    } else {
        engine.accumulate(&mut model, &batch)?;
        // What is under way arrives.
        engine.barrier()?;
    }
    Ok((engine.memory(&model), engine.peak().gradients))
}

/// Bytes per weight: of what is kept, 2 + 4 + 12 or 2 + 12, each kind divided from its stage on.
fn formula(stage: Stage, world: usize, (weight, gradient): (f64, f64)) -> f64 {
    let divided = |bytes: f64, from: Stage| if stage >= from { bytes / world as f64 } else { bytes };
    divided(weight, Stage::Weights) + divided(gradient, Stage::Gradients) + divided(12.0, Stage::States)
}

fn table(group: &mut Group) -> Result<(), Error> {
    let (rank, world) = (group.rank(), group.world());
    let mut lines = Vec::new();
    for stage in STAGES {
        for early in [false, true] {
            let (memory, live) = counted(group.split(0, rank)?, stage, early)?;
            let per_weight = |bytes: u64| bytes as f64 / WEIGHTS as f64;
            let kinds = [memory.parameters, memory.gradients, memory.master, memory.moments].map(per_weight);
            let total = per_weight(memory.total());
            let expected = formula(stage, world, (2.0, if early { 0.0 } else { 4.0 }));
            assert!((total / expected - 1.0).abs() < 0.02, "{stage:?}, early {early}: {total}, expected {expected}");
            let [weights, gradients, master, moments] = kinds.map(|bytes| format!("{bytes:.3}"));
            lines.push(format!(
                "| {}{} | {weights} | {gradients} | {master} | {moments} | {total:.3} | {expected:.3} | {:.3} | {:.3} |",
                u8::from(stage),
                if early { ", early updates" } else { "" },
                formula(stage, world, (2.0, 2.0)),
                per_weight(live as u64),
            ));
        }
    }
    group.barrier()?;
    if rank == 0 {
        println!("bf16 weights, f32 masters: bytes of rank 0 of {world} per weight, of {WEIGHTS}");
        println!("| stage | weights | gradients | masters | moments | counted | formula | paper | live gradients |");
        println!("|---|---|---|---|---|---|---|---|---|");
        lines.iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

fn main() -> Result<(), Error> {
    let (session, mut group) = mpi::Session::start()?;
    table(&mut group)?;
    session.finish();
    Ok(())
}
