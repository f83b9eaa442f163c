//! Counts the memory of mixed precision: a rank's bytes per weight in every ZeRO stage, from the engine's own buffers,
//! printed as Markdown. Run as `mpirun -n 4 masters`, see `tests/mpi/memory`; without mpirun it is a world of one.
//!
//! ZeRO's paper (arXiv:1910.02054, section 3.1) counts 2 bytes for a weight, 2 for its gradient and 12 for the
//! optimizer's f32 copy and two moments: 16. This engine accumulates gradients in f32, which makes 18. Updates during
//! the backward pass keep no gradient: 14.

use burn::{
    backend::{Autodiff, Flex},
    module::{Module, ModuleVisitor, Param},
    tensor::{
        DType, Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_zero::{
    EngineConfig, Error, Sharding, ZeroStage,
    comm::{Collectives, Communicator, ProcessGroup, mpi},
    estimate::MemoryEstimate,
    optimizer::AdamW,
    segment::{Checkpointing, DynTensor, Segments, TrainSegments},
};

type TrainBackend = Autodiff<Flex>;

/// Large enough that padding, at most a block of 256 values per matrix and rank, is negligible.
const SIZE: usize = 512;
const LAYERS: usize = 6;
const WEIGHTS: usize = LAYERS * SIZE * SIZE;
const STAGES: [ZeroStage; 4] =
    [ZeroStage::Disabled, ZeroStage::OptimizerStates, ZeroStage::Gradients, ZeroStage::Weights];

/// A stack of square bf16 matrices.
#[derive(Module, Debug)]
struct Stack<B: Backend> {
    layers: Vec<Param<Tensor<B, 2>>>,
}

fn stack() -> Stack<TrainBackend> {
    let layer = |number: usize| {
        let value = |i: usize| ((number * 7919 + i * 104_729) % 1009) as f32 / 1009.0 / 16.0 - 0.03;
        let values: Vec<f32> = (0..SIZE * SIZE).map(value).collect();
        let flat = Tensor::<Flex, 1>::from_floats(values.as_slice(), &Default::default());
        let matrix = flat.reshape([SIZE, SIZE]).cast(DType::BF16);
        Param::from_tensor(Tensor::<TrainBackend, 2>::from_inner(matrix).require_grad())
    };
    Stack { layers: (0..LAYERS).map(layer).collect() }
}

impl<B: Backend> Segments<B> for Stack<B> {
    type Batch = Tensor<B, 2>;

    fn segments(&self) -> usize {
        LAYERS
    }

    fn forward_segment(&self, segment: usize, batch: &Self::Batch, inputs: Vec<DynTensor<B>>) -> Vec<DynTensor<B>> {
        let x = inputs.into_iter().next().map_or_else(|| batch.clone(), DynTensor::tensor::<2>);
        vec![DynTensor::new(x.matmul(self.layers[segment].val().cast(DType::F32)).tanh())]
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

/// Returns the memory that a rank holds after the backward pass of the second step (gradients kept, or with `early`
/// already applied), and the largest number of bytes of gradients at a time.
fn measure(group: Box<dyn Communicator>, stage: ZeroStage, early: bool) -> Result<(MemoryEstimate, usize), Error> {
    let config = EngineConfig::new(AdamW::default()).with_checkpointing(Checkpointing::Full);
    let config = config.with_communicator(group).with_sharding(Sharding { stage, bucket_size: SIZE * SIZE });
    let (mut engine, batch) = (config.init(stack())?, [Tensor::ones([1, SIZE], &Default::default())]);
    engine.train_step(&batch, 1e-3)?;
    if early {
        engine.train_step(&batch, 1e-3)?;
    } else {
        engine.forward_backward(&batch)?;
        // Wait for the buckets in flight.
        engine.barrier()?;
    }
    Ok((engine.memory(), engine.peak_memory().gradients))
}

/// Returns the expected bytes per weight: 2 + 4 + 12, or 2 + 12 with early updates, each part sharded from its stage
/// on.
fn expected_bytes(stage: ZeroStage, world: usize, weight: f64, gradient: f64) -> f64 {
    let divided = |bytes: f64, from: ZeroStage| if stage >= from { bytes / world as f64 } else { bytes };
    divided(weight, ZeroStage::Weights)
        + divided(gradient, ZeroStage::Gradients)
        + divided(12.0, ZeroStage::OptimizerStates)
}

fn table(group: &mut ProcessGroup) -> Result<(), Error> {
    let (rank, world) = (group.rank(), group.world_size());
    let mut lines = Vec::new();
    for stage in STAGES {
        for early in [false, true] {
            let (memory, live) = measure(group.split(0, rank)?, stage, early)?;
            let per_weight = |bytes: u64| bytes as f64 / WEIGHTS as f64;
            let kinds = [memory.parameters, memory.gradients, memory.master, memory.moments].map(per_weight);
            let total = per_weight(memory.total());
            let expected = expected_bytes(stage, world, 2.0, if early { 0.0 } else { 4.0 });
            assert!((total / expected - 1.0).abs() < 0.02, "{stage:?}, early {early}: {total}, expected {expected}");
            let [weights, gradients, master, moments] = kinds.map(|bytes| format!("{bytes:.3}"));
            lines.push(format!(
                "| {}{} | {weights} | {gradients} | {master} | {moments} | {total:.3} | {expected:.3} | \
                 {:.3} | {:.3} |",
                u8::from(stage),
                if early { ", early updates" } else { "" },
                expected_bytes(stage, world, 2.0, 2.0),
                per_weight(live as u64),
            ));
        }
    }
    group.barrier()?;
    if rank == 0 {
        println!("bf16 weights, f32 master weights: bytes per weight of {WEIGHTS}, rank 0 of {world}");
        println!("| stage | weights | gradients | masters | moments | counted | formula | paper | live gradients |");
        println!("|---|---|---|---|---|---|---|---|---|");
        lines.iter().for_each(|line| println!("{line}"));
    }
    Ok(())
}

fn main() -> Result<(), Error> {
    let (session, mut group) = mpi::Session::init()?;
    table(&mut group)?;
    session.finalize();
    Ok(())
}
