//! The laws of the collectives and of ZeRO between real processes: `mpirun -n 3 ranks`, from `tests/mpi/run`.
//!
//! Every rank trains its micro-batches in every stage, with states and weights on the device, on the host and in a file, with
//! clipping and without (then the last micro-batch of a step is updated with on its way), and compares the parameters with one
//! process that takes all of them, and what it has sent with the formulas of the paper.
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
    Engine, Error, Sharding, Tier,
    comm::{Collectives, Communicator, Group, mpi},
    ds_config::Stage,
    optimizer::AdamW,
    segment::{Checkpointing, Segments, TrainSegments, Value},
};
use std::{path::Path, time::Duration};

type Train = Autodiff<Flex>;

const SIZE: usize = 42;
const WIDE: usize = 72;
const STEPS: usize = 10;
const BUCKET: usize = 2000;

/// What differs from model to model.
#[derive(Debug, Clone, Copy)]
struct Shape {
    /// The first matrix is the last one too.
    tied: bool,
    /// The second matrix does not learn.
    frozen: bool,
}

/// Four matrices in a row, unequal ones, and three values.
#[derive(Module, Debug)]
struct Stack<B: Backend> {
    table: Param<Tensor<B, 2>>,
    up: Param<Tensor<B, 2>>,
    down: Param<Tensor<B, 2>>,
    /// None if it is the table.
    head: Option<Param<Tensor<B, 2>>>,
    tiny: Param<Tensor<B, 1>>,
}

impl Shape {
    fn stack(self) -> Stack<Train> {
        let matrix = |number: usize, [rows, columns]: [usize; 2]| {
            let value = |i: usize| (((number * 7919 + i * 104_729) % 1009) as f32 / 1009.0 - 0.5) / 3.0;
            let values: Vec<f32> = (0..rows * columns).map(value).collect();
            let flat = Tensor::<Train, 1>::from_floats(values.as_slice(), &Default::default());
            Param::from_tensor(flat.reshape([rows, columns]))
        };
        let up = matrix(1, [SIZE, WIDE]);
        Stack {
            table: matrix(0, [SIZE, SIZE]),
            up: if self.frozen { up.set_require_grad(false) } else { up },
            down: matrix(2, [WIDE, SIZE]),
            head: (!self.tied).then(|| matrix(3, [SIZE, SIZE])),
            tiny: Param::from_tensor(Tensor::from_floats([0.5, 1.0, 1.5], &Default::default())),
        }
    }

    /// The padded values of what learns and of what does not. Of these matrices only the head and what follows it fit one
    /// bucket; a parameter starts at a multiple of 256, and a bucket ends where every rank has as many blocks.
    fn padded(self, world: usize) -> (usize, usize) {
        let bucket = |sizes: &[usize]| {
            let blocks: usize = sizes.iter().map(|size| size.div_ceil(256)).sum();
            blocks.div_ceil(world) * world * 256
        };
        let (square, wide) = (SIZE * SIZE, SIZE * WIDE);
        let end = if self.tied { bucket(&[3]) } else { bucket(&[square, 3]) };
        let learns = bucket(&[square]) + bucket(&[wide]) + end;
        if self.frozen { (learns, bucket(&[wide])) } else { (learns + bucket(&[wide]), 0) }
    }
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
        4
    }

    fn forward_segment(&self, segment: usize, batch: &Self::Batch, inputs: Vec<Value<B>>) -> Vec<Value<B>> {
        let x = inputs.into_iter().next().map_or_else(|| batch[0].clone(), Value::tensor::<2>);
        vec![Value::new(match segment {
            0 => x.matmul(self.table.val()).tanh(),
            1 => x.matmul(self.up.val()).tanh(),
            2 => x.matmul(self.down.val()).tanh(),
            _ => {
                let y = x.matmul(self.head.as_ref().unwrap_or(&self.table).val().transpose());
                let y = y.reshape([SIZE / 3, 3]) * self.tiny.val().unsqueeze();
                (y.reshape([1, SIZE]) - batch[1].clone()).powf_scalar(2.0)
            }
        })]
    }
}

fn visit<B: Backend, const D: usize>(name: &str, param: &Param<Tensor<B, D>>, visitor: &mut impl ModuleVisitor<B>) {
    visitor.enter_module(name, "");
    visitor.visit_float(param);
    visitor.exit_module(name, "");
}

impl<B: AutodiffBackend> TrainSegments<B> for Stack<B> {
    fn inner_batch(batch: &Vec<Tensor<B, 2>>) -> Vec<Tensor<B::InnerBackend, 2>> {
        batch.iter().map(|tensor| tensor.clone().inner()).collect()
    }

