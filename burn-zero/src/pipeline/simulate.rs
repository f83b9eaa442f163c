//! A program carried out on clocks: each rank has its own, a message sets both of its ends'.

use super::{Costs, Instruction, Program, ScheduleError, Span, Timeline, Transport, Work};
use std::collections::HashMap;

impl Program {
    /// Carries the program out, with `costs` instead of work. The result does not depend on the order in which ranks are looked
    /// at: what a rank does next, and with whom, is fixed by its list.
    ///
    /// # Errors
    /// If `costs` has no time for some stage, or no rank can go on.
    ///
    /// # Panics
    /// If there is work for a chunk that the layout does not have; [`Program::validate`] says so.
    pub fn simulate(&self, costs: &Costs) -> Result<Timeline, ScheduleError> {
        let stages = self.layout.stages();
        for (field, times) in [("forward", &costs.forward), ("backward", &costs.backward)] {
            if times.len() != stages {
                let (expected, found) = (format!("{stages} times, one per stage"), times.len().to_string());
                return Err(ScheduleError::Setting { field, expected, found });
            }
        }
        let ranks = self.ranks.len();
        let timeline = Timeline { ranks: vec![Vec::new(); ranks] };
        let (next, now) = (vec![0; ranks], vec![0.0; ranks]);
        let mut clocks = Clocks { program: self, costs, next, now, travelling: HashMap::new(), timeline };
        loop {
            let mut moved = false;
            for rank in 0..ranks {
                while clocks.step(rank) {
                    moved = true;
                }
            }
            match (0..ranks).find(|&rank| clocks.head(rank, 0).is_some()) {
                None => return Ok(clocks.timeline),
                Some(rank) if !moved => return Err(clocks.deadlock(rank)),
                Some(_) => {}
            }
        }
    }
}

struct Clocks<'a> {
    program: &'a Program,
    costs: &'a Costs,
    /// The position of each rank's next instruction.
    next: Vec<usize>,
    now: Vec<f64>,
    /// When buffered messages arrive, by the rank and work that they are for.
    travelling: HashMap<(usize, Work), f64>,
    timeline: Timeline,
}

impl Clocks<'_> {
    fn head(&self, rank: usize, offset: usize) -> Option<Instruction> {
        self.program.ranks.get(rank)?.get(self.next[rank] + offset).copied()
    }

    /// Carries out `rank`'s next instruction if it can be; says whether it was.
    fn step(&mut self, rank: usize) -> bool {
        match self.head(rank, 0) {
            None => false,
            Some(Instruction::Compute(work)) => {
                let start = self.now[rank];
                let end = start + self.costs.pass(work.pass, self.program.layout.stage(rank, work.chunk));
                self.timeline.ranks[rank].push(Span { work, start, end });
                self.advance(rank, 1, end)
            }
            Some(Instruction::Send { work, to }) => self.exchange(rank, to) || self.send(rank, work, to),
            Some(Instruction::Recv { work, from }) => self.exchange(rank, from) || self.receive(rank, work),
            Some(_) => self.advance(rank, 1, self.now[rank]),
        }
    }

    fn advance(&mut self, rank: usize, instructions: usize, now: f64) -> bool {
        self.next[rank] += instructions;
        self.now[rank] = now;
        true
    }

    fn send(&mut self, rank: usize, work: Work, to: usize) -> bool {
        let Some((_, input)) = self.program.layout.after(rank, work) else { return false };
        if self.costs.transport == Transport::Buffered {
            self.travelling.insert((to, input), self.now[rank] + self.costs.message);
            return self.advance(rank, 1, self.now[rank]);
        }
        self.head(to, 0) == Some(Instruction::Recv { work: input, from: rank }) && self.meet(rank, to, 1)
    }

    /// A receive that is not buffered is carried out by its send.
    fn receive(&mut self, rank: usize, work: Work) -> bool {
        match self.travelling.remove(&(rank, work)) {
            Some(arrival) => self.advance(rank, 1, self.now[rank].max(arrival)),
            None => false,
        }
    }

    fn exchange(&mut self, rank: usize, peer: usize) -> bool {
        self.costs.transport == Transport::Exchange
            && self.pair(rank, peer).zip(self.pair(peer, rank)).is_some_and(|((sent, received), (back, input))| {
                let layout = self.program.layout;
                layout.after(rank, sent) == Some((peer, input)) && layout.after(peer, back) == Some((rank, received))
            })
            && self.meet(rank, peer, 2)
    }

    /// What `rank` sends to and receives from `peer` if its next two instructions are one of each.
    fn pair(&self, rank: usize, peer: usize) -> Option<(Work, Work)> {
        match (self.head(rank, 0)?, self.head(rank, 1)?) {
            (Instruction::Send { work, to }, Instruction::Recv { work: input, from })
            | (Instruction::Recv { work: input, from }, Instruction::Send { work, to })
                if to == peer && from == peer =>
            {
                Some((work, input))
            }
            _ => None,
        }
    }

    fn meet(&mut self, rank: usize, peer: usize, instructions: usize) -> bool {
        let end = self.now[rank].max(self.now[peer]) + self.costs.message;
        self.advance(rank, instructions, end) && self.advance(peer, instructions, end)
    }

    fn deadlock(&self, rank: usize) -> ScheduleError {
        let text =
            |instruction: Option<Instruction>| instruction.map_or("the end of its list".to_owned(), |i| i.to_string());
        let head = self.head(rank, 0);
        let (peer, expected) = match head {
            Some(Instruction::Send { work, to }) => {
                (to, self.program.layout.after(rank, work).map(|(_, work)| Instruction::Recv { work, from: rank }))
            }
            Some(Instruction::Recv { work, from }) => {
                (from, self.program.layout.before(rank, work).map(|(_, work)| Instruction::Send { work, to: rank }))
            }
            _ => (rank, None),
        };
        let expected = format!("rank {peer} at {}", text(expected));
        let peers = text(self.head(peer, 0));
        let position = self.next[rank];
        ScheduleError::Deadlock {
            rank,
            position,
            expected,
            found: format!("{}, and rank {peer} at {peers}", text(head)),
        }
    }
}
