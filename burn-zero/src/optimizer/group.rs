//! Parameters that the optimizer treats alike.

/// How the optimizer treats one parameter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// What the schedule's learning rate is multiplied by.
    pub learning_rate_scale: f64,
    /// The weight decay.
    pub weight_decay: f64,
}

/// Which parameters are treated how, by their paths.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Groups {
    /// Whether norms, biases and vectors decay too, see [`no_decay`]. Default: no.
    pub decay_all: bool,
    /// Learning rates of parameters with a part of this name in their path, as multiples of the schedule's. The first that
    /// fits holds. Default: none.
    pub scales: Vec<(String, f64)>,
    /// That of vectors which no part names. Default: 1.
    pub vector_scale: Option<f64>,
}

impl Groups {
    /// LoRA+ (Hayou et al., 2024, arXiv:2402.12354): the matrices `B` of adapters learn `ratio` times as fast as the matrices `A`,
    /// and so do vectors, as in PEFT; the paper advises 16.
    pub fn lora_plus(ratio: f64) -> Self {
        Self { scales: vec![("lora_B".to_owned(), ratio)], vector_scale: Some(ratio), ..Self::default() }
    }

    /// The group of a parameter by its path and rank; `weight_decay` is that of matrices.
    pub fn of(&self, path: &str, rank: usize, weight_decay: f64) -> Group {
        let named = |(name, _): &&(String, f64)| path.split('.').any(|part| part.eq_ignore_ascii_case(name));
        let learning_rate_scale = self.scales.iter().find(named).map(|&(_, scale)| scale);
        let vector_scale = self.vector_scale.filter(|_| rank <= 1);
        let learning_rate_scale = learning_rate_scale.or(vector_scale).unwrap_or(1.0);
        let decays = self.decay_all || !no_decay(path, rank);
        Group { learning_rate_scale, weight_decay: if decays { weight_decay } else { 0.0 } }
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
        let all = Groups { decay_all: true, ..Groups::default() };
        for (path, rank, expected) in table {
            assert_eq!(no_decay(path, rank), expected, "{path}");
            assert_eq!(Groups::default().of(path, rank, 0.1).weight_decay == 0.0, expected, "{path}");
            assert_eq!(all.of(path, rank, 0.1).weight_decay, 0.1, "{path}");
        }
    }

    #[test]
    fn the_matrices_b_of_lora_plus_learn_faster() {
        let groups = Groups::lora_plus(16.0);
        for (path, scale) in [
            ("model.layers.0.self_attn.q_proj.adapters.0.lora_b", 16.0),
            ("base_model.model.q_proj.lora_B.weight", 16.0),
            ("model.layers.0.self_attn.q_proj.bias", 16.0),
            ("model.layers.0.self_attn.q_proj.adapters.0.dora.magnitude", 16.0),
            ("model.layers.0.self_attn.q_proj.adapters.0.lora_a", 1.0),
            ("model.layers.0.self_attn.q_proj.weight", 1.0),
        ] {
            let rank = if path.ends_with("bias") || path.ends_with("magnitude") { 1 } else { 2 };
            assert_eq!(groups.of(path, rank, 0.0).learning_rate_scale, scale, "{path}");
        }
    }
}
