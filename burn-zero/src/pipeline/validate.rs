//! Validation of a program: it runs every action once, in an order that respects all dependencies, without deadlock.

use super::{Action, Costs, Instruction, PipelineError, PipelineShape, Program, RankAction, SendMode, StageTimes};
use std::collections::HashSet;
use std::mem::discriminant;

impl Program {
    /// Checks that every rank has each of its instructions once, each after its prerequisites; that messages between
    /// two ranks are received in the order in which they are sent (a communicator has no tags); and that the program
    /// does not deadlock in this send mode.
    ///
    /// # Errors
    /// The first invalid instruction, with its rank and position, the expected instruction and the one found.
    pub fn validate(&self, send_mode: SendMode) -> Result<(), PipelineError> {
        if self.ranks.len() != self.shape.ranks() {
            let (expected, found) = (format!("{} lists", self.shape.ranks()), self.ranks.len().to_string());
            return Err(PipelineError::Setting { field: "ranks", expected, found });
        }
        for (rank, list) in self.ranks.iter().enumerate() {
            check_list(self.shape, rank, list)?;
        }
        for from in 0..self.ranks.len() {
            for to in 0..self.ranks.len() {
                self.check_messages(from, to)?;
            }
        }
        let times = StageTimes { forward: 1.0, backward_input: 1.0, backward_weight: 1.0 };
        self.simulate(&Costs { send_mode, ..Costs::uniform(self.shape, times) }).map(drop)
    }

    fn check_messages(&self, from: usize, to: usize) -> Result<(), PipelineError> {
        let sent = self.ranks[from].iter().filter_map(|&instruction| match instruction {
            Instruction::Send { action, to: peer } if peer == to => self.shape.consumer(from, action),
            _ => None,
        });
        let received = self.ranks[to].iter().enumerate().filter_map(|(position, &instruction)| match instruction {
            Instruction::Recv { action, from: peer } if peer == from => Some((position, action)),
            _ => None,
        });
        for (RankAction { action, .. }, (position, found)) in sent.zip(received) {
            if action.message_key() != found.message_key() {
                let (expected, found) = (Instruction::Recv { action, from }, Instruction::Recv { action: found, from });
                return Err(order_error(to, position, expected, found));
            }
        }
        Ok(())
    }
}

fn order_error(rank: usize, position: usize, expected: impl ToString, found: impl ToString) -> PipelineError {
    PipelineError::Order { rank, position, expected: expected.to_string(), found: found.to_string() }
}

fn check_list(shape: PipelineShape, rank: usize, list: &[Instruction]) -> Result<(), PipelineError> {
    let computed = list.iter().filter_map(|instruction| match instruction {
        Instruction::Compute(action) => Some(*action),
        _ => None,
    });
    let required: Vec<_> = shape.actions(computed).flat_map(|action| with_messages(shape, rank, action)).collect();
    let (known, mut seen) = (required.iter().copied().collect::<HashSet<_>>(), HashSet::new());
    for (position, &found) in list.iter().enumerate() {
        if found.action().is_some() && !known.contains(&found) {
            let alike =
                |other: &&Instruction| other.action() == found.action() && discriminant(*other) == discriminant(&found);
            let expected = required.iter().find(alike).map(ToString::to_string);
            return Err(order_error(
                rank,
                position,
                expected.unwrap_or("an instruction of this rank".to_owned()),
                found,
            ));
        }
        if let Some(expected) =
            prerequisites(shape, rank, found, &required).into_iter().find(|need| !seen.contains(need))
        {
            return Err(order_error(rank, position, expected, found));
        }
        if !seen.insert(found) {
            return Err(order_error(rank, position, "each instruction once", format!("{found} again")));
        }
    }
    match required.into_iter().chain(Instruction::CLOSING).find(|instruction| !seen.contains(instruction)) {
        Some(expected) => Err(order_error(rank, list.len(), expected, "the end of the list")),
        None => Ok(()),
    }
}

/// Returns the receive of an action's input, the action and the send of its output, as far as they exist.
fn with_messages(shape: PipelineShape, rank: usize, action: Action) -> impl Iterator<Item = Instruction> {
    let other = |neighbour: Option<RankAction>| neighbour.map(|peer| peer.rank).filter(|&peer| peer != rank);
    let recv = other(shape.producer(rank, action)).map(|from| Instruction::Recv { action, from });
    let send = other(shape.consumer(rank, action)).map(|to| Instruction::Send { action, to });
    recv.into_iter().chain([Instruction::Compute(action)]).chain(send)
}

/// Returns the instructions that must come before an instruction in the list of its rank.
fn prerequisites(
    shape: PipelineShape,
    rank: usize,
    instruction: Instruction,
    required: &[Instruction],
) -> Vec<Instruction> {
    match instruction {
        Instruction::Compute(action) => {
            let input = shape.producer(rank, action).map(|source| match source.rank {
                from if from == rank => Instruction::Compute(source.action),
                from => Instruction::Recv { action, from },
            });
            input.into_iter().chain(action.prerequisite().map(Instruction::Compute)).collect()
        }
        Instruction::Send { action, .. } => vec![Instruction::Compute(action)],
        Instruction::Recv { .. } => Vec::new(),
        // Before all passes and messages are done, the gradients are incomplete and a peer may wait for this rank.
        Instruction::ReduceTiedGradients => required.to_vec(),
        Instruction::ReduceGradients => vec![Instruction::ReduceTiedGradients],
        Instruction::OptimizerStep => vec![Instruction::ReduceGradients],
    }
}
