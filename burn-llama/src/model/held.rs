//! The segments of a model whose parameters a rank holds.

use super::Llama;
use crate::{Error, LlamaConfig, kernel::Kernels};
use burn_peft::Prompt;
use std::ops::Range;

/// The path of the prompts, which the first segment uses.
const PROMPTS: &str = "prompts";

/// The segments (see [`Segments`](burn_zero::segment::Segments)) whose parameters a rank holds: all of them, or those of
/// the stages that it runs in a pipeline. The model of a rank has all its parameters; those that only other ranks hold
/// are placeholders of one element (packed weights: one row).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldSegments(Option<Vec<Range<usize>>>);

impl HeldSegments {
    /// Returns all segments of any model.
    pub fn all() -> Self {
        Self(None)
    }

    /// Returns the segments of some ranges, each from 0 to twice the number of layers plus 1; the order of the ranges
    /// does not matter.
    pub fn of(ranges: impl IntoIterator<Item = Range<usize>>) -> Self {
        Self(Some(ranges.into_iter().collect()))
    }

    /// Returns true if these are all segments.
    pub fn is_all(&self) -> bool {
        self.0.is_none()
    }

    /// Returns true if the rank holds the parameters of a segment.
    pub fn contains(&self, segment: usize) -> bool {
        self.0.as_ref().is_none_or(|ranges| ranges.iter().any(|range| range.contains(&segment)))
    }

    /// Returns true if the rank holds the parameter, or all parameters of the module, at `path`.
    pub fn holds(&self, config: &LlamaConfig, path: &str) -> bool {
        config.segments_of(path).into_iter().any(|segment| self.contains(segment))
    }
}

impl LlamaConfig {
    /// Returns the number of segments: the embedding, attention and MLP of every layer, and the output head.
    pub fn num_segments(&self) -> usize {
        2 * self.num_hidden_layers + 2
    }

    /// Returns the segments that use the parameter at `path`, or the module at `path`, ascending. An embedding whose
    /// weight the output head shares is used by the first and the last one.
    pub fn segments_of(&self, path: &str) -> Vec<usize> {
        let last = self.num_segments() - 1;
        let is_in =
            |module: &str| path.strip_prefix(module).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        if is_in("model.embed_tokens") {
            return if self.tie_word_embeddings { vec![0, last] } else { vec![0] };
        }
        if is_in(PROMPTS) {
            return vec![0];
        }
        let layer = path.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        let Some((index, module)) = layer.and_then(|(index, rest)| Some((index.parse::<usize>().ok()?, rest))) else {
            return vec![last];
        };
        let attention = module.starts_with("self_attn") || module.starts_with("input_layernorm");
        vec![2 * index + if attention { 1 } else { 2 }]
    }
}

impl<B: Kernels> Llama<B> {
    /// Returns the segments whose parameters the model holds.
    pub fn held_segments(&self) -> &HeldSegments {
        &self.held
    }

    /// Says that the model holds all parameters, or will when a rank gathers those that are placeholders.
    pub fn assume_held(mut self) -> Self {
        self.held = HeldSegments::all();
        self.model.embed_tokens.assume_held();
        burn_peft::Linears::linears_mut(&mut self, &mut |_, linear| linear.assume_held());
        self
    }

    /// Adds a prompt to the model; its parameters become placeholders if another rank holds the first segment.
    pub fn add_prompt(&mut self, prompt: Prompt<B>) {
        self.prompts.push(if self.held.contains(0) { prompt } else { prompt.into_placeholder() });
    }

    /// Returns an error if a start that needs all weights is asked for on a part of the model.
    pub(super) fn check_holds_all(&self, start: &str) -> Result<(), Error> {
        if self.held.is_all() { Ok(()) } else { Err(burn_peft::Error::needs_whole_model(start).into()) }
    }
}
