//! Executes the program of one rank of a pipeline.
//!
//! Any valid program runs, whatever its order, as long as its sends are buffered. One rank is the pipeline of one stage:
//! F0 B0 F1 B1 …, without messages. Gradients reach the hook in the order of the backward passes, so a program whose
//! backward passes come in ascending micro-batches gives, bit for bit, the gradients of one process that accumulates the
//! same micro-batches.

use super::{
    Action, ComputationType, Instruction, PipelineShape, Program,
    p2p::{P2p, P2pReceive, P2pValue},
};
use crate::{
    Error,
    comm::{AsyncCommunicator, Trace},
    segment::{
        AfterBackward, BackwardEnd, BackwardStart, Driver, DynTensor, ForwardEnd, Gradient, PendingGradient,
        PostBackwardHook, Saved, SegmentPass, Segments, TrainSegments, WeightProvider,
    },
};
use burn::tensor::{
    Device,
    backend::{AutodiffBackend, Backend},
};
use std::{collections::HashMap, ops::Range};

/// The stages of a pipeline as one rank sees them.
#[derive(Clone, Copy)]
pub(crate) struct StageView<'a> {
    pub shape: PipelineShape,
    /// This rank's number.
    pub rank: usize,
    /// The segments of every stage.
    pub segments: &'a [Range<usize>],
}

impl StageView<'_> {
    fn stage(&self, action: Action) -> usize {
        self.shape.stage_index(self.rank, action.chunk)
    }

    /// Returns the segments that the action runs.
    fn segments(&self, action: Action) -> Range<usize> {
        self.segments[self.stage(action)].clone()
    }

    fn is_last(&self, action: Action) -> bool {
        self.stage(action) + 1 == self.segments.len()
    }
}

impl Program {
    /// Returns the program without backward passes and closing instructions.
    pub(crate) fn forward_only(mut self) -> Self {
        self.ranks.iter_mut().for_each(|list| list.retain(|instruction| instruction.action().is_some_and(is_forward)));
        self
    }
}

/// The values that enter and leave the passes of a rank.
struct Mailbox<'a, B: Backend> {
    p2p: P2p<'a>,
    device: &'a Device<B>,
    /// The messages that are being received, by the action that takes them.
    receives: HashMap<Action, P2pReceive>,
    /// The values that this rank produced for itself, by the action that takes them.
    local: HashMap<Action, Vec<P2pValue<B>>>,
    /// The values to be sent, by the action that produced them.
    outgoing: HashMap<Action, Vec<P2pValue<B>>>,
}

impl<B: Backend> Mailbox<'_, B> {
    /// Waits for the values that an action takes.
    fn take(&mut self, action: Action) -> Result<Vec<P2pValue<B>>, Error> {
        let key = action.message_key();
        match self.receives.remove(&key) {
            Some(receive) => receive.wait(self.device),
            None => Ok(self.local.remove(&key).expect("a valid program produces a value before it is used")),
        }
    }

    /// Keeps the output of an action for the rank that takes it.
    fn put(&mut self, stages: &StageView, action: Action, values: Vec<P2pValue<B>>) {
        match stages.shape.consumer(stages.rank, action) {
            Some(consumer) if consumer.rank == stages.rank => {
                self.local.insert(consumer.action.message_key(), values);
            }
            _ => {
                self.outgoing.insert(action.message_key(), values);
            }
        }
    }

    fn send(&mut self, action: Action, to: usize) -> Result<(), Error> {
        let values = self.outgoing.remove(&action.message_key());
        self.p2p.send(to, values.expect("a valid program produces a value before it is sent"))
    }
}

/// The outcome of a program.
pub(crate) struct Executed<B: Backend> {
    /// The loss of each micro-batch; empty on a rank without the last stage.
    pub losses: Vec<DynTensor<B>>,
    /// The largest number of bytes that were kept at a time for gradients of weights that had been put off.
    pub deferred_bytes: usize,
}

