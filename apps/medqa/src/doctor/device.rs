//! Checks of the device: training lowers the loss, and the results agree with those of the CPU.

use super::{CheckSubject, compute};
use crate::model;
use anyhow::{Context, Result, bail};
#[cfg(feature = "flex")]
use burn::backend::Flex;
use burn::{backend::Autodiff, tensor::DType};
use burn_llama::{Batch, Example, Llama, SequenceLayout, generate, kernel::Kernels};
use burn_peft::{AdapterModel, ForwardContext, Linears, LoraConfig, TargetModules, adapter, param};
use burn_zero::{
    EngineConfig,
    optimizer::AdamW,
    segment::{self, Checkpointing},
};
use std::{cell::OnceCell, collections::BTreeMap, path::Path};

/// Name of the adapter that the checks train and then discard.
const ADAPTER: &str = "doctor";
const STEPS: usize = 5;
/// Tolerance between two devices, relative to the largest value.
const DEVICE_TOLERANCE: f32 = 1e-3;

/// Results of a short LoRA training on one device.
pub(super) struct DeviceTraining {
    /// Gradient of every adapter parameter before the first step, by path.
    gradients: BTreeMap<String, Vec<f32>>,
    /// Loss before each step, and after the last one.
    losses: Vec<f64>,
    /// Logits after training, `[tokens · vocabulary]`.
    logits: Vec<f32>,
}

impl<B: Kernels> CheckSubject<B> {
    /// Returns the results of the training on the tested device.
    fn training(&self) -> Result<&DeviceTraining> {
        get_or_try_init(&self.training, || {
            let ids = compute::test_sequence(self)?;
            train_adapter::<B>(&self.model_args.model, &self.device, &ids, self.adapter_dir.path())
        })
    }

    /// Returns the results of the same training on the CPU.
    #[cfg(feature = "flex")]
    fn cpu_training(&self) -> Result<&DeviceTraining> {
        let folder = self.adapter_dir.path().join("reference");
        get_or_try_init(&self.cpu_training, || {
            let ids = compute::test_sequence(self)?;
            train_adapter::<Flex>(&self.model_args.model, &Default::default(), &ids, &folder)
        })
    }
}

/// Returns the value of the cell, which `make` computes the first time.
fn get_or_try_init(
    cell: &OnceCell<DeviceTraining>,
    make: impl FnOnce() -> Result<DeviceTraining>,
) -> Result<&DeviceTraining> {
    match cell.get() {
        Some(trained) => Ok(trained),
        None => make().map(|trained| cell.get_or_init(|| trained)),
    }
}

/// A model in which LoRA learns, and one batch.
type LoraStep<B> = (Llama<Autodiff<B>>, Batch<Autodiff<B>>);

/// Returns the model with LoRA, and a batch of the first row.
pub(super) fn lora_step<B: Kernels>(subject: &CheckSubject<B>) -> Result<LoraStep<B>> {
    attach_lora::<B>(&subject.model_args.model, &subject.device, &compute::test_sequence(subject)?)
}

fn attach_lora<B: Kernels>(model: &str, device: &B::Device, ids: &[u32]) -> Result<LoraStep<B>> {
    let mut model = model::load_base::<Autodiff<B>>(model, DType::F32, device)?.model;
    let config =
        LoraConfig { target_modules: TargetModules::Pattern("all-linear".to_owned()), ..LoraConfig::default() };
    adapter::attach(&mut model, ADAPTER, &config, 1)?;
    model.linears_mut(&mut |_, linear| {
        // B starts at zero, which would make the gradient of A zero too.
        linear.adapters.iter_mut().for_each(|lora| lora.lora_b = lora.lora_b.clone().map(|b| b + 0.01));
    });
    let model = param::train_only(model, adapter::is_adapter);
    let row = Example { ids: ids.to_vec(), loss_mask: vec![true; ids.len()] };
    let weight = 1.0 / row.num_targets() as f32;
    let batch = model.batch(
        std::slice::from_ref(&row),
        &SequenceLayout::from_lengths(&[ids.len()], false),
        weight,
        ForwardContext::default(),
    )?;
    Ok((model, batch))
}

