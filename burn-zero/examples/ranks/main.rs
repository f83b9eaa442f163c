//! Tests of the collectives and of ZeRO between real processes: `mpirun -n 3 ranks`, see `tests/mpi/run`.
//!
//! Every rank trains on its micro-batches in every stage, with states and weights on the device, in host memory and in
//! a file, with clipping and without (then the parameters are updated during the last backward pass of a step). It
//! compares the parameters with those of one process that takes all micro-batches, and the amount of data sent with the
//! formulas of the paper. `ranks order` checks that exchanges match in the order of their start, in parts of 7 bytes.
//!
//! `ranks pipeline` compares pipelines of every schedule, and two of them side by side in ZeRO stages 0 to 2, with one
//! process.
//!
//! `ranks lose` makes the middle rank abort between two steps, `ranks hang` makes it stop responding; with `forward`,
//! `backward` or `sums` it does so in that part of a step of a pipeline. With `ranks chain` every
//! rank waits for the one before; with `ranks answered` rank 1 no longer does when rank 2 gives up. If TRACE names a folder, each rank writes a timeline there.

use burn_zero::{
    Engine, EngineConfig, Error, MemoryTier, Sharding, ZeroStage,
    comm::{Collectives, Communicator, Message, Operation, ProcessGroup, mpi},
    optimizer::AdamW,
    segment::Checkpointing,
};
use stack::{ModelVariant, Stack, TrainBackend, Values, rows, values};
use std::{path::Path, time::Duration};

mod lost;
mod pipeline;
mod stack;

const STEPS: usize = 10;
const BUCKET: usize = 2000;

fn config(max_grad_norm: Option<f64>) -> EngineConfig {
    EngineConfig::new(AdamW::default()).with_max_grad_norm(max_grad_norm).with_checkpointing(Checkpointing::All)
}

/// Returns the parameters after ten steps of the micro-batches `micros` of this rank, and the numbers of gradient and
/// weight elements sent until then. With `in_backward` and without clipping, the parameters are updated during the last
/// backward pass of a step.
fn train(
    mut engine: Engine<TrainBackend, Stack<TrainBackend>>,
    micros: &[usize],
    in_backward: bool,
    world: usize,
) -> Result<(Values, [u64; 2]), Error> {
    for step in 0..STEPS {
        let micro_batches: Vec<_> = micros.iter().map(|micro| rows(step * world + micro)).collect();
        if in_backward {
            engine.train_step(&micro_batches, 1e-3)?;
        } else {
            engine.forward_backward(&micro_batches)?;
            engine.step(1e-3)?;
        }
    }
    let traffic = engine.traffic();
    let found = engine.with_full_params(values)?;
    if let Some(folder) = std::env::var_os("TRACE") {
        let path = Path::new(&folder).join(format!("rank-{}-of-{world}.json", engine.rank()));
        engine.trace().write(&path, engine.rank())?;
    }
    Ok((found, [traffic.reduced.elements, traffic.gathered.elements]))
}

/// Returns the number of values that differ in some bit.
fn different(found: &Values, expected: &Values) -> usize {
    let pairs = expected.iter().flat_map(|(name, values)| {
        assert_eq!(found[name].len(), values.len(), "{name}");
        found[name].iter().zip(values)
    });
    pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count()
}

/// Returns the number of elements that a rank sends per micro-batch: 2Φ, 2Φ, 2Φ, 3Φ × (N − 1) / N if everything is
/// trainable. In stage 3 frozen weights are gathered with the rest.
fn expected_elements(shape: ModelVariant, stage: ZeroStage, world: usize) -> [u64; 2] {
    let (learns, frozen) = shape.padded(world);
    let [reduced, gathered] = match stage {
        ZeroStage::Disabled => [2 * learns, 0],
        ZeroStage::OptimizerStates | ZeroStage::Gradients => [learns, learns],
        ZeroStage::Weights => [learns, 2 * (learns + frozen)],
    };
    [reduced, gathered].map(|elements| (elements / world * (world - 1)) as u64)
}

/// Checks that every variant, stage and memory tier gives the result of one process that takes all micro-batches.
fn stages(group: &mut ProcessGroup) -> Result<(), Error> {
    let (rank, world) = (group.rank(), group.world_size());
    let everyone: Vec<usize> = (0..world).collect();
    // All ranks of a run share a parent, mpirun, so they share this folder with each other and with no other run.
    let folder = std::env::temp_dir().join(format!("ranks-of-{}", std::os::unix::process::parent_id()));
    let shapes = [(false, false), (true, false), (false, true), (true, true)];
    for ((tied, frozen), clip) in shapes.into_iter().flat_map(|shape| [(shape, Some(0.5)), (shape, None)]) {
        let shape = ModelVariant { tied, frozen };
        let (expected, _) = train(config(clip).init(shape.stack())?, &everyone, false, world)?;
        for tier in [MemoryTier::Device, MemoryTier::Host, MemoryTier::File(folder.clone())] {
            for stage in [ZeroStage::Disabled, ZeroStage::OptimizerStates, ZeroStage::Gradients, ZeroStage::Weights] {
                let what = format!("{shape:?}, clipped to {clip:?}, {tier:?}, {stage:?}, rank {rank} of {world}");
                let config = config(clip).with_communicator(group.split(0, rank)?);
                let config = config.with_sharding(Sharding { stage, bucket_size: BUCKET });
                let config = config.with_weights_in(tier.clone()).with_optimizer_states_in(tier.clone());
                let (found, sent) = train(config.init(shape.stack())?, &[rank], true, world)?;
                assert_eq!(different(&found, &expected), 0, "values that differ: {what}");
                let steps = STEPS as u64;
                assert_eq!(
                    sent,
                    expected_elements(shape, stage, world).map(|elements| steps * elements),
                    "elements: {what}"
                );
            }
        }
    }
    group.barrier()?;
    if rank == 0 {
        // The folder is empty, because an engine removes its files when it is dropped.
        std::fs::remove_dir(&folder).map_err(|source| Error::Io { path: folder, source })?;
    }
    Ok(())
}

