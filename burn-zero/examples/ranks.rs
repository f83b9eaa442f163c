//! The laws of the collectives and of ZeRO between real processes: `mpirun -n 3 ranks`, from `tests/mpi/run`.
//!
//! Every rank trains its micro-batches in every stage and compares the parameters with one process that takes all of them.
//! `ranks lose` lets rank 1 kill itself between two steps, `ranks hang` lets it fall silent. With a folder in TRACE each rank
//! leaves a timeline there.

use burn::{
    backend::{Autodiff, Flex},
    module::{Module, ModuleVisitor, Param},
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use burn_zero::{
    Engine, Error, Sharding,
    comm::{Collectives, Communicator, Group, mpi},
    ds_config::Stage,
    optimizer::AdamW,
    segment::{Checkpointing, Segments, TrainSegments, Value},
};
use std::time::Duration;

type Train = Autodiff<Flex>;

const SIZE: usize = 40;

/// Three matrices in a row.
#[derive(Module, Debug)]
struct Stack<B: Backend> {
    layers: Vec<Param<Tensor<B, 2>>>,
}

fn stack() -> Stack<Train> {
    let value = |layer: usize, i: usize| ((layer * 7919 + i * 104_729) % 1009) as f32 / 1009.0 - 0.5;
    let layer = |layer| {
        let values: Vec<f32> = (0..SIZE * SIZE).map(|i| value(layer, i) / 3.0).collect();
        let flat = Tensor::<Train, 1>::from_floats(values.as_slice(), &Default::default());
        Param::from_tensor(flat.reshape([SIZE, SIZE]))
    };
    Stack { layers: (0..3).map(layer).collect() }
}

/// One row of inputs and targets.
fn rows(number: usize) -> Vec<Tensor<Train, 2>> {
    let row = |shift: usize| {
        let values: Vec<f32> = (0..SIZE).map(|i| ((number * 31 + i * 17 + shift) % 23) as f32 / 23.0 - 0.5).collect();
        Tensor::<Train, 1>::from_floats(values.as_slice(), &Default::default()).reshape([1, SIZE])
    };
    vec![row(0), row(5)]
}

impl<B: Backend> Segments<B> for Stack<B> {
    type Batch = Vec<Tensor<B, 2>>;

    fn segments(&self) -> usize {
        self.layers.len()
    }

    fn forward_segment(&self, segment: usize, batch: &Self::Batch, inputs: Vec<Value<B>>) -> Vec<Value<B>> {
        let x = inputs.into_iter().next().map_or_else(|| batch[0].clone(), Value::tensor::<2>);
        let y = x.matmul(self.layers[segment].val());
        let last = segment + 1 == self.layers.len();
        vec![Value::new(if last { (y - batch[1].clone()).powf_scalar(2.0) } else { y.tanh() })]
    }
}

impl<B: AutodiffBackend> TrainSegments<B> for Stack<B> {
    fn inner_batch(batch: &Vec<Tensor<B, 2>>) -> Vec<Tensor<B::InnerBackend, 2>> {
        batch.iter().map(|tensor| tensor.clone().inner()).collect()
    }

    fn visit_segment<V: ModuleVisitor<B>>(&self, segment: usize, visitor: &mut V) {
        visitor.enter_module("layers", "");
        visitor.enter_module(&segment.to_string(), "");
        visitor.visit_float(&self.layers[segment]);
        visitor.exit_module(&segment.to_string(), "");
        visitor.exit_module("layers", "");
    }
}

fn values(model: &Stack<Train>) -> Vec<f32> {
    let layer = |layer: &Param<Tensor<Train, 2>>| layer.val().into_data().iter::<f32>().collect::<Vec<_>>();
    model.layers.iter().flat_map(layer).collect()
}

fn engine() -> Engine<Train> {
    Engine::new(AdamW::default(), Some(0.5), Checkpointing::Full)
}

/// The parameters after ten steps.
fn train(mut engine: Engine<Train>, micros: &[usize], world: usize) -> Result<Vec<f32>, Error> {
    let mut model = stack();
    for step in 0..10 {
        for micro in micros {
            engine.accumulate(&mut model, &rows(step * world + micro))?;
        }
        engine.step(&mut model, 1e-3)?;
    }
    let found = engine.with_whole(&model, values);
    if let Some(folder) = std::env::var_os("TRACE") {
        let path = std::path::Path::new(&folder).join(format!("rank-{}-of-{world}.json", engine.rank()));
        engine.trace().write(&path, engine.rank())?;
    }
    found
}

fn stages(group: &mut Group) -> Result<(), Error> {
    let (rank, world) = (group.rank(), group.world());
    let everyone: Vec<usize> = (0..world).collect();
    let expected = train(engine(), &everyone, world)?;
    for stage in [Stage::Replicated, Stage::States, Stage::Gradients, Stage::Weights] {
        let engine = engine().in_world(group.split(0, rank)?, Sharding { stage, bucket_size: 2000 });
        let found = train(engine, &[rank], world)?;
        assert_eq!(found, expected, "stage {stage:?}, rank {rank} of {world}");
    }
    Ok(())
}

fn collectives(group: &mut Group) -> Result<(), Error> {
    let (rank, world) = (group.rank(), group.world());
    for n in [0, 1, 1000, 3_000_000] {
        let value = |rank: usize, i: usize| ((rank * 7919 + i) % 1009) as f32 / 64.0;
        let mut all: Vec<f32> = (0..n).map(|i| value(rank, i)).collect();
        group.all_reduce(&mut all)?;
        let sum = |i| (1..world).fold(value(0, i), |sum, rank| sum + value(rank, i));
        assert!(all.iter().enumerate().all(|(i, &x)| x == sum(i)), "all_reduce of {n}");
    }
    let mut pairs = group.split(rank / 2, rank)?;
    let notes = pairs.share(&[rank as u8])?;
    assert!(notes.iter().all(|note| usize::from(note[0]) / 2 == rank / 2));
    let mut token = [0f32];
    if rank > 0 {
        group.recv(&mut token, rank - 1)?;
    }
    token[0] += 1.0;
    if rank + 1 < world {
        group.send(&token, rank + 1)?;
    }
    group.broadcast(&mut token, world - 1)?;
    assert_eq!(token, [world as f32]);
    group.barrier()
}

/// Goes on until a rank is lost.
fn until_lost(group: Group, kill: bool) -> Result<(), Error> {
    let rank = group.rank();
    let sharding = Sharding { stage: Stage::Gradients, bucket_size: 2000 };
    let mut engine = engine().in_world(Box::new(group.with_deadline(Duration::from_secs(5))), sharding);
    let mut model = stack();
    for step in 0..1_000_000 {
        if rank == 1 && step == 20 {
            if kill {
                std::process::abort();
            }
            std::thread::sleep(Duration::from_secs(25));
        }
        engine.accumulate(&mut model, &rows(step))?;
        engine.step(&mut model, 1e-3)?;
    }
    Ok(())
}

fn main() -> Result<(), Error> {
    let (session, mut group) = mpi::Session::start()?;
    let rank = group.rank();
    let result = match std::env::args().nth(1).as_deref() {
        Some("lose") => until_lost(group, true),
        Some("hang") => until_lost(group, false),
        _ => collectives(&mut group).and_then(|()| stages(&mut group)),
    };
    match result {
        Ok(()) => println!("rank {rank}: every law holds"),
        Err(error) => {
            eprintln!("rank {rank}: {error}");
            // Without `finish`: mpirun ends the others.
            std::process::exit(1);
        }
    }
    session.finish();
    Ok(())
}
