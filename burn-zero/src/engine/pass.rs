//! A micro-batch's way through the model, and what becomes of its gradients: they are summed for a step to come, or with the
//! last micro-batch of a step they are updated with at once.
//!
//! ```text
//!  compute     ─ backward 3 ──┬─ backward 2 ──┬─ backward 1 ──┬─ backward 0 ──┬─ …
//!  transfers, or other ranks  └ gradients 3 ──┴─ gradients 2 ─┼─ gradients 1 ─┼─ …
//!  update, there or on the host                               └─ update 3 ────┴─ update 2 ─ …
//! ```
//!
//! A bucket is due when the first of its segments has been left: it has all its gradients then, and the rest of the pass uses
//! none of its weights. What is due is waited for a segment later, the same on every rank, so that all submit the same
//! collectives in the same order.

use super::{
    Division, Engine, StepReport,
    step::{add_squares_in, only},
    update::Updates,
};
use crate::{
    Error,
    comm::{Collectives, Lane, Pending, Queue},
    ds_config::Stage,
    gather::{Gathered, Place, Store, Weights, Whole},
    norm::Exact,
    optimizer::Rates,
    partition::Layout,
    reduce::Gradients,
    segment::{self, Checkpointing, Gradient, Segments, TrainSegments, Value},
};
use burn::tensor::backend::{AutodiffBackend, Backend};
use std::collections::VecDeque;

impl<B: AutodiffBackend> Engine<B> {
    /// Adds the gradients of one micro-batch; returns the sum of this rank's loss.
    ///
    /// The loss weights in `batch` must already be divided by the number of target tokens of the whole step, of all ranks and
    /// micro-batches, so that the sum over them is the step's gradient whatever their sizes. Sums are kept in f32.
    ///
    /// In stage 3 the first call takes this rank's part of the weights and leaves shells in the model, see
    /// [`Engine::with_whole`]. What is trained must not change from then on.
    ///
    /// # Errors
    /// [`Error::Lost`] and the like if a rank is lost; gradients are incomplete then.
    pub fn accumulate<M: TrainSegments<B>>(
        &mut self,
        model: &mut M,
        batch: &<M as Segments<B>>::Batch,
    ) -> Result<f64, Error> {
        self.divide(model)?;
        let (queue, overlap) = (&self.queue, self.overlap);
        // A reduction of one rank is the identity: it may wait, unless it takes gradients off the device.
        let divided = self.sharding.stage >= Stage::Gradients;
        let early = if queue.world() > 1 { divided } else { self.desk.is_some() };
        let Division { layout, device, gradients, weights } =
            self.division.as_mut().expect("the model was divided above");
        let place = Place { layout, queue, device };
        let pass = Pass { place, weights: weights.as_mut(), how: (self.checkpointing, usize::from(overlap)) };
        let (loss, gathered) = pass.go(model, batch, &mut Sums { gradients, layout, queue, early, overlap })?;
        gradients.peak.gathered = gradients.peak.gathered.max(gathered);
        Ok(self.unscaled(loss))
    }

    /// [`Engine::accumulate`] with the last micro-batch of a step, and [`Engine::step`]: the loss, and what the step found. The
    /// parameters are those of the two calls, bit for bit.
    ///
    /// Without clipping and without a loss scaler nothing has to be known of all gradients before the first update. Then a
    /// bucket is updated as soon as the backward pass has left the first segment that uses it, and its gradients are freed:
    /// those of the whole model never exist, if this is the only micro-batch of the step or gradients are divided, and with the
    /// states off the device updates go on beside the backward pass, as in ZeRO-Offload (arXiv:2101.06840). That holds for every
    /// stage, world and optimizer. With clipping or a scaler this is the two calls.
    ///
    /// # Errors
    /// As the two. Only where updates have begun [`Error::NotFinite`] comes after the fact: model and moments have been
    /// updated with what is not finite, and training can go on from a checkpoint alone.
    pub fn accumulate_and_step<M: TrainSegments<B>>(
        &mut self,
        model: &mut M,
        batch: &<M as Segments<B>>::Batch,
        learning_rate: f64,
    ) -> Result<(f64, StepReport), Error> {
        if self.max_grad_norm.is_some() || self.scaler.is_some() {
            let loss = self.accumulate(model, batch)?;
            return Ok((loss, self.step(model, learning_rate)?));
        }
        self.divide(model)?;
        let mut division = self.division.take().expect("the model was divided above");
        let mut gradients = division.take_gradients();
        let done = self.step_early(model, batch, (&mut division, &mut gradients), learning_rate);
        division.gradients.peak = gradients.peak;
        self.division = Some(division);
        done
    }

