//! LoRA's configuration, with PEFT's field names and defaults.

mod adalora;
mod json;
mod selection;
mod tokens;

pub use adalora::AdaLoraConfig;
pub(crate) use selection::Selection;
pub use tokens::TokenIndices;

use crate::{Error, TargetModules};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The configuration of a LoRA adapter: the fields of PEFT's `adapter_config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// The LoRA rank.
    pub r: usize,
    /// The adapter's output is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// The dropout probability of an input feature during training.
    pub lora_dropout: f64,
    /// If true, scales by `lora_alpha / √r` instead (rank-stabilized LoRA: Kalajdzievski, 2023, arXiv:2312.03732).
    pub use_rslora: bool,
    /// The layers that get an adapter.
    pub target_modules: TargetModules,
    /// Layers that get no adapter even if `target_modules` selects them: a list of names or a regular expression.
    pub exclude_modules: Option<TargetModules>,
    /// The indices of the transformer blocks that get adapters. Needs a list as `target_modules`.
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// The name of the module list that holds the blocks, for paths with several numbers.
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Ranks other than `r`, by a regular expression that the end of a layer's path matches; the first match counts.
    pub rank_pattern: Map<String, Value>,
    /// Values other than `lora_alpha`, in the form of `rank_pattern`.
    pub alpha_pattern: Map<String, Value>,
    /// If true, trains magnitude and direction of the weight separately (DoRA: Liu et al., 2024, arXiv:2402.09353).
    pub use_dora: bool,
    /// The initialization of the adapter.
    pub init_lora_weights: InitLoraWeights,
    /// The biases of the base model that are trained along with the adapter.
    pub bias: Bias,
    /// Modules of the base model, such as `lm_head`, that are fully trained along with the adapter.
    pub modules_to_save: Option<Vec<String>>,
    /// Tokens whose rows of the embedding are trained by themselves; they replace those of the base model.
    pub trainable_token_indices: Option<TokenIndices>,
    /// If true, LoRA on the embedding acts on an output head that shares its weight, too. The rows of
    /// `trainable_token_indices` always do.
    pub ensure_weight_tying: bool,
    /// True if the adapter's file also holds the base model's embedding or output head, which are not trained: PEFT
    /// writes them after the vocabulary has grown. Not a field of the file.
    #[serde(skip)]
    pub save_embedding_layers: bool,
    /// The schedule of ranks of AdaLoRA, whose initial rank is `r`; `None` for LoRA. A loaded adapter is plain LoRA.
    #[serde(skip)]
    pub adalora: Option<AdaLoraConfig>,
    /// The name or path of the base model, for information only.
    pub base_model_name_or_path: Option<String>,
}

/// One value or a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One value.
    One(T),
    /// A list; an empty one counts as absent.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// Returns all values.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// The biases of the base model that are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// No biases.
    #[default]
    None,
    /// All biases of the model.
    All,
    /// The biases of layers with an adapter.
    LoraOnly,
}

/// The initialization of `A` and `B`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum InitLoraWeights {
    /// `A` is uniform in `±1/√in`, `B` is zero.
    #[default]
    True,
    /// Both are random: the adapter changes the model's output from the start.
    False,
    /// `A` is normal with standard deviation `1/r`, `B` is zero.
    Gaussian,
    /// `A` and `B` are random mixtures of the two halves of a random orthogonal matrix: neither is zero, but `B·A` is.
    Orthogonal,
    /// The principal singular components of the weight, which keeps the residual (PiSSA: Meng et al., 2024,
    /// arXiv:2404.02948), computed by `niter` subspace iterations, or until they converge.
    Pissa {
        /// The number of iterations in `pissa_niter_<n>`.
        niter: Option<usize>,
    },
    /// The first directions of the weight's QR decomposition; the weight keeps the residual (OLoRA: Büyükakyüz, 2024,
    /// arXiv:2406.01775).
    Olora,
    /// The principal singular components of the error of quantizing the weight to NF4 (LoftQ with one iteration: Li et
    /// al., 2023, arXiv:2310.08659). Initializes like `True` until
    /// [`replace_lora_weights_loftq`](crate::adapter::replace_lora_weights_loftq) is called, which needs the original
    /// weight. Files also say `True`: the base is plain NF4, and loading the adapter must not initialize it again.
    Loftq,
    /// Another initialization of PEFT, which a loaded adapter may have been trained from.
    Other(String),
}

impl InitLoraWeights {
    /// Returns true if the initialization subtracts `s·B·A` from the base weights (PiSSA, OLoRA).
    pub fn mutates_base_weights(&self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora)
    }

    /// Returns true if the initial values are computed from the base weights, so that all of these must be there.
    pub fn reads_base_weights(&self) -> bool {
        self.mutates_base_weights() || *self == Self::Loftq
    }
}