impl<B: Backend> Executed<B> {
    /// Returns the sum of the losses.
    pub(crate) fn sum(self) -> f64 {
        let sum = |loss: DynTensor<B>| loss.flatten().into_data().iter::<f64>().sum::<f64>();
        self.losses.into_iter().map(sum).sum()
    }
}

/// Runs the instructions of one rank.
pub(crate) struct Executor<'a, B: AutodiffBackend, M: TrainSegments<B>> {
    driver: Driver<'a>,
    stages: StageView<'a>,
    micro_batches: &'a [<M as Segments<B>>::Batch],
    mailbox: Mailbox<'a, B::InnerBackend>,
    /// The data that forward passes have saved, by forward pass.
    saved: HashMap<Action, Saved<B>>,
    /// The gradients that have been put off, by forward pass.
    pending: HashMap<Action, Vec<PendingGradient<B>>>,
    pending_bytes: usize,
    executed: Executed<B::InnerBackend>,
}

impl<'a, B: AutodiffBackend, M: TrainSegments<B>> Executor<'a, B, M> {
    pub(crate) fn new(
        driver: Driver<'a>,
        stages: StageView<'a>,
        micro_batches: &'a [<M as Segments<B>>::Batch],
        communicator: &'a AsyncCommunicator,
        device: &'a Device<B::InnerBackend>,
    ) -> Self {
        let p2p = P2p::new(communicator);
        let (receives, local, outgoing) = Default::default();
        let mailbox = Mailbox { p2p, device, receives, local, outgoing };
        let (saved, pending) = (HashMap::new(), HashMap::new());
        let executed = Executed { losses: Vec::new(), deferred_bytes: 0 };
        Self { driver, stages, micro_batches, mailbox, saved, pending, pending_bytes: 0, executed }
    }

    /// Runs the passes and messages of a valid program; the closing instructions are the caller's. All receives start
    /// first, so that a message is taken as soon as it arrives.
    ///
    /// # Errors
    /// Returns a communication error if a rank is lost, and the errors of `source` and `hook`.
    pub(crate) fn run<S: WeightProvider<M>>(
        mut self,
        program: &[Instruction],
        source: &mut S,
        hook: &mut PostBackwardHook<B, S>,
    ) -> Result<Executed<B::InnerBackend>, Error> {
        let forward_only = program.iter().filter_map(|instruction| instruction.action()).all(is_forward);
        for &instruction in program {
            if let Instruction::Recv { action, from } = instruction
                && self.travels(action, self.stages.segments(action).end)
            {
                self.mailbox.receives.insert(action.message_key(), self.mailbox.p2p.recv(from)?);
            }
        }
        for &instruction in program {
            match instruction {
                Instruction::Compute(action) => match action.computation {
                    ComputationType::Forward => self.forward(action, source, forward_only)?,
                    ComputationType::BackwardWeight => self.backward_weight(action, source, hook)?,
                    ComputationType::Backward | ComputationType::BackwardInput => {
                        self.backward(action, source, hook)?;
                    }
                },
                Instruction::Send { action, to } if self.travels(action, self.stages.segments(action).start) => {
                    self.mailbox.send(action, to)?;
                }
                _ => {}
            }
        }
        self.mailbox.p2p.finish()?;
        Ok(self.executed)
    }

    /// Returns false for gradients that would cross to segments before `boundary`, of which none learns. Both ranks know
    /// that.
    fn travels(&self, action: Action, boundary: usize) -> bool {
        is_forward(action) || self.driver.plan.first_trainable < boundary
    }

