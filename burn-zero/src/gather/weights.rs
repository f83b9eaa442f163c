//! This rank's part of the weights: on the device, in the host's memory or in a file.

use super::{Gathering, Pieces, Place, Store, Take, start};
use crate::{
    Error, bucket,
    comm::{Collectives, Lane, Queue},
    offload::{Shelf, Tier},
    partition::{Layout, Piece},
};
use burn::{
    module::Module,
    tensor::backend::{AutodiffBackend, Backend},
};
use std::{collections::HashMap, sync::Arc};

/// This rank's part of all weights.
pub(crate) struct Weights<B: Backend> {
    /// By bucket.
    parts: HashMap<usize, Part<B>>,
    /// Where parts are that are in a file.
    shelf: Option<Shelf>,
    tier: Tier,
}

/// The parts as they are updated.
pub(crate) struct Stored<'a, B: Backend>(&'a mut Weights<B>, Place<'a, B>);

impl<B: Backend> Store<B> for Stored<'_, B> {
    fn take(&mut self, index: usize) -> Result<Pieces<B>, Error> {
        self.0.take(self.1.layout, index, self.1.device)
    }

    fn put(&mut self, index: usize, pieces: Pieces<B>) -> Result<(), Error> {
        self.0.put(self.1.layout, index, pieces)
    }
}

/// A rank's part of a bucket.
enum Part<B: Backend> {
    Device(Pieces<B>),
    /// The bytes of all pieces, as they travel.
    Host(Arc<Vec<u8>>),
    /// So many bytes of the file, from here on.
    File(u64, usize),
}

impl<B: Backend> Weights<B> {
    /// Cuts a model's weights; what stays in the model are shells of one element.
    ///
    /// # Errors
    /// [`Error::Path`] if parts go to a file that cannot be written.
    pub fn cut<A: AutodiffBackend<InnerBackend = B>, M: Module<A>>(
        model: M,
        layout: &Layout,
        (device, tier): (&B::Device, &Tier),
    ) -> Result<(M, Self), Error> {
        let mut take = Take { layout, which: |_| true, values: HashMap::new() };
        let model = model.map(&mut take);
        let mut values = take.values;
        let shelf = match tier {
            Tier::File(folder) => Some(Shelf::create(folder, layout.part)?),
            _ => None,
        };
        let mut weights = Self { parts: HashMap::new(), shelf, tier: tier.clone() };
        for (index, bucket) in layout.buckets.iter().enumerate() {
            let own = layout.pieces(bucket).into_iter();
            let cut = own.map(|piece| {
                let value = values.remove(&piece.parameter).expect("the model has every parameter of the layout");
                let part = bucket::cut(value, &piece, true, device);
                (piece, part)
            });
            weights.put(layout, index, cut.collect())?;
        }
        Ok((model, weights))
    }

    /// The parts at their place.
    pub fn stored<'a>(&'a mut self, place: Place<'a, B>) -> Stored<'a, B> {
        Stored(self, place)
    }

    /// Takes over this rank's pieces of a bucket.
    fn put(&mut self, layout: &Layout, index: usize, pieces: Pieces<B>) -> Result<(), Error> {
        let bytes = || bucket::part_bytes(layout, &layout.buckets[index], &pieces);
        let part = match (&self.tier, &mut self.shelf) {
            (Tier::Device, _) => Part::Device(pieces),
            (_, None) => Part::Host(Arc::new(bytes())),
            (_, Some(shelf)) => {
                let bytes = bytes();
                let start = match self.parts.get(&index) {
                    Some(&Part::File(start, _)) => start,
                    _ => shelf.allocate(bytes.len()),
                };
                shelf.write(start, &bytes)?;
                Part::File(start, bytes.len())
            }
        };
        self.parts.insert(index, part);
        Ok(())
    }

    /// This rank's pieces of a bucket, on the device, to be updated in place and [put](Self::put) back.
    fn take(&mut self, layout: &Layout, index: usize, device: &B::Device) -> Result<Pieces<B>, Error> {
        match self.parts.get_mut(&index) {
            Some(Part::Device(pieces)) => Ok(std::mem::take(pieces)),
            _ => self.look(layout, index, device),
        }
    }

    /// A copy of this rank's pieces of a bucket, on the device.
    pub fn look(&self, layout: &Layout, index: usize, device: &B::Device) -> Result<Pieces<B>, Error> {
        let bucket = &layout.buckets[index];
        let bytes = match (&self.parts[&index], &self.shelf) {
            (Part::Device(pieces), _) => return Ok(pieces.clone()),
            (Part::Host(bytes), _) => bytes.clone(),
            (Part::File(start, length), Some(shelf)) => Arc::new(shelf.reader(*start, *length)()?),
            (Part::File(..), None) => unreachable!("a part is in a file that there is"),
        };
        let size = bucket.dtype.size();
        let piece = |piece: Piece| {
            let bytes = &bytes[piece.at * size..][..piece.range.len() * size];
            let value = bucket::tensor(bytes, &[piece.range.len()], bucket.dtype, device);
            (piece, value)
        };
        Ok(layout.pieces(bucket).into_iter().map(piece).collect())
    }

    /// Starts to gather a bucket.
    pub fn gather(&self, layout: &Layout, index: usize, queue: &Queue) -> Gathering<B> {
        let bucket = &layout.buckets[index];
        let (size, trace) = (bucket.dtype.size(), queue.trace().clone());
        match (&self.parts[&index], &self.shelf) {
            (Part::Device(pieces), _) => start(layout, bucket, pieces.clone(), queue),
            (Part::Host(bytes), _) => {
                let bytes = bytes.clone();
                Gathering::Coming(queue.submit("all_gather", move |group| group.all_gather_bytes(&bytes, size)))
            }
            (Part::File(start, length), Some(shelf)) => {
                let read = shelf.reader(*start, *length);
                Gathering::Coming(queue.submit("all_gather", move |group| {
                    let bytes = trace.span_of(("from the file", index), Lane::Transfer, read)?;
                    group.all_gather_bytes(&bytes, size)
                }))
            }
            (Part::File(..), None) => unreachable!("a part is in a file that there is"),
        }
    }

    /// Bytes on the device and on the host, of buckets that are trained or not.
    pub fn bytes(&self, layout: &Layout, trainable: bool) -> (usize, usize) {
        let own = self.parts.iter().filter(|(index, _)| layout.buckets[**index].trainable == trainable);
        own.fold((0, 0), |(device, host), (_, part)| match part {
            Part::Device(pieces) => (device + pieces.iter().map(|(_, value)| value.bytes()).sum::<usize>(), host),
            Part::Host(bytes) => (device, host + bytes.len()),
            Part::File(..) => (device, host),
        })
    }
}
