//! Translation of GGUF metadata into the `config.json` that the same model has on the Hugging Face Hub.

use serde_json::{Map, Value as Json, json};

use super::{Gguf, MetadataValue};
use crate::error::Error;

/// The architectures whose metadata can be translated.
const ARCHITECTURES: [&str; 3] = ["llama", "qwen2", "qwen3"];

impl Gguf {
    /// Returns the equivalent of the model's Hugging Face `config.json`.
    ///
    /// The keys are the same: `model_type`, `hidden_size`, `num_hidden_layers`, … . Llama 3's frequency scaling is
    /// stored in GGUF as a tensor of divisors, `rope_freqs.weight`; it becomes
    /// `"rope_scaling": {"rope_type": "factors", "factors": [head_dim / 2 numbers that divide inv_freq]}`.
    ///
    /// # Errors
    ///
    /// [`Error::Format`] naming the metadata key or tensor that is missing or wrong, or an architecture other than
    /// `llama`, `qwen2`, `qwen3`.
    pub fn config_json(&self) -> Result<Json, Error> {
        let architecture = self.text("general.architecture")?.unwrap_or("none");
        if !ARCHITECTURES.contains(&architecture) {
            let expected = format!("one of {}", ARCHITECTURES.join(", "));
            return Err(self.error("general.architecture", &expected, architecture));
        }
        let hidden = self.required_integer("embedding_length")?;
        let heads = self.required_integer("attention.head_count")?;
        let key_value_heads = self.optional_integer("attention.head_count_kv")?.unwrap_or(heads);
        let mut config = Map::new();
        let mut set = |key: &str, value: Json| config.insert(key.to_owned(), value);
        set("model_type", json!(architecture));
        set("vocab_size", json!(self.vocabulary_rows()?));
        set("hidden_size", json!(hidden));
        set("intermediate_size", json!(self.required_integer("feed_forward_length")?));
        set("num_hidden_layers", json!(self.required_integer("block_count")?));
        set("num_attention_heads", json!(heads));
        set("num_key_value_heads", json!(key_value_heads));
        set("head_dim", json!(self.head_dim(hidden, heads)?));
        set("hidden_act", json!("silu"));
        set("max_position_embeddings", json!(self.required_integer("context_length")?));
        set("rms_norm_eps", json!(self.required_float("attention.layer_norm_rms_epsilon")?));
        // The default of llama.cpp for a missing key.
        set("rope_theta", json!(self.optional_float("rope.freq_base")?.unwrap_or(10000.0)));
        set("tie_word_embeddings", json!(self.tensor("output.weight").is_none()));
        if architecture != "qwen2" {
            // Qwen2 always has query, key and value biases and no configuration field for them.
            set("attention_bias", json!(self.tensor("blk.0.attn_q.bias").is_some()));
            set("mlp_bias", json!(self.tensor("blk.0.ffn_gate.bias").is_some()));
        }
        if let Some(scaling) = self.rope_scaling()? {
            set("rope_scaling", scaling);
        }
        if let Some(window) = self.optional_integer("attention.sliding_window")? {
            set("sliding_window", json!(window));
            if architecture == "llama" {
                // llama.cpp has no architecture of its own for Mistral, the only one of this name that has a window.
                set("model_type", json!("mistral"));
            }
        }
        for key in ["bos_token_id", "eos_token_id"] {
            if let Some(id) = self.integer(&format!("tokenizer.ggml.{key}"))? {
                set(key, json!(id));
            }
        }
        Ok(Json::Object(config))
    }

    /// Returns the number of rows of the embedding: the vocabulary including its padding.
    fn vocabulary_rows(&self) -> Result<usize, Error> {
        let name = "token_embd.weight";
        match self.tensor(name).map(|entry| entry.shape.as_slice()) {
            Some(&[rows, _]) => Ok(rows),
            Some(shape) => Err(self.error(name, "shape [vocabulary, hidden]", &format!("{shape:?}"))),
            None => Err(self.error(name, "a tensor of this name", "none; is this a vocabulary without a model?")),
        }
    }

    /// Returns the size of a head, which may differ from `hidden_size / num_attention_heads`.
    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize, Error> {
        if let Some(size) =
            self.optional_integer("attention.key_length")?.or(self.optional_integer("rope.dimension_count")?)
        {
            return Ok(size);
        }
        if heads == 0 || !hidden.is_multiple_of(heads) {
            let key = self.key("attention.head_count")?;
            return Err(self.error(&key, &format!("a divisor of {hidden}"), &heads.to_string()));
        }
        Ok(hidden / heads)
    }

    /// Returns the `rope_scaling` object, from the tensor of divisors if there is one, else from the metadata.
    fn rope_scaling(&self) -> Result<Option<Json>, Error> {
        if let Some(entry) = self.tensor("rope_freqs.weight") {
            return Ok(Some(json!({ "rope_type": "factors", "factors": self.read(entry)? })));
        }
        let key = self.key("rope.scaling.type")?;
        let kind = match self.text(&key)? {
            None | Some("none") => return Ok(None),
            Some(kind @ ("linear" | "yarn")) => kind,
            Some(other) => return Err(self.error(&key, "none, linear or yarn", other)),
        };
        let mut scaling = Map::new();
        scaling.insert("rope_type".to_owned(), json!(kind));
        scaling.insert("factor".to_owned(), json!(self.required_float("rope.scaling.factor")?));
        if let Some(length) = self.optional_integer("rope.scaling.original_context_length")? {
            scaling.insert("original_max_position_embeddings".to_owned(), json!(length));
        }
        for (suffix, name) in [("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")] {
            if let Some(value) = self.optional_float(&format!("rope.scaling.{suffix}"))? {
                scaling.insert(name.to_owned(), json!(value));
            }
        }
        Ok(Some(Json::Object(scaling)))
    }

    /// Returns the full key of a hyperparameter: its name prefixed with the architecture.
    fn key(&self, name: &str) -> Result<String, Error> {
        Ok(format!("{}.{name}", self.text("general.architecture")?.unwrap_or_default()))
    }

    /// Returns an integer hyperparameter that may be absent.
    fn optional_integer(&self, name: &str) -> Result<Option<usize>, Error> {
        self.integer(&self.key(name)?)
    }

    /// Returns a required integer hyperparameter.
    fn required_integer(&self, name: &str) -> Result<usize, Error> {
        self.optional_integer(name)?.map_or_else(|| Err(self.error(&self.key(name)?, "an integer", "no such key")), Ok)
    }

    /// Returns a float hyperparameter that may be absent.
    ///
    /// The file stores it in 32 bits: 1e-5 reads back as 9.99999974e-6. The shortest decimal with the same `f32` value
    /// is the number of the original configuration.
    fn optional_float(&self, name: &str) -> Result<Option<f64>, Error> {
        let value = self.typed(&self.key(name)?, "a float", MetadataValue::as_f64)?;
        Ok(value.map(|value| (value as f32).to_string().parse().unwrap_or(value)))
    }

    /// Returns a required float hyperparameter.
    fn required_float(&self, name: &str) -> Result<f64, Error> {
        self.optional_float(name)?.map_or_else(|| Err(self.error(&self.key(name)?, "a float", "no such key")), Ok)
    }
}