    fn visit_segment<V: ModuleVisitor<B>>(&self, segment: usize, visitor: &mut V) {
        match segment {
            0 => visit("table", &self.table, visitor),
            1 => visit("up", &self.up, visitor),
            2 => visit("down", &self.down, visitor),
            _ => {
                visit("head", self.head.as_ref().unwrap_or(&self.table), visitor);
                visit("tiny", &self.tiny, visitor);
            }
        }
    }
}

#[derive(Default)]
struct Values(Vec<f32>);

impl ModuleVisitor<Train> for Values {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
        self.0.extend(param.val().into_data().iter::<f32>());
    }
}

fn values(model: &Stack<Train>) -> Vec<f32> {
    let mut values = Values::default();
    model.visit(&mut values);
    values.0
}

fn engine(max_grad_norm: Option<f64>) -> Engine<Train> {
    Engine::new(AdamW::default(), max_grad_norm, Checkpointing::All)
}

/// The parameters after ten steps, and how many elements of gradients and of weights were sent until then. The last micro-batch
/// of a step is updated with on its way, where it is `early` and nothing is clipped.
fn train(
    shape: Shape,
    mut engine: Engine<Train>,
    (micros, early): (&[usize], bool),
    world: usize,
) -> Result<(Vec<f32>, [u64; 2]), Error> {
    let mut model = shape.stack();
    let (last, others) = micros.split_last().expect("a step has a micro-batch");
    for step in 0..STEPS {
        let rows = |micro| rows(step * world + micro);
        for &micro in others {
            engine.accumulate(&mut model, &rows(micro))?;
        }
        if early {
            engine.accumulate_and_step(&mut model, &rows(*last), 1e-3)?;
        } else {
            engine.accumulate(&mut model, &rows(*last))?;
            engine.step(&mut model, 1e-3)?;
        }
    }
    let traffic = engine.traffic();
    let found = engine.with_whole(&model, values)?;
    if let Some(folder) = std::env::var_os("TRACE") {
        let path = Path::new(&folder).join(format!("rank-{}-of-{world}.json", engine.rank()));
        engine.trace().write(&path, engine.rank())?;
    }
    Ok((found, [traffic.reduced.elements, traffic.gathered.elements]))
}

/// What a rank sends in a micro-step: 2Φ, 2Φ, 2Φ, 3Φ × (N − 1) / N elements where everything learns. What does not is gathered
/// with the rest in stage 3.
fn formula(shape: Shape, stage: Stage, world: usize) -> [u64; 2] {
    let (learns, frozen) = shape.padded(world);
    let [reduced, gathered] = match stage {
        Stage::Replicated => [2 * learns, 0],
        Stage::States | Stage::Gradients => [learns, learns],
        Stage::Weights => [learns, 2 * (learns + frozen)],
    };
    [reduced, gathered].map(|elements| (elements / world * (world - 1)) as u64)
}

/// Every shape of model in every stage, with states and weights in every place, is one process that takes all micro-batches.
fn stages(group: &mut Group) -> Result<(), Error> {
    let (rank, world) = (group.rank(), group.world());
    let everyone: Vec<usize> = (0..world).collect();
    // The same for all ranks, whose parent is mpirun, and no other run's.
    let folder = std::env::temp_dir().join(format!("ranks-of-{}", std::os::unix::process::parent_id()));
    let shapes = [(false, false), (true, false), (false, true), (true, true)];
    for ((tied, frozen), clip) in shapes.into_iter().flat_map(|shape| [(shape, Some(0.5)), (shape, None)]) {
        let shape = Shape { tied, frozen };
        let (expected, _) = train(shape, engine(clip), (&everyone, false), world)?;
        for tier in [Tier::Device, Tier::Host, Tier::File(folder.clone())] {
            for stage in [Stage::Replicated, Stage::States, Stage::Gradients, Stage::Weights] {
                let what = format!("{shape:?}, clipped to {clip:?}, {tier:?}, {stage:?}, rank {rank} of {world}");
                let engine = engine(clip).in_world(group.split(0, rank)?, Sharding { stage, bucket_size: BUCKET });
                let engine = engine.with_weights_in(tier.clone()).with_states_in(&tier)?;
                let (found, sent) = train(shape, engine, (&[rank], true), world)?;
                let apart = found.iter().zip(&expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                assert_eq!((found.len(), apart), (expected.len(), 0), "values that differ: {what}");
                let steps = STEPS as u64;
                assert_eq!(sent, formula(shape, stage, world).map(|elements| steps * elements), "elements: {what}");
            }
        }
    }
    group.barrier()?;
    if rank == 0 {
        // Empty: files go with their engines.
        std::fs::remove_dir(&folder).map_err(|source| Error::Path { path: folder, source })?;
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
    let sharding = Sharding { stage: Stage::Gradients, bucket_size: BUCKET };
    let mut engine = engine(Some(0.5)).in_world(Box::new(group.with_deadline(Duration::from_secs(5))), sharding);
    let mut model = Shape { tied: true, frozen: false }.stack();
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
