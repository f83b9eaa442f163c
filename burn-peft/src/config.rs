//! LoRA's configuration, under PEFT's names and with PEFT's defaults.

mod json;

use crate::{Error, TargetModules, target::Selection};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// LoRA's knobs: what PEFT's `adapter_config.json` says of an adapter.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LoraConfig {
    /// The rank.
    pub r: usize,
    /// The adapter's output is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// The probability with which an input feature is dropped while training.
    pub lora_dropout: f64,
    /// Scale by `lora_alpha / √r` instead (Kalajdzievski, 2023, arXiv:2312.03732).
    pub use_rslora: bool,
    /// The layers that get an adapter.
    #[serde(deserialize_with = "default_if_null")]
    pub target_modules: TargetModules,
    /// Layers that get none, whatever `target_modules` says: a list of names or a regular expression.
    pub exclude_modules: Option<TargetModules>,
    /// Only the blocks of these numbers get adapters. Only with a list of `target_modules`.
    pub layers_to_transform: Option<OneOrMany<usize>>,
    /// What the lists of blocks are called, if a path has several numbers.
    pub layers_pattern: Option<OneOrMany<String>>,
    /// Other ranks for layers whose path ends in a name (a regular expression); the first that fits counts.
    #[serde(deserialize_with = "default_if_null")]
    pub rank_pattern: Map<String, Value>,
    /// Other values of `lora_alpha`, as `rank_pattern`.
    #[serde(deserialize_with = "default_if_null")]
    pub alpha_pattern: Map<String, Value>,
    /// Learn magnitude and direction of the weight apart (DoRA: Liu et al., 2024, arXiv:2402.09353).
    pub use_dora: bool,
    /// What the adapter starts from.
    #[serde(deserialize_with = "default_if_null")]
    pub init_lora_weights: InitLora,
    /// Which biases of the base model learn beside the adapter.
    pub bias: Bias,
    /// Modules of the base model that learn whole beside the adapter, such as `lm_head`.
    pub modules_to_save: Option<Vec<String>>,
    /// The base model, for the record.
    pub base_model_name_or_path: Option<String>,
}

/// One value or a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum OneOrMany<T> {
    /// One.
    One(T),
    /// A list; an empty one says nothing.
    Many(Vec<T>),
}

impl<T> OneOrMany<T> {
    /// All of them.
    pub fn as_slice(&self) -> &[T] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Many(many) => many,
        }
    }
}

/// Which biases of the base model learn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bias {
    /// None.
    #[default]
    None,
    /// All of the model.
    All,
    /// Those of layers with an adapter.
    LoraOnly,
}

/// What `A` and `B` start from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum InitLora {
    /// `A` uniform in `±1/√in`, `B` zero.
    #[default]
    True,
    /// Both random: the adapter changes the model from the start.
    False,
    /// `A` normal with deviation `1/r`, `B` zero.
    Gaussian,
    /// The two halves of a random orthogonal matrix, mixed: `A` and `B` do not vanish, their product does.
    Orthogonal,
    /// The principal singular directions of the weight, which keeps the rest (PiSSA: Meng et al., 2024, arXiv:2404.02948); by that
    /// many subspace iterations, or until they no longer change.
    Pissa {
        /// `pissa_niter_<n>`.
        niter: Option<usize>,
    },
    /// The first directions of the weight's QR decomposition, which keeps the rest (OLoRA: Büyükakyüz, 2024, arXiv:2406.01775).
    Olora,
    /// The principal singular directions of what rounding to NF4 took from the weight (LoftQ with one iteration: Li et al., 2023,
    /// arXiv:2310.08659): see [`replace_lora_weights_loftq`](crate::adapter::replace_lora_weights_loftq), which knows the weight as
    /// it was. Until then as `True`, and so in files: the base is nothing but NF4, and nobody is to start again who loads the adapter.
    Loftq,
    /// Another of PEFT's, which a trained adapter may have had.
    Other(String),
}

impl InitLora {
    /// Whether the adapter starts as a part of the weight, which keeps the rest.
    pub fn splits_weight(&self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora)
    }
}

