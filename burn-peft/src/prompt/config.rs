//! PEFT's `adapter_config.json` for the prompt learning methods.

use crate::{
    Error, Loaded,
    config_file::{KnownFields, parse_fields},
    random,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::Path;

/// The sizes of the base model that a prompt depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseShape {
    /// The size of the hidden states.
    pub hidden_size: usize,
    /// The number of transformer blocks.
    pub num_hidden_layers: usize,
    /// The number of query heads.
    pub num_attention_heads: usize,
    /// The number of key and value heads.
    pub num_key_value_heads: usize,
    /// The number of features per head.
    pub head_dim: usize,
}

impl BaseShape {
    /// Returns the number of features of one token's keys (or values) in one layer.
    pub fn kv_dim(&self) -> usize {
        self.num_key_value_heads * self.head_dim
    }
}

/// The prompt learning method and its options, with PEFT's names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "peft_type")]
pub enum PromptMethod {
    /// Trained keys and values in every layer: prefix tuning, P-tuning v2 (Liu et al., 2021, arXiv:2110.07602).
    #[serde(rename = "PREFIX_TUNING")]
    Prefix {
        /// If true, an MLP computes the prefix from smaller embeddings during training.
        #[serde(default)]
        prefix_projection: bool,
        /// The width of the MLP; the width of one layer's keys if absent.
        #[serde(default)]
        encoder_hidden_size: Option<usize>,
        /// `zero` initializes keys and values to zero; they are random if absent.
        #[serde(default)]
        init_weights: Option<String>,
        /// The dropout probability of a value of the prefix in a training step (not in PEFT's file).
        #[serde(default, skip_serializing)]
        dropout: f64,
    },
    /// Trained embeddings before every sequence: prompt tuning (Lester et al., 2021, arXiv:2104.08691).
    #[serde(rename = "PROMPT_TUNING")]
    Prompt {
        /// The initialization of the embeddings.
        #[serde(default)]
        prompt_tuning_init: PromptTuningInit,
        /// The initial text for [`PromptTuningInit::Text`].
        #[serde(default)]
        prompt_tuning_init_text: Option<String>,
        /// The tokenizer of the initial text.
        #[serde(default)]
        tokenizer_name_or_path: Option<String>,
    },
    /// Embeddings before every sequence that an MLP computes during training: P-tuning (Liu et al., 2021,
    /// arXiv:2103.10385).
    #[serde(rename = "P_TUNING")]
    PTuning {
        /// The width of the MLP; the model's hidden size if absent.
        #[serde(default)]
        encoder_hidden_size: Option<usize>,
    },
}

/// The initialization of prompt tuning's embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum PromptTuningInit {
    /// Random numbers of the normal distribution.
    #[default]
    #[serde(rename = "RANDOM")]
    Random,
    /// The embeddings of a text's tokens.
    #[serde(rename = "TEXT")]
    Text,
    /// The embeddings of random tokens of the vocabulary.
    #[serde(rename = "SAMPLE_VOCAB")]
    SampleVocab,
}

/// The configuration of a prompt learning method.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PromptConfig {
    /// The number of virtual tokens.
    pub num_virtual_tokens: usize,
    /// The method and its options.
    #[serde(flatten)]
    pub method: PromptMethod,
    /// The name or path of the base model, for information only.
    #[serde(default)]
    pub base_model_name_or_path: Option<String>,
}

/// The values of `peft_type` of the prompt learning methods.
const PROMPT_TYPES: [&str; 3] = ["PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING"];

