//! A schedule with its messages: a list of instructions per rank.

use super::{Instruction, Layout, Pass, Schedule, Transport, Work};
use std::cmp::Reverse;

/// What every rank does for one batch, one instruction after the other. Any list can be put in; [`Program::validate`] says whether
/// it works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// The sizes of the pipeline.
    pub layout: Layout,
    /// The instructions of each rank.
    pub ranks: Vec<Vec<Instruction>>,
}

impl Schedule {
    /// The schedule's instructions for ranks that talk by `transport`.
    ///
    /// The messages made in a slot travel before the next slot, link by link, so that all ranks see one order; links with an even
    /// number go first, so that a message waits for at most one other (in a ring of an odd number of ranks for two). On one link
    /// gradients go first, as in DeepSpeed. If sends are buffered, each message is received only when it, or a later one from the
    /// same rank, is needed.
    pub fn program(&self, transport: Transport) -> Program {
        let layout = self.layout();
        let mut ranks = vec![Vec::new(); layout.ranks()];
        for slot in 0..self.rows()[0].len() {
            let works = (0..layout.ranks()).filter_map(|rank| Some((rank, self.rows()[rank][slot]?)));
            let mut messages = Vec::new();
            for (rank, work) in works {
                ranks[rank].push(Instruction::Compute(work));
                messages.extend(message(layout, rank, work));
            }
            messages.sort_by_key(|message| message.key);
            for Message { output, input, from, to, .. } in messages {
                ranks[from].push(Instruction::Send { work: output, to });
                ranks[to].push(Instruction::Recv { work: input, from });
            }
        }
        if transport == Transport::Buffered {
            ranks = ranks.into_iter().map(late).collect();
        }
        ranks.iter_mut().for_each(|list| list.extend(Instruction::CLOSING));
        Program { layout, ranks }
    }
}

impl Program {
    /// For each rank the largest number of activations, counted in chunks of one micro-batch, that it keeps at a time: from the
    /// forward pass to the end of its backward pass.
    pub fn peak_live(&self) -> Vec<usize> {
        self.ranks.iter().map(|list| live(list).map(|(_, live)| live).max().unwrap_or(0)).collect()
    }
}

/// The position of every pass in a list, with the number of activations alive while it runs.
pub(super) fn live(list: &[Instruction]) -> impl Iterator<Item = (usize, usize)> {
    let works = list.iter().enumerate().filter_map(|(position, instruction)| match instruction {
        Instruction::Compute(work) => Some((position, work.pass)),
        _ => None,
    });
    works.scan(0, |live: &mut usize, (position, pass)| {
        let during = if pass == Pass::Forward { *live + 1 } else { *live };
        *live = if pass == Pass::Forward { during } else { during.saturating_sub(1) };
        Some((position, during))
    })
}

struct Message {
    /// Its place among the messages of a slot.
    key: (usize, usize, Reverse<Pass>),
    output: Work,
    input: Work,
    from: usize,
    to: usize,
}

fn message(layout: Layout, from: usize, output: Work) -> Option<Message> {
    let (to, input) = layout.after(from, output).filter(|&(to, _)| to != from)?;
    // A link's number is that of its rank with the lower stage.
    let link = if output.pass == Pass::Forward { from } else { to };
    Some(Message { key: (link % 2, link, Reverse(output.pass)), output, input, from, to })
}

/// The list with every receive as late as it can be while messages from one rank are received as they were sent.
fn late(list: Vec<Instruction>) -> Vec<Instruction> {
    let (mut waiting, mut later): (Vec<(usize, Work)>, Vec<_>) = Default::default();
    for instruction in list {
        match instruction {
            Instruction::Recv { work, from } => waiting.push((from, work)),
            Instruction::Compute(needed) => {
                if let Some(last) = waiting.iter().position(|&(_, work)| work == needed) {
                    let from = waiting[last].0;
                    let due = waiting.extract_if(..=last, |&mut (peer, _)| peer == from);
                    later.extend(due.map(|(from, work)| Instruction::Recv { work, from }));
                }
                later.push(instruction);
            }
            _ => later.push(instruction),
        }
    }
    later
}
