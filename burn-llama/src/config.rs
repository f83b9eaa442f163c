//! The sizes and variants of a model, read from Hugging Face's `config.json`.

mod rotary;

use crate::{Error, rope::RopeScaling};
use rotary::RotaryConfig;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The projections that carry a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// True if `q_proj`, `k_proj` and `v_proj` have a bias.
    pub qkv: bool,
    /// True if `o_proj` has a bias.
    pub output: bool,
    /// True if `gate_proj`, `up_proj` and `down_proj` have a bias.
    pub mlp: bool,
}

/// The shape of the transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// `llama`, `mistral`, `qwen2` or `qwen3`.
    pub model_type: String,
    /// The number of rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// The number of features of a hidden state.
    pub hidden_size: usize,
    /// The number of features inside the MLP.
    pub intermediate_size: usize,
    /// The number of transformer blocks.
    pub num_hidden_layers: usize,
    /// The number of query heads.
    pub num_attention_heads: usize,
    /// The number of key and value heads; a divisor of the number of query heads.
    pub num_key_value_heads: usize,
    /// The number of features of a head; even.
    pub head_dim: usize,
    /// The epsilon of RMSNorm, added to the mean square.
    pub rms_norm_eps: f64,
    /// The base of the rotary frequencies.
    pub rope_theta: f64,
    /// The scaling of the rotary frequencies for contexts longer than in pretraining.
    pub rope_scaling: RopeScaling,
    /// The longest context that the model claims to support.
    pub max_position_embeddings: usize,
    /// True if the output head shares the weight of the embedding.
    pub tie_word_embeddings: bool,
    /// The projections that carry a bias.
    pub biases: Biases,
    /// True if queries and keys are normalised per head (Qwen3).
    pub qk_norm: bool,
    /// The number of positions that a query attends to at most, its own included.
    pub sliding_window: Option<usize>,
    /// The fields as they were read; they are written back when the model is saved.
    pub raw_fields: Map<String, Value>,
}

/// Reads typed fields; its errors name the field that is wrong.
struct ConfigFields<'a>(&'a Map<String, Value>);

impl ConfigFields<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn positive_integer(&self, name: &str) -> Result<Option<usize>, Error> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if n > 0 && n < 1 << 40 => Ok(Some(n as usize)),
                _ => Err(Error::config(name, "a positive integer", value)),
            },
        }
    }

    fn required(&self, name: &str) -> Result<usize, Error> {
        self.positive_integer(name)?.ok_or_else(|| Error::config(name, "a positive integer", "nothing"))
    }

    /// Returns the positive integer, or the default if there is no such key.
    fn integer_or(&self, name: &str, default: Option<usize>) -> Result<Option<usize>, Error> {
        if self.0.contains_key(name) { self.positive_integer(name) } else { Ok(default) }
    }

    fn optional_positive_number(&self, name: &str) -> Result<Option<f64>, Error> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(x) if x > 0.0 && x.is_finite() => Ok(Some(x)),
                _ => Err(Error::config(name, "a positive number", value)),
            },
        }
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool, Error> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| Error::config(name, "true or false", value)),
        }
    }
}

