//! The optimizer's step.

use super::{Division, Engine, StepReport};
use crate::{
    Error, bucket,
    comm::{Collectives, Lane, Pending},
    gather::{Pieces, Place, Updater, Weights, update_model},
    held::Held,
    norm::{Exact, add_squares, add_squares_of},
    offload::Task,
    optimizer::{self, Lamb, Optimizer, Rates},
    partition::{Layout, Piece},
    reduce::{Gradients, Reduced},
    segment::{TrainSegments, Value},
};
use burn::tensor::{
    DType, Device,
    backend::{AutodiffBackend, Backend},
};
use std::collections::{HashMap, VecDeque};

/// What all ranks agree on about the gradients of a step.
struct Agreed {
    norm: f64,
    /// Whether any rank had a gradient, by parameter.
    present: Vec<bool>,
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
        let mut fresh = Gradients::new(&division.layout);
        fresh.peak = division.gradients.peak;
        let gradients = std::mem::replace(&mut division.gradients, fresh);
        let trace = self.queue.trace().clone();
        let update = || self.update(model, &mut division, gradients, learning_rate);
        let report = trace.span("step", Lane::Compute, update);
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
        let place = (self.sharding.stage, self.queue.as_ref());
        // Where states are on the host gradients stay there.
        let device = self.desk.is_none().then_some(&division.device);
        let reduced = gradients.finish(&division.layout, place, device)?;
        let Agreed { norm, present } = self.agree(&division.layout, &reduced, &mine)?;
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
        let (queue, ahead) = (self.queue.clone(), usize::from(self.overlap));
        let Division { layout, device, weights, .. } = division;
        let mut updates = Updates { engine: self, place: (layout, device), reduced, present, rates };
        match weights {
            Some(weights) => updates.of_parts(weights, ahead)?,
            None => update_model(model, Place { layout, queue: &queue, device }, (&mut updates, ahead))?,
        }
        self.desk.as_ref().map_or(Ok(()), |desk| desk.states().settle())?;
        self.steps += 1;
        Ok(StepReport { grad_norm: norm, clipped: clip < 1.0, skipped: false })
    }

    /// The norm over all parts, and who had a gradient anywhere. Where there is one part all ranks have the same.
    fn agree(
        &self,
        layout: &Layout,
        reduced: &HashMap<usize, Reduced<B::InnerBackend>>,
        present: &[bool],
    ) -> Result<Agreed, Error> {
        let mut sum = Exact::default();
        for held in reduced.values().flatten().filter_map(|(_, value)| value.as_ref()) {
            match held {
                Held::Device(value) => add_squares(&mut sum, value),
                Held::Host(values) => add_squares_of(&mut sum, values),
            }
        }
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

    /// Updates this rank's pieces of a bucket, f32, on the device.
    fn update_pieces(
        &mut self,
        layout: &Layout,
        (pieces, gradients): (Pieces<B::InnerBackend>, Wanted<B::InnerBackend>),
        present: &[bool],
        rates: Rates,
    ) -> Result<Pieces<B::InnerBackend>, Error> {
        match self.optimizer {
            Optimizer::Lamb(lamb) => self.update_by_layer(lamb, layout, (pieces, gradients), (present, rates)),
            _ => Ok(self.update_by_value(layout, (pieces, gradients), present, rates)),
        }
    }

    /// The element-wise optimizers.
    fn update_by_value(
        &mut self,
        layout: &Layout,
        (pieces, gradients): (Pieces<B::InnerBackend>, Wanted<B::InnerBackend>),
        present: &[bool],
        rates: Rates,
    ) -> Pieces<B::InnerBackend> {
        let update = |((piece, value), (_, gradient)): ((Piece, Value<_>), (Piece, Option<Value<_>>))| {
            let Some(gradient) = gradient.filter(|_| present[piece.parameter]) else { return (piece, value) };
            let (id, rate) = (layout.parameters[piece.parameter].id, self.rates(layout, &piece, rates));
            let state = self.states.remove(&id);
            let (value, state) = self.optimizer.update(rate, value.tensor(), gradient.tensor(), state);
            self.states.insert(id, state);
            (piece, Value::new(value))
        };
        pieces.into_iter().zip(gradients).map(update).collect()
    }

    /// The learning rate and the weight decay of a piece.
    fn rates(&self, layout: &Layout, piece: &Piece, rates: Rates) -> Rates {
        let parameter = &layout.parameters[piece.parameter];
        let group = self.groups.of(&parameter.path, parameter.dims.len(), rates.weight_decay);
        Rates { lr: rates.lr * group.learning_rate_scale, weight_decay: group.weight_decay, ..rates }
    }

    /// LAMB: the norms of a bucket's tensors and of their directions are added up over ranks before anything moves.
    fn update_by_layer(
        &mut self,
        lamb: Lamb,
        layout: &Layout,
        (pieces, gradients): (Pieces<B::InnerBackend>, Wanted<B::InnerBackend>),
        (present, rates): (&[bool], Rates),
    ) -> Result<Pieces<B::InnerBackend>, Error> {
        let (mut moving, mut norms) = (Vec::new(), HashMap::new());
        for ((piece, value), (_, gradient)) in pieces.into_iter().zip(gradients) {
            let Some(gradient) = gradient.filter(|_| present[piece.parameter]) else {
                moving.push((piece, value, None));
                continue;
            };
            let (id, rate) = (layout.parameters[piece.parameter].id, self.rates(layout, &piece, rates));
            let state = self.states.remove(&id);
            let parameter = value.clone().tensor::<1>();
            let gradient = optimizer::scaled(gradient.tensor(), rates.scale);
            let (direction, state) = lamb.direction(rate.weight_decay, &parameter, gradient, state);
            self.states.insert(id, state);
            let direction = Value::new(direction);
            let sums: &mut [Exact; 2] = norms.entry(piece.parameter).or_default();
            add_squares(&mut sums[0], &value);
            add_squares(&mut sums[1], &direction);
            moving.push((piece, value, Some(direction)));
        }
        let norms = self.share_norms(layout, norms)?;
        let step = |(piece, value, direction): (Piece, Value<B::InnerBackend>, Option<Value<_>>)| {
            let Some(direction) = direction else { return (piece, value) };
            let [parameter, length] = &norms[&piece.parameter];
            let ratio = lamb.ratio(parameter.value().sqrt(), length.value().sqrt());
            let Rates { lr, .. } = self.rates(layout, &piece, rates);
            let moved = value.tensor::<1>().sub(direction.tensor::<1>().mul_scalar(lr * ratio));
            (piece, Value::new(moved))
        };
        Ok(moving.into_iter().map(step).collect())
    }

    /// The sums of all parts, by parameter.
    fn share_norms(
        &self,
        layout: &Layout,
        norms: HashMap<usize, [Exact; 2]>,
    ) -> Result<HashMap<usize, [Exact; 2]>, Error> {
        let mut note = Vec::new();
        for (parameter, sums) in &norms {
            note.extend((*parameter as u64).to_le_bytes());
            sums.iter().for_each(|sum| note.extend(sum.to_bytes()));
        }
        let notes = self.queue.submit("share", move |group| group.share(&note)).wait()?;
        let mut all: HashMap<usize, [Exact; 2]> = HashMap::new();
        for note in notes.iter().take(layout.parts) {
            let mut rest = note.as_slice();
            while let Some((number, after)) = rest.split_first_chunk::<8>() {
                let (first, after) = Exact::from_bytes(after);
                let (second, after) = Exact::from_bytes(after);
                let sums = all.entry(u64::from_le_bytes(*number) as usize).or_default();
                sums[0].merge(first);
                sums[1].merge(second);
                rest = after;
            }
        }
        Ok(all)
    }
}

