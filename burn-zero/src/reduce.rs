//! Gradients on their way from the backward pass to the optimizer.
//!
//! Whole gradients are added up as they come. A bucket is reduced when the last of them has come: after every micro-batch
//! where gradients are divided (stages 2 and 3), else before the optimizer's step, and in any case with the last micro-batch of
//! a step that updates while it walks backward. What is reduced is kept as this rank's part.

use crate::{
    Error, bucket,
    comm::{Collectives, Lane, Pending, Queue},
    ds_config::Stage,
    held::Held,
    partition::{Bucket, Layout, Piece},
    segment::{Gradient, Value},
};
use burn::tensor::backend::Backend;
use std::collections::{HashMap, VecDeque};

/// Buckets that may be under way at a time.
const WINDOW: usize = 2;

/// Gradients of a step, and where they are.
pub(crate) struct Gradients<B: Backend> {
    /// Sums of this rank by parameter, in f32.
    whole: HashMap<usize, Value<B>>,
    /// This rank's parts of buckets that have been reduced.
    parts: HashMap<usize, Vec<f32>>,
    /// Buckets under way, oldest first, and the bytes of this rank's part of each.
    pending: VecDeque<(usize, usize, Pending<Vec<f32>>)>,
    /// Parameters that had a gradient.
    present: Vec<bool>,
    /// Bytes of the buckets under way.
    under_way: usize,
    /// Bytes that have been [taken](Self::take) and still wait for their update.
    pub updating: usize,
    pub peak: Peak,
}

/// The most bytes that were alive at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Peak {
    /// Gradients: whole ones that wait for their bucket, and this rank's parts, until they are updated with.
    pub gradients: usize,
    /// Gradient buckets under way.
    pub buckets: usize,
    /// Gathered weights of stage 3.
    pub gathered: usize,
}

/// A rank's gradients of a bucket by piece; none where no rank had one.
pub(crate) type Reduced<B> = Vec<(Piece, Option<Held<B>>)>;

impl<B: Backend> Gradients<B> {
    pub fn new(layout: &Layout) -> Self {
        Self {
            whole: HashMap::new(),
            parts: HashMap::new(),
            pending: VecDeque::new(),
            present: vec![false; layout.parameters.len()],
            under_way: 0,
            updating: 0,
            peak: Peak::default(),
        }
    }

    /// Adds one segment's gradients.
    pub fn add(&mut self, layout: &Layout, found: Vec<Gradient<B>>) {
        for gradient in found {
            let index = layout.index[&gradient.id];
            let value = gradient.value.into_f32();
            let value = match self.whole.remove(&index) {
                Some(sum) => sum.add(value),
                None => value,
            };
            self.whole.insert(index, value);
            self.present[index] = true;
        }
        self.peak.gradients = self.peak.gradients.max(self.bytes() + self.updating);
    }

    /// Bytes of the gradients that are alive, buckets under way apart.
    pub fn bytes(&self) -> usize {
        let (whole, parts) = self.bytes_by_place();
        whole + parts
    }

    /// The same, of whole gradients on the device and of this rank's parts on the host.
    pub fn bytes_by_place(&self) -> (usize, usize) {
        let parts: usize = self.parts.values().map(|part| part.len() * 4).sum();
        let parts = parts + self.pending.iter().map(|(_, bytes, _)| bytes).sum::<usize>();
        (self.whole.values().map(Value::bytes).sum(), parts)
    }

    /// The sums that wait for their bucket, by the parameter's number.
    #[cfg(test)]
    pub fn whole(&self) -> &HashMap<usize, Value<B>> {
        &self.whole
    }

    /// Which parameters had a gradient here.
    pub fn present(&self) -> &[bool] {
        &self.present
    }

    /// Sends the buckets on their way whose last gradient comes with this segment.
    pub fn reduce_after(&mut self, layout: &Layout, segment: usize, queue: &Queue) -> Result<(), Error> {
        layout.due_after(segment).try_for_each(|index| self.reduce(layout, index, queue))
    }