/// PEFT's fields that make no difference for a trained adapter, and those that all methods share.
const IGNORED: [&str; 18] = [
    "auto_mapping",
    "base_model_name_or_path",
    "encoder_dropout",
    "encoder_num_layers",
    // With an LSTM, too, the file contains only the outputs of the encoder.
    "encoder_reparameterization_type",
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

impl PromptConfig {
    /// Returns the configuration of prefix tuning with PEFT's defaults.
    pub fn prefix(num_virtual_tokens: usize) -> Self {
        let (prefix_projection, encoder_hidden_size, init_weights, dropout) = (false, None, None, 0.0);
        let method = PromptMethod::Prefix { prefix_projection, encoder_hidden_size, init_weights, dropout };
        Self { num_virtual_tokens, method, base_model_name_or_path: None }
    }

    /// Returns the configuration of prompt tuning with random initial embeddings.
    pub fn prompt(num_virtual_tokens: usize) -> Self {
        let (prompt_tuning_init, prompt_tuning_init_text, tokenizer_name_or_path) = Default::default();
        let method = PromptMethod::Prompt { prompt_tuning_init, prompt_tuning_init_text, tokenizer_name_or_path };
        Self { num_virtual_tokens, method, base_model_name_or_path: None }
    }

    /// Returns the configuration of P-tuning with PEFT's defaults.
    pub fn p_tuning(num_virtual_tokens: usize) -> Self {
        let method = PromptMethod::PTuning { encoder_hidden_size: None };
        Self { num_virtual_tokens, method, base_model_name_or_path: None }
    }

    /// Checks the values of all fields.
    ///
    /// # Errors
    /// If a value is invalid; names the field, the value and the valid values.
    pub fn check(&self) -> Result<(), Error> {
        if self.num_virtual_tokens == 0 {
            return Err(Error::config("`num_virtual_tokens` should be a positive integer value but is 0"));
        }
        match &self.method {
            PromptMethod::Prefix { encoder_hidden_size: Some(0), .. }
            | PromptMethod::PTuning { encoder_hidden_size: Some(0) } => {
                Err(Error::config("`encoder_hidden_size` should be a positive integer value but is 0"))
            }
            PromptMethod::Prefix { dropout, .. } if !(0.0..1.0).contains(dropout) => {
                Err(Error::config(format!("`dropout` of the prefix should be at least 0 and below 1 but is {dropout}")))
            }
            PromptMethod::Prefix { init_weights: Some(other), .. } if other != "zero" => {
                Err(Error::config(format!("`init_weights` should be \"zero\" or absent but is {other:?}")))
            }
            PromptMethod::Prompt {
                prompt_tuning_init: PromptTuningInit::Text, prompt_tuning_init_text: None, ..
            } => Err(Error::config("When prompt_tuning_init='TEXT', prompt_tuning_init_text can't be None.")),
            PromptMethod::Prompt {
                prompt_tuning_init: PromptTuningInit::Text, tokenizer_name_or_path: None, ..
            } => Err(Error::config("When prompt_tuning_init='TEXT', tokenizer_name_or_path can't be None.")),
            _ => Ok(()),
        }
    }

    /// Returns the configured initialization of the virtual tokens. A text given to [`PromptConfig::init_token_ids`]
    /// takes precedence.
    pub fn init(&self) -> PromptTuningInit {
        match self.method {
            PromptMethod::Prompt { prompt_tuning_init, .. } => prompt_tuning_init,
            PromptMethod::Prefix { .. } | PromptMethod::PTuning { .. } => PromptTuningInit::Random,
        }
    }

    /// Returns the token ids from which the virtual tokens are initialized, one per virtual token: those of `text` if
    /// given, repeated or truncated, else according to the configuration, where `SAMPLE_VOCAB` draws from a vocabulary
    /// of the given size with the seed. `None` stands for random values.
    ///
    /// # Errors
    /// If the configuration requires a text and none is given, or the text is empty.
    pub fn init_token_ids(
        &self,
        text: Option<&[u32]>,
        vocabulary: usize,
        seed: u64,
    ) -> Result<Option<Vec<u32>>, Error> {
        let n = self.num_virtual_tokens;
        match (self.init(), text) {
            (PromptTuningInit::Text, None | Some([])) => {
                Err(Error::config("`prompt_tuning_init`: expected the tokens of a text for TEXT, found none"))
            }
            (_, Some([])) => Err(Error::config("the prompt's initial text: expected at least one token, found none")),
            (_, Some(text)) => Ok(Some(text.iter().copied().cycle().take(n).collect())),
            (PromptTuningInit::SampleVocab, None) => {
                let key = random::key(&[seed, random::key_from_str("prompt.vocabulary")]);
                Ok(Some((0..n as u64).map(|i| (random::uniform(key, i) * vocabulary as f64) as u32).collect()))
            }
            (PromptTuningInit::Random, None) => Ok(None),
        }
    }

    /// Returns the number of features of one virtual token: the width of `prompt_embeddings` in PEFT's file.
    pub fn width(&self, base: &BaseShape) -> usize {
        match self.method {
            PromptMethod::Prefix { .. } => base.num_hidden_layers * 2 * base.kv_dim(),
            PromptMethod::Prompt { .. } | PromptMethod::PTuning { .. } => base.hidden_size,
        }
    }

    /// Returns the layer widths of the encoder, from the embedding to the virtual tokens; a single one without an MLP.
    pub fn widths(&self, base: &BaseShape) -> Vec<usize> {
        let out = self.width(base);
        match self.method {
            PromptMethod::Prefix { prefix_projection: true, encoder_hidden_size, .. } => {
                vec![base.kv_dim(), encoder_hidden_size.unwrap_or(base.kv_dim()), out]
            }
            PromptMethod::PTuning { encoder_hidden_size } => {
                let hidden = encoder_hidden_size.unwrap_or(out);
                vec![out, hidden, hidden, out]
            }
            PromptMethod::Prefix { .. } | PromptMethod::Prompt { .. } => vec![out],
        }
    }

    /// Returns the number of trainable values.
    pub fn count_trainable(&self, base: &BaseShape) -> usize {
        let widths = self.widths(base);
        self.num_virtual_tokens * widths[0] + widths.windows(2).map(|pair| (pair[0] + 1) * pair[1]).sum::<usize>()
    }

    /// Returns PEFT's `peft_type`.
    pub fn peft_type(&self) -> &'static str {
        match self.method {
            PromptMethod::Prefix { .. } => "PREFIX_TUNING",
            PromptMethod::Prompt { .. } => "PROMPT_TUNING",
            PromptMethod::PTuning { .. } => "P_TUNING",
        }
    }

    /// Returns true if the content of `adapter_config.json` is that of a prompt learning method.
    pub fn is_prompt(value: &Value) -> bool {
        value["peft_type"].as_str().is_some_and(|kind| PROMPT_TYPES.contains(&kind))
    }

    /// Parses the content of `adapter_config.json`.
    ///
    /// # Errors
    /// If the adapter is not a prompt or uses a feature that is not supported.
    pub fn from_json(path: &Path, value: Value) -> Result<Loaded<Self>, Error> {
        let value = parse_fields(path, value, &PROMPT_TYPES)?;
        let config: Self = serde_json::from_value(value.clone())
            .map_err(|e| Error::format(path, "adapter_config.json", "a prompt method's fields", e))?;
        config.check()?;
        let neutral = json!({ "modules_to_save": null, "num_transformer_submodules": 1 });
        let known = KnownFields { own: &json!(config), neutral: &neutral, ignored: &IGNORED };
        let unknown_fields = known.unknown(path, &value)?;
        Ok(Loaded { value: config, unknown_fields })
    }

    /// Returns the content of `adapter_config.json` as PEFT writes it for this base model.
    pub fn to_json(&self, base: &BaseShape) -> Value {
        let prefix = matches!(self.method, PromptMethod::Prefix { .. });
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
            PromptMethod::Prefix { encoder_hidden_size: None, .. }
            | PromptMethod::PTuning { encoder_hidden_size: None } => {
                add(json!({ "encoder_hidden_size": token_dim }));
            }
            _ => {}
        }
        match self.method {
            PromptMethod::Prompt { .. } => add(json!({ "tokenizer_kwargs": null })),
            PromptMethod::PTuning { .. } => add(json!({
                "encoder_dropout": 0.0, "encoder_num_layers": 2, "encoder_reparameterization_type": "MLP",
            })),
            PromptMethod::Prefix { .. } => {}
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
        if let PromptMethod::Prefix { prefix_projection, encoder_hidden_size, .. } = &mut config.method {
            (*prefix_projection, *encoder_hidden_size) = (projected, Some(512));
        }
        config
    }

    #[test]
    fn trainable_counts_match_peft() {
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
        let read = PromptConfig::from_json(Path::new("x"), json).unwrap();
        assert_eq!(read, Loaded { value: prefix(3, true), unknown_fields: vec!["from_the_future".to_owned()] });
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
