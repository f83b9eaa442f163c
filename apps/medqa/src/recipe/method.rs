//! The table `[method]`: one flat table in the file, five small structs in the program.

use super::value::{TargetModules, TrainableLayers, describe};
use burn_peft::config::{AdaLoraConfig, Bias, InitLoraWeights, OneOrMany};
use serde::{Deserialize, Deserializer, Serialize, de::Error};
use serde_json::{Map, Value};

/// The table `[method]`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct MethodConfig {
    /// The virtual tokens of prompt tuning, P-tuning and P-tuning v2.
    #[serde(flatten)]
    pub virtual_tokens: VirtualTokens,
    /// The hyperparameters of LoRA and its variants.
    #[serde(flatten)]
    pub lora: LoraOptions,
    /// The schedule of ranks of AdaLoRA.
    #[serde(flatten)]
    pub adalora: AdaLoraOptions,
    /// The modules that get adapters, and those that are trained in full.
    #[serde(flatten)]
    pub targets: AdapterTargets,
    /// The method, and settings that several methods share.
    #[serde(flatten)]
    pub common: CommonMethodConfig,
}

/// The method, and settings that several methods share.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CommonMethodConfig {
    /// The fine-tuning method.
    pub kind: MethodKind,
    /// The dropout probability, in [0, 1): on the input of LoRA, or on a prefix.
    pub dropout: f64,
    /// An adapter directory to start from; for a prompt also a safetensors file with the state of PEFT's encoder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<String>,
    /// For `freeze`: the blocks that are trained, by default the last two; see [`TrainableLayers`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers: Option<TrainableLayers>,
}

/// The fine-tuning method.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum MethodKind {
    /// Low-rank adapters beside frozen weights.
    #[default]
    Lora,
    /// LoRA on weights that stay quantized: a GGUF file's blocks, or nf4.
    #[serde(rename = "qlora")]
    #[value(name = "qlora")]
    QLora,
    /// LoRA with the magnitude and the direction of the weights trained separately.
    Dora,
    /// LoRA whose ranks are allocated to the layers during training, by importance.
    #[serde(rename = "adalora")]
    #[value(name = "adalora")]
    AdaLora,
    /// Learned scaling factors of features.
    Ia3,
    /// Prefix tuning: learned keys and values before every sequence, in every block.
    #[serde(rename = "p-tuning-v2")]
    PTuningV2,
    /// Prompt tuning: learned embeddings before every sequence.
    Prompt,
    /// Prompt tuning whose embeddings an MLP produces.
    PTuning,
    /// Full fine-tuning: every weight is trained.
    Full,
    /// Training of some blocks only; embedding, final norm and output head stay frozen.
    Freeze,
}

impl MethodKind {
    /// Returns whether this is LoRA or one of its variants.
    pub fn is_lora(self) -> bool {
        matches!(self, Self::Lora | Self::QLora | Self::Dora | Self::AdaLora)
    }

    /// Returns whether this method trains virtual tokens.
    pub fn is_prompt(self) -> bool {
        matches!(self, Self::PTuningV2 | Self::Prompt | Self::PTuning)
    }

    /// Returns the peak learning rate for a recipe that names none.
    pub fn default_learning_rate(self) -> f64 {
        match self {
            Self::Lora | Self::QLora | Self::Dora => 2e-4,
            Self::AdaLora => 1e-3,
            Self::Ia3 => 5e-3,
            Self::PTuningV2 => 5e-3,
            Self::Prompt => 3e-2,
            Self::PTuning => 1e-3,
            Self::Full | Self::Freeze => 2e-5,
        }
    }
}

/// The hyperparameters of LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraOptions {
    /// The LoRA rank.
    pub r: usize,
    /// The numerator of the adapters' scale: `alpha / r`, or `alpha / √r` with `use_rslora`.
    pub alpha: f64,
    /// True for the rank-stabilised scale.
    pub use_rslora: bool,
    /// The initialization of the adapters: true, false, `"gaussian"`, `"orthogonal"`, `"olora"`, `"pissa"`,
    /// `"pissa_niter_N"`, or, on nf4, `"loftq"`: a low-rank approximation of the quantization error.
    pub init_lora_weights: InitLoraWeights,
    /// For `"loftq"`: the number of times that the base model is quantized; only with 1, the default, does it stay nf4
    /// of the model's weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loftq_iter: Option<usize>,
    /// LoRA ranks of single modules, by the end of a path or a regular expression.
    pub rank_pattern: Map<String, Value>,
    /// Values of `alpha` of single modules, likewise.
    pub alpha_pattern: Map<String, Value>,
}

impl Default for LoraOptions {
    fn default() -> Self {
        Self {
            r: 8,
            alpha: 16.0,
            use_rslora: false,
            init_lora_weights: InitLoraWeights::True,
            loftq_iter: None,
            rank_pattern: Map::new(),
            alpha_pattern: Map::new(),
        }
    }
}

