//! A schedule with its messages, as a list of instructions per rank.

use super::{Action, ComputationType, Instruction, PipelineSchedule, PipelineShape, Placement, RankAction, SendMode};
use std::{cmp::Reverse, collections::HashSet};

/// The instructions of every rank for one batch. The lists can be arbitrary; [`Program::validate`] checks that they
/// work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The shape of the pipeline.
    pub shape: PipelineShape,
    /// The instructions of each rank.
    pub ranks: Vec<Vec<Instruction>>,
}

impl PipelineSchedule {
    /// Returns the instructions of the schedule for ranks that communicate in this send mode.
    ///
    /// The messages that a slot produces are sent before the next slot, link by link, so that all ranks see one order.
    /// Links with an even number go first, so that a message waits for at most one other (for two in a ring of an odd
    /// number of ranks). On one link gradients go first, as in DeepSpeed. If sends are buffered, a message is received
    /// only when it, or a later one from the same rank, is needed.
    pub fn program(&self, send_mode: SendMode) -> Program {
        let shape = self.shape();
        let mut ranks = vec![Vec::new(); shape.ranks()];
        let halved = self.halved_passes();
        for slot in 0..self.rows()[0].len() {
            let actions = (0..shape.ranks()).filter_map(|rank| Some((rank, self.rows()[rank][slot]?)));
            let mut messages = Vec::new();
            for (rank, action) in actions {
                ranks[rank].push(Instruction::Compute(action));
                messages.extend(stage_message(shape, rank, action));
            }
            messages.sort_by_key(|message| message.key);
            for StageMessage { output, input, from, to, .. } in messages {
                ranks[from].push(Instruction::Send { action: output, to });
                let half = Action { computation: ComputationType::BackwardInput, ..input };
                let is_half = input.computation == ComputationType::Backward
                    && halved.contains(&RankAction { rank: to, action: half });
                let action = if is_half { half } else { input };
                ranks[to].push(Instruction::Recv { action, from });
            }
        }
        if send_mode == SendMode::Buffered {
            ranks = ranks.into_iter().map(delay_receives).collect();
        }
        ranks.iter_mut().for_each(|list| list.extend(Instruction::CLOSING));
        Program { shape, ranks }
    }

    /// Returns the input halves of the backward passes that run in two.
    fn halved_passes(&self) -> HashSet<RankAction> {
        let half = |action: &Action| action.computation == ComputationType::BackwardInput;
        let of_rank = |(rank, row): (usize, &Vec<Option<Action>>)| {
            row.iter().flatten().copied().filter(half).map(|action| RankAction { rank, action }).collect::<Vec<_>>()
        };
        self.rows().iter().enumerate().flat_map(of_rank).collect()
    }
}

impl Program {
    /// Returns the largest number of live activations of each rank, counted in chunks of one micro-batch. Activations
    /// live from the forward pass to the end of the backward pass, or of its input half.
    pub fn peak_live_activations(&self) -> Vec<usize> {
        self.peaks(&[ComputationType::Backward, ComputationType::BackwardInput])
    }

    /// Returns the largest number of chunks of one micro-batch of which each rank keeps what the gradients of the
    /// weights need: from the forward pass to the end of the backward pass, or of its weight half. What is kept after
    /// `BackwardInput` are the inputs of the layers whose weight gradients it puts off, and the gradients of their
    /// outputs.
    pub fn peak_kept_activations(&self) -> Vec<usize> {
        self.peaks(&[ComputationType::Backward, ComputationType::BackwardWeight])
    }

    /// Returns, for each rank, the largest number of forward passes that are not yet followed by a pass of `ends`.
    fn peaks(&self, ends: &[ComputationType]) -> Vec<usize> {
        let peak = |list: &Vec<Instruction>| {
            let (mut open, mut peak) = (0_usize, 0);
            for instruction in list {
                match instruction {
                    Instruction::Compute(Action { computation: ComputationType::Forward, .. }) => open += 1,
                    Instruction::Compute(Action { computation, .. }) if ends.contains(computation) => {
                        open = open.saturating_sub(1);
                    }
                    _ => {}
                }
                peak = peak.max(open);
            }
            peak
        };
        self.ranks.iter().map(peak).collect()
    }
}

struct StageMessage {
    /// The sort key among the messages of a slot.
    key: (usize, usize, Reverse<ComputationType>),
    output: Action,
    input: Action,
    from: usize,
    to: usize,
}

fn stage_message(shape: PipelineShape, from: usize, output: Action) -> Option<StageMessage> {
    let RankAction { rank: to, action: input } = shape.consumer(from, output).filter(|to| to.rank != from)?;
    // The number of a link is that of its rank with the lower stage; in a V two stages share the link.
    let link = match (shape.placement(), output.computation) {
        (Placement::V, _) => from.min(to),
        (Placement::Loop, ComputationType::Forward) => from,
        (Placement::Loop, _) => to,
    };
    // `input` has the computation of `output`; the caller knows whether the receiver runs the pass in two.
    let input = input.message_key();
    Some(StageMessage { key: (link % 2, link, Reverse(input.computation)), output, input, from, to })
}

/// Moves every receive as late as possible; messages from one rank are still received in the order in which they were
/// sent.
fn delay_receives(list: Vec<Instruction>) -> Vec<Instruction> {
    let (mut waiting, mut later): (Vec<RankAction>, Vec<_>) = Default::default();
    for instruction in list {
        match instruction {
            Instruction::Recv { action, from } => waiting.push(RankAction { rank: from, action }),
            Instruction::Compute(needed) => {
                if let Some(last) = waiting.iter().position(|message| message.action == needed) {
                    let from = waiting[last].rank;
                    let due = waiting.extract_if(..=last, |message| message.rank == from);
                    later.extend(due.map(|message| Instruction::Recv { action: message.action, from }));
                }
                later.push(instruction);
            }
            _ => later.push(instruction),
        }
    }
    later
}
