//! The CSV format of schedules that `torch.distributed.pipelining` reads and writes and torchtitan takes as
//! `pipeline_parallel_schedule_csv`: a row per rank, a column per slot, cells `{stage}F{micro-batch}` and
//! `{stage}B{micro-batch}` (the stage index counts over all ranks), empty cells for idle slots.

use super::{Action, ComputationType, PipelineError, PipelineSchedule, PipelineShape};

impl PipelineSchedule {
    /// Returns the schedule as CSV; all rows have the same number of cells.
    pub fn to_csv(&self) -> String {
        let cell = |rank: usize, action: &Option<Action>| {
            action.map_or(String::new(), |action| {
                let computation = if action.computation == ComputationType::Forward { 'F' } else { 'B' };
                format!("{}{computation}{}", self.shape().stage_index(rank, action.chunk), action.micro_batch)
            })
        };
        let row = |(rank, row): (usize, &Vec<_>)| {
            row.iter().map(|action| cell(rank, action)).collect::<Vec<_>>().join(",") + "\n"
        };
        self.rows().iter().enumerate().map(row).collect()
    }

    /// Parses a schedule. The shape follows from the cells. Rows may have different lengths and may leave out idle
    /// slots; then every action runs as early as the order of its row allows.
    ///
    /// # Errors
    /// If a cell is not the action of a full forward or backward pass or names a stage of another rank, or if an action
    /// is missing, appears twice or is part of a cycle of dependencies.
    pub fn from_csv(text: &str) -> Result<Self, PipelineError> {
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let mut cells = Vec::new();
        for (rank, line) in lines.iter().enumerate() {
            let row = line.split(',').enumerate().map(|(slot, cell)| parse(cell.trim(), rank, slot, lines.len()));
            cells.push(row.collect::<Result<Vec<_>, _>>()?);
        }
        let most = |size: fn(Action) -> usize| {
            cells.iter().flatten().flatten().map(|&action| size(action).saturating_add(1)).max().unwrap_or(0)
        };
        let shape = PipelineShape::new(lines.len(), most(|action| action.chunk), most(|action| action.micro_batch))?;
        Self::from_rows(shape, cells)
    }
}

fn parse(cell: &str, rank: usize, slot: usize, ranks: usize) -> Result<Option<Action>, PipelineError> {
    let wrong = |expected: String| {
        Err(PipelineError::Csv { line: rank + 1, column: slot + 1, expected, found: cell.to_owned() })
    };
    if cell.is_empty() {
        return Ok(None);
    }
    let action = || {
        let (split, letter) = cell.char_indices().find(|(_, letter)| !letter.is_ascii_digit())?;
        let computation = match letter {
            'F' => ComputationType::Forward,
            'B' => ComputationType::Backward,
            _ => return None,
        };
        let micro_batch = &cell[split + 1..];
        let digits = !micro_batch.is_empty() && micro_batch.bytes().all(|byte| byte.is_ascii_digit());
        digits.then_some((computation, cell[..split].parse::<usize>().ok()?, micro_batch.parse().ok()?))
    };
    match action() {
        None => wrong("an action such as `0F3` or `0B3`, full passes only".to_owned()),
        Some((_, stage, _)) if stage % ranks != rank => {
            wrong(format!("a stage of rank {rank} ({rank}, {}, {} …)", rank + ranks, rank + 2 * ranks))
        }
        Some((pass, stage, micro_batch)) => Ok(Some(Action { computation: pass, chunk: stage / ranks, micro_batch })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::PipelineKind;

    #[test]
    fn what_is_written_is_read() {
        for (kind, ranks, chunks, micro_batches) in [
            (PipelineKind::GPipe, 1, 1, 1),
            (PipelineKind::GPipe, 3, 1, 5),
            (PipelineKind::OneFOneB, 2, 1, 4),
            (PipelineKind::OneFOneB, 8, 1, 16),
            (PipelineKind::Interleaved1F1B, 1, 4, 3),
            (PipelineKind::Interleaved1F1B, 4, 3, 8),
        ] {
            let schedule =
                PipelineSchedule::new(kind, PipelineShape::new(ranks, chunks, micro_batches).unwrap()).unwrap();
            assert_eq!(PipelineSchedule::from_csv(&schedule.to_csv()), Ok(schedule.clone()), "{kind:?}");
            assert_eq!(PipelineSchedule::from_csv(&schedule.to_csv().replace('\n', "\r\n")), Ok(schedule), "{kind:?}");
        }
    }

    #[test]
    fn the_format_is_that_of_pytorch() {
        let schedule = PipelineSchedule::new(PipelineKind::OneFOneB, PipelineShape::new(2, 1, 2).unwrap()).unwrap();
        assert_eq!(schedule.to_csv(), "0F0,,0F1,0B0,,0B1\n,1F0,1B0,1F1,1B1,\n");
    }

    #[test]
    fn rows_without_idle_slots_are_timed() {
        let read = PipelineSchedule::from_csv("0F0,0F1,0B0,0B1\n1F0, 1F1,1B0,1B1\n").unwrap();
        assert_eq!(read, PipelineSchedule::new(PipelineKind::GPipe, PipelineShape::new(2, 1, 2).unwrap()).unwrap());
    }
}
