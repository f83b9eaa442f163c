//! Parameter groups: parameters that the optimizer treats alike.

/// The settings of a parameter group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ParamGroup {
    /// The factor applied to the learning rate of the schedule.
    pub(crate) lr_scale: f64,
    /// The weight decay.
    pub(crate) weight_decay: f64,
}

/// A learning-rate factor of the parameters with a name.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedLrScale {
    /// The name of a module or parameter: one part of a path, in any case.
    pub name: String,
    /// The factor applied to the learning rate of the schedule.
    pub lr_scale: f64,
}

/// The rules that assign parameters to groups, by path and shape.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ParamGroups {
    /// True if norms, biases and vectors decay as well, see [`no_decay`]. Default: false.
    pub decay_all: bool,
    /// Learning-rate factors by name. The first that matches a part of the path wins. Default: none.
    pub lr_scales: Vec<NamedLrScale>,
    /// The learning-rate factor of vectors that no name matches. Default: 1.
    pub vector_lr_scale: Option<f64>,
}

impl ParamGroups {
    /// Returns the groups of LoRA+ (Hayou et al., 2024, arXiv:2402.12354): the adapter matrices `B` learn `ratio` times
    /// as fast as the matrices `A`, and so do vectors, as in PEFT; the paper recommends 16.
    pub fn lora_plus(ratio: f64) -> Self {
        let matrices = NamedLrScale { name: "lora_B".to_owned(), lr_scale: ratio };
        Self { lr_scales: vec![matrices], vector_lr_scale: Some(ratio), ..Self::default() }
    }

    /// Returns the group of a parameter with this path and number of dimensions; `weight_decay` applies to matrices.
    pub(crate) fn group_of(&self, path: &str, num_dims: usize, weight_decay: f64) -> ParamGroup {
        let named = |rule: &&NamedLrScale| path.split('.').any(|part| part.eq_ignore_ascii_case(&rule.name));
        let lr_scale = self.lr_scales.iter().find(named).map(|rule| rule.lr_scale);
        let vector_scale = self.vector_lr_scale.filter(|_| num_dims <= 1);
        let lr_scale = lr_scale.or(vector_scale).unwrap_or(1.0);
        let decays = self.decay_all || !no_decay(path, num_dims);
        ParamGroup { lr_scale, weight_decay: if decays { weight_decay } else { 0.0 } }
    }
}

/// Returns true for parameters without weight decay, that is norms and biases: vectors, paths that end with `bias`, and
/// paths with `norm` in the name of a part. Decay would pull them away from their values without benefit.
pub fn no_decay(path: &str, num_dims: usize) -> bool {
    num_dims <= 1 || path.ends_with("bias") || path.split('.').any(|part| part.contains("norm"))
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
        let all = ParamGroups { decay_all: true, ..ParamGroups::default() };
        for (path, rank, expected) in table {
            assert_eq!(no_decay(path, rank), expected, "{path}");
            assert_eq!(ParamGroups::default().group_of(path, rank, 0.1).weight_decay == 0.0, expected, "{path}");
            assert_eq!(all.group_of(path, rank, 0.1).weight_decay, 0.1, "{path}");
        }
    }

    #[test]
    fn the_matrices_b_of_lora_plus_learn_faster() {
        let groups = ParamGroups::lora_plus(16.0);
        for (path, scale) in [
            ("model.layers.0.self_attn.q_proj.adapters.0.lora_b", 16.0),
            ("base_model.model.q_proj.lora_B.weight", 16.0),
            ("model.layers.0.self_attn.q_proj.bias", 16.0),
            ("model.layers.0.self_attn.q_proj.adapters.0.dora.magnitude", 16.0),
            ("model.layers.0.self_attn.q_proj.adapters.0.lora_a", 1.0),
            ("model.layers.0.self_attn.q_proj.weight", 1.0),
        ] {
            let rank = if path.ends_with("bias") || path.ends_with("magnitude") { 1 } else { 2 };
            assert_eq!(groups.group_of(path, rank, 0.0).lr_scale, scale, "{path}");
        }
    }
}
