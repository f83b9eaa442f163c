//! PEFT's `adapter_config.json` for prompt methods.

use crate::{Error, random};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::path::Path;

/// What a prompt has to know of its base model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseShape {
    /// Features of a token between blocks.
    pub hidden_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Features of a head.
    pub head_dim: usize,
}

impl BaseShape {
    /// Features of one layer's keys, or values, of a token.
    pub fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }
}

/// How virtual tokens come about and where they act, under PEFT's names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "peft_type")]
pub enum Method {
    /// Keys and values of every layer: prefix tuning, P-tuning v2 (Liu et al., 2021, arXiv:2110.07602).
    #[serde(rename = "PREFIX_TUNING")]
    Prefix {
        /// The prefix is computed from small embeddings by an MLP while it is trained.
        #[serde(default)]
        prefix_projection: bool,
        /// The MLP's width; the keys' width of one layer if absent.
        #[serde(default)]
        encoder_hidden_size: Option<usize>,
        /// `zero` starts from keys and values of zero; absent starts from random ones.
        #[serde(default)]
        init_weights: Option<String>,
        /// The probability with which a value of the prefix is dropped in a step of training (not in PEFT's file).
        #[serde(default, skip_serializing)]
        dropout: f64,
    },
    /// Embeddings in front of every sequence (Lester et al., 2021, arXiv:2104.08691).
    #[serde(rename = "PROMPT_TUNING")]
    Prompt {
        /// What the embeddings start from.
        #[serde(default)]
        prompt_tuning_init: PromptTuningInit,
        /// The text for [`PromptTuningInit::Text`].
        #[serde(default)]
        prompt_tuning_init_text: Option<String>,
        /// The tokenizer of that text.
        #[serde(default)]
        tokenizer_name_or_path: Option<String>,
    },
    /// Embeddings in front of every sequence, from an MLP while they are trained: P-tuning (Liu et al., 2021,
    /// arXiv:2103.10385).
    #[serde(rename = "P_TUNING")]
    PTuning {
        /// The MLP's width; the model's hidden size if absent.
        #[serde(default)]
        encoder_hidden_size: Option<usize>,
    },
}

/// What the embeddings of prompt tuning start from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum PromptTuningInit {
    /// Normal random numbers.
    #[default]
    #[serde(rename = "RANDOM")]
    Random,
    /// The embeddings of a text's tokens.
    #[serde(rename = "TEXT")]
    Text,
    /// The embeddings of tokens drawn from the vocabulary.
    #[serde(rename = "SAMPLE_VOCAB")]
    SampleVocab,
}

/// A prompt method's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptConfig {
    /// The number of virtual tokens.
    pub num_virtual_tokens: usize,
    /// The method.
    #[serde(flatten)]
    pub method: Method,
    /// The base model, for the record.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
}

