use super::{
    cpu_adam::{AdamSlices, AdamUpdate, HalfCopy},
    *,
};
use crate::norm::{ExactSum, add_squares};
use burn::{backend::Flex, tensor::TensorData};
use half::{bf16, f16};
use serde_json::Value as Json;

fn fixture() -> Json {
    serde_json::from_str(include_str!("../../fixtures/optimizers.json")).unwrap()
}

fn numbers(json: &Json) -> Vec<f32> {
    json.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

fn tensor(values: &[f32]) -> Tensor<Flex, 1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), &Default::default())
}

fn host(tensor: Tensor<Flex, 1>) -> Vec<f32> {
    tensor.into_data().to_vec().unwrap()
}

fn near(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() <= 1e-6 * b.abs(), "{what}: expected {b}, found {a}");
    }
}

fn norm(tensor: &Tensor<Flex, 1>) -> f64 {
    let mut sum = ExactSum::default();
    add_squares(&mut sum, &DynTensor::new(tensor.clone()));
    sum.value().sqrt()
}

#[test]
fn ten_updates_are_torch_s_or_the_paper_s() {
    let golden = fixture();
    let (lr, adam) = (golden["lr"].as_f64().unwrap(), AdamW::default());
    let table = [
        ("AdamW", Optimizer::AdamW(adam), 0.1),
        ("Adam", Optimizer::Adam(adam), 0.1),
        ("Sgd", Optimizer::Sgd(Sgd::default()), 0.0),
        ("SgdMomentum", Optimizer::Sgd(Sgd { momentum: 0.9, ..Sgd::default() }), 0.1),
        ("SgdNesterov", Optimizer::Sgd(Sgd { momentum: 0.9, nesterov: true, ..Sgd::default() }), 0.0),
        ("Lion", Optimizer::Lion(Lion::default()), 0.1),
        ("Lamb", Optimizer::Lamb(Lamb::default()), 0.1),
        ("LambBounded", Optimizer::Lamb(Lamb { max_coeff: 0.5, ..Lamb::default() }), 0.0),
    ];
    for (name, optimizer, decay) in table {
        let (mut parameter, mut state) = (tensor(&numbers(&golden["start"])), None);
        for gradient in golden["gradients"].as_array().unwrap() {
            let gradient = tensor(&numbers(gradient));
            let (new, next) = match optimizer {
                Optimizer::Lamb(lamb) => {
                    let (direction, state) = lamb.direction(decay, &parameter, gradient, state);
                    let ratio = lamb.trust_ratio(norm(&parameter), norm(&direction));
                    (parameter.sub(direction.mul_scalar(lr * ratio)), state)
                }
                _ => optimizer.update(
                    Hyperparameters { lr, weight_decay: decay, grad_scale: 1.0 },
                    parameter,
                    gradient,
                    state,
                ),
            };
            assert_eq!(next.slots.len(), optimizer.slot_names().len());
            (parameter, state) = (new, Some(next));
        }
        assert_eq!(state.unwrap().step, 10);
        near(&host(parameter), &numbers(&golden[name]), name);
    }
}

/// Runs all updates on the host, with half-precision copies of two out of three.
fn updates_on_host(update: AdamUpdate, start: &[f32], gradients: &[Vec<f32>]) -> (Vec<f32>, Vec<bf16>, Vec<f16>) {
    let n = start.len();
    let (mut parameter, mut exp_avg, mut exp_avg_sq) = (start.to_vec(), vec![-0.0; n], vec![0.0; n]);
    let (mut brief, mut half) = (vec![bf16::ZERO; n], vec![f16::ZERO; n]);
    for (step, gradient) in gradients.iter().enumerate() {
        let update = AdamUpdate { step: step + 1, ..update };
        let copy = match step % 3 {
            0 => HalfCopy::Bf16(&mut brief),
            1 => HalfCopy::F16(&mut half),
            _ => HalfCopy::None,
        };
        let (exp_avg, exp_avg_sq) = (&mut exp_avg, &mut exp_avg_sq);
        update.apply(AdamSlices { parameter: &mut parameter, gradient, exp_avg, exp_avg_sq }, copy);
        match step % 3 {
            0 => assert!(brief.iter().zip(&parameter).all(|(copy, &value)| *copy == bf16::from_f32(value))),
            1 => assert!(half.iter().zip(&parameter).all(|(copy, &value)| *copy == f16::from_f32(value))),
            _ => {}
        }
    }
    (parameter, brief, half)
}

