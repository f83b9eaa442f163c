//! Comparison with the schedules of DeepSpeed and PyTorch.

use super::*;

/// Returns the row of a rank in the notation `F0 . F1 B0`, with a dot for an idle slot.
fn row(schedule: &PipelineSchedule, rank: usize) -> String {
    let cell = |action: &Option<Action>| match action {
        None => ".".to_owned(),
        Some(action) => format!("{}{}", action.computation.letter(), action.micro_batch),
    };
    schedule.rows()[rank].iter().map(cell).collect::<Vec<_>>().join(" ")
}

/// Compares with DeepSpeed's TrainSchedule, computed from its formulas.
#[test]
fn the_goldens_of_deepspeed_hold() {
    let rows = |ranks, micro_batches| {
        let schedule = schedule(PipelineKind::OneFOneB, ranks, 1, micro_batches);
        (0..ranks).map(|rank| row(&schedule, rank)).collect::<Vec<_>>()
    };
    assert_eq!(rows(2, 4), ["F0 . F1 B0 F2 B1 F3 B2 . B3", ". F0 B0 F1 B1 F2 B2 F3 B3 ."]);
    let four = rows(4, 4);
    assert_eq!(four[0], "F0 . F1 . F2 . F3 B0 . B1 . B2 . B3");
    assert_eq!(four[3], ". . . F0 B0 F1 B1 F2 B2 F3 B3 . . .");
    for (ranks, micro_batches) in [(1, 1), (2, 4), (3, 5), (4, 4), (8, 3), (5, 16)] {
        for (stage, row) in rows(ranks, micro_batches).iter().enumerate() {
            let slots = row.split(' ').enumerate().collect::<Vec<_>>();
            assert_eq!(slots.len(), 2 * (micro_batches + ranks - 1));
            for (slot, cell) in slots {
                assert_eq!(cell, deepspeed(slot as i64, stage as i64, ranks as i64, micro_batches as i64));
            }
        }
    }
}

/// Returns a cell of DeepSpeed's schedule by its four formulas, one per parity of slot and stage (all divisions are
/// exact).
fn deepspeed(slot: i64, stage: i64, stages: i64, micro_batches: i64) -> String {
    let (pass, micro_batch) = match (slot % 2, stage % 2) {
        (0, 0) => ('F', slot / 2 - stage / 2),
        (1, 1) => ('F', (slot - 1) / 2 - (stage - 1) / 2),
        (0, _) => ('B', slot / 2 - stages + (stage + 1) / 2),
        (_, _) => ('B', (slot - 1) / 2 - stages + 1 + stage / 2),
    };
    if (0..micro_batches).contains(&micro_batch) { format!("{pass}{micro_batch}") } else { ".".to_owned() }
}

#[test]
fn instructions_are_those_of_deepspeed() {
    let list = &program(PipelineKind::OneFOneB, 3, 1, 4).ranks[1];
    let count = |wanted: fn(&Instruction) -> bool| list.iter().filter(|instruction| wanted(instruction)).count();
    assert_eq!(count(|i| matches!(i, Instruction::Compute(_))), 8);
    assert_eq!(
        count(|i| matches!(
            i,
            Instruction::Send { to: 2, action: Action { computation: ComputationType::Forward, .. } }
        )),
        4
    );
    assert_eq!(
        count(|i| matches!(
            i,
            Instruction::Send { to: 0, action: Action { computation: ComputationType::Backward, .. } }
        )),
        4
    );
    assert_eq!(
        count(|i| matches!(
            i,
            Instruction::Recv { from: 0, action: Action { computation: ComputationType::Forward, .. } }
        )),
        4
    );
    assert_eq!(
        count(|i| matches!(
            i,
            Instruction::Recv { from: 2, action: Action { computation: ComputationType::Backward, .. } }
        )),
        4
    );
    assert_eq!(list.len(), 24 + 3);
    assert_eq!(list[24..], Instruction::CLOSING);
    // A single rank sends nothing, whatever its number of chunks.
    assert_eq!(program(PipelineKind::Interleaved1F1B, 1, 3, 2).ranks[0].len(), 12 + 3);
}

#[test]
fn interleaving_one_chunk_is_1f1b() {
    for (ranks, micro_batches) in [(1, 3), (2, 4), (4, 8), (8, 16)] {
        let [one, interleaved] =
            [PipelineKind::OneFOneB, PipelineKind::Interleaved1F1B].map(|kind| schedule(kind, ranks, 1, micro_batches));
        for rank in 0..ranks {
            assert_eq!(order(&interleaved, rank), order(&one, rank));
        }
    }
}