    fn step_early<M: TrainSegments<B>>(
        &mut self,
        model: &mut M,
        batch: &<M as Segments<B>>::Batch,
        (division, gradients): (&mut Division<B>, &mut Gradients<B::InnerBackend>),
        learning_rate: f64,
    ) -> Result<(f64, StepReport), Error> {
        let (queue, overlap) = (self.queue.clone(), usize::from(self.overlap));
        let Division { layout, device, weights, .. } = division;
        let place = Place { layout, queue: &queue, device };
        let pass = Pass { place, weights: weights.as_mut(), how: (self.checkpointing, overlap) };
        let travels = queue.world() > 1 || self.desk.is_some();
        let rates = Rates { lr: learning_rate, weight_decay: self.optimizer.weight_decay(), scale: 1.0 };
        let updates = Updates::new(self, place, rates);
        let (due, sum) = (VecDeque::new(), Exact::default());
        let mut early = Early { gradients, updates, travels, due, sum };
        let (loss, gathered) = pass.go(model, batch, &mut early)?;
        let Early { gradients, sum, .. } = early;
        gradients.peak.gathered = gradients.peak.gathered.max(gathered);
        let norm = self.agree(layout, &sum, &[])?.norm;
        let report = self.end_step(norm, false)?;
        if !norm.is_finite() {
            return Err(Error::NotFinite { step: self.steps - 1, norm });
        }
        Ok((self.unscaled(loss), report))
    }

    /// The sum of a loss.
    fn unscaled(&self, loss: Value<B::InnerBackend>) -> f64 {
        let sum: f64 = loss.flatten().into_data().iter::<f64>().sum();
        sum / self.loss_scale()
    }
}

/// What becomes of a micro-batch's gradients.
trait Sink<B: Backend> {
    /// Takes the gradients of a segment that the backward pass has left.
    fn after(&mut self, store: &mut dyn Store<B>, segment: usize, found: Vec<Gradient<B>>) -> Result<(), Error>;

    /// The backward pass has ended.
    fn end(&mut self, store: &mut dyn Store<B>) -> Result<(), Error>;
}

/// One way through the model.
struct Pass<'a, B: AutodiffBackend> {
    place: Place<'a, B::InnerBackend>,
    /// Stage 3's; else they are in the model.
    weights: Option<&'a mut Weights<B::InnerBackend>>,
    /// What is kept, and for how many segments weights are gathered ahead.
    how: (Checkpointing, usize),
}

impl<B: AutodiffBackend> Pass<'_, B> {
    /// The loss, and the most bytes of gathered weights.
    fn go<M: TrainSegments<B>>(
        self,
        model: &mut M,
        batch: &<M as Segments<B>>::Batch,
        sink: &mut dyn Sink<B::InnerBackend>,
    ) -> Result<(Value<B::InnerBackend>, usize), Error> {
        let Self { place, weights, how } = self;
        match weights {
            None => {
                let mut whole = Whole::out_of(model, place);
                let loss = walk(&mut whole, (batch, how.0), place.queue, sink);
                Ok((whole.back_into(model, loss)?, 0))
            }
            Some(weights) => {
                let mut gathered = Gathered::new(model.clone(), weights, place, how);
                let loss = walk(&mut gathered, (batch, how.0), place.queue, sink)?;
                Ok((loss, gathered.peak))
            }
        }
    }
}