impl TryFrom<Value> for InitLoraWeights {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        Ok(match &value {
            Value::Bool(true) => Self::True,
            Value::Bool(false) => Self::False,
            Value::String(name) => match name.to_lowercase().as_str() {
                "gaussian" => Self::Gaussian,
                "orthogonal" => Self::Orthogonal,
                "olora" => Self::Olora,
                "loftq" => Self::Loftq,
                "pissa" => Self::Pissa { niter: None },
                other => match other.strip_prefix("pissa_niter_").map(str::parse) {
                    Some(Ok(niter)) => Self::Pissa { niter: Some(niter) },
                    _ => Self::Other(name.clone()),
                },
            },
            other => return Err(format!("init_lora_weights: expected true, false or a name, found {other}")),
        })
    }
}

impl From<InitLoraWeights> for Value {
    fn from(init: InitLoraWeights) -> Self {
        match init {
            InitLoraWeights::True => true.into(),
            InitLoraWeights::False => false.into(),
            InitLoraWeights::Gaussian => "gaussian".into(),
            InitLoraWeights::Orthogonal => "orthogonal".into(),
            InitLoraWeights::Olora => "olora".into(),
            InitLoraWeights::Loftq => "loftq".into(),
            InitLoraWeights::Pissa { niter: None } => "pissa".into(),
            InitLoraWeights::Pissa { niter: Some(n) } => format!("pissa_niter_{n}").into(),
            InitLoraWeights::Other(name) => name.into(),
        }
    }
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            layers_pattern: None,
            rank_pattern: Map::new(),
            alpha_pattern: Map::new(),
            use_dora: false,
            init_lora_weights: InitLoraWeights::True,
            bias: Bias::None,
            modules_to_save: None,
            trainable_token_indices: None,
            ensure_weight_tying: false,
            save_embedding_layers: false,
            adalora: None,
            base_model_name_or_path: None,
        }
    }
}

impl LoraConfig {
    /// Returns `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`; patterns are not considered.
    pub fn scaling(&self) -> f64 {
        self.scale(self.r, self.lora_alpha)
    }

    /// Returns the LoRA rank of the layer at `path`.
    pub fn rank_at(&self, path: &str) -> usize {
        pattern_value(&self.rank_pattern, path).and_then(Value::as_u64).map_or(self.r, |r| r as usize)
    }

    /// Returns the scaling of the adapter of the layer at `path`.
    pub fn scaling_at(&self, path: &str) -> f64 {
        let alpha = pattern_value(&self.alpha_pattern, path).and_then(Value::as_f64).unwrap_or(self.lora_alpha);
        self.scale(self.rank_at(path), alpha)
    }

    fn scale(&self, r: usize, alpha: f64) -> f64 {
        if self.adalora.is_some() {
            // As in PEFT, whatever ranks are left.
            return if alpha > 0.0 { alpha } else { r as f64 } / (r as f64 + 1e-5);
        }
        alpha / if self.use_rslora { (r as f64).sqrt() } else { r as f64 }
    }

    /// Returns true if the token embedding at `path` gets low-rank matrices; `all-linear` does not select it.
    ///
    /// # Errors
    /// If a pattern is not a regular expression.
    pub fn selects_embedding(&self, path: &str) -> Result<bool, Error> {
        Ok(Selection::new(self)?.selects_embedding(path))
    }

