//! The model of a run: loaded whole, or the stages of this rank of a pipeline, or part by part if stage 3 shards it.

use super::{RankPipeline, method::fit};
use crate::{
    model::{self, LoadedModel, RecipeBase},
    recipe::Recipe,
};
use anyhow::Result;
use burn::backend::Autodiff;
use burn_llama::{HeldSegments, Llama, LlamaConfig, Tokenizer, kernel::Kernels};
use burn_zero::{Engine, EngineConfig, ZeroStage};
use std::ops::Range;

/// The engine of a run, which owns the model.
pub(super) type LlamaEngine<B> = Engine<Autodiff<B>, Llama<Autodiff<B>>>;

/// Loads the model of a recipe with the method applied.
pub(crate) struct ModelLoader<B: Kernels> {
    recipe: Recipe,
    base: RecipeBase,
    device: B::Device,
    loading: Loading,
}

/// When the weights of a model are read.
enum Loading {
    /// All weights are read when the model is opened.
    AtOnce,
    /// The weights of this rank's stages are read when the engine is created.
    Stages,
    /// One range of segments after the other is read when the engine is created.
    InParts(Vec<Range<usize>>),
}

impl<B: Kernels> ModelLoader<B> {
    /// Opens the model of a recipe that trains on `world` ranks. Also returns the tokenizer and the model without the
    /// method: placeholders alone, unless it is loaded at once.
    pub(crate) fn open(recipe: &Recipe, world: usize, device: &B::Device) -> Result<(Self, LoadedModel<Autodiff<B>>)> {
        let (base, tokenizer) = RecipeBase::open(recipe)?;
        let sharded = world > 1 && recipe.parallel.sharding.zero_stage == ZeroStage::Weights;
        let (loading, held) = match recipe.parallel.pipeline.pipeline {
            1 if sharded && starts_in_parts(recipe) => (Loading::InParts(parts(base.config())), HeldSegments::of([])),
            1 => (Loading::AtOnce, HeldSegments::all()),
            _ => (Loading::Stages, HeldSegments::of([])),
        };
        let loader = Self { recipe: recipe.clone(), base, device: device.clone(), loading };
        let model = model::with_compute(loader.load(&held)?, recipe.model.compute)?;
        Ok((loader, LoadedModel { model, tokenizer }))
    }

    fn load(&self, held: &HeldSegments) -> Result<Llama<Autodiff<B>>> {
        self.base.load(held, self.recipe.model.dtype.unwrap_or_default(), &self.device)
    }

    /// Creates the engine for the model of [`ModelLoader::open`], to which the method has been applied. Weights that have
    /// not been read are read now: those of this rank's stages, or of one part after the other.
    pub(crate) fn engine(
        &self,
        model: Llama<Autodiff<B>>,
        tokenizer: &Tokenizer,
        config: EngineConfig,
        pipeline: Option<&RankPipeline>,
    ) -> Result<LlamaEngine<B>> {
        let fitted = |held: &HeldSegments| -> Result<_> {
            let part = model::with_compute(self.load(held)?, self.recipe.model.compute)?;
            Ok(fit(part, tokenizer, &self.recipe)?.model)
        };
        match (&self.loading, pipeline) {
            (_, Some(pipeline)) => Ok(config.with_pipeline(pipeline.config.clone()).init(fitted(&pipeline.held())?)?),
            (Loading::InParts(parts), None) => {
                config.init_in_parts(model.assume_held(), parts, |range| fitted(&HeldSegments::of([range])))
            }
            (Loading::AtOnce | Loading::Stages, None) => Ok(config.init(model)?),
        }
    }
}

/// Returns true if the start of a run reads one layer at a time, and not several or the whole adapter.
fn starts_in_parts(recipe: &Recipe) -> bool {
    let method = &recipe.method;
    !method.lora.init_lora_weights.reads_base_weights() && method.virtual_tokens.init_text.is_none()
}

/// Returns consecutive ranges of segments, none of which holds more weights than the largest segment.
fn parts(config: &LlamaConfig) -> Vec<Range<usize>> {
    let counts = config.segment_parameters();
    let most = counts.iter().max().copied().unwrap_or(0);
    let (mut parts, mut held) = (Vec::<Range<usize>>::new(), 0);
    for (segment, &count) in counts.iter().enumerate() {
        match parts.last_mut().filter(|_| held + count <= most) {
            Some(part) => {
                part.end = segment + 1;
                held += count;
            }
            None => {
                parts.push(segment..segment + 1);
                held = count;
            }
        }
    }
    parts
}