fn walk<B, M, S>(
    source: &mut S,
    (batch, checkpointing): (&<M as Segments<B>>::Batch, Checkpointing),
    queue: &Queue,
    sink: &mut dyn Sink<B::InnerBackend>,
) -> Result<Value<B::InnerBackend>, Error>
where
    B: AutodiffBackend,
    M: TrainSegments<B>,
    S: segment::Source<M> + Store<B::InnerBackend>,
{
    let trace = queue.trace();
    let mut after = |source: &mut S, segment, found| sink.after(source, segment, found);
    let drive = || segment::drive::<B, M, S>(source, batch, (checkpointing, trace), &mut after);
    let loss = trace.span("micro-batch", Lane::Compute, drive)?;
    sink.end(source)?;
    Ok(loss)
}

/// Gradients are added to those of the step.
struct Sums<'a, B: Backend> {
    gradients: &'a mut Gradients<B>,
    layout: &'a Layout,
    queue: &'a Queue,
    /// Whether they are reduced on the way.
    early: bool,
    overlap: bool,
}

impl<B: Backend> Sink<B> for Sums<'_, B> {
    fn after(&mut self, _: &mut dyn Store<B>, segment: usize, found: Vec<Gradient<B>>) -> Result<(), Error> {
        self.gradients.add(self.layout, found);
        if self.early {
            self.gradients.reduce_after(self.layout, segment, self.queue)?;
            if !self.overlap {
                self.gradients.settle_all(self.layout)?;
            }
        }
        Ok(())
    }

    fn end(&mut self, _: &mut dyn Store<B>) -> Result<(), Error> {
        Ok(())
    }
}

/// Gradients are updated with.
struct Early<'a, B: AutodiffBackend> {
    gradients: &'a mut Gradients<B::InnerBackend>,
    updates: Updates<'a, B>,
    /// Whether gradients go to other ranks or to the host.
    travels: bool,
    /// Buckets that have all their gradients, oldest first, and of each rank for which parameters it had one.
    due: VecDeque<(usize, Pending<Vec<Vec<u8>>>)>,
    /// Of the squares of this rank's gradients so far.
    sum: Exact,
}

impl<B: AutodiffBackend> Early<'_, B> {
    fn due(&mut self, index: usize) -> Result<(), Error> {
        let Place { layout, queue, .. } = self.updates.place;
        if self.travels {
            self.gradients.reduce(layout, index, queue)?;
        }
        let slots = layout.buckets[index].slots.iter();
        let flags: Vec<u8> = slots.map(|&(parameter, _)| u8::from(self.gradients.present()[parameter])).collect();
        self.due.push_back((index, queue.submit("share", move |group| group.share(&flags))));
        Ok(())
    }

    /// Starts updates until no more than so many buckets wait for their gradients.
    fn update(&mut self, store: &mut dyn Store<B::InnerBackend>, left: usize) -> Result<(), Error> {
        let Place { layout, device, .. } = self.updates.place;
        while self.due.len() > left {
            let Some((index, flags)) = self.due.pop_front() else { return Ok(()) };
            let device = self.updates.engine.desk.is_none().then_some(device);
            let gradients = self.gradients.take(layout, index, device)?;
            add_squares_in(&mut self.sum, &gradients);
            let flags = flags.wait()?;
            let slot = |parameter| layout.buckets[index].slots.iter().position(|&(slot, _)| slot == parameter);
            let present = |parameter| slot(parameter).is_some_and(|slot| flags.iter().any(|flags| flags[slot] != 0));
            self.updates.start(store, index, only(gradients, present))?;
            self.gradients.updating = self.updates.bytes();
        }
        Ok(())
    }
}

impl<B: AutodiffBackend> Sink<B::InnerBackend> for Early<'_, B> {
    fn after(
        &mut self,
        store: &mut dyn Store<B::InnerBackend>,
        segment: usize,
        found: Vec<Gradient<B::InnerBackend>>,
    ) -> Result<(), Error> {
        let layout = self.updates.place.layout;
        self.gradients.add(layout, found);
        let ahead = usize::from(self.travels && self.updates.engine.overlap);
        for index in layout.due_after(segment) {
            self.due(index)?;
            self.update(store, ahead)?;
        }
        Ok(())
    }

    fn end(&mut self, store: &mut dyn Store<B::InnerBackend>) -> Result<(), Error> {
        let trace = self.updates.place.queue.trace();
        trace.span("step", Lane::Compute, || {
            self.update(store, 0)?;
            self.updates.settle(store, 0)
        })
    }
}
