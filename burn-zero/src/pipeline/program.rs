//! A schedule with its messages, as a list of instructions per rank.

use super::{Action, ComputationType, Instruction, PipelineSchedule, PipelineShape, RankAction, SendMode};
use std::cmp::Reverse;

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
                ranks[to].push(Instruction::Recv { action: input, from });
            }
        }
        if send_mode == SendMode::Buffered {
            ranks = ranks.into_iter().map(delay_receives).collect();
        }
        ranks.iter_mut().for_each(|list| list.extend(Instruction::CLOSING));
        Program { shape, ranks }
    }
}

impl Program {
    /// Returns the largest number of live activations of each rank, counted in chunks of one micro-batch. Activations
    /// live from the forward pass to the end of its backward pass.
    pub fn peak_live_activations(&self) -> Vec<usize> {
        self.ranks.iter().map(|list| live_activations(list).max().unwrap_or(0)).collect()
    }
}

/// Returns the number of live activations during each pass of a list.
fn live_activations(list: &[Instruction]) -> impl Iterator<Item = usize> {
    let passes = list.iter().filter_map(|instruction| match instruction {
        Instruction::Compute(action) => Some(action.computation),
        _ => None,
    });
    passes.scan(0, |live: &mut usize, pass| {
        let during = if pass == ComputationType::Forward { *live + 1 } else { *live };
        *live = if pass == ComputationType::Forward { during } else { during.saturating_sub(1) };
        Some(during)
    })
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
    // The number of a link is that of its rank with the lower stage.
    let link = if output.computation == ComputationType::Forward { from } else { to };
    Some(StageMessage { key: (link % 2, link, Reverse(output.computation)), output, input, from, to })
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