/// Gradients of pieces, on the device.
type Wanted<B> = Vec<(Piece, Option<Value<B>>)>;

/// The updates of a step, bucket by bucket.
struct Updates<'a, B: AutodiffBackend> {
    engine: &'a mut Engine<B>,
    place: (&'a Layout, &'a Device<B::InnerBackend>),
    reduced: HashMap<usize, Reduced<B::InnerBackend>>,
    present: Vec<bool>,
    rates: Rates,
}

/// Pieces of a bucket on their way, and the types of its weights.
struct Coming<B: Backend> {
    dtypes: Vec<DType>,
    pieces: Way<B>,
}

enum Way<B: Backend> {
    /// Updated, on the device.
    Done(Pieces<B>),
    /// With the thread that updates on the host.
    Desk(Pending<Vec<(Piece, Held<B>)>>),
}

impl<B: AutodiffBackend> Updates<'_, B> {
    /// Updates the parts of weights that are divided.
    fn of_parts(&mut self, weights: &mut Weights<B::InnerBackend>, ahead: usize) -> Result<(), Error> {
        let (layout, device) = self.place;
        let mut coming = VecDeque::new();
        for (index, _) in layout.trained() {
            let old = weights.take(layout, index, device)?;
            coming.push_back((index, self.begin(index, old)?));
            while coming.len() > ahead {
                self.put_first(&mut coming, weights)?;
            }
        }
        while !coming.is_empty() {
            self.put_first(&mut coming, weights)?;
        }
        Ok(())
    }

    fn put_first(
        &mut self,
        coming: &mut VecDeque<(usize, Coming<B::InnerBackend>)>,
        weights: &mut Weights<B::InnerBackend>,
    ) -> Result<(), Error> {
        let Some((index, update)) = coming.pop_front() else { return Ok(()) };
        let new = self.end(update)?;
        weights.put(self.place.0, index, new)
    }

    /// What the thread that updates on the host is to do.
    fn tasks(
        &self,
        pieces: Vec<(Piece, Held<B::InnerBackend>)>,
        gradients: Reduced<B::InnerBackend>,
    ) -> Vec<Task<B::InnerBackend>> {
        let layout = self.place.0;
        let task = |((piece, value), (_, gradient)): ((Piece, Held<_>), (Piece, Option<Held<_>>))| {
            let parameter = &layout.parameters[piece.parameter];
            let rates = self.engine.rates(layout, &piece, self.rates);
            let gradient = gradient.filter(|_| self.present[piece.parameter]);
            Task { place: (parameter.id, parameter.elements()), piece, rates, value, gradient }
        };
        pieces.into_iter().zip(gradients).map(task).collect()
    }
}

