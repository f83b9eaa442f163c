//! Weights that every rank holds a part of (stage 3): gathered before a segment runs, let go of after it.
//!
//! ```text
//!  forward    gather 0 │ run 0, gather 1 │ run 1, gather 2 │ … │ run last
//!  backward   …        │ run 1, gather 0 │ run 0           │         the weights of a graph that is kept stay
//! ```
//!
//! What is gathered and let go of when is a list made beforehand ([`visits`]); a bucket is gathered once per sweep, and the
//! gathering of the next visit goes on while a segment runs. The parts themselves are on the device, in the host's memory or in
//! a file (parameter offload); then gathering is also how weights come to the device.

use crate::{
    Error, bucket,
    comm::{Collectives, Pending, Queue},
    partition::{Bucket, Layout, Piece},
    segment::{Checkpointing, Source, Sweep, Value},
};
use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    tensor::{
        Tensor,
        backend::{AutodiffBackend, Backend},
    },
};
use std::collections::{HashMap, HashSet};

mod weights;
mod whole;

pub(crate) use weights::Weights;
pub(crate) use whole::Whole;

/// A segment's turn in a sweep, and the buckets that come before it and go after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Visit {
    pub sweep: Sweep,
    pub segment: usize,
    pub gather: Vec<usize>,
    pub release: Vec<usize>,
}

/// The visits of a micro-batch: a bucket comes with its first use in a sweep and goes with its last, but one that a kept graph
/// holds stays from the forward sweep to the end of its use in the backward sweep.
pub(crate) fn visits(layout: &Layout, checkpointing: Checkpointing) -> Vec<Visit> {
    let (segments, first) = (layout.segments, layout.first_trained());
    let visit = |sweep| move |segment| Visit { sweep, segment, gather: Vec::new(), release: Vec::new() };
    let forward = (0..segments).map(visit(Sweep::Forward));
    let mut all: Vec<Visit> = forward.chain((first..segments).rev().map(visit(Sweep::Backward))).collect();
    let backward = |segment: usize| segments + (segments - 1 - segment);
    for (index, bucket) in layout.buckets.iter().enumerate() {
        let uses = &bucket.segments;
        let (begin, end) = (uses[0], uses[uses.len() - 1]);
        let again: Vec<usize> = uses.iter().copied().filter(|&segment| segment >= first).collect();
        let stays = again.iter().any(|&segment| checkpointing.keeps(segment, segments));
        all[begin].gather.push(index);
        match (again.first(), again.last()) {
            (Some(&least), Some(&most)) => {
                if !stays {
                    all[end].release.push(index);
                    all[backward(most)].gather.push(index);
                }
                all[backward(least)].release.push(index);
            }
            _ => all[end].release.push(index),
        }
    }
    all
}

/// Whole parameters on their way.
pub(crate) enum Gathering<B: Backend> {
    /// Nothing has to travel: the pieces are the parameters.
    Here(Vec<(Piece, Value<B>)>),
    /// The bucket's bytes.
    Coming(Pending<Vec<u8>>),
}

/// Sends this rank's pieces of a bucket and asks for everyone's. Where there is one part it is the whole, and nothing leaves the
/// device for it.
pub(crate) fn start<B: Backend>(
    layout: &Layout,
    bucket: &Bucket,
    pieces: Vec<(Piece, Value<B>)>,
    queue: &Queue,
) -> Gathering<B> {
    if layout.parts == 1 {
        return Gathering::Here(pieces);
    }
    let (bytes, size) = (bucket::part_bytes(layout, bucket, &pieces), bucket.dtype.size());
    Gathering::Coming(queue.submit("all_gather", move |group| group.all_gather_bytes(&bytes, size)))
}

impl<B: Backend> Gathering<B> {
    /// Waits for the whole parameters.
    pub fn wait(self, layout: &Layout, bucket: &Bucket, device: &B::Device) -> Result<Vec<(usize, Value<B>)>, Error> {
        match self {
            Self::Here(pieces) => {
                let whole = |(piece, value): (Piece, Value<B>)| {
                    (piece.parameter, value.reshape(&layout.parameters[piece.parameter].dims))
                };
                Ok(pieces.into_iter().map(whole).collect())
            }
            Self::Coming(pending) => Ok(bucket::parameters(layout, bucket, pending.wait()?, device)),
        }
    }
}

/// Pieces of weights.
pub(crate) type Pieces<B> = Vec<(Piece, Value<B>)>;

/// Where the weights are while a step updates them, bucket by bucket.
pub(crate) trait Store<B: Backend> {
    /// This rank's pieces of a bucket, flat. The store lets go of the bucket: a tensor is updated in place only if no one else
    /// holds it.
    fn take(&mut self, index: usize) -> Result<Pieces<B>, Error>;

    /// Takes the updated pieces over.
    fn put(&mut self, index: usize, pieces: Pieces<B>) -> Result<(), Error>;
}

/// What gathering needs to know.
pub(crate) struct Place<'a, B: Backend> {
    pub layout: &'a Layout,
    pub queue: &'a Queue,
    pub device: &'a B::Device,
}

impl<B: Backend> Clone for Place<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend> Copy for Place<'_, B> {}

