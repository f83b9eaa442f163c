//! Properties of schedules, checked for all small pipelines.

mod broken;
mod golden;

use super::*;

const TRANSPORTS: [SendMode; 3] = [SendMode::Blocking, SendMode::SendRecv, SendMode::Buffered];

fn layouts() -> impl Iterator<Item = (PipelineKind, PipelineShape)> {
    let sizes = (1..=8).flat_map(|ranks| (1..=16).map(move |micro_batches| (ranks, micro_batches)));
    sizes.flat_map(|(ranks, micro_batches)| {
        let layout = move |chunks| PipelineShape::new(ranks, chunks, micro_batches).unwrap();
        let interleaved = (1..=4).map(move |chunks| (PipelineKind::Interleaved1F1B, layout(chunks)));
        [(PipelineKind::GPipe, layout(1)), (PipelineKind::OneFOneB, layout(1))].into_iter().chain(interleaved)
    })
}

fn schedules() -> impl Iterator<Item = (PipelineKind, PipelineSchedule)> {
    layouts().filter_map(|(kind, layout)| Some((kind, PipelineSchedule::new(kind, layout).ok()?)))
}

fn program(kind: PipelineKind, ranks: usize, chunks: usize, micro_batches: usize) -> Program {
    PipelineSchedule::new(kind, PipelineShape::new(ranks, chunks, micro_batches).unwrap())
        .unwrap()
        .program(SendMode::Blocking)
}

#[test]
fn a_schedule_exists_for_every_layout_but_uneven_interleaving() {
    for (kind, layout) in layouts() {
        let uneven = kind == PipelineKind::Interleaved1F1B && layout.micro_batches() % layout.ranks() != 0;
        assert_eq!(PipelineSchedule::new(kind, layout).is_err(), uneven, "{kind:?} {layout:?}");
    }
    let refused = |kind, ranks, chunks, m| {
        PipelineSchedule::new(kind, PipelineShape::new(ranks, chunks, m).unwrap()).unwrap_err().to_string()
    };
    assert_eq!(
        refused(PipelineKind::Interleaved1F1B, 4, 2, 6),
        "`micro_batches`: expected a multiple of the 4 ranks, found 6"
    );
    assert_eq!(
        refused(PipelineKind::OneFOneB, 4, 2, 8),
        "`chunks`: expected 1 for OneFOneB (Interleaved1F1B takes more), found 2"
    );
    assert_eq!(PipelineShape::new(4, 1, 0).unwrap_err().to_string(), "`micro_batches`: expected at least 1, found 0");
    assert_eq!("1F1B".parse(), Ok(PipelineKind::OneFOneB));
    assert!("ZBVZeroBubble".parse::<PipelineKind>().unwrap_err().to_string().contains("Interleaved1F1B, found ZBV"));
}

#[test]
fn every_schedule_is_valid_even_if_every_message_blocks() {
    for (kind, schedule) in schedules() {
        for transport in TRANSPORTS {
            let result = schedule.program(transport).validate(transport);
            assert_eq!(result, Ok(()), "{kind:?} {:?} {transport:?}", schedule.shape());
        }
        // The program for the strictest send mode works in every send mode.
        assert_eq!(schedule.program(SendMode::Blocking).validate(SendMode::Buffered), Ok(()));
    }
}

#[test]
fn the_live_activations_are_those_of_the_formulas() {
    for (kind, schedule) in schedules() {
        let layout = schedule.shape();
        let formula = |rank: usize| {
            let (behind, chunks) = (layout.ranks() - 1 - rank, layout.chunks());
            let live = match (kind, chunks) {
                (PipelineKind::GPipe, _) => usize::MAX,
                (PipelineKind::Interleaved1F1B, 2..) => 2 * behind + (chunks - 1) * layout.ranks() + 1,
                _ => behind + 1,
            };
            live.min(chunks * layout.micro_batches())
        };
        let expected: Vec<_> = (0..layout.ranks()).map(formula).collect();
        for program in TRANSPORTS.map(|transport| schedule.program(transport)) {
            assert_eq!(program.peak_live_activations(), expected, "{kind:?} {layout:?}");
        }
    }
}

#[test]
fn the_bubble_is_that_of_the_formula() {
    for (kind, schedule) in schedules() {
        let layout = schedule.shape();
        let idle = schedule.rows().iter().flatten().filter(|action| action.is_none()).count();
        assert_eq!(idle, 2 * (layout.ranks() - 1) * layout.ranks(), "{kind:?} {layout:?}");
        for (transport, backward) in TRANSPORTS.into_iter().flat_map(|t| [(t, 1.0), (t, 2.0)]) {
            let costs = Costs { send_mode: transport, ..Costs::uniform(layout, 1.0, backward) };
            let timeline = schedule.program(transport).simulate(&costs).unwrap();
            let ideal = (1.0 + backward) * (layout.chunks() * layout.micro_batches() + layout.ranks() - 1) as f64;
            let found = timeline.makespan() / ideal;
            if kind == PipelineKind::Interleaved1F1B && transport != SendMode::Buffered && backward != 1.0 {
                // Ranks that synchronized after every slot would take 4/3 of the ideal time.
                assert!((1.0..4.0 / 3.0).contains(&found), "{layout:?} {transport:?}: {found} of the ideal time");
            } else {
                assert!((found - 1.0).abs() < 1e-12, "{kind:?} {layout:?} {costs:?}: {found} of the ideal time");
                assert!((timeline.bubble_fraction() - layout.bubble_fraction()).abs() < 1e-12);
            }
        }
    }
}

/// Checks values of `(ranks - 1) / (micro_batches + ranks - 1)` and an uneven pipeline that were computed by hand: the
/// second stage takes three times as long as the first, which waits for it.
#[test]
fn costs_computed_by_hand_hold() {
    for (ranks, micro_batches, expected) in [(2, 4, 0.2), (4, 4, 0.428571), (4, 8, 0.272727), (8, 32, 0.179487)] {
        let program = program(PipelineKind::OneFOneB, ranks, 1, micro_batches);
        let found = program.simulate(&Costs::uniform(program.shape, 0.5, 0.5)).unwrap().bubble_fraction();
        assert!((found - expected).abs() < 1e-6, "{ranks} ranks, {micro_batches} micro-batches: {found}");
    }
    let program = program(PipelineKind::GPipe, 2, 1, 2);
    let (forward, backward) = (vec![1.0, 3.0], vec![1.0, 3.0]);
    for (transport, expected) in [(SendMode::Blocking, 18.0), (SendMode::Buffered, 16.0)] {
        let costs = Costs { forward: forward.clone(), backward: backward.clone(), message: 1.0, send_mode: transport };
        // End times with blocking sends: 0F0 1, message 2, 1F0 5 while the output of 0F1 waits, message 6, 1F1 9, 1B0
        // 12, message 13, 1B1 16, message 17, 0B1 18. With buffered sends only the first message delays rank 1: 2 + 4 ·
        // 3 = 14, message 15, 0B1 16.
        assert_eq!(program.simulate(&costs).unwrap().makespan(), expected, "{transport:?}");
    }
    let costs = Costs { forward: vec![1.0], ..Costs::uniform(program.shape, 1.0, 1.0) };
    let message = program.simulate(&costs).unwrap_err().to_string();
    assert_eq!(message, "`forward`: expected 2 times, one per stage, found 1");
}
