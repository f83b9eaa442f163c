//! Invalid schedules and programs, each with its error message.

use super::*;

/// Returns the error message of 1F1B for 2 ranks and 4 micro-batches after `change`.
fn broken(change: impl FnOnce(&mut [Vec<Instruction>])) -> String {
    broken_by(SendMode::Blocking, program(PipelineKind::OneFOneB, 2, 1, 4), change)
}

fn broken_by(transport: SendMode, mut program: Program, change: impl FnOnce(&mut [Vec<Instruction>])) -> String {
    assert_eq!(program.validate(transport), Ok(()));
    change(&mut program.ranks);
    program.validate(transport).unwrap_err().to_string()
}

fn position(list: &[Instruction], wanted: Instruction) -> usize {
    list.iter().position(|&instruction| instruction == wanted).unwrap()
}

fn compute(action: Action) -> Instruction {
    Instruction::Compute(action)
}

#[test]
fn missing_doubled_and_foreign_instructions_are_named() {
    let backward = compute(Action::backward(0, 3));
    assert_eq!(
        broken(|ranks| ranks[0].retain(|&instruction| instruction != backward)),
        "rank 0, position 15: expected Backward(chunk 0, micro-batch 3), found ReduceTiedGradients"
    );
    assert_eq!(
        broken(|ranks| ranks[1].truncate(18)),
        "rank 1, position 18: expected OptimizerStep, found the end of the list"
    );
    assert_eq!(
        broken(|ranks| ranks[0].insert(1, compute(Action::forward(0, 0)))),
        "rank 0, position 1: expected each instruction once, found Forward(chunk 0, micro-batch 0) again"
    );
    assert_eq!(
        broken(|ranks| ranks[0].insert(0, compute(Action::forward(1, 0)))),
        "rank 0, position 0: expected an instruction of this rank, found Forward(chunk 1, micro-batch 0)"
    );
    assert_eq!(
        broken(|ranks| ranks[0][1] = Instruction::Send { action: Action::forward(0, 0), to: 7 }),
        "rank 0, position 1: expected the send to rank 1 of the output of Forward(chunk 0, micro-batch 0), \
         found the send to rank 7 of the output of Forward(chunk 0, micro-batch 0)"
    );
    assert_eq!(
        broken_by(SendMode::Blocking, program(PipelineKind::GPipe, 3, 1, 1), |ranks| ranks[2].clear()),
        "rank 2, position 0: expected the receive from rank 1 of the input of Forward(chunk 0, micro-batch 0), \
         found the end of the list"
    );
}

#[test]
fn work_before_what_it_needs_is_named() {
    assert_eq!(
        broken(|ranks| {
            let forward = position(&ranks[1], compute(Action::forward(0, 2)));
            let backward = position(&ranks[1], compute(Action::backward(0, 2)));
            ranks[1].swap(forward, backward);
        }),
        "rank 1, position 9: expected Forward(chunk 0, micro-batch 2), found Backward(chunk 0, micro-batch 2)"
    );
    assert_eq!(
        broken(|ranks| ranks[0].swap(0, 1)),
        "rank 0, position 0: expected Forward(chunk 0, micro-batch 0), \
         found the send to rank 1 of the output of Forward(chunk 0, micro-batch 0)"
    );
    // There is no message between chunks of one rank: the action itself is the prerequisite.
    assert_eq!(
        broken_by(SendMode::Blocking, program(PipelineKind::Interleaved1F1B, 1, 2, 1), |ranks| ranks[0].swap(0, 1)),
        "rank 0, position 0: expected Forward(chunk 0, micro-batch 0), found Forward(chunk 1, micro-batch 0)"
    );
    assert_eq!(
        broken(|ranks| ranks[0].rotate_right(1)),
        "rank 0, position 0: expected ReduceGradients, found OptimizerStep"
    );
}

#[test]
fn swapped_receives_are_named() {
    // The second rank of GPipe receives both activations before it uses them, in the wrong order.
    let receive = |micro_batch| Instruction::Recv { action: Action::forward(0, micro_batch), from: 0 };
    let change = |ranks: &mut [Vec<Instruction>]| {
        ranks[1].retain(|&instruction| instruction != receive(0) && instruction != receive(1));
        ranks[1].splice(0..0, [receive(1), receive(0)]);
    };
    for transport in TRANSPORTS {
        assert_eq!(
            broken_by(transport, program(PipelineKind::GPipe, 2, 1, 2), change),
            "rank 1, position 0: expected the receive from rank 0 of the input of Forward(chunk 0, micro-batch 0), \
             found the receive from rank 0 of the input of Forward(chunk 0, micro-batch 1)"
        );
    }
}