impl<B: AutodiffBackend> Updater<B::InnerBackend> for Updates<'_, B> {
    type Coming = Coming<B::InnerBackend>;

    fn begin(&mut self, index: usize, pieces: Pieces<B::InnerBackend>) -> Result<Self::Coming, Error> {
        let (layout, device) = self.place;
        let gradients = self.reduced.remove(&index).unwrap_or_default();
        let dtypes = pieces.iter().map(|(_, value)| value.dtype()).collect();
        let master = |(piece, value): (Piece, Value<_>)| {
            let kept = self.engine.masters.remove(&layout.parameters[piece.parameter].id);
            (piece, kept.unwrap_or_else(|| Held::Device(value.into_f32())))
        };
        let pieces: Vec<_> = pieces.into_iter().map(master).collect();
        if let Some(desk) = &self.engine.desk {
            return Ok(Coming { dtypes, pieces: Way::Desk(desk.submit(self.tasks(pieces, gradients))) });
        }
        let pieces = pieces.into_iter().map(|(piece, held)| (piece, held.on(device))).collect();
        let gradients = gradients.into_iter().map(|(piece, held)| (piece, held.map(|held| held.on(device)))).collect();
        let new = self.engine.update_pieces(layout, (pieces, gradients), &self.present, self.rates)?;
        Ok(Coming { dtypes, pieces: Way::Done(new) })
    }

    fn end(&mut self, Coming { dtypes, pieces }: Self::Coming) -> Result<Pieces<B::InnerBackend>, Error> {
        let (layout, device) = self.place;
        let pieces: Vec<(Piece, Held<_>)> = match pieces {
            Way::Done(pieces) => pieces.into_iter().map(|(piece, value)| (piece, Held::Device(value))).collect(),
            Way::Desk(pending) => pending.wait()?,
        };
        let round = |((piece, held), dtype): ((Piece, Held<_>), DType)| {
            if dtype == DType::F32 {
                return (piece, held.on(device));
            }
            let value = match &held {
                Held::Device(value) => value.clone().into_dtype(dtype),
                Held::Host(values) => bucket::rounded(values, dtype, device),
            };
            self.engine.masters.insert(layout.parameters[piece.parameter].id, held);
            (piece, value)
        };
        Ok(pieces.into_iter().zip(dtypes).map(round).collect())
    }
}
