//! The optimizer's step.

use super::{Division, Engine, StepReport};
use crate::{
    Error, bucket,
    comm::Collectives,
    gather::{self, Gathering, Put, Take},
    norm::{Exact, add_squares},
    optimizer::Group,
    partition::{Layout, Piece},
    reduce::{Gradients, Reduced},
    segment::{TrainSegments, Value},
};
use burn::{module::ParamId, tensor::backend::AutodiffBackend};
use std::collections::{HashMap, VecDeque};

/// Buckets of new weights that may be under way at a time.
const WINDOW: usize = 2;

/// What all ranks agree on about the gradients of a step.
struct Agreed {
    norm: f64,
    /// Whether any rank had a gradient, by parameter.
    present: Vec<bool>,
}

/// What an update needs besides the values.
struct Rates {
    learning_rate: f64,
    /// What gradients are multiplied by, if below 1.
    scale: f64,
}

impl<B: AutodiffBackend> Engine<B> {
    /// Clips the accumulated gradients by their global norm, as torch's `clip_grad_norm_` does, updates the parameters that
    /// have one on any rank and forgets the gradients. Parameters keep their identity; matrices decay, see
    /// [`crate::optimizer::no_decay`]. The norm is that of all ranks together, and it does not depend on their number.
    ///
    /// # Errors
    /// [`Error::NotFinite`] if the norm is: model, moments and step count are as before, the gradients are gone.
    /// [`Error::Lost`] and the like if a rank is lost: the model is incomplete then.
    pub fn step<M: TrainSegments<B>>(&mut self, model: &mut M, learning_rate: f64) -> Result<StepReport, Error> {
        self.divide(model);
        let mut division = self.division.take().expect("the model was divided above");
        let mut fresh = Gradients::new(&division.layout);
        fresh.peak = division.gradients.peak;
        let gradients = std::mem::replace(&mut division.gradients, fresh);
        let report = self.update(model, &mut division, gradients, learning_rate);
        self.division = Some(division);
        report
    }

    fn update<M: TrainSegments<B>>(
        &mut self,
        model: &mut M,
        division: &mut Division<B>,
        gradients: Gradients<B::InnerBackend>,
        learning_rate: f64,
    ) -> Result<StepReport, Error> {
        let mine = gradients.present().to_vec();
        let place = (self.sharding.stage, &self.queue);
        let mut reduced = gradients.finish(&division.layout, place, &division.device)?;
        let Agreed { norm, present } = self.agree(&division.layout, &reduced, &mine)?;
        if !norm.is_finite() {
            return Err(Error::NotFinite { step: self.steps, norm });
        }
        let scale = self.max_grad_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        let rates = Rates { learning_rate, scale };
        match division.weights.take() {
            Some(mut weights) => {
                for (index, _) in division.layout.trained() {
                    let old = weights.pieces.remove(&index).unwrap_or_default();
                    let gradients = reduced.remove(&index).unwrap_or_default();
                    let new = self.update_pieces(&division.layout, (old, gradients), &present, &rates);
                    weights.pieces.insert(index, new);
                }
                division.weights = Some(weights);
            }
            None => self.update_model(model, division, reduced, (&present, &rates))?,
        }
        self.steps += 1;
        Ok(StepReport { grad_norm: norm, clipped: scale < 1.0 })
    }

    /// The norm over all parts, and who had a gradient anywhere. Where there is one part all ranks have the same.
    fn agree(
        &self,
        layout: &Layout,
        reduced: &HashMap<usize, Reduced<B::InnerBackend>>,
        present: &[bool],
    ) -> Result<Agreed, Error> {
        let mut sum = Exact::default();
        let values = reduced.values().flatten().filter_map(|(_, value)| value.as_ref());
        values.for_each(|value| add_squares(&mut sum, value));
        let mut note = sum.to_bytes();
        note.extend(present.iter().map(|&present| u8::from(present)));
        let notes = self.queue.submit(move |group| group.share(&note)).wait()?;
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

    /// Updates a model that has its weights: this rank's part of every bucket, the others' gathered.
    fn update_model<M: TrainSegments<B>>(
        &mut self,
        model: &mut M,
        division: &Division<B>,
        mut reduced: HashMap<usize, Reduced<B::InnerBackend>>,
        (present, rates): (&[bool], &Rates),
    ) -> Result<(), Error> {
        let Division { layout, device, .. } = division;
        // A tensor is updated in place only if no one else holds it: the weights are taken out of the model.
        let which = |id: ParamId| layout.parameters[layout.index[&id]].trainable;
        let mut take = Take { layout, which, values: HashMap::new() };
        let shell = model.clone().map(&mut take);
        *model = shell;
        let (mut old, mut new) = (take.values, HashMap::new());
        let mut coming: VecDeque<(usize, Gathering<B::InnerBackend>)> = VecDeque::new();
        let mut receive = |coming: &mut VecDeque<(usize, Gathering<_>)>| -> Result<(), Error> {
            let Some((index, gathering)) = coming.pop_front() else { return Ok(()) };
            let whole = gathering.wait(layout, &layout.buckets[index], device)?;
            new.extend(whole.into_iter().map(|(parameter, value)| (layout.parameters[parameter].id, value)));
            Ok(())
        };
        for (index, bucket) in layout.trained() {
            let pieces = layout.pieces(bucket).into_iter().map(|piece| {
                let value = old.remove(&piece.parameter).expect("the model has every parameter of the layout");
                let value = bucket::cut(value, &piece, false, device);
                (piece, value)
            });
            let (pieces, gradients) = (pieces.collect(), reduced.remove(&index).unwrap_or_default());
            bucket.slots.iter().for_each(|(parameter, _)| drop(old.remove(parameter)));
            let pieces = self.update_pieces(layout, (pieces, gradients), present, rates);
            coming.push_back((index, gather::start(layout, bucket, pieces, &self.queue)));
            if coming.len() > WINDOW {
                receive(&mut coming)?;
            }
        }
        while !coming.is_empty() {
            receive(&mut coming)?;
        }
        *model = model.clone().map(&mut Put { values: new });
        Ok(())
    }

    /// Updates this rank's pieces of a bucket.
    fn update_pieces(
        &mut self,
        layout: &Layout,
        (pieces, gradients): (Pieces<B::InnerBackend>, Reduced<B::InnerBackend>),
        present: &[bool],
        rates: &Rates,
    ) -> Pieces<B::InnerBackend> {
        let update = |((piece, value), (_, gradient)): ((Piece, Value<_>), (Piece, Option<Value<_>>))| {
            let parameter = &layout.parameters[piece.parameter];
            let Some(gradient) = gradient.filter(|_| present[piece.parameter]) else { return (piece, value) };
            let group = Group::new(&parameter.path, parameter.dims.len(), self.optimizer.weight_decay);
            let lr = rates.learning_rate * group.learning_rate_scale;
            let mut gradient = gradient.tensor::<1>();
            if rates.scale < 1.0 {
                gradient = gradient.mul_scalar(rates.scale);
            }
            let state = self.moments.remove(&parameter.id);
            let (value, state) = self.optimizer.update(lr, group.weight_decay, value.tensor::<1>(), gradient, state);
            self.moments.insert(parameter.id, state);
            (piece, Value::new(value))
        };
        pieces.into_iter().zip(gradients).map(update).collect()
    }
}

/// Pieces of weights.
type Pieces<B> = Vec<(Piece, Value<B>)>;
