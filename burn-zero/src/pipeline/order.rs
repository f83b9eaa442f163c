//! The slot or the order that each schedule gives to the actions of a rank.

use super::{Action, ComputationType, PipelineShape};

/// Returns the slot of an action in 1F1B. The two formulas are DeepSpeed's four, by parity of slot and stage, solved
/// for the slot. A message is used in the slot after the one that produced it, so none has to be stored.
pub(super) fn one_f_one_b_slot(shape: PipelineShape, rank: usize, action: Action) -> usize {
    let place = if action.computation == ComputationType::Forward { rank } else { 2 * shape.ranks() - 1 - rank };
    2 * action.micro_batch + place
}

/// Returns the order of a rank's actions in looped BFS, and with one chunk in GPipe: the forward passes of all
/// micro-batches through one chunk after the other, then the backward passes from the last chunk to the first.
pub(super) fn breadth_first_order(shape: PipelineShape) -> Vec<Action> {
    let all = |chunk, pass: fn(usize, usize) -> Action| (0..shape.micro_batches()).map(move |m| pass(chunk, m));
    let forward = (0..shape.chunks()).flat_map(|chunk| all(chunk, Action::forward));
    forward.chain((0..shape.chunks()).rev().flat_map(|chunk| all(chunk, Action::backward))).collect()
}

/// Returns the order of a rank's actions in interleaved 1F1B: a warm-up of forward passes, then forward and backward
/// passes in alternation, then a cool-down of backward passes.
pub(super) fn interleaved_order(shape: PipelineShape, rank: usize) -> Vec<Action> {
    let all = shape.chunks() * shape.micro_batches();
    let warm_up = warmup_passes(shape, rank).min(all);
    let mut order: Vec<_> = (0..warm_up).map(|k| nth_action(shape, ComputationType::Forward, k)).collect();
    for k in warm_up..all {
        order.extend([
            nth_action(shape, ComputationType::Forward, k),
            nth_action(shape, ComputationType::Backward, k - warm_up),
        ]);
    }
    order.extend((all - warm_up..all).map(|k| nth_action(shape, ComputationType::Backward, k)));
    order
}

/// Returns the number of warm-up forward passes, those before the first pair of a forward and a backward pass. With one
/// chunk the schedule is 1F1B.
fn warmup_passes(shape: PipelineShape, rank: usize) -> usize {
    let behind = shape.ranks() - 1 - rank;
    if shape.chunks() == 1 { behind } else { 2 * behind + (shape.chunks() - 1) * shape.ranks() }
}

/// Returns the `k`-th forward or backward pass of a rank: as many micro-batches as there are ranks form a group, which
/// passes one chunk after the other.
fn nth_action(shape: PipelineShape, computation: ComputationType, k: usize) -> Action {
    let (ranks, chunks) = (shape.ranks(), shape.chunks());
    let (group, within) = (k / (ranks * chunks), k % (ranks * chunks));
    let turn = within / ranks;
    let chunk = if computation == ComputationType::Forward { turn } else { chunks - 1 - turn };
    Action { computation, chunk, micro_batch: group * ranks + within % ranks }
}

/// Returns the order of a rank's actions in ZB-H1: that of 1F1B with `BackwardInput` for `Backward`. On rank `r` the
/// weight gradients of micro-batch `k` follow the input gradients of `k + r`, so every rank puts off as much as fills
/// its idle time at the end.
pub(super) fn zb_h1_order(shape: PipelineShape, rank: usize) -> Vec<Action> {
    let mut order = Vec::new();
    for action in interleaved_order(shape, rank) {
        if action.computation == ComputationType::Forward {
            order.push(action);
            continue;
        }
        order.push(Action::backward_input(action.chunk, action.micro_batch));
        order.extend(action.micro_batch.checked_sub(rank).map(|m| Action::backward_weight(action.chunk, m)));
    }
    let put_off = shape.micro_batches().saturating_sub(rank)..shape.micro_batches();
    order.extend(put_off.map(|m| Action::backward_weight(0, m)));
    order
}

/// Returns the order of a rank's actions in ZBV. As in PyTorch, it is made for at least `2 · ranks - 1` micro-batches;
/// those that do not exist are left out.
pub(super) fn zbv_order(shape: PipelineShape, rank: usize) -> Vec<Action> {
    use ComputationType::{BackwardInput as I, BackwardWeight as W, Forward as F};
    let (ranks, micro_batches) = (shape.ranks(), shape.micro_batches());
    let behind = ranks - rank;
    let mut order = AscendingOrder::default();
    order.repeat(2 * behind - 1, &[(F, 0)]);
    order.repeat(rank, &[(F, 1), (F, 0)]);
    order.repeat(behind, &[(F, 1), (I, 1), (W, 1)]);
    // Every turn from here on has one backward pass of each chunk, and a forward pass as long as there are any.
    let all = micro_batches.max(2 * ranks - 1);
    order.repeat(all - order.count(F, 0), &[(F, 0), (I, 0), (W, 0), (F, 1), (I, 1), (W, 1)]);
    order.repeat(all - order.count(F, 1), &[(I, 0), (W, 0), (F, 1), (I, 1), (W, 1)]);
    order.repeat(rank, &[(I, 0), (I, 1)]);
    order.repeat(behind, &[(I, 0), (W, 0)]);
    order.repeat(order.count(I, 1) - order.count(W, 1), &[(W, 1)]);
    order.repeat(order.count(I, 0) - order.count(W, 0), &[(W, 0)]);
    order.actions.retain(|action| action.micro_batch < micro_batches);
    order.actions
}

/// An order in which the passes of each computation and chunk have ascending micro-batches.
#[derive(Default)]
struct AscendingOrder {
    actions: Vec<Action>,
}

impl AscendingOrder {
    /// Adds `passes`, each of the next micro-batch, `times` times.
    fn repeat(&mut self, times: usize, passes: &[(ComputationType, usize)]) {
        for _ in 0..times {
            for &(computation, chunk) in passes {
                let micro_batch = self.count(computation, chunk);
                self.actions.push(Action { computation, chunk, micro_batch });
            }
        }
    }

    /// Returns the number of passes of a computation through a chunk so far.
    fn count(&self, computation: ComputationType, chunk: usize) -> usize {
        let same = |action: &&Action| (action.computation, action.chunk) == (computation, chunk);
        self.actions.iter().filter(same).count()
    }
}