/// Compares with PyTorch 2.9, whose orders `fixtures/schedules.py` prints, cell for cell. Idle cells are left out: theirs
/// do not say when a pass runs.
#[test]
fn the_orders_of_zero_bubble_schedules_are_those_of_pytorch() {
    for (kind, text) in [
        (PipelineKind::ZBH1, include_str!("../../../fixtures/schedules/InterleavedZeroBubble-2-4.csv")),
        (PipelineKind::ZBH1, include_str!("../../../fixtures/schedules/InterleavedZeroBubble-4-8.csv")),
        (PipelineKind::ZBV, include_str!("../../../fixtures/schedules/ZBVZeroBubble-2-4.csv")),
        (PipelineKind::ZBV, include_str!("../../../fixtures/schedules/ZBVZeroBubble-4-8.csv")),
    ] {
        let theirs = PipelineSchedule::from_csv(text).unwrap();
        let ours = PipelineSchedule::new(kind, theirs.shape()).unwrap().to_csv();
        let cells = |text: &str| -> Vec<Vec<String>> {
            let row = |line: &str| line.split(',').filter(|cell| !cell.is_empty()).map(str::to_owned).collect();
            text.lines().map(row).collect()
        };
        assert_eq!(cells(&ours), cells(text), "{kind}");
    }
}

/// PyTorch's looped BFS descends in micro-batches and its DualPipeV joins passes in one cell: both are read and run.
#[test]
fn other_schedules_of_pytorch_are_read() {
    for (text, passes) in [
        (include_str!("../../../fixtures/schedules/LoopedBFS-2-4.csv"), 16),
        (include_str!("../../../fixtures/schedules/LoopedBFS-4-8.csv"), 32),
        (include_str!("../../../fixtures/schedules/DualPipeV-2-4.csv"), 19),
        (include_str!("../../../fixtures/schedules/DualPipeV-4-8.csv"), 39),
    ] {
        let schedule = PipelineSchedule::from_csv(text).unwrap();
        assert_eq!(order(&schedule, 0).len(), passes, "{text}");
        let place = if text.contains("OVERLAP") { Placement::V } else { Placement::Loop };
        assert_eq!(schedule.shape().placement(), place);
        assert_eq!(PipelineSchedule::from_csv(&schedule.to_csv()).as_ref(), Ok(&schedule));
        for transport in TRANSPORTS {
            assert_eq!(schedule.program(transport).validate(transport), Ok(()), "{transport:?} {text}");
        }
    }
    // A neighbour may run in one what this rank runs in two; each receives the gradients of its own pass.
    let text = include_str!("../../../fixtures/schedules/DualPipeV-2-4.csv");
    let program = PipelineSchedule::from_csv(text).unwrap().program(SendMode::Buffered);
    let receives = |action| {
        program.ranks.iter().flatten().any(|i| matches!(i, Instruction::Recv { action: a, .. } if *a == action))
    };
    assert!(receives(Action::backward_input(0, 2)) && receives(Action::backward(1, 1)));
}

/// Compares with PyTorch 2.9's `Interleaved1F1B` for 2 ranks with 2 stages each and 4 micro-batches: the orders are the
/// same, only the idle slots are in other places.
#[test]
fn the_interleaved_order_is_that_of_pytorch() {
    let text = "0F0,0F1,2F0,2F1,,,0F2,2B0,0F3,2B1,2F2,0B0,2F3,0B1,,2B2,,2B3,,0B2,,0B3\n\
                ,1F0,1F1,,3F0,3B0,3F1,3B1,1F2,1B0,1F3,1B1,3F2,3B2,3F3,3B3,,1B2,,1B3\n";
    let theirs = PipelineSchedule::from_csv(text).unwrap();
    let ours = PipelineSchedule::new(PipelineKind::Interleaved1F1B, theirs.shape()).unwrap();
    for rank in 0..2 {
        assert_eq!(order(&theirs, rank), order(&ours, rank));
    }
    assert_eq!((theirs.rows()[0].len(), ours.rows()[0].len()), (22, 18));
    assert_eq!(theirs.program(SendMode::Blocking).validate(SendMode::Blocking), Ok(()));
}
