//! Prompt learning: virtual tokens are trained while the model is frozen.
//!
//! ```text
//! table [v, e] ─ MLP? ─► [v, width] ─┬─ prefix: keys and values in every layer, to which every sequence attends
//!                                    └─ prompt: embeddings before every sequence
//! ```
//!
//! Every method is an encoder whose output is inserted at one of two points of the model, which is all that the model
//! has to support, see [`EncodedPrompt`]. PEFT's file holds the encoder's output: the MLP is only needed for training.

mod config;
mod encoder;
mod file;

pub use config::{BaseShape, PromptConfig, PromptMethod, PromptTuningInit};
pub use encoder::PromptEncoder;

use crate::{Error, ForwardContext, param, random};
use burn::{
    module::Module,
    tensor::{DType, Tensor, TensorData, s},
};
use burn_peft_kernels::LinearKernels;

/// A prompt of a model, trained or in training.
#[derive(Module, Debug)]
pub struct Prompt<B: LinearKernels> {
    /// The encoder, which computes the virtual tokens.
    pub encoder: PromptEncoder<B>,
    /// The adapter's name; `default` unless set by [`Prompt::named`].
    pub name: String,
    /// True if the prompt is active: a forward pass without a route uses the first active prompt.
    pub active: bool,
    config: PromptConfig,
    base: BaseShape,
    /// True if another rank holds the encoder, and this prompt has placeholders.
    elsewhere: bool,
}

/// The point of the model at which virtual tokens are inserted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injection {
    /// In the KV cache of every layer, as keys and values: PEFT's `past_key_values`.
    PastKeyValues,
    /// Before every sequence, as input embeddings.
    Embeddings,
}

/// The virtual tokens of one forward pass, in one of two forms; the other is empty.
#[derive(Debug, Clone)]
pub struct EncodedPrompt<B: LinearKernels> {
    /// The input embeddings before every sequence: `[num_virtual_tokens, hidden_size]`.
    pub embeddings: Option<Tensor<B, 2>>,
    /// The keys (to which RoPE must not be applied) and values per layer:
    /// `[num_virtual_tokens, 2, kv_heads, head_dim]`.
    pub past_key_values: Vec<Tensor<B, 4>>,
}

impl<B: LinearKernels> Prompt<B> {
    /// Creates a prompt with PEFT's random initialization, drawn with `seed`.
    ///
    /// # Errors
    /// If the configuration is invalid.
    pub fn new(config: &PromptConfig, base: BaseShape, seed: u64, device: &B::Device) -> Result<Self, Error> {
        config.check()?;
        Ok(Self::from_encoder(PromptEncoder::new(config, &base, seed, device), config.clone(), base))
    }

    /// Creates the prompt of a rank that does not hold its encoder: the parameters are placeholders of one element, and
    /// the prompt cannot be encoded. Nothing is drawn.
    ///
    /// # Errors
    /// If the configuration is invalid.
    pub fn placeholder(config: &PromptConfig, base: BaseShape, device: &B::Device) -> Result<Self, Error> {
        config.check()?;
        let encoder = PromptEncoder::placeholder(config, &base, device);
        Ok(Self { elsewhere: true, ..Self::from_encoder(encoder, config.clone(), base) })
    }

    /// Replaces the parameters by placeholders of one element: another rank holds them.
    pub fn into_placeholder(mut self) -> Self {
        self.encoder = param::map_params(self.encoder, &mut param::IntoPlaceholders);
        Self { elsewhere: true, ..self }
    }

    fn from_encoder(encoder: PromptEncoder<B>, config: PromptConfig, base: BaseShape) -> Self {
        Self { encoder, name: "default".to_owned(), active: true, config, base, elsewhere: false }
    }

    /// Renames the prompt; the name also distinguishes its parameter ids from those of other prompts of the model.
    pub fn named(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self.encoder.set_prompt_name(name);
        self
    }

    /// Initializes the virtual tokens to the given `[num_virtual_tokens, width]`, such as a text's embeddings, or its
    /// keys and values.
    ///
    /// # Errors
    /// If the shape differs, or if the encoder has an MLP, which would have to be inverted.
    pub fn with_initial_values(mut self, tokens: Tensor<B, 2>) -> Result<Self, Error> {
        let expected = [self.config.num_virtual_tokens, self.config.width(&self.base)];
        if tokens.dims() != expected {
            let found = tokens.dims();
            return Err(Error::config(format!("the prompt should start from {expected:?} values but got {found:?}")));
        }
        if !self.encoder.layers.is_empty() {
            return Err(Error::config(
                "a prompt with an encoder (`prefix_projection`, P_TUNING) cannot start from a text: its MLP has no \
                 inverse",
            ));
        }
        self.encoder = PromptEncoder::from_embeddings(tokens.cast(DType::F32));
        Ok(self)
    }

    /// Returns the configuration.
    pub fn config(&self) -> &PromptConfig {
        &self.config
    }

    /// Returns the number of virtual tokens.
    pub fn num_virtual_tokens(&self) -> usize {
        self.config.num_virtual_tokens
    }

    /// Returns the point of the model at which the virtual tokens are inserted.
    pub fn injection(&self) -> Injection {
        match self.config.method {
            PromptMethod::Prefix { .. } => Injection::PastKeyValues,
            PromptMethod::Prompt { .. } | PromptMethod::PTuning { .. } => Injection::Embeddings,
        }
    }

    /// Computes the virtual tokens of a forward pass.
    pub fn encode(&self, context: &ForwardContext) -> EncodedPrompt<B> {
        let (tokens, base) = (self.encoder.forward(), &self.base);
        match self.config.method {
            PromptMethod::Prefix { dropout, .. } => {
                let all = apply_dropout(tokens, dropout, context);
                let all = all.reshape([self.num_virtual_tokens(), base.num_hidden_layers, 2, base.kv_dim()]);
                let shape = [self.num_virtual_tokens(), 2, base.num_key_value_heads, base.head_dim];
                let layer = |index: usize| all.clone().slice(s![.., index..index + 1]).reshape(shape);
                EncodedPrompt { embeddings: None, past_key_values: (0..base.num_hidden_layers).map(layer).collect() }
            }
            _ => EncodedPrompt { embeddings: Some(tokens), past_key_values: Vec::new() },
        }
    }
}

/// Applies dropout to the prefix in a training pass. All rows of a step share one mask, as they share the prefix: so
/// the encoder runs once, and gradient accumulation over micro-batches gives the gradient of the whole batch.
fn apply_dropout<B: LinearKernels>(tokens: Tensor<B, 2>, p: f64, context: &ForwardContext) -> Tensor<B, 2> {
    let Some(dropout) = context.dropout.as_ref().filter(|_| p > 0.0) else { return tokens };
    let (shape, device) = (tokens.dims(), tokens.device());
    let mask = dropout.step_mask(random::key_from_str("prompt"), shape[0] * shape[1], p);
    tokens * Tensor::from_data(TensorData::new(mask, shape), (&device, DType::F32))
}
