//! A schedule: for every rank and slot the work done then, if any.

use super::kind::{gpipe_slot, interleaved_order, one_f_one_b_slot};
use super::{Kind, Layout, Pass, ScheduleError, Work};
use std::collections::HashSet;

/// Who computes what when, in slots of equal length. Complete and in order by construction: every rank does all its work once,
/// and every input is made in an earlier slot than it is used in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    layout: Layout,
    rows: Vec<Vec<Option<Work>>>,
}

impl Schedule {
    /// The schedule `kind` for `layout`.
    ///
    /// # Errors
    /// If `kind` does not exist for `layout`, see [`Kind::check`].
    pub fn new(kind: Kind, layout: Layout) -> Result<Self, ScheduleError> {
        kind.check(layout)?;
        match kind {
            Kind::GPipe => Ok(Self::placed(layout, gpipe_slot)),
            Kind::OneFOneB => Ok(Self::placed(layout, one_f_one_b_slot)),
            Kind::Interleaved1F1B => {
                Self::ordered(layout, (0..layout.ranks()).map(|rank| interleaved_order(layout, rank)).collect())
            }
        }
    }

    /// Rows of work and idle slots (`None`), one row per rank, as they stand if every input is made in an earlier slot than it is
    /// used in, else with every work moved to the earliest slot that its rank's order allows.
    ///
    /// # Errors
    /// See [`Schedule::ordered`]; positions count a rank's work without idle slots.
    pub fn from_rows(layout: Layout, mut rows: Vec<Vec<Option<Work>>>) -> Result<Self, ScheduleError> {
        let timed = Self::ordered(layout, rows.iter().map(|row| row.iter().flatten().copied().collect()).collect())?;
        let slots = rows.iter().map(|row| row.iter().rposition(Option::is_some).map_or(0, |last| last + 1)).max();
        rows.iter_mut().for_each(|row| row.resize(slots.unwrap_or(0), None));
        let given = Self { layout, rows };
        Ok(if given.is_timed() { given } else { timed })
    }

    /// The schedule in which each rank does its work in the order given, everything as early as can be.
    ///
    /// # Errors
    /// If work is missing, comes twice, does not exist in `layout`, or waits for work that waits for it.
    pub fn ordered(layout: Layout, orders: Vec<Vec<Work>>) -> Result<Self, ScheduleError> {
        if orders.len() != layout.ranks() {
            let (expected, found) = (format!("{} rows", layout.ranks()), orders.len().to_string());
            return Err(ScheduleError::Setting { field: "ranks", expected, found });
        }
        for (rank, order) in orders.iter().enumerate() {
            check_complete(layout, rank, order)?;
        }
        let mut schedule = Self { layout, rows: vec![Vec::new(); layout.ranks()] };
        let (mut done, mut next) = (HashSet::new(), vec![0; layout.ranks()]);
        while (0..layout.ranks()).any(|rank| next[rank] < orders[rank].len()) {
            let ready = |rank: usize| {
                orders[rank].get(next[rank]).copied().filter(|&work| missing(layout, rank, work, &done).is_none())
            };
            let slot: Vec<_> = (0..layout.ranks()).map(ready).collect();
            if slot.iter().all(Option::is_none) {
                return Err(stuck(layout, &orders, &next, &done));
            }
            for (rank, work) in slot.into_iter().enumerate() {
                schedule.rows[rank].push(work);
                next[rank] += usize::from(work.is_some());
                done.extend(work.map(|work| (rank, work)));
            }
        }
        Ok(schedule)
    }

    /// The sizes of the pipeline.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// One row per rank, all of one length: what the rank does in each slot, `None` if it is idle.
    pub fn rows(&self) -> &[Vec<Option<Work>>] {
        &self.rows
    }

    /// Every work in the slot that `slot` gives it. Rank 0 must be the last to end: it has the last backward pass.
    fn placed(layout: Layout, slot: impl Fn(Layout, usize, Work) -> usize) -> Self {
        let slots = layout.work().map(|work| slot(layout, 0, work)).max().map_or(0, |last| last + 1);
        let mut rows = vec![vec![None; slots]; layout.ranks()];
        for (rank, row) in rows.iter_mut().enumerate() {
            for work in layout.work() {
                row[slot(layout, rank, work)] = Some(work);
            }
        }
        Self { layout, rows }
    }

    fn is_timed(&self) -> bool {
        let mut done = HashSet::new();
        (0..self.rows[0].len()).all(|slot| {
            let works: Vec<_> = (0..self.rows.len()).filter_map(|rank| Some((rank, self.rows[rank][slot]?))).collect();
            let timed = works.iter().all(|&(rank, work)| missing(self.layout, rank, work, &done).is_none());
            done.extend(works);
            timed
        })
    }
}

/// What has to be done before `rank` can do `work` and is not: the stage before's output, or the forward pass that a backward
/// pass belongs to.
fn missing(layout: Layout, rank: usize, work: Work, done: &HashSet<(usize, Work)>) -> Option<(usize, Work)> {
    let own = (work.pass == Pass::Backward).then_some((rank, Work { pass: Pass::Forward, ..work }));
    own.into_iter().chain(layout.before(rank, work)).find(|input| !done.contains(input))
}

fn check_complete(layout: Layout, rank: usize, order: &[Work]) -> Result<(), ScheduleError> {
    let wrong =
        |position, expected: String, found: String| Err(ScheduleError::Order { rank, position, expected, found });
    let mut seen = HashSet::new();
    for (position, &work) in order.iter().enumerate() {
        if work.chunk >= layout.chunks() || work.micro_batch >= layout.micro_batches() {
            let expected =
                format!("a chunk below {} and a micro-batch below {}", layout.chunks(), layout.micro_batches());
            return wrong(position, expected, work.to_string());
        }
        if !seen.insert(work) {
            return wrong(position, "each work once".to_owned(), format!("{work} again"));
        }
    }
    match layout.work().find(|work| !seen.contains(work)) {
        Some(work) => wrong(order.len(), work.to_string(), "the end of the list".to_owned()),
        None => Ok(()),
    }
}

fn stuck(layout: Layout, orders: &[Vec<Work>], next: &[usize], done: &HashSet<(usize, Work)>) -> ScheduleError {
    let waits = |rank: usize| {
        let found = *orders[rank].get(next[rank])?;
        let (other, input) = missing(layout, rank, found, done)?;
        let expected = format!("{input} of rank {other} before");
        Some(ScheduleError::Order { rank, position: next[rank], expected, found: found.to_string() })
    };
    // A backward pass before its own forward pass blocks every other rank: name its rank, not the first that waits for it.
    let own = |rank: &usize| {
        let work = orders[*rank].get(next[*rank]);
        work.is_some_and(|&work| missing(layout, *rank, work, done).is_some_and(|(other, _)| other == *rank))
    };
    let rank = (0..orders.len()).find(own).or_else(|| (0..orders.len()).find(|&rank| next[rank] < orders[rank].len()));
    rank.and_then(waits).expect("a schedule is stuck only if a rank waits for an input")
}