    /// Sends a bucket on its way: this rank's part, which goes on from what it holds, or all of it where nothing is divided.
    /// The gradients leave the device beside the thread that computes.
    pub fn reduce(&mut self, layout: &Layout, index: usize, queue: &Queue) -> Result<(), Error> {
        while self.pending.len() >= WINDOW || self.pending.iter().any(|(other, ..)| *other == index) {
            self.settle(layout)?;
        }
        let bucket = layout.buckets[index].clone();
        let parts = layout.parts;
        let taken = bucket.slots.iter().filter_map(|(parameter, _)| Some((*parameter, self.whole.remove(parameter)?)));
        let mut whole: HashMap<usize, Value<B>> = taken.collect();
        self.under_way += bucket.length * 4;
        self.peak.buckets = self.peak.buckets.max(self.under_way);
        let trace = queue.trace().clone();
        let mut flatten = move |bucket: &Bucket| {
            let flat = || bucket::flatten(bucket, |parameter| whole.remove(&parameter));
            trace.span_of(("to the host", index), Lane::Transfer, flat)
        };
        let pending = if parts == 1 && queue.world() > 1 {
            queue.submit("all_reduce", move |group| {
                let mut flat = flatten(&bucket);
                group.all_reduce(&mut flat).map(|()| flat)
            })
        } else {
            let part = self.parts.remove(&index);
            queue.submit("reduce_scatter", move |group| {
                let flat = flatten(&bucket);
                // A sum that starts at -0 is what is added to it, the sign of a zero included.
                let mut part = part.unwrap_or_else(|| vec![-0.0; bucket.length / parts]);
                group.reduce_scatter_onto(&flat, &mut part).map(|()| part)
            })
        };
        self.pending.push_back((index, layout.buckets[index].length / parts * 4, pending));
        Ok(())
    }

    /// Waits for the oldest bucket under way.
    fn settle(&mut self, layout: &Layout) -> Result<(), Error> {
        let Some((index, _, pending)) = self.pending.pop_front() else { return Ok(()) };
        self.parts.insert(index, pending.wait()?);
        self.under_way -= layout.buckets[index].length * 4;
        Ok(())
    }

    /// Waits for all buckets under way.
    pub fn settle_all(&mut self, layout: &Layout) -> Result<(), Error> {
        while !self.pending.is_empty() {
            self.settle(layout)?;
        }
        Ok(())
    }

    /// Ends the step: every bucket reduced, this rank's parts on the device, if one is given. A reduction of one rank is the
    /// identity, and nothing leaves the device for it.
    pub fn finish(
        mut self,
        layout: &Layout,
        (stage, queue): (Stage, &Queue),
        device: Option<&B::Device>,
    ) -> Result<HashMap<usize, Reduced<B>>, Error> {
        let alone = queue.world() == 1;
        if !alone && stage < Stage::Gradients {
            layout.trained().try_for_each(|(index, _)| self.reduce(layout, index, queue))?;
        }
        self.settle_all(layout)?;
        layout.trained().map(|(index, _)| Ok((index, self.take(layout, index, device)?))).collect()
    }

    /// This rank's gradients of a bucket that has been [sent on its way](Self::reduce) or need not be; on the device, if one is
    /// given.
    pub fn take(&mut self, layout: &Layout, index: usize, device: Option<&B::Device>) -> Result<Reduced<B>, Error> {
        while self.pending.iter().any(|(under_way, ..)| *under_way == index) {
            self.settle(layout)?;
        }
        let part = self.parts.remove(&index);
        let gradient = |piece: Piece| {
            let own = |part: &Vec<f32>| part[piece.at..piece.at + piece.range.len()].to_vec();
            let value = match (&part, device) {
                (Some(part), Some(device)) => Some(Held::Device(bucket::from_vec(own(part), device))),
                (Some(part), None) => Some(Held::Host(own(part))),
                (None, _) => {
                    let whole = self.whole.remove(&piece.parameter);
                    whole.map(|whole| Held::Device(Value::new(whole.flatten())))
                }
            };
            (piece, value)
        };
        Ok(layout.pieces(&layout.buckets[index]).into_iter().map(gradient).collect())
    }
}
