//! LoftQ initialization: the adapter is the best low-rank approximation of the NF4 quantization error, and nothing else
//! changes.

use burn::{
    backend::{Autodiff, Flex},
    tensor::{DType, Tensor, TensorData},
};
use burn_llama::{Checkpoint, Llama, Storage, generate, kernel::Kernels};
use burn_peft::{
    AdapterModel, Error, Linear, LinearKernels, Linears, Lora, LoraConfig, PackedWeight, TargetModules, Weight,
    adapter::{self, QuantizationResidual, replace_lora_weights_loftq},
    config::InitLoraWeights,
    param, random,
};
use laws::{fixture, floats, max_diff, one_backward_at_a_time};

const NAME: &str = "default";

fn all_linear(r: usize) -> LoraConfig {
    let target_modules = TargetModules::Pattern("all-linear".into());
    LoraConfig {
        r,
        lora_alpha: 6.0,
        target_modules,
        init_lora_weights: InitLoraWeights::Loftq,
        ..LoraConfig::default()
    }
}

/// A model of a single linear layer.
struct SingleLayer<B: LinearKernels>(Linear<B>);

impl<B: LinearKernels> Linears<B> for SingleLayer<B> {
    fn linears(&self, visit: &mut dyn FnMut(&str, &Linear<B>)) {
        visit("layer", &self.0);
    }

    fn linears_mut(&mut self, visit: &mut dyn FnMut(&str, &mut Linear<B>)) {
        visit("layer", &mut self.0);
    }
}

/// Returns an NF4 layer `[out, features]` with a new adapter, and its unquantized weight: noise with columns of
/// different scales.
fn one(shape: [usize; 2], config: &LoraConfig) -> (SingleLayer<Flex>, TensorData) {
    let key = random::key_from_str("loftq");
    let value = |i: usize| random::normal(key, i as u64) * (0.5 + (i % shape[1] * 7 % 13) as f64 / 4.0);
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| 0.02 * value(i) as f32).collect();
    let packed = PackedWeight::nf4(&values, shape[1], &Default::default()).unwrap();
    let mut layer = Linear::packed("layer", packed, None);
    layer.attach("layer", NAME, config, 0).unwrap();
    (SingleLayer(layer), TensorData::new(values, shape))
}

fn start(model: &mut SingleLayer<Flex>, original: &TensorData) -> QuantizationResidual {
    replace_lora_weights_loftq::<_, _, Error>(model, NAME, &|_| Ok(original.clone())).unwrap()
}

fn tensor<B: LinearKernels>(data: &TensorData) -> Tensor<B, 2> {
    Tensor::from_data(data.clone(), (&B::Device::default(), DType::F32))
}

/// Returns `‖x‖²`.
fn squares<B: LinearKernels>(x: Tensor<B, 2>) -> f64 {
    floats(&x.into_data()).iter().map(|&x| f64::from(x).powi(2)).sum()
}

/// Returns the squares of all singular values, largest first, by one-sided Jacobi in f64.
fn spectrum<B: LinearKernels>(x: Tensor<B, 2>) -> Vec<f64> {
    let [rows, columns] = x.dims();
    let x = if rows > columns { x.transpose() } else { x };
    let features = x.dims()[1];
    let values = floats(&x.into_data());
    let mut rows: Vec<Vec<f64>> =
        values.chunks_exact(features).map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    loop {
        let mut turned = false;
        for p in 0..rows.len() {
            for q in p + 1..rows.len() {
                let (before, rest) = rows.split_at_mut(q);
                let (a, b) = (&mut before[p], &mut rest[0]);
                let (aa, bb, ab) = (dot(a, a), dot(b, b), dot(a, b));
                if ab.abs() <= 1e-12 * (aa * bb).sqrt() {
                    continue;
                }
                turned = true;
                let theta = (bb - aa) / (2.0 * ab);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let cos = 1.0 / (t * t + 1.0).sqrt();
                for (x, y) in a.iter_mut().zip(b.iter_mut()) {
                    (*x, *y) = (cos * *x - cos * t * *y, cos * t * *x + cos * *y);
                }
            }
        }
        if !turned {
            break;
        }
    }
    let mut squares: Vec<f64> = rows.iter().map(|row| dot(row, row)).collect();
    squares.sort_by(|a, b| b.total_cmp(a));
    squares
}

