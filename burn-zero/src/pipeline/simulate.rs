//! Simulation of a program: each rank has a clock, and a message synchronizes the clocks of its two ranks.

use super::{Action, Costs, Instruction, PipelineError, Program, RankAction, SendMode, TimedAction, Timeline};
use std::collections::HashMap;

impl Program {
    /// Simulates the program with the times of `costs`. The result does not depend on the order in which the simulation
    /// visits the ranks, because the list of each rank fixes what it does next and with which peer.
    ///
    /// # Errors
    /// If `costs` has no time for some stage, or the program deadlocks.
    ///
    /// # Panics
    /// If an action names a chunk that the shape does not have; [`Program::validate`] returns an error for it.
    pub fn simulate(&self, costs: &Costs) -> Result<Timeline, PipelineError> {
        let stages = self.shape.stages();
        if costs.stages.len() != stages {
            let (expected, found) = (format!("{stages} times, one per stage"), costs.stages.len().to_string());
            return Err(PipelineError::Setting { field: "stages", expected, found });
        }
        let ranks = self.ranks.len();
        let timeline = Timeline { ranks: vec![Vec::new(); ranks] };
        let (next, now) = (vec![0; ranks], vec![0.0; ranks]);
        let mut clocks =
            Simulator { program: self, costs, positions: next, clocks: now, in_flight: HashMap::new(), timeline };
        loop {
            let mut moved = false;
            for rank in 0..ranks {
                while clocks.try_step(rank) {
                    moved = true;
                }
            }
            match (0..ranks).find(|&rank| clocks.next_instruction(rank, 0).is_some()) {
                None => return Ok(clocks.timeline),
                Some(rank) if !moved => return Err(clocks.deadlock_error(rank)),
                Some(_) => {}
            }
        }
    }
}

struct Simulator<'a> {
    program: &'a Program,
    costs: &'a Costs,
    /// The position of the next instruction of each rank.
    positions: Vec<usize>,
    clocks: Vec<f64>,
    /// The arrival times of buffered messages, by the [`RankAction::message_key`] that they are for.
    in_flight: HashMap<RankAction, f64>,
    timeline: Timeline,
}

impl Simulator<'_> {
    fn next_instruction(&self, rank: usize, offset: usize) -> Option<Instruction> {
        self.program.ranks.get(rank)?.get(self.positions[rank] + offset).copied()
    }

    /// Runs the next instruction of `rank` if nothing blocks it; returns whether it ran.
    fn try_step(&mut self, rank: usize) -> bool {
        match self.next_instruction(rank, 0) {
            None => false,
            Some(Instruction::Compute(action)) => {
                let start = self.clocks[rank];
                let end =
                    start + self.costs.time(action.computation, self.program.shape.stage_index(rank, action.chunk));
                self.timeline.ranks[rank].push(TimedAction { action, start, end });
                self.advance(rank, 1, end)
            }
            Some(Instruction::Send { action, to }) => self.try_send_recv(rank, to) || self.try_send(rank, action, to),
            Some(Instruction::Recv { action, from }) => {
                self.try_send_recv(rank, from) || self.try_receive(rank, action)
            }
            Some(_) => self.advance(rank, 1, self.clocks[rank]),
        }
    }

    fn advance(&mut self, rank: usize, instructions: usize, now: f64) -> bool {
        self.positions[rank] += instructions;
        self.clocks[rank] = now;
        true
    }

    fn try_send(&mut self, rank: usize, action: Action, to: usize) -> bool {
        let Some(RankAction { action: input, .. }) = self.program.shape.consumer(rank, action) else { return false };
        if self.costs.send_mode == SendMode::Buffered {
            let message = RankAction { rank: to, action: input }.message_key();
            self.in_flight.insert(message, self.clocks[rank] + self.costs.message);
            return self.advance(rank, 1, self.clocks[rank]);
        }
        let receives = |next: Instruction| matches!(next, Instruction::Recv { action, from } if from == rank && action.message_key() == input.message_key());
        self.next_instruction(to, 0).is_some_and(receives) && self.synchronize(rank, to, 1)
    }

    /// Runs a buffered receive. A receive in the other send modes is run by its send.
    fn try_receive(&mut self, rank: usize, action: Action) -> bool {
        match self.in_flight.remove(&RankAction { rank, action }.message_key()) {
            Some(arrival) => self.advance(rank, 1, self.clocks[rank].max(arrival)),
            None => false,
        }
    }

    fn try_send_recv(&mut self, rank: usize, peer: usize) -> bool {
        self.costs.send_mode == SendMode::SendRecv
            && self.send_recv_pair(rank, peer).zip(self.send_recv_pair(peer, rank)).is_some_and(
                |((sent, received), (back, input))| {
                    let meets = |from, sent, rank, action| {
                        let consumer = self.program.shape.consumer(from, sent).map(RankAction::message_key);
                        consumer == Some(RankAction { rank, action }.message_key())
                    };
                    meets(rank, sent, peer, input) && meets(peer, back, rank, received)
                },
            )
            && self.synchronize(rank, peer, 2)
    }

    /// Returns the action whose output `rank` sends to `peer` and the one whose input it receives from `peer`, if its
    /// next two instructions are one of each.
    fn send_recv_pair(&self, rank: usize, peer: usize) -> Option<(Action, Action)> {
        match (self.next_instruction(rank, 0)?, self.next_instruction(rank, 1)?) {
            (Instruction::Send { action, to }, Instruction::Recv { action: input, from })
            | (Instruction::Recv { action: input, from }, Instruction::Send { action, to })
                if to == peer && from == peer =>
            {
                Some((action, input))
            }
            _ => None,
        }
    }

    fn synchronize(&mut self, rank: usize, peer: usize, instructions: usize) -> bool {
        let end = self.clocks[rank].max(self.clocks[peer]) + self.costs.message;
        self.advance(rank, instructions, end) && self.advance(peer, instructions, end)
    }

    fn deadlock_error(&self, rank: usize) -> PipelineError {
        let text =
            |instruction: Option<Instruction>| instruction.map_or("the end of its list".to_owned(), |i| i.to_string());
        let head = self.next_instruction(rank, 0);
        let (peer, expected) = match head {
            Some(Instruction::Send { action, to }) => (
                to,
                self.program.shape.consumer(rank, action).map(|to| Instruction::Recv { action: to.action, from: rank }),
            ),
            Some(Instruction::Recv { action, from }) => (
                from,
                self.program.shape.producer(rank, action).map(|of| Instruction::Send { action: of.action, to: rank }),
            ),
            _ => (rank, None),
        };
        let expected = format!("rank {peer} at {}", text(expected));
        let peers = text(self.next_instruction(peer, 0));
        let position = self.positions[rank];
        PipelineError::Deadlock {
            rank,
            position,
            expected,
            found: format!("{}, and rank {peer} at {peers}", text(head)),
        }
    }
}
