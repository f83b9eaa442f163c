//! Weights that every rank has whole (stages 0 to 2).

use super::{Gathering, Pieces, Place, Put, Store, Take, start};
use crate::{
    Error, bucket,
    segment::{Source, Sweep, Value, fresh},
};
use burn::{
    module::{Module, ParamId},
    tensor::backend::AutodiffBackend,
};
use std::collections::{HashMap, VecDeque};

/// Buckets of new weights that may be under way at a time.
const WINDOW: usize = 2;

/// A model that has all its weights. While they are updated, this rank's pieces of a bucket come out of it, and the new ones of
/// all ranks wait beside it until its end.
pub(crate) struct Whole<'a, B: AutodiffBackend, M> {
    /// None only while it is mapped.
    model: Option<M>,
    place: Place<'a, B::InnerBackend>,
    /// New weights under way, oldest first.
    coming: VecDeque<(usize, Gathering<B::InnerBackend>)>,
    /// New weights that are there.
    values: HashMap<ParamId, Value<B::InnerBackend>>,
}

impl<'a, B: AutodiffBackend, M: Module<B>> Whole<'a, B, M> {
    /// Takes what is trained out of a model, which is left with shells of one element: no one else holds the weights then.
    pub fn out_of(model: &mut M, place: Place<'a, B::InnerBackend>) -> Self {
        let whole = fresh(model.clone());
        let layout = place.layout;
        let which = |id: ParamId| layout.parameters[layout.index[&id]].trainable;
        *model = model.clone().map(&mut Take { layout, which, values: HashMap::new() });
        Self { model: Some(whole), place, coming: VecDeque::new(), values: HashMap::new() }
    }

    /// Waits until no more than so many buckets are under way.
    fn receive(&mut self, left: usize) -> Result<(), Error> {
        let Place { layout, device, .. } = self.place;
        while self.coming.len() > left {
            let Some((index, gathering)) = self.coming.pop_front() else { return Ok(()) };
            let whole = gathering.wait(layout, &layout.buckets[index], device)?;
            self.values.extend(whole.into_iter().map(|(parameter, value)| (layout.parameters[parameter].id, value)));
        }
        Ok(())
    }

    /// Puts the weights back. After an error, `done` or on the way, the model lacks what was being updated.
    pub fn back_into<R>(mut self, model: &mut M, done: Result<R, Error>) -> Result<R, Error> {
        let done = done.and_then(|done| self.receive(0).map(|()| done));
        let values = std::mem::take(&mut self.values);
        if let Some(whole) = self.model {
            *model = if values.is_empty() { whole } else { whole.map(&mut Put { values }) };
        }
        done
    }
}

impl<B: AutodiffBackend, M: Module<B>> Source<M> for Whole<'_, B, M> {
    const STAYS: bool = true;

    fn model(&self) -> &M {
        self.model.as_ref().expect("the model is only away while it is mapped")
    }

    fn enter(&mut self, _: Sweep, _: usize) -> Result<(), Error> {
        Ok(())
    }

    fn leave(&mut self, _: Sweep, _: usize) {}
}

impl<B: AutodiffBackend, M: Module<B>> Store<B::InnerBackend> for Whole<'_, B, M> {
    fn take(&mut self, index: usize) -> Result<Pieces<B::InnerBackend>, Error> {
        let Place { layout, device, .. } = self.place;
        let bucket = &layout.buckets[index];
        let which = |id| bucket.slots.iter().any(|&(parameter, _)| layout.parameters[parameter].id == id);
        let mut take = Take { layout, which, values: HashMap::new() };
        self.model = self.model.take().map(|model| model.map(&mut take));
        let mut values = take.values;
        let pieces = layout.pieces(bucket).into_iter().map(|piece| {
            let value = values.remove(&piece.parameter).expect("the model has every parameter of the layout");
            let value = bucket::cut(value, &piece, false, device);
            (piece, value)
        });
        Ok(pieces.collect())
    }

    fn put(&mut self, index: usize, pieces: Pieces<B::InnerBackend>) -> Result<(), Error> {
        let Place { layout, queue, .. } = self.place;
        self.coming.push_back((index, start(layout, &layout.buckets[index], pieces, queue)));
        self.receive(WINDOW)
    }
}
