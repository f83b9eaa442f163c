//! The pipeline of a run: the ranks of each pipeline, and the stages of this one.

use crate::{
    footprint::model_shape,
    recipe::{Partition, PipelineOptions, Recipe},
};
use anyhow::{Context, Result, bail};
use burn_llama::{Example, HeldSegments, LlamaConfig};
use burn_zero::{
    PipelineConfig,
    comm::Communicator,
    estimate::RankStages,
    pipeline::{PartitionMethod, PipelineSchedule, PipelineShape, SendMode},
};
use std::ops::Range;

/// Returns the number of pipelines of a run on `ranks` ranks, among which the rows are divided.
///
/// # Errors
/// One line with the numbers, if the ranks are not those that the recipe asks for.
pub(crate) fn replicas(options: &PipelineOptions, ranks: usize) -> Result<usize> {
    let PipelineOptions { pipeline, data, .. } = *options;
    match data {
        Some(data) if data * pipeline != ranks => bail!(
            "`parallel.pipeline` = {pipeline} and `parallel.data` = {data}: expected {} ranks (mpirun -n {}), found {ranks}",
            data * pipeline,
            data * pipeline
        ),
        _ if !ranks.is_multiple_of(pipeline) => bail!(
            "`parallel.pipeline` = {pipeline}: expected a multiple of {pipeline} ranks (mpirun -n {pipeline}), found {ranks}"
        ),
        _ => Ok(ranks / pipeline),
    }
}

/// The mean row of the training data.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MeanRow {
    pub tokens: u64,
    /// The tokens that are learned.
    pub targets: u64,
}

impl MeanRow {
    /// A row of a question and an answer, before the data is read.
    pub(crate) const TYPICAL: Self = Self { tokens: 512, targets: 256 };

    /// Returns the mean of some rows, at least one token.
    pub(crate) fn of<'a>(rows: impl Iterator<Item = &'a Example>) -> Self {
        let (mut count, mut tokens, mut targets) = (0, 0, 0);
        for row in rows {
            (count, tokens, targets) = (count + 1, tokens + row.ids.len(), targets + row.num_targets());
        }
        let mean = |sum: usize| sum.div_ceil(count.max(1)).max(1) as u64;
        Self { tokens: mean(tokens), targets: mean(targets) }
    }
}

/// Returns the segments of every stage of a model.
///
/// # Errors
/// One line with the numbers, if the model has too few segments for the stages or the recipe's list does not fit it.
pub(crate) fn stage_segments(
    options: &PipelineOptions,
    config: &LlamaConfig,
    row: MeanRow,
) -> Result<Vec<Range<usize>>> {
    let flops = model_shape(config).segment_flops(row.tokens, row.targets);
    let method = match &options.partition {
        Partition::Time => PartitionMethod::Weighted(flops.clone()),
        Partition::Uniform => PartitionMethod::Uniform,
        Partition::Explicit(sizes) => PartitionMethod::Explicit(sizes.clone()),
    };
    let (ranks, chunks) = (options.pipeline, options.chunks());
    method
        .split(&flops, ranks * chunks)
        .with_context(|| format!("`parallel.pipeline` = {ranks} with {chunks} stages per rank"))
}

/// The place of this rank in its pipeline, and the stages that it runs.
#[derive(Debug, Clone)]
pub(crate) struct RankPipeline {
    /// The pipeline, for the engine.
    pub config: PipelineConfig,
    /// The stages of this rank, for the estimate of its memory.
    pub stages: RankStages,
}

impl RankPipeline {
    /// Returns the pipeline of a recipe; none if every rank runs the whole model.
    ///
    /// # Errors
    /// As [`replicas`] and [`stage_segments`].
    pub(crate) fn new(
        recipe: &Recipe,
        config: &LlamaConfig,
        row: MeanRow,
        communicator: &dyn Communicator,
    ) -> Result<Option<Self>> {
        let options = &recipe.parallel.pipeline;
        let replicas = replicas(options, communicator.world_size())?;
        if options.pipeline == 1 {
            return Ok(None);
        }
        let segments = stage_segments(options, config, row)?;
        let mut ranks = rank_stages(options, &segments, recipe.train.steps.gradient_accumulation)?;
        let stages = ranks.swap_remove(communicator.rank() / replicas);
        let (ranks, chunks, kind) = (options.pipeline, options.chunks(), options.schedule);
        Ok(Some(Self { config: PipelineConfig { ranks, kind, chunks, segments }, stages }))
    }

    /// Returns the segments of this rank.
    pub(crate) fn held(&self) -> HeldSegments {
        HeldSegments::of(self.stages.segments.iter().cloned())
    }
}

/// Returns the stages of every rank of a pipeline, with what the schedule keeps of them for `micro_batches`.
pub(crate) fn rank_stages(
    options: &PipelineOptions,
    segments: &[Range<usize>],
    micro_batches: usize,
) -> Result<Vec<RankStages>> {
    let shape = PipelineShape::new(options.pipeline, options.chunks(), micro_batches)?;
    let schedule = PipelineSchedule::new(options.schedule, shape.with_placement(options.schedule.placement()))?;
    Ok(RankStages::of_program(&schedule.program(SendMode::Buffered), segments))
}
