//! The optimizer's step, once all gradients are there.

use super::{Division, Engine, StepReport, update::Updates};
use crate::{
    Error,
    comm::{Collectives, Lane},
    gather::{Place, Store, Whole},
    held::Held,
    norm::{Exact, add_squares, add_squares_of},
    optimizer::Rates,
    partition::{Layout, Piece},
    reduce::{Gradients, Reduced},
    segment::TrainSegments,
};
use burn::tensor::backend::{AutodiffBackend, Backend};
use std::collections::HashMap;

/// What all ranks agree on about the gradients of a step.
pub(super) struct Agreed {
    pub norm: f64,
    /// Whether any rank had a gradient, by parameter.
    pub present: Vec<bool>,
}

impl<B: AutodiffBackend> Engine<B> {
    /// Clips the accumulated gradients by their global norm, as torch's `clip_grad_norm_` does, updates the parameters that
    /// have one on any rank and forgets the gradients. Parameters keep their identity; matrices decay, see
    /// [`crate::optimizer::no_decay`]. The norm is that of all ranks together, and it does not depend on their number.
    ///
    /// Weights in half precision are updated through copies in f32 that this rank keeps of its pieces (masters).
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the norm is, on any rank: model, moments and step count are as before, the gradients are gone. With
    /// a loss scaler that is a step that all ranks skip instead, or [`Error::LossScale`].
    /// [`Error::Lost`] and the like if a rank is lost: the model is incomplete then.
    pub fn step<M: TrainSegments<B>>(&mut self, model: &mut M, learning_rate: f64) -> Result<StepReport, Error> {
        self.divide(model)?;
        let mut division = self.division.take().expect("the model was divided above");
        let gradients = division.take_gradients();
        let trace = self.queue.trace().clone();
        let update = || self.step_at_once(model, &mut division, gradients, learning_rate);
        let report = trace.span("step", Lane::Compute, update);
        self.division = Some(division);
        report
    }

    fn step_at_once<M: TrainSegments<B>>(
        &mut self,
        model: &mut M,
        division: &mut Division<B>,
        gradients: Gradients<B::InnerBackend>,
        learning_rate: f64,
    ) -> Result<StepReport, Error> {
        let mine = gradients.present().to_vec();
        let place = (self.sharding.stage, self.queue.as_ref());
        // Where states are on the host gradients stay there.
        let device = self.desk.is_none().then_some(&division.device);
        let reduced = gradients.finish(&division.layout, place, device)?;
        let mut sum = Exact::default();
        reduced.values().for_each(|gradients| add_squares_in(&mut sum, gradients));
        let Agreed { norm, present } = self.agree(&division.layout, &sum, &mine)?;
        let (norm, unscale) = (norm / self.loss_scale(), 1.0 / self.loss_scale());
        let finite = norm.is_finite();
        if let Some(scaler) = &mut self.scaler {
            scaler.update(!finite)?;
        } else if !finite {
            return Err(Error::NotFinite { step: self.steps, norm });
        }
        if !finite {
            return Ok(StepReport { grad_norm: norm, clipped: false, skipped: true });
        }
        let clip = self.max_grad_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        let rates = Rates { lr: learning_rate, weight_decay: self.optimizer.weight_decay(), scale: clip * unscale };
        let queue = self.queue.clone();
        let Division { layout, device, weights, .. } = division;
        let place = Place { layout, queue: &queue, device };
        let updates = Updates::new(self, place, rates);
        match weights {
            Some(weights) => updates.all(&mut weights.stored(place), (reduced, &present))?,
            None => {
                let mut whole = Whole::out_of(model, place);
                let done = updates.all(&mut whole, (reduced, &present));
                whole.back_into(model, done)?;
            }
        }
        self.end_step(norm, clip < 1.0)
    }

    /// Counts a step whose updates have been made.
    pub(super) fn end_step(&mut self, grad_norm: f64, clipped: bool) -> Result<StepReport, Error> {
        self.desk.as_ref().map_or(Ok(()), |desk| desk.states().settle())?;
        self.steps += 1;
        Ok(StepReport { grad_norm, clipped, skipped: false })
    }

    /// The norm over all parts from the sum of this rank's squares, and who had a gradient anywhere. Where there is one part
    /// all ranks have the same.
    pub(super) fn agree(&self, layout: &Layout, sum: &Exact, present: &[bool]) -> Result<Agreed, Error> {
        let mut note = sum.to_bytes();
        note.extend(present.iter().map(|&present| u8::from(present)));
        let notes = self.queue.submit("share", move |group| group.share(&note)).wait()?;
        let (mut total, mut any) = (Exact::default(), vec![false; present.len()]);
        for (rank, note) in notes.iter().enumerate() {
            let (part, flags) = Exact::from_bytes(note);
            if rank < layout.parts {
                total.merge(part);
            }
            any.iter_mut().zip(flags).for_each(|(any, &flag)| *any |= flag != 0);
        }
        Ok(Agreed { norm: total.value().sqrt(), present: any })
    }
}

/// Adds the squares of a bucket's gradients.
pub(super) fn add_squares_in<B: Backend>(sum: &mut Exact, gradients: &Reduced<B>) {
    for held in gradients.iter().filter_map(|(_, held)| held.as_ref()) {
        match held {
            Held::Device(value) => add_squares(sum, value),
            Held::Host(values) => add_squares_of(sum, values),
        }
    }
}

/// What is left of a bucket's gradients where only those count that any rank had.
pub(super) fn only<B: Backend>(gradients: Reduced<B>, present: impl Fn(usize) -> bool) -> Reduced<B> {
    let filter = |(piece, held): (Piece, Option<Held<B>>)| {
        let held = held.filter(|_| present(piece.parameter));
        (piece, held)
    };
    gradients.into_iter().map(filter).collect()
}

impl<B: AutodiffBackend> Updates<'_, B> {
    /// Updates everything that is trained.
    fn all(
        mut self,
        store: &mut dyn Store<B::InnerBackend>,
        (mut reduced, present): (HashMap<usize, Reduced<B::InnerBackend>>, &[bool]),
    ) -> Result<(), Error> {
        for (index, _) in self.place.layout.trained() {
            let gradients = reduced.remove(&index).unwrap_or_default();
            self.start(store, index, only(gradients, |parameter| present[parameter]))?;
        }
        self.settle(store, 0)
    }
}