/// Returns the quantization error of the layer without and with the adapter.
fn lost<B: LinearKernels>(linear: &Linear<B>, original: &TensorData) -> [Tensor<B, 2>; 2] {
    let lost = tensor::<B>(original) - linear.weight.val();
    [lost.clone(), lost - linear.adapter(NAME).unwrap().delta_weight()]
}

#[test]
fn the_adapter_is_the_best_approximation_of_what_rounding_took() {
    for (shape, r) in [([96, 64], 1), ([96, 64], 8), ([64, 192], 16), ([192, 576], 8)] {
        let (mut model, original) = one(shape, &all_linear(r));
        let found = start(&mut model, &original);
        let [taken, left] = lost(&model.0, &original);
        let (values, left) = (spectrum(taken.clone()), squares(left));
        let (taken, best) = (squares(taken), values[r..].iter().sum::<f64>());
        assert!((values.iter().sum::<f64>() / taken - 1.0).abs() < 1e-6);
        // The error is close to noise, so a low rank removes only part of it.
        assert!(left < 0.99 * taken && (left / best - 1.0).abs() < 1e-3, "{shape:?} {r}: {left} of {taken}, {best}");
        assert!(
            (found.without_adapter / taken - 1.0).abs() < 1e-4 && (found.with_adapter / left - 1.0).abs() < 1e-4,
            "{found:?}"
        );
        // The singular values are split evenly between A and B.
        let Lora { lora_a, lora_b, .. } = model.0.adapter(NAME).unwrap();
        assert!((squares(lora_a.val()) / squares(lora_b.val()) - 1.0).abs() < 1e-3);
    }
    let left = |r| {
        let (mut model, original) = one([96, 64], &all_linear(r));
        let QuantizationResidual { without_adapter: taken, with_adapter: left, .. } = start(&mut model, &original);
        left / taken
    };
    assert!(left(2) > left(8) && left(8) > left(32) && left(64) < 1e-6, "a larger rank leaves less");
}

#[test]
fn whatever_else_an_adapter_has_stays_right() {
    // The LoRA scaling is divided out, and DoRA's magnitude is that of the sum of weight and update.
    for config in [LoraConfig { lora_alpha: 64.0, ..all_linear(8) }, LoraConfig { use_dora: true, ..all_linear(8) }] {
        let (mut model, original) = one([96, 64], &config);
        start(&mut model, &original);
        let (mut plain, _) = one([96, 64], &all_linear(8));
        start(&mut plain, &original);
        let delta = |model: &SingleLayer<Flex>| model.0.adapter(NAME).unwrap().delta_weight();
        assert!(max_diff(&floats(&delta(&model).into_data()), &floats(&delta(&plain).into_data())) < 1e-6);
        if let Some(dora) = &model.0.adapter(NAME).unwrap().dora {
            let sum = model.0.weight.val() + delta(&model);
            let norm = sum.powi_scalar(2).sum_dim(1).sqrt();
            assert!(max_diff(&floats(&dora.magnitude.val().into_data()), &floats(&norm.into_data())) < 1e-5);
        }
    }
    // If quantization is exact, A must not be zero: an adapter of zeros would never learn.
    let packed = PackedWeight::nf4(&[0.0; 64 * 64], 64, &Default::default()).unwrap();
    let mut model = SingleLayer(Linear::<Flex>::packed("layer", packed, None));
    model.0.attach("layer", NAME, &all_linear(8), 0).unwrap();
    let QuantizationResidual { without_adapter: taken, with_adapter: left, .. } =
        start(&mut model, &TensorData::zeros::<f32, _>([64, 64]));
    assert_eq!((taken, left), (0.0, 0.0));
    assert!(squares(model.0.adapter(NAME).unwrap().lora_a.val()) > 0.0);
}

