//! Models with random weights.

use super::{HeldSegments, Llama, build};
use crate::{LlamaConfig, kernel::Kernels};
use burn::tensor::TensorData;
use burn_peft::random;
use rayon::prelude::*;
use serde_json::Value;
use std::{collections::HashMap, convert::Infallible, f64::consts::PI};

impl LlamaConfig {
    /// Creates a model with random f32 weights, initialized as in `transformers`: matrices from a normal distribution
    /// with standard deviation `initializer_range` (from the raw fields of the configuration; default 0.02), norms 1,
    /// biases 0. Every value depends only on `seed`, the parameter's path and its index in the parameter.
    pub fn init<B: Kernels>(&self, seed: u64, device: &B::Device) -> Llama<B> {
        let shapes: HashMap<String, Vec<usize>> = build::parameter_shapes(self).into_iter().collect();
        let deviation = self.raw_fields.get("initializer_range").and_then(Value::as_f64).unwrap_or(0.02);
        let values = |path: &str| {
            let shape = shapes[path].clone();
            let values = match shape.len() {
                1 => vec![if path.ends_with("norm.weight") { 1.0 } else { 0.0 }; shape[0]],
                _ => normal(random::key(&[seed, random::key_from_str(path)]), shape.iter().product(), deviation),
            };
            Ok::<_, Infallible>(build::LoadedTensor::Floats(TensorData::new(values, shape)))
        };
        let Ok(model) = build::build(self, &HeldSegments::all(), &values, device);
        model
    }
}

/// Samples `n` numbers from a normal distribution with mean 0 (Box and Muller, 1958).
fn normal(key: u64, n: usize, deviation: f64) -> Vec<f32> {
    let number = |pair: u64| {
        // `1 - u` is in (0, 1], so that the logarithm is finite.
        let radius = (-2.0 * (1.0 - random::uniform(key, 2 * pair)).ln()).sqrt() * deviation;
        let (sin, cos) = (2.0 * PI * random::uniform(key, 2 * pair + 1)).sin_cos();
        [(radius * cos) as f32, (radius * sin) as f32]
    };
    let mut values = vec![0.0; n];
    values.par_chunks_mut(2).enumerate().with_min_len(1 << 12).for_each(|(pair, out)| {
        out.copy_from_slice(&number(pair as u64)[..out.len()]);
    });
    values
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn::{backend::Flex, tensor::Tensor};

    fn config() -> LlamaConfig {
        let fields = serde_json::json!({
            "model_type": "qwen2", "vocab_size": 301, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05,
        });
        LlamaConfig::from_json(fields).unwrap()
    }

    #[test]
    fn a_random_model_has_the_configured_deviation_and_depends_on_the_seed_alone() {
        let model = |seed| config().init::<Flex>(seed, &Default::default());
        let values = |x: Tensor<Flex, 2>| x.into_data().into_vec::<f32>().unwrap();
        let embedding = |seed| values(model(seed).model.embed_tokens.weight.val());
        let found = embedding(1);
        let n = found.len() as f64;
        let mean = found.iter().map(|&x| x as f64).sum::<f64>() / n;
        let deviation = (found.iter().map(|&x| (x as f64).powi(2)).sum::<f64>() / n).sqrt();
        assert!(mean.abs() < 2e-3, "{mean}");
        assert!((deviation - 0.05).abs() < 2e-3, "{deviation}");
        assert_eq!(embedding(1), found);
        assert_ne!(embedding(2), found);
        let model = model(1);
        assert_ne!(
            values(model.model.layers[0].self_attn.k_proj.weight.val()),
            values(model.model.layers[0].self_attn.v_proj.weight.val())
        );
        let vector = |x: Tensor<Flex, 1>| x.into_data().into_vec::<f32>().unwrap();
        assert_eq!(vector(model.model.norm.weight.val()), [1.0; 32]);
        let bias = model.model.layers[1].self_attn.q_proj.bias.as_ref().unwrap();
        assert_eq!(vector(bias.val()), [0.0; 32]);
    }
}