fn collectives(group: &mut ProcessGroup) -> Result<(), Error> {
    let (rank, world) = (group.rank(), group.world_size());
    for n in [0, 1, 1000, 3_000_000] {
        let value = |rank: usize, i: usize| ((rank * 7919 + i) % 1009) as f32 / 64.0;
        let mut all: Vec<f32> = (0..n).map(|i| value(rank, i)).collect();
        group.all_reduce(&mut all)?;
        let sum = |i| (1..world).fold(value(0, i), |sum, rank| sum + value(rank, i));
        assert!(all.iter().enumerate().all(|(i, &x)| x == sum(i)), "all_reduce of {n}");
    }
    let mut pairs = group.split(rank / 2, rank)?;
    let notes = pairs.all_gather_object(&[rank as u8])?;
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

/// The bytes of a part of a message with `ranks order`.
const PART_BYTES: usize = 7;

/// Checks that exchanges with one peer match in the order of their start, whole or in parts, however late they are
/// waited for.
fn order(mut group: ProcessGroup) -> Result<(), Error> {
    let (rank, world) = (group.rank(), group.world_size());
    let peers: Vec<usize> = (0..world).filter(|&peer| peer != rank).collect();
    // From an empty message to one of five parts; the last part may be empty.
    let content = |from: usize, number: usize| vec![(from * 31 + number) as u8; number % (4 * PART_BYTES + 1)];
    for round in 0..20 {
        let numbers = round * 50..(round + 1) * 50;
        let mut receives = Vec::new();
        for number in numbers.clone() {
            receives.push((number, group.start(Operation::Send, Vec::new(), &peers)?));
        }
        let send = |number| peers.iter().map(|&to| Message { to, bytes: content(rank, number) }).collect();
        let sends = numbers.map(|number| group.start(Operation::Send, send(number), &[]));
        let sends = sends.collect::<Result<Vec<_>, _>>()?;
        for (number, receive) in receives.into_iter().rev() {
            let expected: Vec<_> = peers.iter().map(|&from| content(from, number)).collect();
            assert_eq!(receive.wait()?, expected, "messages {number} to rank {rank}");
        }
        for send in sends {
            send.wait()?;
        }
    }
    late_wait(group)
}

/// Checks that the deadline of a receive counts from the wait: rank 1 sends only when the deadline has long passed since
/// rank 0 has started to receive.
fn late_wait(mut group: ProcessGroup) -> Result<(), Error> {
    group.barrier()?;
    let (rank, world) = (group.rank(), group.world_size());
    if world == 1 || rank > 1 {
        return Ok(());
    }
    let deadline = Duration::from_secs(2);
    let mut group = group.with_deadline(deadline);
    let other = 1 - rank;
    let receive = group.start(Operation::Send, Vec::new(), &[other])?;
    std::thread::sleep(2 * deadline);
    let received = if rank == 0 {
        assert!(!receive.is_done());
        group.send(&[0f32], other)?;
        receive.wait()?
    } else {
        let received = receive.wait()?;
        group.send(&[0f32], other)?;
        received
    };
    assert_eq!(received, [[0; 4]]);
    Ok(())
}

fn main() -> Result<(), Error> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let command = arguments.first().map(String::as_str);
    let in_parts = || mpi::Session::init_with_part_bytes(PART_BYTES);
    let (session, mut group) = if command == Some("order") { in_parts() } else { mpi::Session::init() }?;
    let rank = group.rank();
    let result = match command {
        Some("order") => order(group),
        Some("chain") => lost::wait_in_a_chain(group, false),
        Some("answered") => lost::wait_in_a_chain(group, true),
        Some("pipeline") => pipeline::laws(&mut group),
        Some(how @ ("lose" | "hang")) => lost::train(group, how, arguments.get(1).map_or("", String::as_str)),
        _ => collectives(&mut group).and_then(|()| stages(&mut group)),
    };
    match result {
        Ok(()) => println!("rank {rank}: every law holds"),
        Err(error) => {
            eprintln!("rank {rank}: {error}");
            // Exit without `finalize`, so that mpirun ends the other ranks.
            std::process::exit(1);
        }
    }
    session.finalize();
    Ok(())
}
