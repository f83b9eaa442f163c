//! Ranks that are lost: one aborts or falls silent.

use crate::{
    BUCKET, config, pipeline,
    stack::{ModelVariant, rows},
};
use burn::tensor::backend::Backend;
use burn_zero::{
    Error, Sharding, ZeroStage,
    comm::{Collectives, Communicator, ProcessGroup},
    pipeline::PipelineKind,
};
use std::{cell::Cell, time::Duration};

/// The step in which the middle rank is lost.
const STEP: usize = 20;

/// The way and the place in which a rank is lost.
#[derive(Clone, Copy, PartialEq)]
struct Loss {
    /// True if the process ends, false if it falls silent.
    abort: bool,
    /// True for the backward pass of a segment, false for its forward pass.
    backward: bool,
}

thread_local! {
    /// The next loss of this rank within a segment.
    static LOSS: Cell<Option<Loss>> = const { Cell::new(None) };
}

/// Loses this rank if that is due in this pass of a segment. With the checkpointing of these tests only the backward pass
/// runs a segment with a graph.
pub(crate) fn in_segment<B: Backend>() {
    if let Some(loss) = LOSS.get().filter(|loss| loss.backward == B::ad_enabled(&Default::default())) {
        lose(loss.abort);
    }
}

/// Ends this process, or sleeps until the others have long given up.
fn lose(abort: bool) {
    if abort {
        std::process::abort();
    }
    std::thread::sleep(Duration::from_secs(25));
}

/// Trains until a rank is lost: `how` is `lose` or `hang`, and `part` the part of a pipeline's step in which it happens,
/// or nothing for a run without a pipeline.
pub(crate) fn train(group: ProcessGroup, how: &str, part: &str) -> Result<(), Error> {
    let (rank, world, abort) = (group.rank(), group.world_size(), how == "lose");
    let sharding = Sharding { stage: ZeroStage::Gradients, bucket_size: BUCKET };
    let communicator = Box::new(group.with_deadline(Duration::from_secs(5)));
    let mut config = config(Some(0.5)).with_communicator(communicator).with_sharding(sharding);
    if let Some(pipeline) = pipeline::of_kind(world, PipelineKind::OneFOneB, 1).filter(|_| !part.is_empty()) {
        config = config.with_pipeline(pipeline);
    }
    let mut engine = config.init(ModelVariant { tied: true, frozen: false }.stack())?;
    for step in 0..1_000_000 {
        let lost = rank == world / 2 && step == STEP;
        let backward = part == "backward";
        LOSS.set((lost && (backward || part == "forward")).then_some(Loss { abort, backward }));
        if lost && part.is_empty() {
            lose(abort);
        }
        let micro_batches: Vec<_> = (0..2 * world).map(|micro| rows(2 * world * step + micro)).collect();
        engine.forward_backward(&micro_batches)?;
        if lost && part == "sums" {
            lose(abort);
        }
        engine.step(1e-3)?;
    }
    Ok(())
}

/// Lets every rank wait for the one before, the last one first, so that its deadline is the first to pass. With
/// `answered`, rank 0 sends so late that the wait of rank 1 has been told, and rank 1 then falls silent.
pub(crate) fn wait_in_a_chain(group: ProcessGroup, answered: bool) -> Result<(), Error> {
    let deadline = Duration::from_secs(6);
    let mut group = group.with_deadline(deadline);
    group.barrier()?;
    let rank = group.rank();
    match rank {
        0 => {
            std::thread::sleep(deadline * 2 / 3);
            if answered {
                group.send(&[0f32], 1)?;
            }
        }
        1 => {
            std::thread::sleep(if answered { Duration::ZERO } else { deadline / 6 });
            group.recv(&mut [0f32], 0)?;
        }
        _ => group.recv(&mut [0f32], rank - 1)?,
    }
    std::thread::sleep(deadline * 3);
    Ok(())
}