impl TryFrom<Value> for InitLora {
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

impl From<InitLora> for Value {
    fn from(init: InitLora) -> Self {
        match init {
            InitLora::True => true.into(),
            InitLora::False => false.into(),
            InitLora::Gaussian => "gaussian".into(),
            InitLora::Orthogonal => "orthogonal".into(),
            InitLora::Olora => "olora".into(),
            InitLora::Loftq => "loftq".into(),
            InitLora::Pissa { niter: None } => "pissa".into(),
            InitLora::Pissa { niter: Some(n) } => format!("pissa_niter_{n}").into(),
            InitLora::Other(name) => name.into(),
        }
    }
}

/// PEFT writes `null` for what was left out.
pub(crate) fn default_if_null<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
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
            init_lora_weights: InitLora::True,
            bias: Bias::None,
            modules_to_save: None,
            base_model_name_or_path: None,
        }
    }
}

impl LoraConfig {
    /// `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`, where no pattern says otherwise.
    pub fn scaling(&self) -> f64 {
        self.scale(self.r, self.lora_alpha)
    }

    /// The rank of the adapter of the layer at `path`.
    pub fn rank_at(&self, path: &str) -> usize {
        of_pattern(&self.rank_pattern, path).and_then(Value::as_u64).map_or(self.r, |r| r as usize)
    }

    /// The scaling of the adapter of the layer at `path`.
    pub fn scaling_at(&self, path: &str) -> f64 {
        let alpha = of_pattern(&self.alpha_pattern, path).and_then(Value::as_f64).unwrap_or(self.lora_alpha);
        self.scale(self.rank_at(path), alpha)
    }

    fn scale(&self, r: usize, alpha: f64) -> f64 {
        alpha / if self.use_rslora { (r as f64).sqrt() } else { r as f64 }
    }

    /// The number of values that the adapter trains on linear layers of these paths and shapes `[out, in]`, those apart that learn
    /// beside it (`bias`, `modules_to_save`).
    ///
    /// # Errors
    /// If the configuration is not possible.
    pub fn count_trainable<'a>(&self, layers: impl IntoIterator<Item = (&'a str, [usize; 2])>) -> Result<usize, Error> {
        self.check()?;
        let selection = Selection::new(self)?;
        let count = |(path, [out, features]): (&str, [usize; 2])| {
            self.rank_at(path) * (out + features) + if self.use_dora { out } else { 0 }
        };
        Ok(layers.into_iter().filter(|(path, _)| selection.selects(path)).map(count).sum())
    }

    /// Whether the adapter is no more than one rank and one scaling of `B·A` on an unchanged base model.
    pub fn is_plain(&self) -> bool {
        let patterns = self.rank_pattern.is_empty() && self.alpha_pattern.is_empty();
        patterns && !self.use_dora && !self.changes_base()
    }

    /// Whether the adapter changes more of the model than what it adds: by its start, biases or whole modules.
    pub fn changes_base(&self) -> bool {
        let saved = self.modules_to_save.as_ref().is_some_and(|modules| !modules.is_empty());
        saved || self.bias != Bias::None || self.init_lora_weights.splits_weight()
    }

    /// Refuses values that no adapter can have.
    ///
    /// # Errors
    /// Names the field, its value and what would do.
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
        if let Some(exclude) = &self.exclude_modules {
            exclude.matcher()?;
        }
        if self.init_lora_weights == InitLora::Orthogonal && !self.r.is_multiple_of(2) {
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
            pattern(key).map_err(|e| Error::config(format!("`{field}`: {key:?} is no regular expression: {e}")))?;
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

/// The expression that a path has to match for a pattern's key: the key itself at the path's end.
fn pattern(key: &str) -> Result<fancy_regex::Regex, Box<fancy_regex::Error>> {
    fancy_regex::Regex::new(&format!(r"^(?:.*\.)?(?:{key})$")).map_err(Box::new)
}

fn of_pattern<'a>(patterns: &'a Map<String, Value>, path: &str) -> Option<&'a Value> {
    let fits = |key: &str| pattern(key).is_ok_and(|regex| regex.is_match(path).unwrap_or(false));
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
    fn what_cannot_be_is_refused_by_name() {
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
            (LoraConfig { r: 3, init_lora_weights: InitLora::Orthogonal, ..base() }, "even, got 3"),
        ];
        for (config, expected) in table {
            let error = config.check().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
