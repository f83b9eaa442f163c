//! The span, the live and the kept activations of every schedule, each by its formula. All times are whole numbers, so
//! spans are compared exactly.

use super::*;

/// Returns the span of a schedule in times of one stage, if its formula holds for this shape and these times, and
/// messages are buffered and take no time.
fn span(kind: PipelineKind, shape: PipelineShape, times: StageTimes) -> Option<f64> {
    let StageTimes { forward, backward_input, backward_weight } = times;
    let (both, zero) = (forward + backward_input + backward_weight, forward + backward_input - backward_weight);
    let (ranks, chunks, micro_batches) = (shape.ranks(), shape.chunks(), shape.micro_batches());
    let (ends, all) = ((ranks - 1) as f64, (micro_batches * chunks) as f64);
    let equal = forward == backward_input && forward == backward_weight;
    match kind {
        PipelineKind::GPipe | PipelineKind::OneFOneB | PipelineKind::Interleaved1F1B => Some((all + ends) * both),
        // With fewer micro-batches than ranks, every chunk but the last waits for the first micro-batch to come round.
        PipelineKind::LoopedBFS => {
            let turns = (chunks - 1) * micro_batches.max(ranks) + micro_batches;
            Some((turns as f64 + ends) * both)
        }
        PipelineKind::ZBH1 => {
            let holds = micro_batches >= ranks && backward_weight <= forward.min(backward_input);
            holds.then_some(all * both + ends * zero)
        }
        PipelineKind::ZBV => {
            // From 2 · ranks - 2 micro-batches on, the idle time does not depend on their number.
            let idle = ends.max(4.0 * ends - 2.0 * (micro_batches - 1) as f64);
            equal.then_some(all * both + idle * zero)
        }
    }
}

/// Returns the live and the kept activations of a rank.
fn activations(kind: PipelineKind, shape: PipelineShape, rank: usize) -> [usize; 2] {
    let (ranks, chunks, micro_batches) = (shape.ranks(), shape.chunks(), shape.micro_batches());
    let all = chunks * micro_batches;
    let one_f_one_b = all.min(ranks - rank);
    match kind {
        PipelineKind::GPipe | PipelineKind::LoopedBFS => [all; 2],
        PipelineKind::Interleaved1F1B if chunks > 1 => [all.min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks + 1); 2],
        PipelineKind::OneFOneB | PipelineKind::Interleaved1F1B => [one_f_one_b; 2],
        PipelineKind::ZBH1 => [one_f_one_b, all.min(ranks)],
        PipelineKind::ZBV => [all.min(2 * ranks).min(micro_batches + 1 + rank); 2],
    }
}

fn simulated(schedule: &PipelineSchedule, send_mode: SendMode, times: StageTimes) -> Timeline {
    let costs = Costs { send_mode, ..Costs::uniform(schedule.shape(), times) };
    schedule.program(send_mode).simulate(&costs).unwrap()
}

#[test]
fn the_live_and_kept_activations_are_those_of_the_formulas() {
    for (kind, schedule) in schedules() {
        let shape = schedule.shape();
        let expected: Vec<_> = (0..shape.ranks()).map(|rank| activations(kind, shape, rank)).collect();
        for program in TRANSPORTS.map(|transport| schedule.program(transport)) {
            let found = program.peak_live_activations().into_iter().zip(program.peak_kept_activations());
            assert_eq!(found.map(<[_; 2]>::from).collect::<Vec<_>>(), expected, "{kind} {shape:?}");
        }
    }
}

#[test]
fn the_span_is_that_of_the_formula() {
    let mut counts = [0; KINDS.len()];
    for (kind, schedule) in schedules() {
        for times in [times(1, 1, 1), times(2, 2, 2), times(2, 3, 1), times(3, 4, 2), times(2, 2, 0), times(1, 3, 2)] {
            let Some(expected) = span(kind, schedule.shape(), times) else { continue };
            let found = simulated(&schedule, SendMode::Buffered, times);
            assert_eq!(found.makespan(), expected, "{kind} {:?} {times:?}", schedule.shape());
            counts[KINDS.iter().position(|&other| other == kind).unwrap()] += 1;
        }
    }
    assert!(counts.iter().all(|&count| count > 500), "{counts:?}");
}

