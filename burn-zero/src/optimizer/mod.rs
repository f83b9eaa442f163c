//! Optimizers, and the groups of parameters that they treat alike.

mod adamw;

pub use adamw::{AdamW, Moments};

/// How the optimizer treats one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// What the schedule's learning rate is multiplied by.
    pub learning_rate_scale: f64,
    /// The decoupled weight decay, per unit of learning rate.
    pub weight_decay: f64,
}

impl Group {
    /// The group of a parameter by its path and rank: `weight_decay` holds for matrices only, see [`no_decay`].
    pub fn new(path: &str, rank: usize, weight_decay: f64) -> Self {
        Self { learning_rate_scale: 1.0, weight_decay: if no_decay(path, rank) { 0.0 } else { weight_decay } }
    }
}

/// Whether a parameter is a norm's or a bias: vectors, paths that end with `bias`, and those with `norm` in one of their
/// parts' names. Decay would pull these away from where the model has them, for nothing.
pub fn no_decay(path: &str, rank: usize) -> bool {
    rank <= 1 || path.ends_with("bias") || path.split('.').any(|part| part.contains("norm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_biases_and_vectors_do_not_decay() {
        let table = [
            ("model.layers.0.mlp.up_proj.weight", 2, false),
            ("model.embed_tokens.weight", 2, false),
            ("model.layers.0.self_attn.q_proj.lora_A", 2, false),
            ("model.layers.0.input_layernorm.weight", 1, true),
            ("model.norm.weight", 2, true),
            ("model.layers.0.self_attn.q_proj.bias", 2, true),
            ("scale", 1, true),
        ];
        for (path, rank, expected) in table {
            assert_eq!(no_decay(path, rank), expected, "{path}");
            assert_eq!(Group::new(path, rank, 0.1).weight_decay == 0.0, expected, "{path}");
        }
    }
}