    /// Returns the number of the adapter's trainable values on linear layers of these paths and shapes `[out, in]`,
    /// without the base model's parameters that are trained along with it (`bias`, `modules_to_save`).
    ///
    /// # Errors
    /// If the configuration is invalid.
    pub fn count_trainable<'a>(&self, layers: impl IntoIterator<Item = (&'a str, [usize; 2])>) -> Result<usize, Error> {
        self.check()?;
        let selection = Selection::new(self)?;
        let count = |(path, [out, features]): (&str, [usize; 2])| {
            let r = self.rank_at(path);
            let (magnitude, factors) =
                (if self.use_dora { out } else { 0 }, if self.adalora.is_some() { r } else { 0 });
            r * (out + features) + magnitude + factors
        };
        Ok(layers.into_iter().filter(|(path, _)| selection.selects(path)).map(count).sum())
    }

    /// Returns true if the adapter is plain LoRA: one rank and one scaling of `B·A` on an unchanged base model.
    pub fn is_plain(&self) -> bool {
        let patterns = self.rank_pattern.is_empty() && self.alpha_pattern.is_empty();
        patterns
            && !self.use_dora
            && self.adalora.is_none()
            && !self.changes_base()
            && self.trainable_token_indices.is_none()
    }

    /// Returns true if the adapter also changes the base model: by its initialization, `bias`, `modules_to_save`, or an
    /// embedding of its own.
    pub fn changes_base(&self) -> bool {
        let saved = self.modules_to_save.as_ref().is_some_and(|modules| !modules.is_empty());
        saved || self.save_embedding_layers || self.bias != Bias::None || self.init_lora_weights.mutates_base_weights()
    }

    /// Checks the values of all fields.
    ///
    /// # Errors
    /// If a value is invalid; names the field, the value and the valid values.
    pub fn check(&self) -> Result<(), Error> {
        if self.r == 0 {
            return Err(Error::config("`r` should be a positive integer value but the value passed is 0"));
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            let found = self.lora_dropout;
            return Err(Error::config(format!("`lora_dropout` should be at least 0 and below 1 but is {found}")));
        }
        self.check_patterns()?;
        self.check_layers()?;
        self.check_adalora()?;
        if let Some(exclude) = &self.exclude_modules {
            exclude.matcher()?;
        }
        if self.init_lora_weights == InitLoraWeights::Orthogonal && !self.r.is_multiple_of(2) {
            let r = self.r;
            let message = format!("Orthogonal initialization requires the LoRA rank to be even, got {r} instead.");
            return Err(Error::config(message));
        }
        self.target_modules.matcher().map(|_| ())
    }

    fn check_patterns(&self) -> Result<(), Error> {
        let rank = |value: &Value| value.as_u64().is_some_and(|r| r > 0);
        let alpha = |value: &Value| value.as_f64().is_some();
        let ranks = self.rank_pattern.iter().map(|(key, value)| ("rank_pattern", key, value, rank(value)));
        let alphas = self.alpha_pattern.iter().map(|(key, value)| ("alpha_pattern", key, value, alpha(value)));
        for (field, key, value, fits) in ranks.chain(alphas) {
            if !fits {
                return Err(Error::config(format!("`{field}`: expected a positive number for {key:?}, found {value}")));
            }
            pattern_regex(key)
                .map_err(|e| Error::config(format!("`{field}`: {key:?} is no regular expression: {e}")))?;
        }
        Ok(())
    }

    fn check_layers(&self) -> Result<(), Error> {
        let given = self.layers_to_transform.is_some();
        if given && matches!(self.target_modules, TargetModules::Pattern(_)) {
            return Err(Error::config("`layers_to_transform` cannot be used when `target_modules` is a str."));
        }
        if self.layers_pattern.is_some() && !given {
            let message = "When `layers_pattern` is specified, `layers_to_transform` must also be specified. ";
            return Err(Error::config(message));
        }
        Ok(())
    }
}

/// Returns the regular expression for a pattern's key, which has to match the end of a path.
fn pattern_regex(key: &str) -> Result<fancy_regex::Regex, Box<fancy_regex::Error>> {
    fancy_regex::Regex::new(&format!(r"^(?:.*\.)?(?:{key})$")).map_err(Box::new)
}

fn pattern_value<'a>(patterns: &'a Map<String, Value>, path: &str) -> Option<&'a Value> {
    let fits = |key: &str| pattern_regex(key).is_ok_and(|regex| regex.is_match(path).unwrap_or(false));
    patterns.iter().find(|(key, _)| fits(key)).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn scaling_follows_peft() {
        let config = LoraConfig { r: 4, lora_alpha: 6.0, ..Default::default() };
        assert_eq!(config.scaling(), 1.5);
        assert_eq!(LoraConfig { use_rslora: true, ..config }.scaling(), 3.0);
        assert_eq!(LoraConfig::default().scaling(), 1.0);
    }

    #[test]
    fn the_first_pattern_that_fits_decides() {
        let map = |value: Value| value.as_object().unwrap().clone();
        let config = LoraConfig {
            rank_pattern: map(json!({ r"layers\.1\..*v_proj": 2, "v_proj": 16 })),
            alpha_pattern: map(json!({ "self_attn.v_proj": 4.0 })),
            ..Default::default()
        };
        let path = |layer: usize, name: &str| format!("model.layers.{layer}.self_attn.{name}");
        for (layer, name, rank, scaling) in
            [(0, "v_proj", 16, 0.25), (1, "v_proj", 2, 2.0), (0, "q_proj", 8, 1.0), (0, "xv_proj", 8, 1.0)]
        {
            let path = path(layer, name);
            assert_eq!((config.rank_at(&path), config.scaling_at(&path)), (rank, scaling), "{path}");
        }
    }

    #[test]
    fn invalid_values_are_rejected_by_name() {
        let map = |value: Value| value.as_object().unwrap().clone();
        let base = LoraConfig::default;
        let table = [
            (LoraConfig { r: 0, ..base() }, "`r` should be a positive integer value but the value passed is 0"),
            (LoraConfig { lora_dropout: 1.0, ..base() }, "lora_dropout"),
            (LoraConfig { rank_pattern: map(json!({"q_proj": 0})), ..base() }, "rank_pattern"),
            (LoraConfig { alpha_pattern: map(json!({"(": 1})), ..base() }, "alpha_pattern"),
            (LoraConfig { layers_pattern: Some(OneOrMany::One("layers".into())), ..base() }, "layers_to_transform"),
            (
                LoraConfig {
                    layers_to_transform: Some(OneOrMany::One(0)),
                    target_modules: TargetModules::Pattern(".*q_proj".into()),
                    ..base()
                },
                "`layers_to_transform` cannot be used when `target_modules` is a str.",
            ),
            (LoraConfig { r: 3, init_lora_weights: InitLoraWeights::Orthogonal, ..base() }, "even, got 3"),
        ];
        for (config, expected) in table {
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
