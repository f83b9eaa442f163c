//! The CSV form of a schedule that `torch.distributed.pipelining` reads and writes and torchtitan takes as
//! `pipeline_parallel_schedule_csv`: a row per rank, a column per slot, cells `{stage}F{micro-batch}` and `{stage}B{micro-batch}`
//! (the stage is counted over all ranks), empty cells for idle slots.

use super::{Layout, Pass, Schedule, ScheduleError, Work};

impl Schedule {
    /// The schedule as CSV, every row of the same number of cells.
    pub fn to_csv(&self) -> String {
        let cell = |rank: usize, work: &Option<Work>| {
            work.map_or(String::new(), |work| {
                let pass = if work.pass == Pass::Forward { 'F' } else { 'B' };
                format!("{}{pass}{}", self.layout().stage(rank, work.chunk), work.micro_batch)
            })
        };
        let row = |(rank, row): (usize, &Vec<_>)| {
            row.iter().map(|work| cell(rank, work)).collect::<Vec<_>>().join(",") + "\n"
        };
        self.rows().iter().enumerate().map(row).collect()
    }

    /// Reads a schedule from `text`. Its sizes are those that the cells name; rows may have different lengths, and may leave out
    /// idle slots: then work is done as early as its row's order allows.
    ///
    /// # Errors
    /// If a cell is no action of a whole forward or backward pass or names a stage of another rank, or if the whole is no
    /// schedule, see [`Schedule::from_rows`].
    pub fn from_csv(text: &str) -> Result<Self, ScheduleError> {
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let mut cells = Vec::new();
        for (rank, line) in lines.iter().enumerate() {
            let row = line.split(',').enumerate().map(|(slot, cell)| parse(cell.trim(), rank, slot, lines.len()));
            cells.push(row.collect::<Result<Vec<_>, _>>()?);
        }
        let most = |size: fn(Work) -> usize| {
            cells.iter().flatten().flatten().map(|&work| size(work).saturating_add(1)).max().unwrap_or(0)
        };
        let layout = Layout::new(lines.len(), most(|work| work.chunk), most(|work| work.micro_batch))?;
        Self::from_rows(layout, cells)
    }
}

fn parse(cell: &str, rank: usize, slot: usize, ranks: usize) -> Result<Option<Work>, ScheduleError> {
    let wrong = |expected: String| {
        Err(ScheduleError::Csv { line: rank + 1, column: slot + 1, expected, found: cell.to_owned() })
    };
    if cell.is_empty() {
        return Ok(None);
    }
    let action = || {
        let (split, letter) = cell.char_indices().find(|(_, letter)| !letter.is_ascii_digit())?;
        let pass = match letter {
            'F' => Pass::Forward,
            'B' => Pass::Backward,
            _ => return None,
        };
        let micro_batch = &cell[split + 1..];
        let digits = !micro_batch.is_empty() && micro_batch.bytes().all(|byte| byte.is_ascii_digit());
        digits.then_some((pass, cell[..split].parse::<usize>().ok()?, micro_batch.parse().ok()?))
    };
    match action() {
        None => wrong("an action such as `0F3` or `0B3`, whole passes only".to_owned()),
        Some((_, stage, _)) if stage % ranks != rank => {
            wrong(format!("a stage of rank {rank} ({rank}, {}, {} …)", rank + ranks, rank + 2 * ranks))
        }
        Some((pass, stage, micro_batch)) => Ok(Some(Work { pass, chunk: stage / ranks, micro_batch })),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Kind;

    #[test]
    fn what_is_written_is_read() {
        for (kind, ranks, chunks, micro_batches) in [
            (Kind::GPipe, 1, 1, 1),
            (Kind::GPipe, 3, 1, 5),
            (Kind::OneFOneB, 2, 1, 4),
            (Kind::OneFOneB, 8, 1, 16),
            (Kind::Interleaved1F1B, 1, 4, 3),
            (Kind::Interleaved1F1B, 4, 3, 8),
        ] {
            let schedule = Schedule::new(kind, Layout::new(ranks, chunks, micro_batches).unwrap()).unwrap();
            assert_eq!(Schedule::from_csv(&schedule.to_csv()), Ok(schedule.clone()), "{kind:?}");
            assert_eq!(Schedule::from_csv(&schedule.to_csv().replace('\n', "\r\n")), Ok(schedule), "{kind:?}");
        }
    }

    #[test]
    fn the_format_is_that_of_pytorch() {
        let schedule = Schedule::new(Kind::OneFOneB, Layout::new(2, 1, 2).unwrap()).unwrap();
        assert_eq!(schedule.to_csv(), "0F0,,0F1,0B0,,0B1\n,1F0,1B0,1F1,1B1,\n");
    }

    #[test]
    fn rows_without_idle_slots_are_timed() {
        let read = Schedule::from_csv("0F0,0F1,0B0,0B1\n1F0, 1F1,1B0,1B1\n").unwrap();
        assert_eq!(read, Schedule::new(Kind::GPipe, Layout::new(2, 1, 2).unwrap()).unwrap());
    }
}