/// Messages that block cost nothing where each rank exchanges with one neighbour at a time.
#[test]
fn gpipe_and_1f1b_lose_nothing_if_messages_block() {
    for (kind, schedule) in schedules() {
        let shape = schedule.shape();
        for (send_mode, times) in
            TRANSPORTS.into_iter().flat_map(|mode| [(mode, times(1, 1, 0)), (mode, times(1, 1, 1))])
        {
            let expected = span(kind, shape, times).unwrap_or(f64::INFINITY);
            let found = simulated(&schedule, send_mode, times).makespan();
            match kind {
                PipelineKind::GPipe | PipelineKind::OneFOneB => assert_eq!(found, expected, "{kind} {shape:?}"),
                // Ranks that synchronized after every slot would take 4/3 of the time.
                PipelineKind::Interleaved1F1B => {
                    assert!((1.0..4.0 / 3.0).contains(&(found / expected)), "{shape:?} {send_mode:?}: {found}");
                }
                _ => {}
            }
        }
    }
}

#[test]
fn the_bubbles_are_those_of_the_table() {
    let table = [
        (2, 4, [0.2, 1.0 / 13.0, 0.04]),
        (4, 8, [3.0 / 11.0, 1.0 / 9.0, 1.0 / 17.0]),
        (8, 16, [7.0 / 23.0, 7.0 / 55.0, 7.0 / 103.0]),
    ];
    for (ranks, micro_batches, fractions) in table {
        let kinds = [(PipelineKind::OneFOneB, 1), (PipelineKind::ZBH1, 1), (PipelineKind::ZBV, 2)];
        for ((kind, chunks), expected) in kinds.into_iter().zip(fractions) {
            let schedule = schedule(kind, ranks, chunks, micro_batches);
            let timeline = simulated(&schedule, SendMode::Buffered, times(1, 1, 1));
            assert!((timeline.bubble_fraction() - expected).abs() < 1e-12, "{kind} {ranks} {micro_batches}");
            let idle = |rank: usize| match kind {
                PipelineKind::ZBV => 0,
                PipelineKind::ZBH1 => ranks - 1 - rank,
                _ => 3 * (ranks - 1 - rank),
            };
            let idle: Vec<f64> = (0..ranks).map(|rank| idle(rank) as f64).collect();
            assert_eq!(timeline.idle_within(), idle, "{kind} {ranks} {micro_batches}");
        }
    }
}

#[test]
fn zb_h1_without_time_for_weights_is_1f1b() {
    for (ranks, micro_batches) in [(1, 3), (2, 4), (4, 2), (4, 8), (8, 16)] {
        let one = schedule(PipelineKind::OneFOneB, ranks, 1, micro_batches);
        let half = schedule(PipelineKind::ZBH1, ranks, 1, micro_batches);
        let (mut whole, zero) =
            (simulated(&one, SendMode::Buffered, times(2, 3, 0)), simulated(&half, SendMode::Buffered, times(2, 3, 0)));
        for span in whole.ranks.iter_mut().flatten() {
            if span.action.computation == ComputationType::Backward {
                span.action.computation = ComputationType::BackwardInput;
            }
        }
        for (expected, mut found) in whole.ranks.into_iter().zip(zero.ranks) {
            found.retain(|span| span.action.computation != ComputationType::BackwardWeight);
            assert_eq!(found, expected, "{ranks} {micro_batches}");
        }
    }
}

/// Checks an uneven pipeline that was computed by hand: the second stage takes three times as long as the first, which
/// waits for it.
#[test]
fn costs_computed_by_hand_hold() {
    let program = program(PipelineKind::GPipe, 2, 1, 2);
    let stages = vec![times(1, 1, 0), times(3, 1, 2)];
    for (send_mode, expected) in [(SendMode::Blocking, 18.0), (SendMode::Buffered, 16.0)] {
        let costs = Costs { stages: stages.clone(), message: 1.0, send_mode };
        // End times with blocking sends: 0F0 1, message 2, 1F0 5 while the output of 0F1 waits, message 6, 1F1 9, 1B0
        // 12, message 13, 1B1 16, message 17, 0B1 18. With buffered sends only the first message delays rank 1: 2 + 4 ·
        // 3 = 14, message 15, 0B1 16.
        assert_eq!(program.simulate(&costs).unwrap().makespan(), expected, "{send_mode:?}");
    }
    let costs = Costs { stages: vec![times(1, 1, 1)], ..Costs::uniform(program.shape, times(1, 1, 1)) };
    let message = program.simulate(&costs).unwrap_err().to_string();
    assert_eq!(message, "`stages`: expected 2 times, one per stage, found 1");
}
