//! A pipeline schedule: the action of every rank in every slot.

use super::order::{breadth_first_order, interleaved_order, one_f_one_b_slot, zb_h1_order, zbv_order};
use super::{Action, PipelineError, PipelineKind, PipelineShape, RankAction};
use std::collections::HashSet;

/// A pipeline schedule: the action of each rank in each slot, where all slots have equal length. It is complete and
/// ordered by construction: every rank runs each of its actions once, and every input is produced in an earlier slot
/// than the one that uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipelineSchedule {
    shape: PipelineShape,
    rows: Vec<Vec<Option<Action>>>,
}

impl PipelineSchedule {
    /// Returns the schedule `kind` for a pipeline of this shape.
    ///
    /// # Errors
    /// If `kind` does not exist for this shape, see [`PipelineKind::check`].
    pub fn new(kind: PipelineKind, shape: PipelineShape) -> Result<Self, PipelineError> {
        kind.check(shape)?;
        let order: fn(PipelineShape, usize) -> Vec<Action> = match kind {
            PipelineKind::OneFOneB => return Ok(Self::from_slots(shape, one_f_one_b_slot)),
            PipelineKind::GPipe | PipelineKind::LoopedBFS => |shape, _| breadth_first_order(shape),
            PipelineKind::Interleaved1F1B => interleaved_order,
            PipelineKind::ZBH1 => zb_h1_order,
            PipelineKind::ZBV => zbv_order,
        };
        Self::from_orders(shape, (0..shape.ranks()).map(|rank| order(shape, rank)).collect())
    }

    /// Creates a schedule from rows of actions and idle slots (`None`), one row per rank. The rows are kept as they are
    /// if every input is produced in an earlier slot than the one that uses it; otherwise every action moves to the
    /// earliest slot that the order of its rank allows.
    ///
    /// # Errors
    /// As [`PipelineSchedule::from_orders`]; positions count the actions of a rank without idle slots.
    pub(super) fn from_rows(shape: PipelineShape, mut rows: Vec<Vec<Option<Action>>>) -> Result<Self, PipelineError> {
        let timed = Self::from_orders(shape, rows.iter().map(|row| row.iter().flatten().copied().collect()).collect())?;
        let slots = rows.iter().map(|row| row.iter().rposition(Option::is_some).map_or(0, |last| last + 1)).max();
        rows.iter_mut().for_each(|row| row.resize(slots.unwrap_or(0), None));
        let given = Self { shape, rows };
        Ok(if given.respects_dependencies() { given } else { timed })
    }

    /// Creates the schedule in which each rank runs its actions in the given order, each as early as possible.
    ///
    /// # Errors
    /// If an action is missing, appears twice, does not exist in this shape, or is part of a cycle of dependencies.
    fn from_orders(shape: PipelineShape, orders: Vec<Vec<Action>>) -> Result<Self, PipelineError> {
        if orders.len() != shape.ranks() {
            let (expected, found) = (format!("{} rows", shape.ranks()), orders.len().to_string());
            return Err(PipelineError::Setting { field: "ranks", expected, found });
        }
        for (rank, order) in orders.iter().enumerate() {
            check_complete(shape, rank, order)?;
        }
        let mut schedule = Self { shape, rows: vec![Vec::new(); shape.ranks()] };
        let (mut done, mut next) = (HashSet::new(), vec![0; shape.ranks()]);
        while (0..shape.ranks()).any(|rank| next[rank] < orders[rank].len()) {
            let ready = |rank: usize| {
                let next = orders[rank].get(next[rank]).copied();
                next.filter(|&action| missing_input(shape, RankAction { rank, action }, &done).is_none())
            };
            let slot: Vec<_> = (0..shape.ranks()).map(ready).collect();
            if slot.iter().all(Option::is_none) {
                return Err(deadlock_error(shape, &orders, &next, &done));
            }
            for (rank, action) in slot.into_iter().enumerate() {
                schedule.rows[rank].push(action);
                next[rank] += usize::from(action.is_some());
                done.extend(action.map(|action| RankAction { rank, action }.message_key()));
            }
        }
        Ok(schedule)
    }

    /// Returns the shape of the pipeline.
    pub fn shape(&self) -> PipelineShape {
        self.shape
    }

