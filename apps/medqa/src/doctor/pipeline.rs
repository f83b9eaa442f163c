//! The check that a pipeline of two ranks, here threads, computes what one process computes.

use super::{CheckSubject, device};
use anyhow::{Context, Result, bail};
use burn::backend::Autodiff;
use burn_llama::{Batch, Llama, kernel::Kernels};
use burn_zero::{
    Engine, EngineConfig, PipelineConfig,
    comm::threads,
    optimizer::AdamW,
    pipeline::{PartitionMethod, PipelineKind},
    segment::Segments,
};
use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

const RANKS: usize = 2;
const MICRO_BATCHES: usize = 2;

/// The loss and the gradients of one step, by path.
struct StepResult {
    loss: f64,
    gradients: BTreeMap<String, Vec<f32>>,
}

fn step<B: Kernels>(
    engine: &mut Engine<Autodiff<B>, Llama<Autodiff<B>>>,
    batches: &[Batch<Autodiff<B>>],
) -> Result<StepResult> {
    let loss = engine.forward_backward(batches)?;
    let found = engine.gradients().into_iter();
    let values = found.map(|found| (found.path, found.value.flatten().into_data().iter::<f32>().collect()));
    Ok(StepResult { loss, gradients: values.collect() })
}

/// Checks that the losses and gradients of a pipeline are, bit for bit, those of one process.
pub(super) fn equals_one_process<B: Kernels>(subject: &CheckSubject<B>) -> Result<String> {
    let (model, batch) = device::lora_step(subject)?;
    let batches = vec![batch; MICRO_BATCHES];
    let config = || EngineConfig::new(AdamW::default());
    let expected = step::<B>(&mut config().init(model.clone())?, &batches)?;
    let segments = Segments::segments(&model);
    let segments = PartitionMethod::Uniform.split(&vec![1; segments], RANKS)?;
    let pipeline = PipelineConfig { ranks: RANKS, kind: PipelineKind::OneFOneB, chunks: 1, segments };
    let ranks = Mutex::new(vec![(model, batches); RANKS]);
    let results = threads::run(RANKS, |group| {
        let mut ranks = ranks.lock().unwrap_or_else(PoisonError::into_inner);
        let (model, batches) = ranks.pop().context("there is a model for every rank")?;
        drop(ranks);
        let config = config().with_communicator(Box::new(group)).with_pipeline(pipeline.clone());
        step::<B>(&mut config.init(model)?, &batches)
    });
    let (mut loss, mut gradients) = (0.0, BTreeMap::new());
    for result in results {
        let result = result?;
        loss += result.loss;
        gradients.extend(result.gradients);
    }
    if loss != expected.loss {
        bail!("loss: expected {}, found {loss}", expected.loss);
    }
    for (path, expected) in &expected.gradients {
        if gradients.get(path) != Some(expected) {
            bail!("{path}: expected the gradient of one process, found another one");
        }
    }
    Ok(format!("{RANKS} ranks, loss and {} gradients, bit for bit", expected.gradients.len()))
}