    fn pass(&self, action: Action) -> SegmentPass<'a, <M as Segments<B>>::Batch> {
        let Action { micro_batch, .. } = action;
        SegmentPass { batch: &self.micro_batches[micro_batch], micro_batch, segments: self.stages.segments(action) }
    }

    fn forward<S: WeightProvider<M>>(
        &mut self,
        action: Action,
        source: &mut S,
        forward_only: bool,
    ) -> Result<(), Error> {
        let pass = self.pass(action);
        let inputs = if self.stages.stage(action) == 0 { Vec::new() } else { self.mailbox.take(action)? };
        let inputs = inputs.into_iter().filter_map(|value| value.tensor).collect();
        let run = || self.driver.forward::<B, M, S>(source, &pass, inputs);
        let ForwardEnd { outputs, saved } = span(self.driver.trace, action, run)?;
        if forward_only {
            source.finish_pass(pass.id());
        } else {
            self.saved.insert(action, saved);
        }
        if self.stages.is_last(action) {
            self.executed.losses.extend(outputs.into_iter().next());
            return Ok(());
        }
        let requires_grad = !forward_only && self.driver.plan.first_trainable < pass.segments.end;
        let value = |tensor| P2pValue { tensor: Some(tensor), requires_grad };
        self.mailbox.put(&self.stages, action, outputs.into_iter().map(value).collect());
        Ok(())
    }

    fn backward<S: WeightProvider<M>>(
        &mut self,
        action: Action,
        source: &mut S,
        hook: &mut PostBackwardHook<B, S>,
    ) -> Result<(), Error> {
        let (pass, key) = (self.pass(action), Action::forward(action.chunk, action.micro_batch));
        let upstream = if self.stages.is_last(action) {
            None
        } else if self.travels(action, pass.segments.end) {
            Some(self.mailbox.take(action)?.into_iter().map(|value| value.tensor).collect())
        } else {
            Some(Vec::new())
        };
        let saved = self.saved.remove(&key).expect("a valid program runs the forward pass first");
        let start = BackwardStart { saved, upstream, defer: action.computation == ComputationType::BackwardInput };
        let run = || self.driver.backward::<B, M, S>(source, &pass, start, hook);
        let BackwardEnd { inputs, pending } = span(self.driver.trace, action, run)?;
        self.pending_bytes += pending.iter().map(|gradient| gradient.deferred.bytes).sum::<usize>();
        self.executed.deferred_bytes = self.executed.deferred_bytes.max(self.pending_bytes);
        self.pending.insert(key, pending);
        if self.travels(action, pass.segments.start) && pass.segments.start > 0 {
            let value = |tensor| P2pValue { tensor, requires_grad: false };
            self.mailbox.put(&self.stages, action, inputs.into_iter().map(value).collect());
        }
        Ok(())
    }

    /// Computes the gradients that have been put off, segment by segment.
    fn backward_weight<S: WeightProvider<M>>(
        &mut self,
        action: Action,
        source: &mut S,
        hook: &mut PostBackwardHook<B, S>,
    ) -> Result<(), Error> {
        let Action { micro_batch, chunk, .. } = action;
        let mut pending = self.pending.remove(&Action::forward(chunk, micro_batch)).unwrap_or_default();
        self.pending_bytes -= pending.iter().map(|gradient| gradient.deferred.bytes).sum::<usize>();
        let segments = self.stages.segments(action).rev();
        let mut segments = segments.take_while(|&segment| segment >= self.driver.plan.first_trainable);
        span(self.driver.trace, action, || {
            segments.try_for_each(|segment| {
                let mut found: Vec<Gradient<B::InnerBackend>> = Vec::new();
                for gradient in pending.extract_if(.., |gradient| gradient.segment == segment) {
                    let gradient = gradient.compute();
                    match found.pop_if(|last| last.id == gradient.id) {
                        Some(last) => found.push(Gradient { value: last.value.add(gradient.value), ..gradient }),
                        None => found.push(gradient),
                    }
                }
                hook(source, AfterBackward { segment, micro_batch, complete: true }, found)
            })
        })
    }
}

fn is_forward(action: Action) -> bool {
    action.computation == ComputationType::Forward
}

/// Records a pass in the trace, as torch names it.
fn span<R>(trace: &Trace, action: Action, work: impl FnOnce() -> R) -> R {
    let letter = match action.computation {
        ComputationType::Forward => "F",
        ComputationType::Backward => "B",
        ComputationType::BackwardInput => "I",
        ComputationType::BackwardWeight => "W",
    };
    trace.pass_span(letter, action.micro_batch, action.chunk, work)
}