#[test]
fn adam_on_the_host_is_torch_s() {
    let golden = fixture();
    let gradients: Vec<_> = golden["gradients"].as_array().unwrap().iter().map(numbers).collect();
    for (name, decoupled) in [("AdamW", true), ("Adam", false)] {
        let lr = golden["lr"].as_f64().unwrap();
        let update =
            AdamUpdate { settings: AdamW::default(), decoupled, lr, weight_decay: 0.1, grad_scale: 1.0, step: 0 };
        let (found, ..) = updates_on_host(update, &numbers(&golden["start"]), &gradients);
        near(&found, &numbers(&golden[name]), name);
    }
}

#[test]
fn adam_on_the_host_is_adam_on_the_device_bit_for_bit() {
    let settings = AdamW { betas: (0.9, 0.95), epsilon: 1e-6, weight_decay: 0.0 };
    // DeepSpeed's test sizes, a single value, and more than a block.
    for n in [1, 22, 64, 128, 1024, 40_000] {
        for (optimizer, decoupled) in [(Optimizer::AdamW(settings), true), (Optimizer::Adam(settings), false)] {
            for (weight_decay, scale) in [(0.0, 1.0), (0.1, 0.37)] {
                let value = |i: usize, k: usize| ((i * 37 + k * 101) as f32).sin();
                let start: Vec<f32> = (0..n).map(|i| value(i, 99)).collect();
                let gradient = |k| (0..n).map(|i| if i % 11 == 3 { -0.0 } else { value(i, k) }).collect();
                let gradients: Vec<Vec<f32>> = (0..10).map(gradient).collect();
                let update = AdamUpdate { settings, decoupled, lr: 3e-3, weight_decay, grad_scale: scale, step: 0 };
                let (found, ..) = updates_on_host(update, &start, &gradients);
                let hyperparameters = Hyperparameters { lr: 3e-3, weight_decay, grad_scale: scale };
                let (mut by_tensors, mut moments, mut in_place, mut state) =
                    (tensor(&start), None, tensor(&start), None);
                for gradient in &gradients {
                    let adam = AdamVariant { settings, decoupled };
                    let (new, next) = adam.update(hyperparameters, by_tensors, tensor(gradient), moments);
                    (by_tensors, moments) = (new, Some(next));
                    let (new, next) = optimizer.update(hyperparameters, in_place, tensor(gradient), state);
                    (in_place, state) = (new, Some(next));
                }
                for tensor in [by_tensors, in_place] {
                    let same = found.iter().zip(host(tensor)).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{n} values, {optimizer:?}, decay {weight_decay}, scale {scale}");
                }
            }
        }
    }
}

#[test]
fn eight_bits_stay_near_thirty_two() {
    let (n, settings) = (5000, AdamW::default());
    let value = |i: usize, k: usize| ((i * 37 + k * 101) as f32).sin();
    let start: Vec<f32> = (0..n).map(|i| value(i, 99)).collect();
    let (mut parameter, mut codes) = (start.clone(), EightBitMoments::new(n));
    let gradients: Vec<Vec<f32>> = (0..30).map(|k| (0..n).map(|i| value(i, 0) + 0.3 * value(i, k)).collect()).collect();
    let update = AdamUpdate { settings, decoupled: true, lr: 1e-3, weight_decay: 0.01, grad_scale: 1.0, step: 0 };
    for (step, gradient) in gradients.iter().enumerate() {
        codes.apply(&AdamUpdate { step: step + 1, ..update }, &mut parameter, gradient);
    }
    let (expected, ..) = updates_on_host(update, &start, &gradients);
    let moved = |a: &[f32]| a.iter().zip(&start).map(|(a, b)| f64::from((a - b).powi(2))).sum::<f64>().sqrt();
    let apart = expected.iter().zip(&parameter).map(|(a, b)| f64::from((a - b).powi(2))).sum::<f64>().sqrt();
    assert!(apart < 0.05 * moved(&expected), "{apart} apart after a way of {}", moved(&expected));
}

#[test]
fn a_momentum_of_1_is_refused() {
    assert!(Optimizer::Sgd(Sgd { momentum: 1.0, ..Sgd::default() }).check().is_err());
}
