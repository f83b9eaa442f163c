//! A hot swap replaces the values of an adapter in place.

use super::{base, directory, logits, sequence};
use burn::{backend::Flex, tensor::Tensor};
use burn_llama::Llama;
use burn_peft::{Linears, LoraConfig, adapter};
use laws::{fixture, floats, max_diff};

/// Returns the memory addresses of all adapter values.
fn addresses(model: &Llama<Flex>) -> Vec<usize> {
    let mut all = Vec::new();
    let mut see = |tensor: Tensor<Flex, 2>| {
        let tensor = tensor.into_primitive().tensor();
        all.push(tensor.storage::<f32>().as_ptr() as usize);
    };
    model.linears(&mut |_, linear| {
        for adapter in &linear.adapters {
            see(adapter.lora_a.val());
            see(adapter.lora_b.val());
        }
    });
    all
}

#[test]
fn a_hot_swap_keeps_every_tensor_in_its_place() {
    let (mut model, text) = (base(), sequence(4, 9));
    adapter::load(&mut model, "live", &directory("a")).unwrap();
    let (places, first) = (addresses(&model), logits(&model, &text));
    let other = tempfile::tempdir().unwrap();
    let files = burn_peft::format::read(&directory("a")).unwrap();
    let changed = files.tensors.iter().map(|(key, data)| {
        let values: Vec<f32> = floats(data).iter().rev().map(|x| 1.5 * x).collect();
        (key.clone(), burn::tensor::TensorData::new(values, data.shape.clone()))
    });
    let config = LoraConfig { lora_alpha: 9.0, ..files.config };
    burn_peft::format::write(other.path(), &config.to_json(), changed).unwrap();
    let mut fresh = base();
    adapter::load(&mut fresh, "live", other.path()).unwrap();
    let swapped = adapter::hotswap(&mut model, "live", other.path()).unwrap();
    assert_eq!((swapped.value.lora_alpha, swapped.unknown_fields.len()), (9.0, 0));
    assert_eq!(logits(&model, &text), logits(&fresh, &text), "the new values, and their scaling");
    assert!(max_diff(&logits(&model, &text), &first) > 1e-2, "the swap must matter");
    assert_eq!(addresses(&model), places);
    adapter::hotswap(&mut model, "live", &directory("a")).unwrap();
    assert_eq!((logits(&model, &text), addresses(&model)), (first.clone(), places), "and back");

    for (directory, expected) in [
        (directory("wide"), "[4, 32], found [6, 32]"),
        (directory("b"), "have `mlp.down_proj` where `self_attn.q_proj` is expected"),
        (fixture("family/dora"), "lora_magnitude_vector"),
        (fixture("family/pissa"), "changes the base model"),
    ] {
        let error = adapter::hotswap(&mut model, "live", &directory).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
        assert_eq!(logits(&model, &text), first, "refused, unchanged");
    }
    let error = adapter::hotswap(&mut model, "live", &directory("wide")).unwrap_err().to_string();
    assert!(error.contains("delete `live` and load this one instead"), "{error}");
    assert!(
        adapter::hotswap(&mut model, "dead", &directory("a")).unwrap_err().to_string().contains("not on the model")
    );
    adapter::merge(&mut model, "live").unwrap();
    assert!(adapter::hotswap(&mut model, "live", &directory("a")).unwrap_err().to_string().contains("merged"));
}
