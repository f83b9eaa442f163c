//! Laws about the device: it learns, and it computes what the processor computes.

use super::{Subject, compute};
use crate::model;
use anyhow::{Context, Result, bail};
#[cfg(feature = "flex")]
use burn::backend::Flex;
use burn::{backend::Autodiff, tensor::DType};
use burn_llama::{Example, Layout, generate, kernel::Kernels};
use burn_peft::{Linears, LoraConfig, Pass, TargetModules, adapter, param};
use burn_zero::{
    Engine,
    optimizer::AdamW,
    segment::{self, Checkpointing},
};
use std::{cell::OnceCell, collections::BTreeMap, path::Path};

/// The adapter that is trained and forgotten.
const ADAPTER: &str = "doctor";
const STEPS: usize = 5;
/// The largest difference between two devices, relative to the largest value.
const APART: f32 = 1e-3;

/// What a device makes of a sequence.
pub struct Trained {
    /// Of every adapter parameter, before the first step.
    gradients: BTreeMap<String, Vec<f32>>,
    /// Before each step, and after the last.
    losses: Vec<f64>,
    /// `[tokens · vocabulary]`, after training.
    logits: Vec<f32>,
}

impl<B: Kernels> Subject<B> {
    fn trained(&self) -> Result<&Trained> {
        kept(&self.trained, || {
            train::<B>(&self.args.model, &self.device, (&compute::sequence(self)?, self.folder.path()))
        })
    }

    /// The same on the processor.
    #[cfg(feature = "flex")]
    fn reference(&self) -> Result<&Trained> {
        let folder = self.folder.path().join("reference");
        kept(&self.reference, || {
            train::<Flex>(&self.args.model, &Default::default(), (&compute::sequence(self)?, &folder))
        })
    }
}

fn kept(cell: &OnceCell<Trained>, make: impl FnOnce() -> Result<Trained>) -> Result<&Trained> {
    match cell.get() {
        Some(trained) => Ok(trained),
        None => make().map(|trained| cell.get_or_init(|| trained)),
    }
}

/// Puts LoRA on the model and trains it on `ids`; leaves the adapter in `directory`.
fn train<B: Kernels>(model: &str, device: &B::Device, (ids, directory): (&[u32], &Path)) -> Result<Trained> {
    let mut model = model::base::<Autodiff<B>>(model, DType::F32, device)?.model;
    let config =
        LoraConfig { target_modules: TargetModules::Pattern("all-linear".to_owned()), ..LoraConfig::default() };
    adapter::attach(&mut model, ADAPTER, &config, 1)?;
    model.linears_mut(&mut |_, linear| {
        // B starts at zero, and so would the gradient of A.
        linear.adapters.iter_mut().for_each(|lora| lora.lora_b = lora.lora_b.clone().map(|b| b + 0.01));
    });
    let mut model = param::train_only(model, adapter::is_adapter);
    let row = Example { ids: ids.to_vec(), learned: vec![true; ids.len()] };
    let weight = 1.0 / row.targets() as f32;
    let batch = model.batch(std::slice::from_ref(&row), &Layout::of(&[ids.len()], false), weight, Pass::default())?;
    let mut gradients = BTreeMap::new();
    segment::run(&model, &batch, Checkpointing::None, &mut |found| {
        gradients.extend(found.into_iter().map(|found| (found.path, found.value.flatten().into_data())));
    });
    let mut engine = Engine::<Autodiff<B>>::new(AdamW::default(), Some(1.0), Checkpointing::None);
    let mut losses = Vec::new();
    for _ in 0..STEPS {
        losses.push(engine.accumulate(&mut model, &batch)?);
        engine.step(&mut model, 2e-3)?;
    }
    losses.push(model.batch_loss(&batch).sum().into_data().iter::<f64>().sum());
    adapter::save(&model, ADAPTER, &config, directory)?;
    let gradients = gradients.into_iter().map(|(path, data)| (path, data.iter::<f32>().collect())).collect();
    Ok(Trained { gradients, losses, logits: compute::values(generate::logits(&model, ids)?)? })
}

/// Five steps of LoRA lower the loss.
pub fn learns<B: Kernels>(subject: &Subject<B>) -> Result<String> {
    let losses = &subject.trained()?.losses;
    let (first, last) = (losses[0], losses[STEPS]);
    if last.partial_cmp(&first) != Some(std::cmp::Ordering::Less) {
        bail!("expected a loss below {first:.4} after {STEPS} steps, found {last:.4}");
    }
    Ok(format!("loss {first:.4} → {last:.4}"))
}

/// The logits of the model are those of the processor.
#[cfg(feature = "flex")]
pub fn logits<B: Kernels>(subject: &Subject<B>) -> Result<String> {
    let ids = compute::sequence(subject)?;
    let there = model::load::<Flex>(&subject.args, DType::F32, &Default::default())?.model;
    let found = compute::values(generate::logits(&subject.loaded.model, &ids)?)?;
    compute::same(&found, &compute::values(generate::logits(&there, &ids)?)?, APART)
}

/// Every gradient of LoRA is that of the processor.
#[cfg(feature = "flex")]
pub fn gradients<B: Kernels>(subject: &Subject<B>) -> Result<String> {
    let (found, expected) = (&subject.trained()?.gradients, &subject.reference()?.gradients);
    let mut numbers = 0;
    for (path, expected) in expected {
        let found = found.get(path).with_context(|| format!("{path}: expected a gradient, found none"))?;
        compute::same(found, expected, APART).with_context(|| path.clone())?;
        numbers += expected.len();
    }
    Ok(format!("{numbers} numbers of {} tensors", expected.len()))
}

/// The losses along five steps of LoRA are those of the processor.
#[cfg(feature = "flex")]
pub fn losses<B: Kernels>(subject: &Subject<B>) -> Result<String> {
    let losses = |of: &Trained| of.losses.iter().map(|loss| *loss as f32).collect::<Vec<_>>();
    compute::same(&losses(subject.trained()?), &losses(subject.reference()?), APART)
}

/// The adapter that this device has trained gives its logits on the processor too, read from its files.
#[cfg(feature = "flex")]
pub fn serves<B: Kernels>(subject: &Subject<B>) -> Result<String> {
    let expected = &subject.trained()?.logits;
    let mut there = model::base::<Flex>(&subject.args.model, DType::F32, &Default::default())?.model;
    adapter::load(&mut there, ADAPTER, subject.folder.path())?;
    compute::same(&compute::values(generate::logits(&there, &compute::sequence(subject)?)?)?, expected, APART)
}