#[test]
fn what_cannot_start_so_is_refused() {
    let (mut model, original) = one([96, 64], &all_linear(4));
    let refusal = |model: &mut SingleLayer<Flex>, name: &str, original: &TensorData| {
        let original = |_: &str| Ok::<_, Error>(original.clone());
        replace_lora_weights_loftq(model, name, &original).unwrap_err().to_string()
    };
    let error = refusal(&mut model, "other", &original);
    assert!(error.contains("adapter `other` is on no weight in NF4"), "{error}");
    let error = refusal(&mut model, NAME, &TensorData::zeros::<f32, _>([64, 96]));
    assert!(error.contains("weight of layer: expected the shape [96, 64], found [64, 96]"), "{error}");
    model.0.weight = model.0.weight.clone().unpacked();
    assert!(refusal(&mut model, NAME, &original).contains("on no weight in NF4"));
    let config = LoraConfig { r: 65, ..all_linear(4) };
    let error = model.0.attach("layer", "wide", &config, 0).unwrap_err().to_string();
    assert!(error.contains("\"loftq\": expected at most 64 at layer, found 65"), "{error}");
    let missing = |path: &str| Err(Error::InvalidAdapter { name: path.to_owned(), state: "is missing" });
    let (mut model, _) = one([96, 64], &all_linear(4));
    let error = replace_lora_weights_loftq(&mut model, NAME, &missing).unwrap_err().to_string();
    assert!(error.contains("`layer` is missing"), "{error}");
}

/// Returns the model of a checkpoint in NF4, with a LoftQ-initialized adapter on all projections.
fn started<B: Kernels>(checkpoint: &Checkpoint, config: &LoraConfig) -> (Llama<B>, QuantizationResidual) {
    let mut model = checkpoint.load::<B>(Storage::Nf4, &Default::default()).unwrap();
    adapter::attach(&mut model, NAME, config, 0).unwrap();
    let found = replace_lora_weights_loftq(&mut model, NAME, &|path| checkpoint.weight(path)).unwrap();
    (model, found)
}

#[test]
fn a_model_begins_nearer_to_the_one_that_was_not_rounded() {
    let _lock = one_backward_at_a_time();
    let checkpoint = Checkpoint::open(&fixture("gguf/model.gguf")).unwrap();
    let logits = |model: &Llama<Flex>| floats(&generate::logits(model, &[1, 2, 3, 4]).unwrap().into_data());
    let unrounded = logits(&checkpoint.load(DType::F32, &Default::default()).unwrap());
    let plain = max_diff(&logits(&checkpoint.load(Storage::Nf4, &Default::default()).unwrap()), &unrounded);
    let (model, found) = started::<Flex>(&checkpoint, &all_linear(24));
    let near = max_diff(&logits(&model), &unrounded);
    assert!(near < 0.7 * plain, "{near} against {plain}");
    // The rows of down_proj are not whole blocks, so it is not quantized to NF4 and its adapter is initialized as
    // usual.
    assert_eq!(found.layers, 6);
    model.linears(&mut |path, linear| {
        let Some(Lora { lora_b, .. }) = linear.adapter(NAME) else { return };
        let packed = matches!(&linear.weight, Weight::Packed { .. });
        assert_eq!(packed, squares(lora_b.val()) > 0.0, "{path}");
    });
    // The result does not depend on the threads, and frozen parameters stay frozen.
    let (again, _) = started::<Autodiff<Flex>>(&checkpoint, &all_linear(24));
    let trained = param::count_trainable::<Autodiff<Flex>, _>(&adapter::train_active(again.clone()).unwrap());
    let count = |model: &Llama<Autodiff<Flex>>| {
        let mut count = 0;
        model.linears(&mut |_, linear| {
            count += linear
                .adapters
                .iter()
                .map(|a| a.lora_a.shape().num_elements() + a.lora_b.shape().num_elements())
                .sum::<usize>();
        });
        count
    };
    assert_eq!(trained, count(&again));
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    model.save_adapter(NAME, folders[0].path()).unwrap();
    again.save_adapter(NAME, folders[1].path()).unwrap();
    let read = |index: usize, file: &str| std::fs::read(folders[index].path().join(file)).unwrap();
    assert!(read(0, "adapter_model.safetensors") == read(1, "adapter_model.safetensors"));
    // Loading the adapter on the same NF4 model gives the same logits, without a new initialization.
    let config: serde_json::Value = serde_json::from_slice(&read(0, "adapter_config.json")).unwrap();
    assert_eq!((&config["init_lora_weights"], &config["loftq_config"]), (&true.into(), &serde_json::json!({})));
    let mut loaded = checkpoint.load::<Flex>(Storage::Nf4, &Default::default()).unwrap();
    adapter::load(&mut loaded, NAME, folders[0].path()).unwrap();
    assert_eq!(logits(&loaded), logits(&model));
}
