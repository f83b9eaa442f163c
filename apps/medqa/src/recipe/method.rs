//! The table `[method]`: one flat table in the file, four small structs in the program.

use super::value::{Layers, TargetModules};
use burn_peft::config::{Bias, InitLora, OneOrMany};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// `[method]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Method {
    /// Prompts of every kind.
    #[serde(flatten)]
    pub tokens: VirtualTokens,
    /// LoRA and its family.
    #[serde(flatten)]
    pub lora: Lora,
    /// Which weights LoRA goes on, and what else learns.
    #[serde(flatten)]
    pub scope: Scope,
    /// The method.
    #[serde(flatten)]
    pub choice: Choice,
}

/// The method, and what several have.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Choice {
    /// Which parameters learn.
    pub kind: MethodKind,
    /// Dropout, in [0, 1): before LoRA, or of a prefix.
    pub dropout: f64,
    /// An adapter directory to start from; for a prompt also a safetensors file with the state of PEFT's encoder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// For `freeze`: which blocks learn, by default the last two; see [`Layers`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<Layers>,
}

/// Which parameters learn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MethodKind {
    /// Low-rank adapters beside frozen weights.
    #[default]
    Lora,
    /// The same on weights that stay packed: a GGUF file's blocks, or nf4.
    #[serde(rename = "qlora")]
    QLora,
    /// The same as `lora`, magnitude and direction of the weights apart.
    Dora,
    /// Factors of features.
    Ia3,
    /// Keys and values before every sequence, in every block: prefix tuning.
    #[serde(rename = "p-tuning-v2")]
    PTuningV2,
    /// Embeddings before every sequence.
    Prompt,
    /// The same, made by an MLP.
    PTuning,
    /// Every weight.
    Full,
    /// The weights of some blocks; embedding, last norm and head stay as they are.
    Freeze,
}

impl MethodKind {
    /// Whether it is of LoRA's family.
    pub fn is_lora(self) -> bool {
        matches!(self, Self::Lora | Self::QLora | Self::Dora)
    }

    /// Whether it trains virtual tokens.
    pub fn is_prompt(self) -> bool {
        matches!(self, Self::PTuningV2 | Self::Prompt | Self::PTuning)
    }

    /// The highest learning rate if the recipe names none.
    pub fn learning_rate(self) -> f64 {
        match self {
            Self::Lora | Self::QLora | Self::Dora => 2e-4,
            Self::Ia3 => 5e-3,
            Self::PTuningV2 => 5e-3,
            Self::Prompt => 3e-2,
            Self::PTuning => 1e-3,
            Self::Full | Self::Freeze => 2e-5,
        }
    }
}

/// LoRA's numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Lora {
    /// Rank of the adapters.
    pub r: usize,
    /// Their scale: `alpha / r`, or `alpha / √r` with `use_rslora`.
    pub alpha: f64,
    /// Rank-stabilised scale.
    pub use_rslora: bool,
    /// What they start from: true, false, `"gaussian"`, `"orthogonal"`, `"olora"`, `"pissa"`, `"pissa_niter_N"`, or, on nf4,
    /// `"loftq"`: the most of what rounding took.
    pub init_lora_weights: InitLora,
    /// For `"loftq"`: how often the base is rounded; 1, the default, is all that leaves it nf4 of the model's weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loftq_iter: Option<usize>,
    /// Other ranks, by the end of a path or a regular expression.
    pub rank_pattern: Map<String, Value>,
    /// Other values of `alpha`, likewise.
    pub alpha_pattern: Map<String, Value>,
}

impl Default for Lora {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 16.0,
            use_rslora: false,
            init_lora_weights: InitLora::True,
            loftq_iter: None,
            rank_pattern: Map::new(),
            alpha_pattern: Map::new(),
        }
    }
}

/// What LoRA's family goes on, and what else learns.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scope {
    /// Which projections get an adapter: names, or one pattern. By default PEFT's for LLaMA: those of queries and values, for
    /// IA3 keys, values and `down_proj`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<TargetModules>,
    /// Which of them get none after all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Only in the blocks of these numbers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// What the lists of blocks are called, where `layers_to_transform` cannot tell: a name or several.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_pattern: Option<OneOrMany<String>>,
    /// For `ia3`: those of `target_modules` whose inputs are scaled instead of their outputs; by default `down_proj`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feedforward_modules: Option<TargetModules>,
    /// Which biases of the model learn: `"none"`, `"all"` or `"lora_only"`.
    pub bias: Bias,
    /// Modules of the model that learn whole, such as `"lm_head"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules_to_save: Option<Vec<String>>,
}

/// Prompts of every kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VirtualTokens {
    /// How many there are.
    pub num_virtual_tokens: usize,
    /// For `p-tuning-v2`: an MLP makes them while they are trained.
    pub prefix_projection: bool,
    /// Its width, and that of `p-tuning`'s; by default PEFT's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_hidden_size: Option<usize>,
    /// For `p-tuning-v2`: `"zero"` starts from keys and values of zero, not random ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_weights: Option<String>,
    /// A text that they start as (not with an MLP).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_text: Option<String>,
    /// For `prompt`: they start as tokens drawn from the vocabulary.
    pub init_from_vocabulary: bool,
}

impl Default for VirtualTokens {
    fn default() -> Self {
        Self {
            num_virtual_tokens: 20,
            prefix_projection: false,
            encoder_hidden_size: None,
            init_weights: None,
            init_text: None,
            init_from_vocabulary: false,
        }
    }
}