impl LlamaConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// Returns an error if the file is missing or a field is missing, impossible or not supported.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let value = serde_json::from_slice(&text).map_err(|e| Error::format(path, "content", "JSON", e.to_string()))?;
        Self::from_json(value).map_err(|error| error.in_file(path))
    }

    /// Reads the fields of a `config.json`.
    ///
    /// # Errors
    /// Returns an error if a field is missing, impossible or not supported; it names the field.
    pub fn from_json(value: Value) -> Result<Self, Error> {
        let Value::Object(source) = value else {
            return Err(Error::config("config.json", "an object", value));
        };
        let fields = ConfigFields(&source);
        let model_type = model_type(&fields)?;
        refuse_unsupported(&fields)?;
        let (hidden_size, heads) = (fields.required("hidden_size")?, fields.required("num_attention_heads")?);
        let head_dim = head_dim(&fields, &model_type, hidden_size, heads)?;
        let (qwen2, attention_bias) = (model_type == "qwen2", fields.flag("attention_bias", false)?);
        let defaults = ModelDefaults::of(&model_type);
        let max_position_embeddings =
            fields.positive_integer("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings);
        let rotary = RotaryConfig::read(&fields, max_position_embeddings, head_dim)?;
        let config = Self {
            vocab_size: fields.required("vocab_size")?,
            intermediate_size: fields.required("intermediate_size")?,
            num_hidden_layers: fields.required("num_hidden_layers")?,
            num_key_value_heads: fields
                .integer_or("num_key_value_heads", defaults.num_key_value_heads)?
                .unwrap_or(heads),
            rms_norm_eps: fields.optional_positive_number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: rotary.theta,
            rope_scaling: rotary.scaling,
            tie_word_embeddings: fields.flag("tie_word_embeddings", false)?,
            biases: Biases {
                qkv: qwen2 || attention_bias,
                output: !qwen2 && attention_bias,
                mlp: fields.flag("mlp_bias", false)?,
            },
            qk_norm: model_type == "qwen3",
            sliding_window: sliding_window(&fields, &model_type)?,
            num_attention_heads: heads,
            model_type,
            hidden_size,
            head_dim,
            max_position_embeddings,
            raw_fields: Map::new(),
        };
        config.check()?;
        Ok(Self { raw_fields: source, ..config })
    }

    fn check(&self) -> Result<(), Error> {
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if !heads.is_multiple_of(kv) {
            return Err(Error::config(
                "num_key_value_heads",
                format!("a divisor of num_attention_heads = {heads}"),
                kv,
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(Error::config("head_dim", "an even number, since positions rotate pairs", self.head_dim));
        }
        Ok(())
    }

    /// Returns an error for a token id beyond the vocabulary: then tokenizer and model do not belong together.
    pub(crate) fn check_token_ids<'a>(&self, mut ids: impl Iterator<Item = &'a u32>) -> Result<(), Error> {
        match ids.find(|&&id| id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => {
                let expected = format!("token ids below {} (is the tokenizer the model's own?)", self.vocab_size);
                Err(Error::config("vocab_size", expected, id))
            }
        }
    }

    /// Gives the output head a weight of its own.
    pub(crate) fn untie(&mut self) {
        self.tie_word_embeddings = false;
        self.raw_fields.insert("tie_word_embeddings".to_owned(), false.into());
    }

    /// Returns the number of positions that the model supports, unless its rotary frequencies are scaled for longer
    /// contexts.
    pub fn position_limit(&self) -> Option<usize> {
        match self.rope_scaling {
            RopeScaling::None => Some(self.max_position_embeddings),
            RopeScaling::Dynamic { original } => Some(original),
            _ => None,
        }
    }

    /// Refuses a sequence that is longer than [`LlamaConfig::position_limit`].
    pub(crate) fn check_length(&self, found: usize) -> Result<(), Error> {
        match self.position_limit() {
            Some(limit) if found > limit => Err(Error::ContextLength { limit, found }),
            _ => Ok(()),
        }
    }

    /// Returns the `config.json` of this model with weights in f32, which `transformers` 4.40 to 5 read the same: keys
    /// that have changed their names are written under both. Rotary divisors from a GGUF file are written as Llama 3's
    /// rule if they follow it; other divisors keep the type `factors`, which `transformers` does not know.
    pub fn to_json(&self) -> Value {
        let mut fields = self.raw_fields.clone();
        let architecture = match self.model_type.as_str() {
            "mistral" => "MistralForCausalLM",
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        for (name, value) in [
            ("architectures", json!([architecture])),
            ("dtype", json!("float32")),
            ("torch_dtype", json!("float32")),
            ("model_type", json!(self.model_type)),
            // The defaults of these depend on the model type, or on the version.
            ("num_key_value_heads", json!(self.num_key_value_heads)),
            ("head_dim", json!(self.head_dim)),
            ("max_position_embeddings", json!(self.max_position_embeddings)),
            ("tie_word_embeddings", json!(self.tie_word_embeddings)),
        ] {
            fields.insert(name.to_owned(), value);
        }
        if self.model_type == "mistral" {
            fields.insert("sliding_window".to_owned(), json!(self.sliding_window));
        }
        rotary::write(self, &mut fields);
        Value::Object(fields)
    }
}

/// The values of keys that a `config.json` may lack, where `transformers` has other ones for other model types.
struct ModelDefaults {
    num_key_value_heads: Option<usize>,
    max_position_embeddings: usize,
    sliding_window: Option<usize>,
}

impl ModelDefaults {
    fn of(model_type: &str) -> Self {
        match model_type {
            "mistral" => {
                Self { num_key_value_heads: Some(8), max_position_embeddings: 131_072, sliding_window: Some(4096) }
            }
            "qwen2" | "qwen3" => {
                Self { num_key_value_heads: Some(32), max_position_embeddings: 32_768, sliding_window: None }
            }
            _ => Self { num_key_value_heads: None, max_position_embeddings: 2048, sliding_window: None },
        }
    }
}

fn model_type(fields: &ConfigFields<'_>) -> Result<String, Error> {
    let found = fields.get("model_type").and_then(Value::as_str).unwrap_or("nothing");
    match found {
        "llama" | "mistral" | "qwen2" | "qwen3" => Ok(found.to_owned()),
        _ => Err(Error::config("model_type", "llama, mistral, qwen2 or qwen3", found)),
    }
}

/// Returns the number of features of a head, by default those of the hidden states divided among the heads, or 128 for
/// Qwen3.
fn head_dim(fields: &ConfigFields<'_>, model_type: &str, hidden_size: usize, heads: usize) -> Result<usize, Error> {
    match fields.integer_or("head_dim", (model_type == "qwen3").then_some(128))? {
        Some(head_dim) => Ok(head_dim),
        None if hidden_size.is_multiple_of(heads) => Ok(hidden_size / heads),
        None => Err(Error::config("hidden_size", format!("a multiple of num_attention_heads = {heads}"), hidden_size)),
    }
}

/// Refuses fields that would silently give another model if they were ignored.
fn refuse_unsupported(fields: &ConfigFields<'_>) -> Result<(), Error> {
    match fields.get("hidden_act").map(|act| (act.as_str(), act)) {
        None | Some((Some("silu" | "swish"), _)) => {}
        Some((_, found)) => return Err(Error::config("hidden_act", "silu", found)),
    }
    if let Some(quantization) = fields.get("quantization_config") {
        let method = quantization.get("quant_method").unwrap_or(quantization);
        return Err(Error::config(
            "quantization_config",
            "nothing (load the unquantized model, or a GGUF file)",
            method,
        ));
    }
    let in_rope = |name: &'static str| Some((name, fields.get(name)?.get("partial_rotary_factor")?));
    let rotary = ["rope_parameters", "rope_scaling"].into_iter().filter_map(in_rope);
    let alone = ["pretraining_tp", "partial_rotary_factor"].into_iter();
    let alone = alone.filter_map(|name| Some((name, fields.get(name)?)));
    match alone.chain(rotary).find(|(_, value)| value.as_f64() != Some(1.0)) {
        None => Ok(()),
        Some((name @ ("pretraining_tp" | "partial_rotary_factor"), found)) => Err(Error::config(name, "1", found)),
        Some((name, found)) => Err(Error::config(format!("{name}.partial_rotary_factor"), "1", found)),
    }
}

/// Returns the sliding window. Llama has none, and Qwen's files carry one that applies only if `use_sliding_window` is
/// true.
fn sliding_window(fields: &ConfigFields<'_>, model_type: &str) -> Result<Option<usize>, Error> {
    match model_type {
        "mistral" => fields.integer_or("sliding_window", ModelDefaults::of(model_type).sliding_window),
        "llama" => Ok(None),
        _ if !fields.flag("use_sliding_window", false)? => Ok(None),
        _ => Err(Error::config("use_sliding_window", "false (windows on some layers only are not supported)", "true")),
    }
}
