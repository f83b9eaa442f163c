//! GGUF tensor names and the corresponding Hugging Face keys.

/// Names outside the layers, as pairs of GGUF stem and Hugging Face stem.
const TOP_LEVEL_NAMES: [(&str, &str); 3] =
    [("token_embd", "model.embed_tokens"), ("output_norm", "model.norm"), ("output", "lm_head")];

/// Names within a layer, as pairs of GGUF stem and Hugging Face stem.
const LAYER_NAMES: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// Returns the Hugging Face key of a GGUF tensor: `model.layers.3.self_attn.q_proj.weight` for `blk.3.attn_q.weight`.
///
/// Returns `None` for a name that is not a parameter of the supported architectures, such as `rope_freqs.weight`.
pub fn hugging_face_key(name: &str) -> Option<String> {
    let (stem, suffix) = split(name)?;
    if let Some((layer, part)) = stem.strip_prefix("blk.").and_then(|rest| rest.split_once('.')) {
        let layer: usize = layer.parse().ok()?;
        let (_, key) = LAYER_NAMES.iter().find(|(gguf, _)| *gguf == part)?;
        return Some(format!("model.layers.{layer}.{key}.{suffix}"));
    }
    let (_, key) = TOP_LEVEL_NAMES.iter().find(|(gguf, _)| *gguf == stem)?;
    Some(format!("{key}.{suffix}"))
}

/// Returns the GGUF name of a Hugging Face key: the inverse of [`hugging_face_key`].
pub fn gguf_name(key: &str) -> Option<String> {
    let (stem, suffix) = split(key)?;
    if let Some((layer, part)) = stem.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.')) {
        let layer: usize = layer.parse().ok()?;
        let (name, _) = LAYER_NAMES.iter().find(|(_, key)| *key == part)?;
        return Some(format!("blk.{layer}.{name}.{suffix}"));
    }
    let (name, _) = TOP_LEVEL_NAMES.iter().find(|(_, key)| *key == stem)?;
    Some(format!("{name}.{suffix}"))
}

/// Splits a name into its stem and its last part, which must be `weight` or `bias`.
fn split(name: &str) -> Option<(&str, &str)> {
    name.rsplit_once('.').filter(|(_, suffix)| matches!(*suffix, "weight" | "bias"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_keys_are_inverse() {
        for (name, key) in [
            ("blk.17.attn_q.weight", "model.layers.17.self_attn.q_proj.weight"),
            ("blk.0.attn_k_norm.weight", "model.layers.0.self_attn.k_norm.weight"),
            ("blk.2.ffn_norm.weight", "model.layers.2.post_attention_layernorm.weight"),
            ("blk.2.attn_v.bias", "model.layers.2.self_attn.v_proj.bias"),
            ("token_embd.weight", "model.embed_tokens.weight"),
            ("output.weight", "lm_head.weight"),
        ] {
            assert_eq!(hugging_face_key(name).as_deref(), Some(key));
            assert_eq!(gguf_name(key).as_deref(), Some(name));
        }
        for name in ["rope_freqs.weight", "blk.x.attn_q.weight", "blk.0.ffn_gate_exps.weight", "output", ""] {
            assert_eq!(hugging_face_key(name), None, "{name}");
        }
    }
}
