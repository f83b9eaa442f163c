//! The mesh of a run: its ranks along the axes data, pipeline and tensor, with a communicator for each axis.

use crate::{
    ConfigError, Error,
    comm::{AsyncCommunicator, Communicator, Solo, Trace, TraceAxis, Traffic},
};

/// The number of ranks along each axis of a mesh. The ranks of a tensor group are neighbours, then those that share a
/// pipeline stage, as in Megatron-LM and torchtitan: rank = (pipeline · `data` + data) · `tensor` + tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MeshShape {
    /// The replicas of the model, which divide the data among them.
    pub data: usize,
    /// The ranks that a micro-batch passes, each with its stages of the model.
    pub pipeline: usize,
    /// The ranks that share every layer.
    pub tensor: usize,
}

/// The place of a rank in a mesh: its index along each axis, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MeshCoordinates {
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
    /// The volume among the replicas of a stage: gradients and weights.
    pub data: Traffic,
    /// The volume along the pipeline: hidden states, their gradients, and tied weights.
    pub pipeline: Traffic,
}

impl MeshShape {
    /// Returns the number of ranks, or `None` if it does not fit a `usize`.
    fn ranks(self) -> Option<usize> {
        self.data.checked_mul(self.pipeline)?.checked_mul(self.tensor)
    }

    /// Returns the place of a rank.
    fn coordinates(self, rank: usize) -> MeshCoordinates {
        let Self { data, pipeline: _, tensor } = self;
        MeshCoordinates { data: rank / tensor % data, pipeline: rank / tensor / data, tensor: rank % tensor }
    }

    /// Checks that the mesh has `world` ranks.
    ///
    /// # Errors
    /// [`ConfigError::MeshShape`] if it has another number of ranks, or an axis without any.
    fn check(self, world: usize) -> Result<(), Error> {
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
    fn check_trainable(self) -> Result<(), Error> {
        if self.tensor == 1 {
            return Ok(());
        }
        let reason = "a layer cannot be divided among ranks; write 1 and give the ranks to `data` or `pipeline`";
        Err(ConfigError::Unsupported { key: "tensor".to_owned(), found: self.tensor.to_string(), reason }.into())
    }
}

/// One rank's communicators of a mesh, one for each axis that the engine uses. Each has a thread of its own, so collectives
/// of different axes do not wait for each other; along an axis, every rank submits the same ones in the same order.
#[derive(Debug)]
pub(crate) struct Mesh {
    /// The ranks that hold the same part of the model, numbered by their `data` coordinate.
    pub(crate) data: AsyncCommunicator,
    /// The ranks of this rank's pipeline, numbered by their `pipeline` coordinate.
    pub(crate) pipeline: AsyncCommunicator,
}

impl Mesh {
    /// Divides the ranks of `world` along the axes; every rank must call it with the same shape. Both communicators
    /// record into one trace.
    ///
    /// # Errors
    /// [`ConfigError::MeshShape`] if the shape has another number of ranks than `world`, [`ConfigError::Unsupported`] if
    /// the engine cannot train on it, otherwise those of [`Communicator::split`].
    ///
    /// # Panics
    /// If the system cannot start a thread.
    pub(crate) fn new(mut world: Box<dyn Communicator>, shape: MeshShape) -> Result<Self, Error> {
        shape.check(world.world_size())?;
        shape.check_trainable()?;
        let (rank, trace) = (world.rank(), Trace::default());
        let MeshCoordinates { data, pipeline, .. } = shape.coordinates(rank);
        // An axis with all ranks takes the communicator as it is.
        let (data, pipeline): (Box<dyn Communicator>, Box<dyn Communicator>) = match (shape.data, shape.pipeline) {
            (_, 1) => (world, Box::new(Solo)),
            (1, _) => (Box::new(Solo), world),
            _ => (world.split(pipeline, rank)?, world.split(data, rank)?),
        };
        Ok(Self {
            data: AsyncCommunicator::with_trace(data, trace.clone()),
            pipeline: AsyncCommunicator::with_trace(pipeline, trace.on_axis(TraceAxis::Pipeline)),
        })
    }
}

#[cfg(test)]
mod tests;
