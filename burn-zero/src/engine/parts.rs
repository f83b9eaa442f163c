//! Engines for models that are loaded part by part, so that no rank ever holds all weights (stage 3).

use super::{Engine, EngineConfig, ShardingState, stages::Axes};
use crate::{
    ConfigError, Error,
    gather::WeightShards,
    offload::MemoryTier,
    reduce::GradientReducer,
    segment::{Segments, TrainSegments},
    sharding::{RankInfo, ShardLayout, Sharding, device_of},
    stage::ZeroStage,
};
use burn::{
    module::{ModuleMapper, ModuleVisitor, Param, ParamId},
    tensor::{Int, Tensor, backend::AutodiffBackend},
};
use std::{collections::HashMap, ops::Range};

impl EngineConfig {
    /// Creates the engine of stage 3 for a model that does not fit into the memory of a rank. `load` loads a range of
    /// the model's segments: it returns the model with the values of the parameters that these segments use, and
    /// placeholders of one element for all others. This rank's weight shards are taken out of it and the rest is dropped
    /// before the next range is loaded. `skeleton` is the model with placeholders alone. The engine is bit for bit the
    /// one that [`EngineConfig::init`] creates from the whole model.
    ///
    /// Parameters that are not floats, such as packed weights, are not sharded: every rank keeps those that `load`
    /// returns.
    ///
    /// # Errors
    /// Returns the errors of `load` and those of [`EngineConfig::init`], and [`ConfigError::InvalidValue`] if the stage is
    /// not 3 or `parts` are not consecutive ranges of all segments.
    pub fn init_in_parts<B: AutodiffBackend, M: TrainSegments<B>, E: From<Error>>(
        self,
        skeleton: M,
        parts: &[Range<usize>],
        load: impl FnMut(Range<usize>) -> Result<M, E>,
    ) -> Result<Engine<B, M>, E> {
        let segments = Segments::segments(&skeleton);
        check_parts(parts, segments)?;
        self.build(segments, |sharding, axes, tier| {
            let rank = RankInfo::from(axes.data);
            ShardingState::in_parts(PartwiseModel { skeleton, parts, load, sharding, rank }, tier)
        })
    }
}

fn check_parts(parts: &[Range<usize>], segments: usize) -> Result<(), Error> {
    let end = parts.iter().try_fold(0, |end, part| (part.start == end && part.end > end).then_some(part.end));
    if end == Some(segments) {
        return Ok(());
    }
    let expected = format!("consecutive ranges of all {segments} segments");
    Err(ConfigError::invalid_value("parts", expected, format!("{parts:?}")).into())
}

/// A model that is loaded part by part, and the place of the rank that shards it.
struct PartwiseModel<'a, M, F> {
    skeleton: M,
    parts: &'a [Range<usize>],
    load: F,
    sharding: Sharding,
    rank: RankInfo,
}

impl<B: AutodiffBackend> ShardingState<B> {
    fn in_parts<M: TrainSegments<B>, E: From<Error>>(
        model: PartwiseModel<'_, M, impl FnMut(Range<usize>) -> Result<M, E>>,
        tier: &MemoryTier,
    ) -> Result<(M, Self), E> {
        let PartwiseModel { skeleton, parts, mut load, sharding, rank } = model;
        if sharding.stage != ZeroStage::Weights {
            let found = u8::from(sharding.stage).to_string();
            let error = ConfigError::invalid_value("zero_stage", "3 for a model that is loaded in parts", found);
            return Err(Error::from(error).into());
        }
        let mut whole = ShardLayout::new::<B, M>(&skeleton, sharding, rank, |_| Some(0));
        let device = device_of::<B, M>(&skeleton);
        let mut weights = WeightShards::new(tier, rank)?;
        let mut integers = IntegerParameters::<B> { values: HashMap::new() };
        for range in parts {
            let part = load(range.clone())?;
            let layout = whole.measure_part::<B, M>(&part, range, sharding, rank);
            range.clone().for_each(|segment| part.visit_segment(segment, &mut integers));
            drop(weights.add(part, &layout, &device)?);
        }
        let layout = ShardLayout::from_parameters(whole.parameters, sharding, rank, whole.num_segments);
        let (reducer, tied) = (GradientReducer::new(&layout), Vec::new());
        Ok((skeleton.map(&mut integers), Self { layout, device, reducer, weights: Some(weights), tied }))
    }

    /// Shards a model: the parameters of other stages are dropped, and in stage 3 this rank's weight shards are taken out
    /// of it and kept in `tier`.
    pub(super) fn new<M: TrainSegments<B>>(
        model: M,
        sharding: Sharding,
        axes: Axes<'_>,
        tier: &MemoryTier,
    ) -> Result<(M, Self), Error> {
        let (rank, pipeline) = (RankInfo::from(axes.data), axes.pipeline);
        let layout = ShardLayout::new::<B, M>(&model, sharding, rank, |segment| pipeline.own_chunk(segment));
        let device = device_of::<B, M>(&model);
        let (model, tied) = (pipeline.keep_own(model, &layout), pipeline.tied_parameters(&layout));
        let reducer = GradientReducer::new(&layout);
        if sharding.stage != ZeroStage::Weights {
            return Ok((model, Self { layout, device, reducer, weights: None, tied }));
        }
        let mut weights = WeightShards::new(tier, rank)?;
        let placeholders = weights.add(model, &layout, &device)?;
        Ok((placeholders, Self { layout, device, reducer, weights: Some(weights), tied }))
    }
}

/// Parameters that are not floats, moved from the parts of a model into its skeleton.
struct IntegerParameters<B: AutodiffBackend> {
    values: HashMap<ParamId, B::IntTensorPrimitive>,
}

impl<B: AutodiffBackend> ModuleVisitor<B> for IntegerParameters<B> {
    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<B, D, Int>>) {
        self.values.insert(param.id, param.val().into_primitive());
    }
}

impl<B: AutodiffBackend> ModuleMapper<B> for IntegerParameters<B> {
    fn map_int<const D: usize>(&mut self, param: Param<Tensor<B, D, Int>>) -> Param<Tensor<B, D, Int>> {
        let Some(value) = self.values.remove(&param.id) else { return param };
        let (id, _, mapper) = param.consume();
        Param::from_mapped_value(id, Tensor::from_primitive(value), mapper)
    }
}