/// The schedule of ranks of AdaLoRA: PEFT's fields, with its defaults.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdaLoraOptions {
    /// The rank of every layer at first; `r` is for the other kinds.
    pub init_r: usize,
    /// The mean rank of a layer in the end.
    pub target_r: usize,
    /// The number of steps before the first allocation.
    pub tinit: usize,
    /// The number of steps after the last allocation.
    pub tfinal: usize,
    /// The number of steps from one allocation to the next.
    #[serde(alias = "deltaT")]
    pub delta_t: usize,
    /// The decay rate of the mean importance.
    pub beta1: f64,
    /// The decay rate of the mean deviation of the importance from its mean.
    pub beta2: f64,
    /// The coefficient of the loss that keeps the rows of `A` and the columns of `B` orthonormal.
    pub orth_reg_weight: f64,
}

impl Default for AdaLoraOptions {
    fn default() -> Self {
        let AdaLoraConfig { target_r, tinit, tfinal, delta_t, beta1, beta2, orth_reg_weight, .. } =
            AdaLoraConfig::default();
        Self { init_r: 12, target_r, tinit, tfinal, delta_t, beta1, beta2, orth_reg_weight }
    }
}

impl AdaLoraOptions {
    /// Returns the schedule for a run of `total_step` steps.
    pub(crate) fn schedule(&self, total_step: usize) -> AdaLoraConfig {
        let Self { target_r, tinit, tfinal, delta_t, beta1, beta2, orth_reg_weight, .. } = *self;
        AdaLoraConfig { target_r, tinit, tfinal, delta_t, beta1, beta2, orth_reg_weight, total_step }
    }

    /// Checks that a run of `steps` steps leaves steps between the first allocation and the last one; the error says
    /// what is wrong with `tinit` and `tfinal`.
    pub(crate) fn check_steps(&self, steps: usize) -> Result<(), String> {
        let Self { tinit, tfinal, .. } = *self;
        if tinit.saturating_add(tfinal) < steps {
            return Ok(());
        }
        Err(format!("expected `tinit` + `tfinal` below the {steps} steps of the run, found {tinit} + {tfinal}"))
    }
}

/// The modules that get adapters, and those that are trained in full.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterTargets {
    /// The projections that get an adapter: names, or one pattern. By default PEFT's for LLaMA: those of queries and
    /// values, for IA3 those of keys and values and `down_proj`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_modules: Option<TargetModules>,
    /// The projections among these that get none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// The indices of the blocks that get adapters; by default all.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "deserialize_indices")]
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// The names of the lists of blocks, if `layers_to_transform` alone is ambiguous: one or several.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "deserialize_names")]
    pub layers_pattern: Option<OneOrMany<String>>,
    /// For `ia3`: the modules of `target_modules` whose inputs are scaled instead of their outputs; by default
    /// `down_proj`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub feedforward_modules: Option<TargetModules>,
    /// The biases of the model that are trained: `"none"`, `"all"` or `"lora_only"`.
    pub bias: Bias,
    /// The modules of the model that are trained in full, such as `"lm_head"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub modules_to_save: Option<Vec<String>>,
    /// Tokens to add to the tokenizer, such as `"<finding>"`. Their rows of the embedding start from the mean of the
    /// others and are trained; they and the tokenizer are saved with the adapter.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub new_tokens: Vec<String>,
}

fn deserialize_indices<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<OneOrMany<usize>>, D::Error> {
    deserialize_one_or_many(deserializer, "a block's index, 0 or more, or a list of indices")
}

fn deserialize_names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<OneOrMany<String>>, D::Error> {
    deserialize_one_or_many(deserializer, "a name, or a list of names")
}

/// Reads one value or a list; serde's own error would only name the type.
fn deserialize_one_or_many<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
    expected: &str,
) -> Result<Option<OneOrMany<T>>, D::Error> {
    let value = toml::Value::deserialize(deserializer)?;
    let found = describe(&value);
    OneOrMany::deserialize(value).map(Some).map_err(|_| D::Error::custom(format!("expected {expected}, found {found}")))
}

/// The virtual tokens of prompt tuning, P-tuning and P-tuning v2.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VirtualTokens {
    /// The number of virtual tokens.
    pub num_virtual_tokens: usize,
    /// For `p-tuning-v2`: an MLP produces them during training.
    pub prefix_projection: bool,
    /// The hidden size of this MLP and of `p-tuning`'s; by default PEFT's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub encoder_hidden_size: Option<usize>,
    /// For `p-tuning-v2`: `"zero"` starts from keys and values of zero, not random ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_weights: Option<String>,
    /// The text that they are initialized from (not with an MLP).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_text: Option<String>,
    /// For `prompt`: initializes them from tokens drawn from the vocabulary.
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
