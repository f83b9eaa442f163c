//! Translation of a model configuration into the metadata that llama.cpp reads.

use super::{
    super::{MetadataValue, permutation::is_permuted},
    file::Metadata,
};
use crate::{Error, LlamaConfig, rope::RopeScaling};

/// Returns llama.cpp's name of the architecture for the model's `model_type`.
pub(super) fn architecture(config: &LlamaConfig) -> &str {
    match config.model_type.as_str() {
        // llama.cpp has no separate architecture for the first Mistral models.
        "llama" | "mistral" => "llama",
        other => other,
    }
}

/// Returns the head dimension by which query and key rows are permuted in the file, or `None` if they are not.
pub(in crate::checkpoint::gguf) fn permuted_head_dim(config: &LlamaConfig) -> Option<usize> {
    is_permuted(architecture(config)).then_some(config.head_dim)
}

/// Converts a float to a metadata value of `f32` precision.
fn float(x: f64) -> MetadataValue {
    MetadataValue::Float(f64::from(x as f32))
}

/// Checks that llama.cpp can run a model of this configuration. Returns one sentence for each property of the model that
/// llama.cpp does not honour, and with which its results are nevertheless right up to a limit.
///
/// # Errors
/// If llama.cpp refuses the tensors of the model, or has no such rotary scaling.
pub fn check(config: &LlamaConfig) -> Result<Vec<String>, Error> {
    let (architecture, biases) = (architecture(config), config.biases);
    // Its loaders of qwen2 and qwen3 leave tensors over, and then refuse the file.
    let left_over = [
        ("attention_bias", biases.output && architecture != "llama"),
        ("mlp_bias", biases.mlp && architecture != "llama"),
    ];
    if let Some((field, _)) = left_over.into_iter().find(|(_, left)| *left) {
        let expected = format!("false, since llama.cpp has no such biases for {architecture}");
        return Err(Error::config(format!("{field} (for GGUF)"), expected, true));
    }
    rope_scaling(&config.rope_scaling)?;
    rope_freqs(config)?;
    let window = config.sliding_window.map(|window| {
        format!(
            "llama.cpp does not apply the model's sliding window of {window} positions; longer texts give other results \
             there"
        )
    });
    Ok(window.into_iter().collect())
}

/// Returns the hyperparameters as metadata; every key is prefixed with the architecture.
pub(super) fn metadata(config: &LlamaConfig) -> Result<Metadata, Error> {
    let unsigned = |n: usize| MetadataValue::Unsigned(n as u64);
    let context = match config.rope_scaling {
        // The frequencies are unscaled up to this length; llama.cpp has no dynamic scaling for longer contexts.
        RopeScaling::Dynamic { original } => original,
        _ => config.max_position_embeddings,
    };
    let mut fields = vec![
        ("vocab_size", unsigned(config.vocab_size)),
        ("context_length", unsigned(context)),
        ("embedding_length", unsigned(config.hidden_size)),
        ("block_count", unsigned(config.num_hidden_layers)),
        ("feed_forward_length", unsigned(config.intermediate_size)),
        ("attention.head_count", unsigned(config.num_attention_heads)),
        ("attention.head_count_kv", unsigned(config.num_key_value_heads)),
        ("attention.key_length", unsigned(config.head_dim)),
        ("attention.value_length", unsigned(config.head_dim)),
        ("attention.layer_norm_rms_epsilon", float(config.rms_norm_eps)),
        ("rope.dimension_count", unsigned(config.head_dim)),
        ("rope.freq_base", float(config.rope_theta)),
    ];
    if let Some(window) = config.sliding_window {
        fields.push(("attention.sliding_window", unsigned(window)));
    }
    fields.extend(rope_scaling(&config.rope_scaling)?);
    let architecture = architecture(config);
    Ok(fields.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value)).collect())
}

/// Returns the rotary scalings that metadata can express; divisors per frequency are written as a tensor instead.
fn rope_scaling(scaling: &RopeScaling) -> Result<Vec<(&'static str, MetadataValue)>, Error> {
    let kind = |name: &str| ("rope.scaling.type", MetadataValue::String(name.to_owned()));
    Ok(match scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } | RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) => {
            vec![]
        }
        RopeScaling::Linear { factor } => vec![kind("linear"), ("rope.scaling.factor", float(*factor))],
        RopeScaling::Yarn { factor, attention_factor, beta_fast, beta_slow, truncate, original } => {
            let usual = if *factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
            if !truncate || (attention_factor - usual).abs() > 1e-6 {
                let expected = format!("truncate = true and attention_factor = {usual}, which llama.cpp computes");
                let found = format!("truncate = {truncate} and attention_factor = {attention_factor}");
                return Err(Error::config("rope_scaling (for GGUF)", expected, found));
            }
            vec![
                kind("yarn"),
                ("rope.scaling.factor", float(*factor)),
                ("rope.scaling.original_context_length", MetadataValue::Unsigned(*original as u64)),
                ("rope.scaling.yarn_beta_fast", float(*beta_fast)),
                ("rope.scaling.yarn_beta_slow", float(*beta_slow)),
            ]
        }
    })
}

/// Returns `rope_freqs.weight`, the divisor of each rotary frequency (`[head_dim / 2]`), if the model's scaling has
/// one.
pub(super) fn rope_freqs(config: &LlamaConfig) -> Result<Option<Vec<f32>>, Error> {
    let Some(divisors) = config.rope_scaling.divisors(config.head_dim, config.rope_theta) else { return Ok(None) };
    if architecture(config) != "llama" {
        let expected = "none, linear or yarn, since llama.cpp reads rope_freqs.weight for llama only";
        return Err(Error::config("rope_scaling (for GGUF)", expected, &config.model_type));
    }
    Ok(Some(divisors.into_iter().map(|divisor| divisor as f32).collect()))
}