/// Trains LoRA on the tokens `ids` for five steps and saves the adapter to `directory`.
fn train_adapter<B: Kernels>(model: &str, device: &B::Device, ids: &[u32], directory: &Path) -> Result<DeviceTraining> {
    let (model, batch) = attach_lora::<B>(model, device, ids)?;
    let mut gradients = BTreeMap::new();
    segment::forward_backward(&model, &batch, Checkpointing::None, &mut |found| {
        gradients.extend(found.into_iter().map(|found| (found.path, found.value.flatten().into_data())));
    });
    let mut engine = EngineConfig::new(AdamW::default()).with_max_grad_norm(1.0).init(model)?;
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        losses.push(engine.train_step(std::slice::from_ref(&batch), 2e-3)?.loss);
    }
    let model = engine.into_model()?;
    losses.push(model.batch_loss(&batch).sum().into_data().iter::<f64>().sum());
    model.save_adapter(ADAPTER, directory)?;
    let gradients = gradients.into_iter().map(|(path, data)| (path, data.iter::<f32>().collect())).collect();
    Ok(DeviceTraining { gradients, losses, logits: compute::to_f32_vec(generate::logits(&model, ids)?)? })
}

/// Checks that five steps of LoRA lower the loss.
pub(super) fn loss_decreases<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let losses = &subject.training()?.losses;
    let (first, last) = (losses[0], losses[STEPS]);
    if last.partial_cmp(&first) != Some(std::cmp::Ordering::Less) {
        bail!("expected a loss below {first:.4} after {STEPS} steps, found {last:.4}");
    }
    Ok(format!("loss {first:.4} → {last:.4}"))
}

/// Checks that the model's logits agree with those of the CPU.
#[cfg(feature = "flex")]
pub(super) fn logits<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let ids = compute::test_sequence(subject)?;
    let cpu_model = model::load::<Flex>(&subject.model_args, DType::F32, &Default::default())?.model;
    let found = compute::to_f32_vec(generate::logits(&subject.loaded.model, &ids)?)?;
    compute::compare(&found, &compute::to_f32_vec(generate::logits(&cpu_model, &ids)?)?, DEVICE_TOLERANCE)
}

/// Checks that all LoRA gradients agree with those of the CPU.
#[cfg(feature = "flex")]
pub(super) fn gradients<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let (found, expected) = (&subject.training()?.gradients, &subject.cpu_training()?.gradients);
    let mut numbers = 0;
    for (path, expected) in expected {
        let found = found.get(path).with_context(|| format!("{path}: expected a gradient, found none"))?;
        compute::compare(found, expected, DEVICE_TOLERANCE).with_context(|| path.clone())?;
        numbers += expected.len();
    }
    Ok(format!("{numbers} numbers of {} tensors", expected.len()))
}

/// Checks that the losses during five steps of LoRA agree with those of the CPU.
#[cfg(feature = "flex")]
pub(super) fn losses<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let losses = |of: &DeviceTraining| of.losses.iter().map(|loss| *loss as f32).collect::<Vec<_>>();
    compute::compare(&losses(subject.training()?), &losses(subject.cpu_training()?), DEVICE_TOLERANCE)
}

/// Checks that the adapter trained on this device, loaded from its files, gives the same logits on the CPU.
#[cfg(feature = "flex")]
pub(super) fn adapter_transfers<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let expected = &subject.training()?.logits;
    let mut cpu_model = model::load_base::<Flex>(&subject.model_args.model, DType::F32, &Default::default())?.model;
    adapter::load(&mut cpu_model, ADAPTER, subject.adapter_dir.path())?;
    compute::compare(
        &compute::to_f32_vec(generate::logits(&cpu_model, &compute::test_sequence(subject)?)?)?,
        expected,
        DEVICE_TOLERANCE,
    )
}
