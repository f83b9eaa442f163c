//! A configuration as the metadata that llama.cpp reads.

use super::{super::Value, file::Metadata};
use crate::{Error, LlamaConfig, rope::RopeScaling};

/// What llama.cpp calls the architecture of a `model_type`.
pub(super) fn architecture(config: &LlamaConfig) -> &str {
    match config.model_type.as_str() {
        // llama.cpp has no architecture of its own for Mistral's first models.
        "llama" | "mistral" => "llama",
        other => other,
    }
}

/// The size of the heads whose rows llama.cpp keeps in pairs: it rotates neighbours for `llama`, halves for the others.
pub(in crate::checkpoint::gguf) fn paired(config: &LlamaConfig) -> Option<usize> {
    (architecture(config) == "llama").then_some(config.head_dim)
}

fn float(x: f64) -> Value {
    Value::Float(f64::from(x as f32))
}

/// The hyperparameters, each key behind the architecture's name.
pub(super) fn metadata(config: &LlamaConfig) -> Result<Metadata, Error> {
    let unsigned = |n: usize| Value::Unsigned(n as u64);
    let context = match config.rope_scaling {
        // Plain up to here; llama.cpp has no frequencies that change beyond.
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
    fields.extend(scaling(&config.rope_scaling)?);
    let architecture = architecture(config);
    Ok(fields.into_iter().map(|(key, value)| (format!("{architecture}.{key}"), value)).collect())
}

/// The stretched frequencies that metadata can say; divisors per frequency are a tensor instead.
fn scaling(scaling: &RopeScaling) -> Result<Vec<(&'static str, Value)>, Error> {
    let kind = |name: &str| ("rope.scaling.type", Value::String(name.to_owned()));
    Ok(match scaling {
        RopeScaling::None | RopeScaling::Dynamic { .. } | RopeScaling::Llama3 { .. } | RopeScaling::Factors(_) => {
            vec![]
        }
        RopeScaling::Linear { factor } => vec![kind("linear"), ("rope.scaling.factor", float(*factor))],
        RopeScaling::Yarn { factor, attention_factor, beta, truncate, original } => {
            let usual = if *factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
            if !truncate || (attention_factor - usual).abs() > 1e-6 {
                let expected = format!("truncate = true and attention_factor = {usual}, which llama.cpp computes");
                let found = format!("truncate = {truncate} and attention_factor = {attention_factor}");
                return Err(Error::config("rope_scaling (for GGUF)", expected, found));
            }
            vec![
                kind("yarn"),
                ("rope.scaling.factor", float(*factor)),
                ("rope.scaling.original_context_length", Value::Unsigned(*original as u64)),
                ("rope.scaling.yarn_beta_fast", float(beta.0)),
                ("rope.scaling.yarn_beta_slow", float(beta.1)),
            ]
        }
    })
}

/// `rope_freqs.weight`: what divides each rotary frequency, `[head_dim / 2]`, if the model's scaling is of that kind.
pub(super) fn divisors(config: &LlamaConfig) -> Result<Option<Vec<f32>>, Error> {
    let Some(divisors) = config.rope_scaling.divisors(config.head_dim, config.rope_theta) else { return Ok(None) };
    if architecture(config) != "llama" {
        let expected = "none, linear or yarn, since llama.cpp reads rope_freqs.weight for llama only";
        return Err(Error::config("rope_scaling (for GGUF)", expected, &config.model_type));
    }
    Ok(Some(divisors.into_iter().map(|divisor| divisor as f32).collect()))
}
