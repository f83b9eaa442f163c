//! Properties of schedules, checked for all small pipelines.

mod broken;
mod formulas;
mod golden;

use super::*;

const TRANSPORTS: [SendMode; 3] = [SendMode::Blocking, SendMode::SendRecv, SendMode::Buffered];
const KINDS: [PipelineKind; 6] = [
    PipelineKind::GPipe,
    PipelineKind::OneFOneB,
    PipelineKind::Interleaved1F1B,
    PipelineKind::LoopedBFS,
    PipelineKind::ZBH1,
    PipelineKind::ZBV,
];

fn shape(kind: PipelineKind, ranks: usize, chunks: usize, micro_batches: usize) -> PipelineShape {
    PipelineShape::new(ranks, chunks, micro_batches).unwrap().with_placement(kind.placement())
}

fn shapes() -> impl Iterator<Item = (PipelineKind, PipelineShape)> {
    let sizes = (1..=8).flat_map(|ranks| (1..=32).map(move |micro_batches| (ranks, micro_batches)));
    sizes.flat_map(|(ranks, micro_batches)| {
        let of = move |kind| (1..=4).map(move |chunks| (kind, shape(kind, ranks, chunks, micro_batches)));
        KINDS.into_iter().flat_map(of)
    })
}

fn schedules() -> impl Iterator<Item = (PipelineKind, PipelineSchedule)> {
    shapes().filter_map(|(kind, shape)| Some((kind, PipelineSchedule::new(kind, shape).ok()?)))
}

fn schedule(kind: PipelineKind, ranks: usize, chunks: usize, micro_batches: usize) -> PipelineSchedule {
    PipelineSchedule::new(kind, shape(kind, ranks, chunks, micro_batches)).unwrap()
}

fn program(kind: PipelineKind, ranks: usize, chunks: usize, micro_batches: usize) -> Program {
    schedule(kind, ranks, chunks, micro_batches).program(SendMode::Blocking)
}

/// Returns the order of a rank's actions, without idle slots.
fn order(schedule: &PipelineSchedule, rank: usize) -> Vec<Action> {
    schedule.rows()[rank].iter().flatten().copied().collect()
}

fn times(forward: u8, backward_input: u8, backward_weight: u8) -> StageTimes {
    let [forward, backward_input, backward_weight] = [forward, backward_input, backward_weight].map(f64::from);
    StageTimes { forward, backward_input, backward_weight }
}

#[test]
fn a_schedule_exists_where_its_table_says() {
    for (kind, shape) in shapes() {
        let exists = match kind {
            PipelineKind::GPipe | PipelineKind::OneFOneB | PipelineKind::ZBH1 => shape.chunks() == 1,
            PipelineKind::ZBV => shape.chunks() == 2,
            PipelineKind::LoopedBFS => true,
            PipelineKind::Interleaved1F1B => shape.micro_batches() % shape.ranks() == 0,
        };
        assert_eq!(PipelineSchedule::new(kind, shape).is_ok(), exists, "{kind} {shape:?}");
    }
    let refused =
        |kind, shape: Result<PipelineShape, _>| PipelineSchedule::new(kind, shape.unwrap()).unwrap_err().to_string();
    assert_eq!(
        refused(PipelineKind::Interleaved1F1B, PipelineShape::new(4, 2, 6)),
        "`micro_batches`: expected a multiple of the 4 ranks for Interleaved1F1B, found 6"
    );
    assert_eq!(
        refused(PipelineKind::OneFOneB, PipelineShape::new(4, 2, 8)),
        "`chunks`: expected 1 for 1F1B (Interleaved1F1B and LoopedBFS take more), found 2"
    );
    assert_eq!(
        refused(PipelineKind::ZBV, PipelineShape::new(4, 1, 8)),
        "`chunks`: expected 2 for ZBVZeroBubble, found 1"
    );
    assert_eq!(
        refused(PipelineKind::ZBV, PipelineShape::new(4, 2, 8)),
        "`placement`: expected V for ZBVZeroBubble, found Loop"
    );
    assert_eq!(PipelineShape::new(4, 1, 0).unwrap_err().to_string(), "`micro_batches`: expected at least 1, found 0");
}

#[test]
fn names_are_those_of_pytorch_and_of_the_papers() {
    for kind in KINDS {
        assert_eq!(kind.to_string().to_lowercase().parse(), Ok(kind));
    }
    assert_eq!("1F1B".parse(), Ok(PipelineKind::OneFOneB));
    assert_eq!("InterleavedZeroBubble".parse::<PipelineKind>(), "ZB-H1".parse());
    assert_eq!("ZBVZeroBubble".parse::<PipelineKind>(), "ZBV".parse());
    assert_eq!(
        "DualPipeV".parse::<PipelineKind>().unwrap_err().to_string(),
        "`pipeline_parallel_schedule`: expected one of GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, \
         ZBVZeroBubble, ZB-H1, ZBV, found DualPipeV"
    );
}

#[test]
fn every_stage_is_on_one_rank() {
    let v = PipelineShape::new(4, 2, 1).unwrap().with_placement(Placement::V);
    assert_eq!((0..8).map(|stage| v.stage_rank(stage)).collect::<Vec<_>>(), [0, 1, 2, 3, 3, 2, 1, 0]);
    for (_, shape) in shapes().filter(|(_, shape)| shape.micro_batches() == 1) {
        for stage in 0..shape.stages() {
            assert_eq!(shape.stage_index(shape.stage_rank(stage), shape.stage_chunk(stage)), stage, "{shape:?}");
        }
    }
}

#[test]
fn every_schedule_is_valid_even_if_every_message_blocks() {
    for (kind, schedule) in schedules() {
        for transport in TRANSPORTS {
            let result = schedule.program(transport).validate(transport);
            assert_eq!(result, Ok(()), "{kind} {:?} {transport:?}", schedule.shape());
        }
        // The program for the strictest send mode works in every send mode.
        assert_eq!(schedule.program(SendMode::Blocking).validate(SendMode::Buffered), Ok(()));
    }
}

#[test]
fn backward_passes_of_a_chunk_have_ascending_micro_batches() {
    for (kind, schedule) in schedules() {
        for rank in 0..schedule.shape().ranks() {
            let mut next = vec![[0; 2]; schedule.shape().chunks()];
            for action in order(&schedule, rank) {
                let half = match action.computation {
                    ComputationType::Forward => continue,
                    ComputationType::Backward | ComputationType::BackwardInput => 0,
                    ComputationType::BackwardWeight => 1,
                };
                let next = &mut next[action.chunk][half];
                assert_eq!(action.micro_batch, *next, "{kind} {:?}: {action}", schedule.shape());
                *next += 1;
            }
        }
    }
}