    /// Returns one row per rank, all of the same length: the action in each slot, `None` if the rank is idle.
    pub fn rows(&self) -> &[Vec<Option<Action>>] {
        &self.rows
    }

    /// Puts every action into the slot that `slot` returns. Rank 0 must end last: it has the last backward pass.
    fn from_slots(shape: PipelineShape, slot: impl Fn(PipelineShape, usize, Action) -> usize) -> Self {
        let slots = shape.actions([]).map(|action| slot(shape, 0, action)).max().map_or(0, |last| last + 1);
        let mut rows = vec![vec![None; slots]; shape.ranks()];
        for (rank, row) in rows.iter_mut().enumerate() {
            for action in shape.actions([]) {
                row[slot(shape, rank, action)] = Some(action);
            }
        }
        Self { shape, rows }
    }

    fn respects_dependencies(&self) -> bool {
        let mut done = HashSet::new();
        (0..self.rows[0].len()).all(|slot| {
            let action = |rank: usize| Some(RankAction { rank, action: self.rows[rank][slot]? });
            let actions: Vec<_> = (0..self.rows.len()).filter_map(action).collect();
            let timed = actions.iter().all(|&action| missing_input(self.shape, action, &done).is_none());
            done.extend(actions.into_iter().map(RankAction::message_key));
            timed
        })
    }
}

/// Returns a dependency of an action whose [`RankAction::message_key`] is not in `done`: the action that produces its
/// input, or the action of its own rank that must come before it.
fn missing_input(shape: PipelineShape, of: RankAction, done: &HashSet<RankAction>) -> Option<RankAction> {
    let RankAction { rank, action } = of;
    let own = action.prerequisite().map(|action| RankAction { rank, action });
    own.into_iter().chain(shape.producer(rank, action)).find(|input| !done.contains(&input.message_key()))
}

fn check_complete(shape: PipelineShape, rank: usize, order: &[Action]) -> Result<(), PipelineError> {
    let wrong =
        |position, expected: String, found: String| Err(PipelineError::Order { rank, position, expected, found });
    let mut seen = HashSet::new();
    for (position, &action) in order.iter().enumerate() {
        if action.chunk >= shape.chunks() || action.micro_batch >= shape.micro_batches() {
            let expected =
                format!("a chunk below {} and a micro-batch below {}", shape.chunks(), shape.micro_batches());
            return wrong(position, expected, action.to_string());
        }
        if !seen.insert(action) {
            return wrong(position, "each action once".to_owned(), format!("{action} again"));
        }
        let whole_or_half = [Action::backward, Action::backward_input].map(|of| of(action.chunk, action.micro_batch));
        if whole_or_half.iter().all(|backward| seen.contains(backward)) {
            return wrong(position, "a backward pass in one or in two halves".to_owned(), format!("{action} too"));
        }
    }
    match shape.actions(order.iter().copied()).find(|action| !seen.contains(action)) {
        Some(action) => wrong(order.len(), action.to_string(), "the end of the list".to_owned()),
        None => Ok(()),
    }
}

fn deadlock_error(
    shape: PipelineShape,
    orders: &[Vec<Action>],
    next: &[usize],
    done: &HashSet<RankAction>,
) -> PipelineError {
    let waits = |rank: usize| {
        let found = *orders[rank].get(next[rank])?;
        let input = missing_input(shape, RankAction { rank, action: found }, done)?;
        let expected = format!("{} of rank {} before", input.action, input.rank);
        Some(PipelineError::Order { rank, position: next[rank], expected, found: found.to_string() })
    };
    // A backward pass before its own forward pass blocks all other ranks: report its rank, not the first that waits for
    // it.
    let own = |rank: &usize| {
        let rank = *rank;
        let action = orders[rank].get(next[rank]).map(|&action| RankAction { rank, action });
        action.and_then(|action| missing_input(shape, action, done)).is_some_and(|input| input.rank == rank)
    };
    let rank = (0..orders.len()).find(own).or_else(|| (0..orders.len()).find(|&rank| next[rank] < orders[rank].len()));
    rank.and_then(waits).expect("a schedule is stuck only if a rank waits for an input")
}
