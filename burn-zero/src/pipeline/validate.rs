//! Whether a program does all work once, in an order in which everything has what it needs, and comes to an end.

use super::program::live;
use super::{Costs, Instruction, Layout, Pass, Program, ScheduleError, Transport, Work};
use std::collections::HashSet;
use std::mem::discriminant;

impl Program {
    /// Checks that every rank has each of its instructions once, each after what it needs; that messages between two ranks are
    /// received in the order in which they are sent (a communicator has no tags); and that with `transport` no rank waits
    /// forever.
    ///
    /// # Errors
    /// The first instruction that is wrong, with its rank and position, what was expected there and what was found.
    pub fn validate(&self, transport: Transport) -> Result<(), ScheduleError> {
        if self.ranks.len() != self.layout.ranks() {
            let (expected, found) = (format!("{} lists", self.layout.ranks()), self.ranks.len().to_string());
            return Err(ScheduleError::Setting { field: "ranks", expected, found });
        }
        for (rank, list) in self.ranks.iter().enumerate() {
            check_list(self.layout, rank, list)?;
        }
        for from in 0..self.ranks.len() {
            for to in 0..self.ranks.len() {
                self.check_messages(from, to)?;
            }
        }
        self.simulate(&Costs { transport, ..Costs::uniform(self.layout, 1.0, 1.0) }).map(drop)
    }

    /// Checks that rank `r` never keeps more than `limits[r]` activations, counted in chunks of one micro-batch.
    ///
    /// # Errors
    /// The first forward pass that is one too many.
    pub fn check_live(&self, limits: &[usize]) -> Result<(), ScheduleError> {
        for (rank, (list, &expected)) in self.ranks.iter().zip(limits).enumerate() {
            if let Some((position, found)) = live(list).find(|&(_, live)| live > expected) {
                return Err(ScheduleError::Live { rank, position, expected, found });
            }
        }
        Ok(())
    }

    fn check_messages(&self, from: usize, to: usize) -> Result<(), ScheduleError> {
        let sent = self.ranks[from].iter().filter_map(|&instruction| match instruction {
            Instruction::Send { work, to: peer } if peer == to => self.layout.after(from, work),
            _ => None,
        });
        let received = self.ranks[to].iter().enumerate().filter_map(|(position, &instruction)| match instruction {
            Instruction::Recv { work, from: peer } if peer == from => Some((position, work)),
            _ => None,
        });
        for ((_, work), (position, found)) in sent.zip(received) {
            if work != found {
                let (expected, found) = (Instruction::Recv { work, from }, Instruction::Recv { work: found, from });
                return Err(order(to, position, expected, found));
            }
        }
        Ok(())
    }
}

fn order(rank: usize, position: usize, expected: impl ToString, found: impl ToString) -> ScheduleError {
    ScheduleError::Order { rank, position, expected: expected.to_string(), found: found.to_string() }
}

fn check_list(layout: Layout, rank: usize, list: &[Instruction]) -> Result<(), ScheduleError> {
    let required: Vec<_> = layout.work().flat_map(|work| around(layout, rank, work)).collect();
    let mut seen = HashSet::new();
    for (position, &found) in list.iter().enumerate() {
        if found.work().is_some() && !required.contains(&found) {
            let alike =
                |other: &&Instruction| other.work() == found.work() && discriminant(*other) == discriminant(&found);
            let expected = required.iter().find(alike).map(ToString::to_string);
            return Err(order(rank, position, expected.unwrap_or("an instruction of this rank".to_owned()), found));
        }
        if let Some(expected) = needs(layout, rank, found, &required).into_iter().find(|need| !seen.contains(need)) {
            return Err(order(rank, position, expected, found));
        }
        if !seen.insert(found) {
            return Err(order(rank, position, "each instruction once", format!("{found} again")));
        }
    }
    match required.into_iter().chain(Instruction::CLOSING).find(|instruction| !seen.contains(instruction)) {
        Some(expected) => Err(order(rank, list.len(), expected, "the end of the list")),
        None => Ok(()),
    }
}

/// A rank's work with the messages that bring its input and take its output.
fn around(layout: Layout, rank: usize, work: Work) -> impl Iterator<Item = Instruction> {
    let other = |neighbour: Option<(usize, Work)>| neighbour.map(|(peer, _)| peer).filter(|&peer| peer != rank);
    let recv = other(layout.before(rank, work)).map(|from| Instruction::Recv { work, from });
    let send = other(layout.after(rank, work)).map(|to| Instruction::Send { work, to });
    recv.into_iter().chain([Instruction::Compute(work)]).chain(send)
}

/// What has to come before an instruction in its rank's list.
fn needs(layout: Layout, rank: usize, instruction: Instruction, required: &[Instruction]) -> Vec<Instruction> {
    match instruction {
        Instruction::Compute(work) => {
            let input = layout.before(rank, work).map(|(from, source)| match from {
                from if from == rank => Instruction::Compute(source),
                from => Instruction::Recv { work, from },
            });
            let forward =
                (work.pass == Pass::Backward).then_some(Instruction::Compute(Work { pass: Pass::Forward, ..work }));
            input.into_iter().chain(forward).collect()
        }
        Instruction::Send { work, .. } => vec![Instruction::Compute(work)],
        Instruction::Recv { .. } => Vec::new(),
        // Gradients are whole, and no peer waits for this rank, only after everything else.
        Instruction::ReduceTiedGradients => required.to_vec(),
        Instruction::ReduceGradients => vec![Instruction::ReduceTiedGradients],
        Instruction::OptimizerStep => vec![Instruction::ReduceGradients],
    }
}
