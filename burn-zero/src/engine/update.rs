//! The updates of a step, bucket by bucket.

use super::Engine;
use crate::{
    Error, bucket,
    comm::{Collectives, Lane, Pending},
    gather::{Pieces, Place, Store},
    held::Held,
    norm::{Exact, add_squares},
    offload::Task,
    optimizer::{self, Lamb, Optimizer, Rates},
    partition::{Layout, Piece},
    reduce::Reduced,
    segment::Value,
};
use burn::tensor::{
    DType,
    backend::{AutodiffBackend, Backend},
};
use std::collections::{HashMap, VecDeque};

/// Gradients of pieces, on the device.
type Wanted<B> = Vec<(Piece, Option<Value<B>>)>;

/// The updates of a step under way. While one bucket is updated the one before it is put back.
pub(super) struct Updates<'a, B: AutodiffBackend> {
    pub engine: &'a mut Engine<B>,
    pub place: Place<'a, B::InnerBackend>,
    pub rates: Rates,
    /// Oldest first.
    under_way: VecDeque<(usize, Coming<B::InnerBackend>)>,
}

/// Pieces of a bucket on their way, and the types of its weights.
struct Coming<B: Backend> {
    dtypes: Vec<DType>,
    /// Bytes of their gradients.
    gradients: usize,
    pieces: Way<B>,
}

enum Way<B: Backend> {
    /// Updated, on the device.
    Done(Pieces<B>),
    /// With the thread that updates on the host.
    Desk(Pending<Vec<(Piece, Held<B>)>>),
}

impl<'a, B: AutodiffBackend> Updates<'a, B> {
    pub fn new(engine: &'a mut Engine<B>, place: Place<'a, B::InnerBackend>, rates: Rates) -> Self {
        Self { engine, place, rates, under_way: VecDeque::new() }
    }

    /// Updates this rank's pieces of a bucket with its gradients, none where no rank had one.
    pub fn start(
        &mut self,
        store: &mut dyn Store<B::InnerBackend>,
        index: usize,
        gradients: Reduced<B::InnerBackend>,
    ) -> Result<(), Error> {
        let coming = self.begin(store.take(index)?, gradients)?;
        self.under_way.push_back((index, coming));
        self.settle(store, usize::from(self.engine.overlap))
    }

    /// Waits until no more than so many buckets are under way.
    pub fn settle(&mut self, store: &mut dyn Store<B::InnerBackend>, left: usize) -> Result<(), Error> {
        while self.under_way.len() > left {
            let Some((index, coming)) = self.under_way.pop_front() else { return Ok(()) };
            let pieces = self.end(coming)?;
            store.put(index, pieces)?;
        }
        Ok(())
    }

    /// Bytes of gradients with the thread that updates on the host.
    pub fn bytes(&self) -> usize {
        self.under_way.iter().map(|(_, coming)| coming.gradients).sum()
    }

    /// What the thread that updates on the host is to do.
    fn tasks(
        &self,
        pieces: Vec<(Piece, Held<B::InnerBackend>)>,
        gradients: Reduced<B::InnerBackend>,
    ) -> Vec<Task<B::InnerBackend>> {
        let layout = self.place.layout;
        let task = |((piece, value), (_, gradient)): ((Piece, Held<_>), (Piece, Option<Held<_>>))| {
            let parameter = &layout.parameters[piece.parameter];
            let rates = self.engine.rates(layout, &piece, self.rates);
            Task { place: (parameter.id, parameter.elements()), piece, rates, value, gradient }
        };
        pieces.into_iter().zip(gradients).map(task).collect()
    }

    fn begin(
        &mut self,
        pieces: Pieces<B::InnerBackend>,
        gradients: Reduced<B::InnerBackend>,
    ) -> Result<Coming<B::InnerBackend>, Error> {
        let Place { layout, queue, device } = self.place;
        let dtypes = pieces.iter().map(|(_, value)| value.dtype()).collect();
        let master = |(piece, value): (Piece, Value<_>)| {
            let kept = self.engine.masters.remove(&layout.parameters[piece.parameter].id);
            (piece, kept.unwrap_or_else(|| Held::Device(value.into_f32())))
        };
        let pieces: Vec<_> = pieces.into_iter().map(master).collect();
        if let Some(desk) = &self.engine.desk {
            let bytes = |held: &Held<_>| held.bytes().0 + held.bytes().1;
            let bytes = gradients.iter().filter_map(|(_, held)| held.as_ref()).map(bytes).sum();
            let pieces = Way::Desk(desk.submit(self.tasks(pieces, gradients)));
            return Ok(Coming { dtypes, gradients: bytes, pieces });
        }
        let pieces = pieces.into_iter().map(|(piece, held)| (piece, held.on(device))).collect();
        let gradients = gradients.into_iter().map(|(piece, held)| (piece, held.map(|held| held.on(device)))).collect();
        let trace = queue.trace();
        let update = || self.engine.update_pieces(layout, (pieces, gradients), self.rates);
        let new = trace.span("update", Lane::Compute, update)?;
        Ok(Coming { dtypes, gradients: 0, pieces: Way::Done(new) })
    }

    fn end(&mut self, coming: Coming<B::InnerBackend>) -> Result<Pieces<B::InnerBackend>, Error> {
        let Place { layout, device, .. } = self.place;
        let pieces: Vec<(Piece, Held<_>)> = match coming.pieces {
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
        Ok(pieces.into_iter().zip(coming.dtypes).map(round).collect())
    }
}

impl<B: AutodiffBackend> Engine<B> {
    /// Updates this rank's pieces of a bucket, f32, on the device.
    fn update_pieces(
        &mut self,
        layout: &Layout,
        (pieces, gradients): (Pieces<B::InnerBackend>, Wanted<B::InnerBackend>),
        rates: Rates,
    ) -> Result<Pieces<B::InnerBackend>, Error> {
        match self.optimizer {
            Optimizer::Lamb(lamb) => self.update_by_layer(lamb, layout, (pieces, gradients), rates),
            _ => Ok(self.update_by_value(layout, (pieces, gradients), rates)),
        }
    }

    /// The element-wise optimizers.
    fn update_by_value(
        &mut self,
        layout: &Layout,
        (pieces, gradients): (Pieces<B::InnerBackend>, Wanted<B::InnerBackend>),
        rates: Rates,
    ) -> Pieces<B::InnerBackend> {
        let update = |((piece, value), (_, gradient)): ((Piece, Value<_>), (Piece, Option<Value<_>>))| {
            let Some(gradient) = gradient else { return (piece, value) };
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
        rates: Rates,
    ) -> Result<Pieces<B::InnerBackend>, Error> {
        let (mut moving, mut norms) = (Vec::new(), HashMap::new());
        for ((piece, value), (_, gradient)) in pieces.into_iter().zip(gradients) {
            let Some(gradient) = gradient else {
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
