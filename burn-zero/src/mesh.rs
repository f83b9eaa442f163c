//! The mesh of a run: its ranks along the axes data, pipeline and tensor, with a communicator for each axis.

use crate::{
    ConfigError, Error,
    comm::{AsyncCommunicator, Communicator, Solo, Trace, TraceAxis, Traffic},
};

/// The number of ranks along each axis of a mesh. The ranks of a tensor group are neighbours, then those that share a
/// pipeline stage, as in Megatron-LM and torchtitan: rank = (pipeline · `data` + data) · `tensor` + tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshShape {
    /// The replicas of the model, which divide the data among them.
    pub data: usize,
    /// The ranks that a micro-batch passes, each with its stages of the model.
    pub pipeline: usize,
    /// The ranks that share every layer.
    pub tensor: usize,
}

/// The place of a rank in a mesh: its index along each axis, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MeshCoordinates {
    /// The index among the replicas.
    pub data: usize,
    /// The index among the ranks of the pipeline.
    pub pipeline: usize,
    /// The index among the ranks that share every layer.
    pub tensor: usize,
}

/// The volume that a rank has sent along each axis of a mesh.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MeshTraffic {
    /// The volume of collectives over all ranks: the gradient norm, losses, barriers.
    pub world: Traffic,
    /// The volume among the replicas of a stage: gradients and weights.
    pub data: Traffic,
    /// The volume along the pipeline: hidden states and their gradients.
    pub pipeline: Traffic,
    /// The volume among the ranks that share every layer.
    pub tensor: Traffic,
}

impl MeshShape {
    /// Returns the number of ranks, or `None` if it does not fit a `usize`.
    pub fn ranks(self) -> Option<usize> {
        self.data.checked_mul(self.pipeline)?.checked_mul(self.tensor)
    }

    /// Returns the place of a rank.
    pub fn coordinates(self, rank: usize) -> MeshCoordinates {
        let Self { data, pipeline: _, tensor } = self;
        MeshCoordinates { data: rank / tensor % data, pipeline: rank / tensor / data, tensor: rank % tensor }
    }

    /// Returns the rank at a place.
    pub fn rank(self, place: MeshCoordinates) -> usize {
        (place.pipeline * self.data + place.data) * self.tensor + place.tensor
    }

    /// Checks that the mesh has `world` ranks.
    ///
    /// # Errors
    /// [`ConfigError::MeshShape`] if it has another number of ranks, or an axis without any.
    pub fn check(self, world: usize) -> Result<(), Error> {
        let Self { data, pipeline, tensor } = self;
        match self.ranks() {
            Some(ranks) if ranks == world && ranks > 0 => Ok(()),
            _ => Err(ConfigError::MeshShape { data, pipeline, tensor, world }.into()),
        }
    }

    /// Checks that the engine can train on the mesh.
    ///
    /// # Errors
    /// [`ConfigError::Unsupported`] if `tensor` is not 1.
    pub fn check_trainable(self) -> Result<(), Error> {
        if self.tensor == 1 {
            return Ok(());
        }
        let reason = "a layer cannot be divided among ranks; write 1 and give the ranks to `data` or `pipeline`";
        Err(ConfigError::Unsupported { key: "tensor".to_owned(), found: self.tensor.to_string(), reason }.into())
    }
}

/// One rank's communicators of a mesh: one for all ranks and one for each axis. Each has a thread of its own, so
/// collectives of different axes do not wait for each other; along an axis, every rank submits the same ones in the same
/// order.
#[derive(Debug)]
pub struct Mesh {
    shape: MeshShape,
    place: MeshCoordinates,
    world: AsyncCommunicator,
    data: AsyncCommunicator,
    pipeline: AsyncCommunicator,
    tensor: AsyncCommunicator,
}

impl Mesh {
    /// Divides the ranks of `world` along the axes; every rank must call it with the same shape.
    ///
    /// # Errors
    /// [`ConfigError::MeshShape`] if the shape has another number of ranks than `world`, otherwise those of
    /// [`Communicator::split`].
    ///
    /// # Panics
    /// If the system cannot start a thread.
    pub fn new(mut world: Box<dyn Communicator>, shape: MeshShape) -> Result<Self, Error> {
        shape.check(world.world_size())?;
        let (place, trace) = (shape.coordinates(world.rank()), Trace::default());
        // The color of a group is its first rank.
        let mut group = |axis, ranks: usize, first: MeshCoordinates| {
            let rank = world.rank();
            let group = if ranks == 1 { Box::new(Solo) } else { world.split(shape.rank(first), rank)? };
            Ok::<_, Error>(AsyncCommunicator::with_trace(group, trace.on_axis(axis)))
        };
        let data = group(TraceAxis::Data, shape.data, MeshCoordinates { data: 0, ..place })?;
        let pipeline = group(TraceAxis::Pipeline, shape.pipeline, MeshCoordinates { pipeline: 0, ..place })?;
        let tensor = group(TraceAxis::Tensor, shape.tensor, MeshCoordinates { tensor: 0, ..place })?;
        let world = AsyncCommunicator::with_trace(world, trace);
        Ok(Self { shape, place, world, data, pipeline, tensor })
    }

    /// Returns the number of ranks along each axis.
    pub fn shape(&self) -> MeshShape {
        self.shape
    }

    /// Returns the place of this rank.
    pub fn coordinates(&self) -> MeshCoordinates {
        self.place
    }

    /// Returns how much this rank has sent along each axis.
    pub fn traffic(&self) -> MeshTraffic {
        MeshTraffic {
            world: self.world.traffic(),
            data: self.data.traffic(),
            pipeline: self.pipeline.traffic(),
            tensor: self.tensor.traffic(),
        }
    }

    /// Returns the timeline of this rank, with the collectives of each axis in a lane of their own.
    pub fn trace(&self) -> &Trace {
        self.world.trace()
    }
}

#[cfg_attr(not(test), expect(dead_code, reason = "the engine does not take a mesh yet"))]
impl Mesh {
    /// Returns the communicator of all ranks.
    pub(crate) fn world(&self) -> &AsyncCommunicator {
        &self.world
    }

    /// Returns the communicator of the ranks that hold the same part of the model. Its ranks are numbered by their
    /// `data` coordinate.
    pub(crate) fn data(&self) -> &AsyncCommunicator {
        &self.data
    }

    /// Returns the communicator of the ranks of this rank's pipeline, numbered by their `pipeline` coordinate.
    pub(crate) fn pipeline(&self) -> &AsyncCommunicator {
        &self.pipeline
    }

    /// Returns the communicator of the ranks that share this rank's layers, numbered by their `tensor` coordinate.
    pub(crate) fn tensor(&self) -> &AsyncCommunicator {
        &self.tensor
    }

    /// Returns the rank of the pipeline before this one, by its `pipeline` coordinate; none for the first.
    pub(crate) fn previous(&self) -> Option<usize> {
        self.place.pipeline.checked_sub(1)
    }

    /// Returns the rank of the pipeline after this one, by its `pipeline` coordinate; none for the last.
    pub(crate) fn next(&self) -> Option<usize> {
        Some(self.place.pipeline + 1).filter(|&next| next < self.shape.pipeline)
    }
}

#[cfg(test)]
mod tests;