/// A model whose weights come and go with their segments.
pub(crate) struct Gathered<'a, B: AutodiffBackend, M> {
    /// None only while it is mapped.
    model: Option<M>,
    weights: &'a mut Weights<B::InnerBackend>,
    place: Place<'a, B::InnerBackend>,
    visits: Vec<Visit>,
    /// The visit that is under way or next.
    now: usize,
    /// For how many visits after this one weights are gathered ahead.
    ahead: usize,
    coming: HashMap<usize, Gathering<B::InnerBackend>>,
    live: usize,
    /// The most bytes of gathered weights.
    pub peak: usize,
}

impl<'a, B: AutodiffBackend, M: Module<B>> Gathered<'a, B, M> {
    /// The model is a shell, as [`Weights::cut`] leaves it.
    pub fn new(
        model: M,
        weights: &'a mut Weights<B::InnerBackend>,
        place: Place<'a, B::InnerBackend>,
        (checkpointing, ahead): (Checkpointing, usize),
    ) -> Self {
        let visits = visits(place.layout, checkpointing);
        Self { model: Some(model), weights, place, visits, now: 0, ahead, coming: HashMap::new(), live: 0, peak: 0 }
    }

    fn map(&mut self, mapper: &mut impl ModuleMapper<B>) {
        self.model = self.model.take().map(|model| model.map(mapper));
    }

    fn start(&mut self, visit: usize) {
        let Some(visit) = self.visits.get(visit) else { return };
        for &index in &visit.gather {
            if !self.coming.contains_key(&index) {
                let gathering = self.weights.gather(self.place.layout, index, self.place.queue);
                self.coming.insert(index, gathering);
                self.live += bytes(&self.place.layout.buckets[index]);
            }
        }
        self.peak = self.peak.max(self.live);
    }
}

fn bytes(bucket: &Bucket) -> usize {
    bucket.length * bucket.dtype.size()
}

impl<B: AutodiffBackend, M: Module<B>> Source<M> for Gathered<'_, B, M> {
    const STAYS: bool = false;

    fn model(&self) -> &M {
        self.model.as_ref().expect("the model is only away while it is mapped")
    }

    fn enter(&mut self, sweep: Sweep, segment: usize) -> Result<(), Error> {
        let visit = &self.visits[self.now];
        assert_eq!((visit.sweep, visit.segment), (sweep, segment), "the driver follows the list of visits");
        let due = visit.gather.clone();
        self.start(self.now);
        let Place { layout, device, .. } = self.place;
        let mut values = HashMap::new();
        for index in due {
            let gathering = self.coming.remove(&index).expect("it was started at the latest just now");
            let whole = gathering.wait(layout, &layout.buckets[index], device)?;
            values.extend(whole.into_iter().map(|(parameter, value)| (layout.parameters[parameter].id, value)));
        }
        for next in 1..=self.ahead {
            self.start(self.now + next);
        }
        if !values.is_empty() {
            self.map(&mut Put { values });
        }
        Ok(())
    }

    fn leave(&mut self, _: Sweep, _: usize) {
        let release = std::mem::take(&mut self.visits[self.now].release);
        self.now += 1;
        let layout = self.place.layout;
        let slots = release.iter().flat_map(|&index| &layout.buckets[index].slots);
        let ids: HashSet<ParamId> = slots.map(|&(parameter, _)| layout.parameters[parameter].id).collect();
        self.live -= release.iter().map(|&index| bytes(&layout.buckets[index])).sum::<usize>();
        if !ids.is_empty() {
            self.map(&mut Take { layout, which: |id| ids.contains(&id), values: HashMap::new() });
        }
    }
}

impl<B: AutodiffBackend, M> Store<B::InnerBackend> for Gathered<'_, B, M> {
    fn take(&mut self, index: usize) -> Result<Pieces<B::InnerBackend>, Error> {
        self.weights.stored(self.place).take(index)
    }

    fn put(&mut self, index: usize, pieces: Pieces<B::InnerBackend>) -> Result<(), Error> {
        self.weights.stored(self.place).put(index, pieces)
    }
}

/// Takes parameters out of a model and leaves shells of one element.
pub(crate) struct Take<'a, B: Backend, F> {
    pub layout: &'a Layout,
    pub which: F,
    /// What was taken, by its number in the layout.
    pub values: HashMap<usize, Value<B>>,
}

impl<B: AutodiffBackend, F: Fn(ParamId) -> bool> ModuleMapper<B> for Take<'_, B::InnerBackend, F> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(&index) = self.layout.index.get(&param.id).filter(|_| (self.which)(param.id)) else { return param };
        let (id, tensor, mapper) = param.consume();
        let shell =
            Tensor::empty([1; D], (&tensor.device(), tensor.dtype())).set_require_grad(tensor.is_require_grad());
        self.values.insert(index, Value::new(tensor.inner()));
        Param::from_mapped_value(id, shell, mapper)
    }
}

/// Puts whole parameters into a model; whether they are trained stays.
pub(crate) struct Put<B: Backend> {
    pub values: HashMap<ParamId, Value<B>>,
}

impl<B: AutodiffBackend> ModuleMapper<B> for Put<B::InnerBackend> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let Some(value) = self.values.remove(&param.id) else { return param };
        let (id, shell, mapper) = param.consume();
        let tensor = Tensor::from_inner(value.tensor()).set_require_grad(shell.is_require_grad());
        Param::from_mapped_value(id, tensor, mapper)
    }
}
