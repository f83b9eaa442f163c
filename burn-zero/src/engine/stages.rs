//! The engine's place in a pipeline: the stages of this rank, the communicator of its axis, and the program of a step.

use crate::{
    ConfigError, Error,
    comm::{AsyncCommunicator, Collectives, Communicator},
    gather::TakeParams,
    mesh::{Mesh, MeshShape},
    norm::ExactSum,
    pipeline::{PipelineError, PipelineKind, PipelineSchedule, PipelineShape, Placement, Program, SendMode, StageView},
    sharding::ShardLayout,
    stage::ZeroStage,
};
use burn::{
    module::{Module, ParamId},
    tensor::backend::AutodiffBackend,
};
use std::{collections::HashMap, ops::Range, sync::Arc};

/// A pipeline: its schedule, and the segments of its stages.
///
/// With `ranks` ranks in a pipeline, a world of `ranks · n` ranks trains `n` replicas of the model: rank `p · n + d` has
/// place `p` in the pipeline of replica `d`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PipelineConfig {
    /// The number of ranks in a pipeline.
    pub ranks: usize,
    /// The schedule.
    pub kind: PipelineKind,
    /// The number of stages per rank.
    pub chunks: usize,
    /// The segments of each of the `ranks · chunks` stages, see
    /// [`PartitionMethod::split`](crate::pipeline::PartitionMethod::split).
    pub segments: Vec<Range<usize>>,
}

impl PipelineConfig {
    /// Returns the pipeline of one rank, which has all segments.
    pub(super) fn one_stage(segments: usize) -> Self {
        Self { ranks: 1, kind: PipelineKind::OneFOneB, chunks: 1, segments: std::iter::once(0..segments).collect() }
    }

    /// Checks the settings against the model and the sharding.
    pub(super) fn check(&self, segments: usize, stage: ZeroStage) -> Result<(), Error> {
        self.shape(1)?;
        let mut next = 0;
        let consecutive = self.segments.iter().all(|range| {
            let fits = range.start == next && range.start < range.end;
            next = range.end;
            fits
        });
        if self.segments.len() != self.ranks * self.chunks || !consecutive || next != segments {
            let stages = self.ranks * self.chunks;
            let expected = format!("{stages} consecutive ranges of the {segments} segments");
            return Err(ConfigError::invalid_value("segments", expected, format!("{:?}", self.segments)).into());
        }
        if self.ranks > 1 && stage == ZeroStage::Weights {
            let expected = "at most 2 with a pipeline, because the graphs of all micro-batches in a pipeline hold the \
                            weights that stage 3 would release";
            return Err(ConfigError::invalid_value("zero_stage", expected, "3".to_owned()).into());
        }
        Ok(())
    }

    fn shape(&self, micro_batches: usize) -> Result<PipelineShape, PipelineError> {
        Ok(PipelineShape::new(self.ranks, self.chunks, micro_batches)?.with_placement(self.kind.placement()))
    }
}

/// A rank and a chunk of it.
#[derive(Default)]
struct RankChunk {
    rank: usize,
    chunk: usize,
}

/// This rank's place in the pipeline.
pub(super) struct PipelineAxis {
    pub communicator: AsyncCommunicator,
    config: PipelineConfig,
    /// The program of the last step.
    program: Option<Arc<Program>>,
}

/// The two communicators of a rank: that of the replicas of its stages, and that of its pipeline.
#[derive(Clone, Copy)]
pub(super) struct Axes<'a> {
    pub data: &'a AsyncCommunicator,
    pub pipeline: &'a PipelineAxis,
}

impl PipelineAxis {
    /// Splits the world into the group of the ranks that run the same stages, and the pipeline.
    pub(super) fn split(
        world: Box<dyn Communicator>,
        config: PipelineConfig,
    ) -> Result<(AsyncCommunicator, Self), Error> {
        let ranks = world.world_size();
        if !ranks.is_multiple_of(config.ranks) {
            let expected = format!("a divisor of the {ranks} ranks that train together");
            return Err(ConfigError::invalid_value("pipeline", expected, config.ranks.to_string()).into());
        }
        let shape = MeshShape { data: ranks / config.ranks, pipeline: config.ranks, tensor: 1 };
        let Mesh { data, pipeline: communicator } = Mesh::new(world, shape)?;
        Ok((data, Self { communicator, config, program: None }))
    }

    /// Returns this rank's place.
    pub(super) fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// Returns true if this rank runs all segments as one stage.
    pub(super) fn is_one_stage(&self) -> bool {
        self.config.segments.len() == 1
    }

    /// Returns the rank that runs a segment, and its chunk.
    fn place(&self, segment: usize) -> RankChunk {
        let stage = self.config.segments.iter().position(|range| range.contains(&segment)).unwrap_or(0);
        let shape = self.config.shape(1).ok();
        shape.map_or(RankChunk::default(), |shape| RankChunk {
            rank: shape.stage_rank(stage),
            chunk: shape.stage_chunk(stage),
        })
    }

    /// Returns the rank that runs a segment.
    pub(super) fn rank_of(&self, segment: usize) -> usize {
        self.place(segment).rank
    }

    /// Returns the chunk of this rank that runs a segment; none if another rank does.
    pub(super) fn own_chunk(&self, segment: usize) -> Option<usize> {
        let RankChunk { rank, chunk } = self.place(segment);
        (rank == self.rank()).then_some(chunk)
    }

    /// Replaces the parameters that no stage of this rank uses by placeholders of one element.
    pub(super) fn keep_own<B: AutodiffBackend, M: Module<B>>(&self, model: M, layout: &ShardLayout) -> M {
        if self.is_one_stage() {
            return model;
        }
        let selects = |id: ParamId| {
            let mut uses = layout.parameters[layout.parameter_index[&id]].segments.iter();
            !uses.any(|&segment| self.rank_of(segment) == self.rank())
        };
        model.map(&mut TakeParams { layout, selects, values: HashMap::new() })
    }

    pub(super) fn stage_view(&self, program: &Program) -> StageView<'_> {
        StageView { shape: program.shape, rank: self.rank(), segments: &self.config.segments }
    }

    /// Returns the program of a step.
    pub(super) fn program(&mut self, micro_batches: usize) -> Result<Arc<Program>, Error> {
        if let Some(known) = self.program.as_ref().filter(|program| program.shape.micro_batches() == micro_batches) {
            return Ok(known.clone());
        }
        let schedule = PipelineSchedule::new(self.config.kind, self.config.shape(micro_batches)?)?;
        let program = schedule.program(SendMode::Buffered);
        program.validate(SendMode::Buffered)?;
        Ok(self.program.insert(Arc::new(program)).clone())
    }

    /// Returns the program that only runs the forward passes.
    pub(super) fn forward_program(&self, micro_batches: usize) -> Result<Program, Error> {
        // These kinds exist for any number of micro-batches.
        let kind = match self.config.kind.placement() {
            Placement::V => PipelineKind::ZBV,
            Placement::Loop => PipelineKind::LoopedBFS,
        };
        let schedule = PipelineSchedule::new(kind, self.config.shape(micro_batches)?)?;
        Ok(schedule.program(SendMode::Buffered).forward_only())
    }

    /// Merges the sums of all ranks of the pipeline.
    pub(super) fn merge(&self, own: &ExactSum) -> Result<ExactSum, Error> {
        let own = own.to_bytes();
        let all = self.communicator.submit("share", move |group| group.all_gather_object(&own)).wait()?;
        let mut total = ExactSum::default();
        all.iter().for_each(|message| total.merge(ExactSum::from_bytes(message).0));
        Ok(total)
    }
}