/// PEFT's fields that change nothing for a trained adapter, and those that every method has.
const IGNORED: [&str; 17] = [
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_dropout",
    "encoder_num_layers",
    "inference_mode",
    "num_attention_heads",
    "num_layers",
    "num_virtual_tokens",
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
    "token_dim",
    "tokenizer_kwargs",
    "prompt_tuning_init_state_dict_path",
    "prompt_tuning_init_task",
    "dropout",
];
/// Fields that we can only follow at one value, if they are there.
fn neutral_fields() -> [(&'static str, Value); 2] {
    [("modules_to_save", Value::Null), ("num_transformer_submodules", json!(1))]
}

impl PromptConfig {
    /// Prefix tuning with `num_virtual_tokens` and PEFT's defaults.
    pub fn prefix(num_virtual_tokens: usize) -> Self {
        let (prefix_projection, encoder_hidden_size, init_weights, dropout) = (false, None, None, 0.0);
        let method = Method::Prefix { prefix_projection, encoder_hidden_size, init_weights, dropout };
        Self { num_virtual_tokens, method, base_model_name_or_path: None }
    }

    /// Prompt tuning with `num_virtual_tokens`, from random numbers.
    pub fn prompt(num_virtual_tokens: usize) -> Self {
        let (prompt_tuning_init, prompt_tuning_init_text, tokenizer_name_or_path) = Default::default();
        let method = Method::Prompt { prompt_tuning_init, prompt_tuning_init_text, tokenizer_name_or_path };
        Self { num_virtual_tokens, method, base_model_name_or_path: None }
    }

    /// P-tuning with `num_virtual_tokens` and PEFT's defaults.
    pub fn p_tuning(num_virtual_tokens: usize) -> Self {
        let method = Method::PTuning { encoder_hidden_size: None };
        Self { num_virtual_tokens, method, base_model_name_or_path: None }
    }

    /// Refuses values that no prompt can have.
    ///
    /// # Errors
    /// Names the field, its value and what would do.
    pub fn check(&self) -> Result<(), Error> {
        if self.num_virtual_tokens == 0 {
            return Err(Error::config("`num_virtual_tokens` should be a positive integer value but is 0"));
        }
        match &self.method {
            Method::Prefix { encoder_hidden_size: Some(0), .. } | Method::PTuning { encoder_hidden_size: Some(0) } => {
                Err(Error::config("`encoder_hidden_size` should be a positive integer value but is 0"))
            }
            Method::Prefix { dropout, .. } if !(0.0..1.0).contains(dropout) => {
                Err(Error::config(format!("`dropout` of the prefix should be at least 0 and below 1 but is {dropout}")))
            }
            Method::Prefix { init_weights: Some(other), .. } if other != "zero" => {
                Err(Error::config(format!("`init_weights` should be \"zero\" or absent but is {other:?}")))
            }
            Method::Prompt { prompt_tuning_init: PromptTuningInit::Text, prompt_tuning_init_text: None, .. } => {
                Err(Error::config("When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be None."))
            }
            Method::Prompt { prompt_tuning_init: PromptTuningInit::Text, tokenizer_name_or_path: None, .. } => {
                Err(Error::config("When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be None."))
            }
            _ => Ok(()),
        }
    }

    /// What the virtual tokens start from, where the configuration says so; a text that is given besides counts more.
    pub fn init(&self) -> PromptTuningInit {
        match self.method {
            Method::Prompt { prompt_tuning_init, .. } => prompt_tuning_init,
            Method::Prefix { .. } | Method::PTuning { .. } => PromptTuningInit::Random,
        }
    }

    /// The tokens of the model that the virtual ones start as, one for each: those of a text if any are given, repeated or cut, else
    /// what the configuration says, drawn from a vocabulary of that size by the seed; `None` for a start from random numbers.
    ///
    /// # Errors
    /// If the configuration asks for a text that is not given, or the text is empty.
    pub fn start_tokens(
        &self,
        text: Option<&[u32]>,
        (vocabulary, seed): (usize, u64),
    ) -> Result<Option<Vec<u32>>, Error> {
        let n = self.num_virtual_tokens;
        match (self.init(), text) {
            (PromptTuningInit::Text, None | Some([])) => {
                Err(Error::config("`prompt_tuning_init`: expected the tokens of a text for TEXT, found none"))
            }
            (_, Some([])) => Err(Error::config("a text to start from: expected at least one token, found none")),
            (_, Some(text)) => Ok(Some(text.iter().copied().cycle().take(n).collect())),
            (PromptTuningInit::SampleVocab, None) => {
                let key = random::key(&[seed, random::text("prompt.vocabulary")]);
                Ok(Some((0..n as u64).map(|i| (random::uniform(key, i) * vocabulary as f64) as u32).collect()))
            }
            (PromptTuningInit::Random, None) => Ok(None),
        }
    }

    /// The features of one virtual token: those of `prompt_embeddings` in PEFT's file.
    pub fn width(&self, base: &BaseShape) -> usize {
        match self.method {
            Method::Prefix { .. } => base.num_hidden_layers * 2 * base.kv_dim(),
            Method::Prompt { .. } | Method::PTuning { .. } => base.hidden_size,
        }
    }

    /// The widths from the encoder's table to the virtual tokens, one if there is no MLP.
    pub fn widths(&self, base: &BaseShape) -> Vec<usize> {
        let out = self.width(base);
        match self.method {
            Method::Prefix { prefix_projection: true, encoder_hidden_size, .. } => {
                vec![base.kv_dim(), encoder_hidden_size.unwrap_or(base.kv_dim()), out]
            }
            Method::PTuning { encoder_hidden_size } => {
                let hidden = encoder_hidden_size.unwrap_or(out);
                vec![out, hidden, hidden, out]
            }
            Method::Prefix { .. } | Method::Prompt { .. } => vec![out],
        }
    }

    /// The number of trained values.
    pub fn count_trainable(&self, base: &BaseShape) -> usize {
        let widths = self.widths(base);
        self.num_virtual_tokens * widths[0] + widths.windows(2).map(|pair| (pair[0] + 1) * pair[1]).sum::<usize>()
    }

    /// PEFT's `peft_type`.
    pub fn peft_type(&self) -> &'static str {
        match self.method {
            Method::Prefix { .. } => "PREFIX_TUNING",
            Method::Prompt { .. } => "PROMPT_TUNING",
            Method::PTuning { .. } => "P_TUNING",
        }
    }

    /// Whether `adapter_config.json`'s content is that of a prompt method.
    pub fn is_prompt(value: &Value) -> bool {
        matches!(value["peft_type"].as_str(), Some("PREFIX_TUNING" | "PROMPT_TUNING" | "P_TUNING"))
    }

    /// Reads `adapter_config.json`'s content; the second value names fields that are not known here, which the caller should
    /// warn about.
    ///
    /// # Errors
    /// If the adapter is of another kind or uses a feature that is not supported.
    pub fn from_json(path: &Path, value: Value) -> Result<(Self, Vec<String>), Error> {
        if !Self::is_prompt(&value) {
            let found = value["peft_type"].as_str().unwrap_or("nothing").to_owned();
            return Err(Error::format(path, "peft_type", "PREFIX_TUNING, PROMPT_TUNING or P_TUNING", found));
        }
        let neutral = neutral_fields();
        for (name, expected) in &neutral {
            let found = &value[name];
            if !found.is_null() && found != expected {
                return Err(Error::format(path, name, format!("{expected} (nothing else is supported)"), found));
            }
        }
        let read: Self = serde_json::from_value(value.clone())
            .map_err(|e| Error::format(path, "adapter_config.json", "a prompt method's fields", e))?;
        read.check()?;
        let own = json!(read);
        let known = |name: &String| {
            own.get(name).is_some() || IGNORED.contains(&name.as_str()) || neutral.iter().any(|(n, _)| n == name)
        };
        // An LSTM, too, is collapsed in the file: what is read are its outputs.
        let known = |name: &String| known(name) || name == "encoder_reparameterization_type";
        let fields = value.as_object().into_iter().flat_map(Map::keys);
        let unknown = fields.filter(|name| !known(name)).cloned().collect();
        Ok((read, unknown))
    }

    /// `adapter_config.json` as PEFT writes it for this base model.
    pub fn to_json(&self, base: &BaseShape) -> Value {
        let prefix = matches!(self.method, Method::Prefix { .. });
        let (heads, token_dim) = match prefix {
            true => (base.num_key_value_heads, base.kv_dim()),
            false => (base.num_attention_heads, base.hidden_size),
        };
        let mut all = json!({
            "auto_mapping": null, "inference_mode": true, "modules_to_save": null, "num_attention_heads": heads,
            "num_layers": base.num_hidden_layers, "num_transformer_submodules": 1, "revision": null,
            "task_type": "CAUSAL_LM", "token_dim": token_dim,
        });
        let mut add = |fields: Value| {
            if let (Value::Object(all), Value::Object(fields)) = (&mut all, fields) {
                all.extend(fields);
            }
        };
        add(json!(self));
        match &self.method {
            Method::Prefix { encoder_hidden_size: None, .. } | Method::PTuning { encoder_hidden_size: None } => {
                add(json!({ "encoder_hidden_size": token_dim }));
            }
            _ => {}
        }
        match self.method {
            Method::Prompt { .. } => add(json!({ "tokenizer_kwargs": null })),
            Method::PTuning { .. } => add(json!({
                "encoder_dropout": 0.0, "encoder_num_layers": 2, "encoder_reparameterization_type": "MLP",
            })),
            Method::Prefix { .. } => {}
        }
        all.sort_all_objects();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(layers: usize, heads: usize, kv: usize, head_dim: usize) -> BaseShape {
        BaseShape {
            hidden_size: heads * head_dim,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv,
            head_dim,
        }
    }

    fn prefix(v: usize, projected: bool) -> PromptConfig {
        let mut config = PromptConfig::prefix(v);
        if let Method::Prefix { prefix_projection, encoder_hidden_size, .. } = &mut config.method {
            (*prefix_projection, *encoder_hidden_size) = (projected, Some(512));
        }
        config
    }

    #[test]
    fn trainable_counts_are_peft_s() {
        let table = [
            (prefix(128, false), shape(22, 32, 4, 64), 1_441_792),
            (prefix(128, false), shape(32, 32, 32, 128), 33_554_432),
            (prefix(128, false), shape(16, 32, 8, 64), 2_097_152),
            (prefix(128, false), shape(32, 32, 8, 128), 8_388_608),
            (prefix(50, false), shape(28, 24, 8, 128), 2_867_200),
            (PromptConfig::prompt(200), shape(28, 24, 8, 128), 614_400),
            (PromptConfig::p_tuning(20), shape(28, 24, 8, 128), 20 * 3072 + 3 * 3073 * 3072),
        ];
        for (config, base, expected) in table {
            assert_eq!(config.count_trainable(&base), expected, "{config:?} on {base:?}");
        }
    }

    #[test]
    fn a_config_survives_its_own_file_and_unknown_fields_are_told() {
        let base = shape(2, 4, 2, 8);
        let mut json = prefix(3, true).to_json(&base);
        json["from_the_future"] = json!(1);
        let (read, unknown) = PromptConfig::from_json(Path::new("x"), json).unwrap();
        assert_eq!((read, unknown), (prefix(3, true), vec!["from_the_future".to_owned()]));
        let text = json!({
            "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "a",
        });
        let error = PromptConfig::from_json(Path::new("x"), text).unwrap_err().to_string();
        assert_eq!(error, "When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be None.");
        let lora = PromptConfig::from_json(Path::new("x"), json!({"peft_type": "LORA"})).unwrap_err().to_string();
        assert!(lora.contains("PREFIX_TUNING") && lora.contains("LORA"), "{lora}");
        let zero = prefix(0, false).check().unwrap_err().to_string();
        assert!(zero.contains("num_virtual_tokens"), "{zero}");
    }
}
