//! A model that knows nothing yet.

use super::build;
use crate::{Error, Llama, LlamaConfig, kernel::Kernels};
use burn::tensor::TensorData;
use burn_peft::random;
use std::collections::HashMap;

/// Standard deviation of the weights (`initializer_range` of `transformers`).
const SCALE: f64 = 0.02;

/// A model with random weights in f32, to be trained from scratch: matrices are normal with standard deviation 0.02, those
/// that write into the stream of hidden states with that divided by `√(2 · layers)` (GPT-2, Radford et al., 2019), norms are
/// one, biases zero. `seed` and a parameter's path decide its values.
///
/// # Errors
/// None for a configuration that [`LlamaConfig::from_json`] returned.
pub fn fresh<B: Kernels>(config: &LlamaConfig, seed: u64, device: &B::Device) -> Result<Llama<B>, Error> {
    let shapes: HashMap<String, Vec<usize>> = build::shapes(config).into_iter().collect();
    let residual = SCALE / (2.0 * config.num_hidden_layers as f64).sqrt();
    let values = |name: &str| {
        let shape = shapes.get(name).cloned().unwrap_or_default();
        let size = shape.iter().product();
        let scale =
            if name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight") { residual } else { SCALE };
        let values: Vec<f32> = match (shape.len(), name.ends_with(".bias")) {
            (1, true) => vec![0.0; size],
            (1, false) => vec![1.0; size],
            _ => {
                (0..size).map(|i| (scale * normal(random::key(&[seed, random::text(name)]), i as u64)) as f32).collect()
            }
        };
        Ok(TensorData::new(values, shape))
    };
    build::build(config, &values, device)
}

/// The `counter`-th standard normal number of a key (Box and Muller, 1958).
fn normal(key: u64, counter: u64) -> f64 {
    let [radius, angle] = [0, 1].map(|part| random::uniform(key, 2 * counter + part));
    (-2.0 * (1.0 - radius).ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;
    use serde_json::json;

    #[test]
    fn fresh_weights_have_their_spread_and_the_seed_decides_them() {
        let config = LlamaConfig::from_json(json!({
            "model_type": "qwen2", "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        }));
        let config = config.unwrap();
        let model = |seed| fresh::<Flex>(&config, seed, &Default::default()).unwrap();
        let values = |seed| {
            let model = model(seed);
            let layer = &model.model.layers[1];
            let floats = |tensor: burn::tensor::Tensor<Flex, 2>| tensor.into_data().into_vec::<f32>().unwrap();
            assert_eq!(model.model.norm.weight.val().sum().into_scalar(), 64.0);
            assert_eq!(layer.self_attn.q_proj.bias.as_ref().unwrap().val().abs().sum().into_scalar(), 0.0);
            [floats(model.model.embed_tokens.weight.val()), floats(layer.mlp.down_proj.weight.val())]
        };
        let found = values(7);
        for (values, scale) in found.iter().zip([0.02, 0.01]) {
            let n = values.len() as f64;
            let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let deviation = (values.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n).sqrt();
            assert!(mean.abs() < 4.0 * scale / n.sqrt(), "mean {mean}");
            assert!((deviation / scale - 1.0).abs() < 4.0 / (2.0 * n).sqrt(), "deviation {deviation} for {scale}");
        }
        assert_eq!(found, values(7));
        assert_ne!(found, values(8));
    }
}