#[test]
fn a_deadlock_is_named_and_depends_on_the_transport() {
    // Both ranks send first: each waits for the other's receive, unless the two are one exchange or sends are buffered.
    let send_first = |ranks: &mut [Vec<Instruction>]| {
        let receive = Instruction::Recv { action: Action::forward(0, 1), from: 0 };
        let at = position(&ranks[1], receive);
        let send = position(&ranks[1], Instruction::Send { action: Action::backward(0, 0), to: 0 });
        ranks[1][at.min(send)..=at.max(send)].sort_by_key(|i| matches!(i, Instruction::Recv { .. }));
        let at = position(&ranks[0], Instruction::Recv { action: Action::backward(0, 0), from: 1 });
        let send = position(&ranks[0], Instruction::Send { action: Action::forward(0, 1), to: 1 });
        ranks[0][at.min(send)..=at.max(send)].sort_by_key(|i| matches!(i, Instruction::Recv { .. }));
    };
    assert_eq!(
        broken(send_first),
        "deadlock: rank 0, position 3: expected rank 1 at the receive from rank 0 of the input of \
         Forward(chunk 0, micro-batch 1), found the send to rank 1 of the output of Forward(chunk 0, micro-batch 1), \
         and rank 1 at the send to rank 0 of the output of Backward(chunk 0, micro-batch 0)"
    );
    for transport in [SendMode::SendRecv, SendMode::Buffered] {
        let mut program = program(PipelineKind::OneFOneB, 2, 1, 4);
        send_first(&mut program.ranks);
        assert_eq!(program.validate(transport), Ok(()), "{transport:?}");
    }
}

#[test]
fn orders_that_are_no_schedule_are_named() {
    let refused = |text: &str| PipelineSchedule::from_csv(text).unwrap_err().to_string();
    assert_eq!(
        refused("0F0,,,0B0\n,1F0\n"),
        "rank 1, position 1: expected Backward(chunk 0, micro-batch 0), found the end of the list"
    );
    assert_eq!(
        refused("0F0,0B0\n1B0,1F0\n"),
        "rank 1, position 0: expected Forward(chunk 0, micro-batch 0) of rank 1 before, \
         found Backward(chunk 0, micro-batch 0)"
    );
    assert_eq!(
        refused("0F0,0F1,0B0,0F0,0B1\n1F0,1F1,1B0,1B1\n"),
        "rank 0, position 3: expected each action once, found Forward(chunk 0, micro-batch 0) again"
    );
    // Each rank waits for an action that the other runs later.
    assert_eq!(
        refused("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n"),
        "rank 0, position 1: expected Backward(chunk 0, micro-batch 0) of rank 1 before, \
         found Backward(chunk 0, micro-batch 0)"
    );
}

#[test]
fn cells_that_are_no_pass_are_named() {
    let refused = |text: &str| PipelineSchedule::from_csv(text).unwrap_err().to_string();
    for (text, expected) in [
        (
            "0F0,0X0",
            "CSV line 1, column 2: expected a pass such as `0F3`, `0B3`, `0I3` or `0W3`, or two as in \
             `(2F1;1B0)OVERLAP_F_B`, found `0X0`",
        ),
        ("0F0\n0F0", "CSV line 2, column 1: expected a stage of rank 1 (1, 3, 5 …; in a V 1, 2, 5 …), found `0F0`"),
        (
            "0F0,0B0,0W0,0I0",
            "rank 0, position 3: expected a backward pass in one or in two halves, found BackwardInput(chunk 0, \
             micro-batch 0) too",
        ),
        (
            "0F0,0W0,0I0",
            "rank 0, position 1: expected BackwardInput(chunk 0, micro-batch 0) of rank 0 before, \
             found BackwardWeight(chunk 0, micro-batch 0)",
        ),
        ("0F0,0I0", "rank 0, position 2: expected BackwardWeight(chunk 0, micro-batch 0), found the end of the list"),
        ("", "`ranks`: expected at least 1, found 0"),
    ] {
        assert_eq!(refused(text), expected);
    }
    for cell in [
        "0UNSHARD",
        "(0F0;0B0)",
        "(0F0)OVERLAP_F_B",
        "F0",
        "0F",
        "0F+1",
        "0F0x",
        "0SEND_F0",
        "-1F0",
        "0f0",
        "0F0 0B0",
        "０F0",
    ] {
        assert!(refused(cell).contains("line 1, column 1: expected a pass"), "{cell}");
    }
}
