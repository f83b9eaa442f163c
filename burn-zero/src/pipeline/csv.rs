//! The CSV format of schedules that `torch.distributed.pipelining` reads and writes and torchtitan takes as
//! `pipeline_parallel_schedule_csv`: a row per rank, a column per slot, cells `{stage}F{micro-batch}` and likewise with
//! `B`, `I` and `W` (the stage index counts over all ranks), empty cells for idle slots.

use super::{Action, ComputationType, PipelineError, PipelineSchedule, PipelineShape, Placement};

impl PipelineSchedule {
    /// Returns the schedule as CSV; all rows have the same number of cells.
    pub fn to_csv(&self) -> String {
        let cell = |rank: usize, action: &Option<Action>| {
            action.map_or(String::new(), |action| {
                let stage = self.shape().stage_index(rank, action.chunk);
                format!("{stage}{}{}", action.computation.letter(), action.micro_batch)
            })
        };
        let row = |(rank, row): (usize, &Vec<_>)| {
            row.iter().map(|action| cell(rank, action)).collect::<Vec<_>>().join(",") + "\n"
        };
        self.rows().iter().enumerate().map(row).collect()
    }

    /// Parses a schedule. The shape follows from the cells. Rows may have different lengths and may leave out idle
    /// slots; then every action runs as early as the order of its row allows. A cell of two overlapping passes, as in
    /// torch's DualPipeV, is read as two cells.
    ///
    /// # Errors
    /// If a cell is not a pass, names a stage of another rank, or if an action is missing, appears twice or is part of a
    /// cycle of dependencies.
    pub fn from_csv(text: &str) -> Result<Self, PipelineError> {
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        let mut rows = Vec::new();
        for (rank, line) in lines.iter().enumerate() {
            let cells = line.split(',').enumerate().map(|(slot, text)| parse_cell(text.trim(), rank, slot));
            rows.push(cells.collect::<Result<Vec<_>, _>>()?.concat());
        }
        let passes =
            || rows.iter().enumerate().flat_map(|(rank, row)| row.iter().flatten().map(move |pass| (rank, pass)));
        let most = |size: fn(&StagePass) -> usize| passes().map(|(_, pass)| size(pass).saturating_add(1)).max();
        let stages = most(|pass| pass.stage).unwrap_or(0);
        let micro_batches = most(|pass| pass.micro_batch).unwrap_or(0);
        let shape = PipelineShape::new(lines.len(), stages.div_ceil(lines.len().max(1)), micro_batches)?;
        let foreign = |shape: PipelineShape| passes().find(|(rank, pass)| shape.stage_rank(pass.stage) != *rank);
        let in_v = shape.with_placement(Placement::V);
        let shape = match (foreign(shape), foreign(in_v)) {
            (None, _) => shape,
            (_, None) => in_v,
            (Some((rank, pass)), _) => return Err(pass.foreign_error(rank, shape)),
        };
        let action = |pass: &StagePass| Action {
            computation: pass.computation,
            chunk: shape.stage_chunk(pass.stage),
            micro_batch: pass.micro_batch,
        };
        let row = |row: &Vec<Option<StagePass>>| row.iter().map(|cell| cell.as_ref().map(action)).collect();
        Self::from_rows(shape, rows.iter().map(row).collect())
    }
}

/// A pass of a cell.
#[derive(Debug, Clone, Copy)]
struct StagePass {
    stage: usize,
    computation: ComputationType,
    micro_batch: usize,
    /// The position of the cell in its row.
    slot: usize,
}

impl StagePass {
    fn parse(text: &str, slot: usize) -> Option<Self> {
        let (split, letter) = text.char_indices().find(|(_, letter)| !letter.is_ascii_digit())?;
        let computation = ComputationType::from_letter(letter)?;
        let micro_batch = &text[split + 1..];
        let digits = !micro_batch.is_empty() && micro_batch.bytes().all(|byte| byte.is_ascii_digit());
        let stage = text[..split].parse().ok()?;
        digits.then_some(Self { stage, computation, micro_batch: micro_batch.parse().ok()?, slot })
    }

    /// Returns the error for a pass through a stage that `rank` holds in neither placement.
    fn foreign_error(self, rank: usize, shape: PipelineShape) -> PipelineError {
        let ranks = shape.ranks();
        let expected = format!(
            "a stage of rank {rank} ({rank}, {}, {} …; in a V {rank}, {}, {} …)",
            rank + ranks,
            rank + 2 * ranks,
            2 * ranks - 1 - rank,
            rank + 2 * ranks
        );
        let found = format!("{}{}{}", self.stage, self.computation.letter(), self.micro_batch);
        PipelineError::Csv { line: rank + 1, column: self.slot + 1, expected, found }
    }
}

/// Parses a cell: an idle slot, one pass, or two passes as in `(2F1;1B0)OVERLAP_F_B`.
fn parse_cell(text: &str, rank: usize, slot: usize) -> Result<Vec<Option<StagePass>>, PipelineError> {
    if text.is_empty() {
        return Ok(vec![None]);
    }
    let overlapping = text.strip_prefix('(').and_then(|rest| rest.strip_suffix(")OVERLAP_F_B"));
    let passes: Option<Vec<_>> = match overlapping.and_then(|pair| pair.split_once(';')) {
        Some((first, second)) => [first, second].map(|pass| StagePass::parse(pass.trim(), slot)).into_iter().collect(),
        None => StagePass::parse(text, slot).map(|pass| vec![pass]),
    };
    let expected = "a pass such as `0F3`, `0B3`, `0I3` or `0W3`, or two as in `(2F1;1B0)OVERLAP_F_B`".to_owned();
    let wrong = PipelineError::Csv { line: rank + 1, column: slot + 1, expected, found: text.to_owned() };
    passes.map(|passes| passes.into_iter().map(Some).collect()).ok_or(wrong)
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
            (PipelineKind::LoopedBFS, 3, 2, 4),
            (PipelineKind::ZBH1, 4, 1, 8),
            (PipelineKind::ZBV, 1, 2, 3),
            (PipelineKind::ZBV, 2, 2, 1),
            (PipelineKind::ZBV, 4, 2, 8),
        ] {
            let shape = PipelineShape::new(ranks, chunks, micro_batches).unwrap().with_placement(kind.placement());
            let schedule = PipelineSchedule::new(kind, shape).unwrap();
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
