//! A model's sizes and variants, from Hugging Face's `config.json`.

use crate::{Error, rope::RopeScaling};
use serde_json::{Map, Value, json};
use std::path::Path;

/// Which projections carry a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Biases {
    /// `q_proj`, `k_proj`, `v_proj`.
    pub qkv: bool,
    /// `o_proj`.
    pub output: bool,
    /// `gate_proj`, `up_proj`, `down_proj`.
    pub mlp: bool,
}

/// The shape of the transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
    /// `llama`, `mistral`, `qwen2` or `qwen3`.
    pub model_type: String,
    /// Rows of the embedding and of the head.
    pub vocab_size: usize,
    /// Features of a token between blocks.
    pub hidden_size: usize,
    /// Features inside the MLP.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; a divisor of the query heads.
    pub num_key_value_heads: usize,
    /// Features of a head; even.
    pub head_dim: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the frequencies are stretched beyond the length of pretraining.
    pub rope_scaling: RopeScaling,
    /// The longest context the model claims.
    pub max_position_embeddings: usize,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Which projections carry a bias.
    pub biases: Biases,
    /// Whether queries and keys are normalised per head (Qwen3).
    pub qk_norm: bool,
    /// A query sees only this many positions.
    pub sliding_window: Option<usize>,
    /// The fields as they were read, to be written back when the model is saved.
    pub source: Map<String, Value>,
}

/// Reads typed fields and says which one is wrong.
struct Fields<'a>(&'a Map<String, Value>);

impl Fields<'_> {
    fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name).filter(|value| !value.is_null())
    }

    fn size(&self, name: &str) -> Result<Option<usize>, Error> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if n > 0 && n < 1 << 40 => Ok(Some(n as usize)),
                _ => Err(Error::config(name, "a positive integer", value)),
            },
        }
    }

    fn needed(&self, name: &str) -> Result<usize, Error> {
        self.size(name)?.ok_or_else(|| Error::config(name, "a positive integer", "nothing"))
    }

    fn number(&self, name: &str, default: f64) -> Result<f64, Error> {
        match self.get(name) {
            None => Ok(default),
            Some(value) => match value.as_f64() {
                Some(x) if x > 0.0 && x.is_finite() => Ok(x),
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
    /// If the file is missing or a field is missing, impossible or not supported.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        let value = serde_json::from_slice(&text).map_err(|e| Error::format(path, "content", "JSON", e.to_string()))?;
        Self::from_json(value).map_err(|error| error.in_file(path))
    }

    /// Reads the fields of a `config.json`.
    ///
    /// # Errors
    /// If a field is missing, impossible or not supported; the error names it.
    pub fn from_json(value: Value) -> Result<Self, Error> {
        let Value::Object(source) = value else {
            return Err(Error::config("config.json", "an object", value));
        };
        let fields = Fields(&source);
        let model_type = model_type(&fields)?;
        refuse_unsupported(&fields)?;
        let (hidden_size, heads) = (fields.needed("hidden_size")?, fields.needed("num_attention_heads")?);
        if fields.get("head_dim").is_none() && !hidden_size.is_multiple_of(heads) {
            return Err(Error::config(
                "hidden_size",
                format!("a multiple of num_attention_heads = {heads}"),
                hidden_size,
            ));
        }
        let (qwen2, attention_bias) = (model_type == "qwen2", fields.flag("attention_bias", false)?);
        let max_position_embeddings = fields.size("max_position_embeddings")?.unwrap_or(2048);
        let rope = fields.get("rope_parameters").or_else(|| fields.get("rope_scaling")).cloned();
        let in_rope = rope.as_ref().and_then(|rope| rope.get("rope_theta")).and_then(Value::as_f64);
        let head_dim = fields.size("head_dim")?.unwrap_or(hidden_size / heads);
        let config = Self {
            vocab_size: fields.needed("vocab_size")?,
            intermediate_size: fields.needed("intermediate_size")?,
            num_hidden_layers: fields.needed("num_hidden_layers")?,
            num_key_value_heads: fields.size("num_key_value_heads")?.unwrap_or(heads),
            rms_norm_eps: fields.number("rms_norm_eps", 1e-6)?,
            rope_theta: in_rope.map_or_else(|| fields.number("rope_theta", 10_000.0), Ok)?,
            rope_scaling: RopeScaling::from_json(rope.as_ref(), max_position_embeddings, head_dim)?,
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
            source: Map::new(),
        };
        config.check()?;
        Ok(Self { source, ..config })
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

    /// Key of the bias-free weight shapes: the features of all query heads, and of all key heads.
    pub fn attention_widths(&self) -> (usize, usize) {
        (self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim)
    }

    /// `config.json` of this model in f32. Rotary divisors from a GGUF file are written as Llama 3's rule if they follow it;
    /// others keep the type `factors`, which `transformers` does not know.
    pub fn to_json(&self) -> Value {
        let mut fields = self.source.clone();
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
        ] {
            fields.insert(name.to_owned(), value);
        }
        if let Some(scaling) = self.rope_scaling.as_llama3(self.head_dim, self.rope_theta) {
            fields.insert("rope_scaling".to_owned(), scaling);
        }
        Value::Object(fields)
    }
}

fn model_type(fields: &Fields<'_>) -> Result<String, Error> {
    let found = fields.get("model_type").and_then(Value::as_str).unwrap_or("nothing");
    match found {
        "llama" | "mistral" | "qwen2" | "qwen3" => Ok(found.to_owned()),
        _ => Err(Error::config("model_type", "llama, mistral, qwen2 or qwen3", found)),
    }
}

/// What would silently give another model if it were passed over.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), Error> {
    match fields.get("hidden_act").and_then(Value::as_str).unwrap_or("silu") {
        "silu" | "swish" => {}
        found => return Err(Error::config("hidden_act", "silu", found)),
    }
    if let Some(quantization) = fields.get("quantization_config") {
        let method = quantization.get("quant_method").unwrap_or(quantization);
        return Err(Error::config(
            "quantization_config",
            "nothing (load the unquantized model, or a GGUF file)",
            method,
        ));
    }
    match fields.get("pretraining_tp").and_then(Value::as_u64).unwrap_or(1) {
        1 => {}
        found => return Err(Error::config("pretraining_tp", "1", found)),
    }
    match fields.get("partial_rotary_factor").and_then(Value::as_f64).unwrap_or(1.0) {
        1.0 => Ok(()),
        found => Err(Error::config("partial_rotary_factor", "1.0", found)),
    }
}

/// Qwen's files carry a window that `use_sliding_window` switches on.
fn sliding_window(fields: &Fields<'_>, model_type: &str) -> Result<Option<usize>, Error> {
    let window = fields.size("sliding_window")?;
    match model_type {
        "mistral" | "llama" => Ok(window),
        _ if !fields.flag("use_sliding_window", false)? => Ok(None),
        _ => Err(Error::config("use_sliding_window", "false (windows on some layers only are not supported)", "true")),
    }
}
