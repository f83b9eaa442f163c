//! Steps of AdaLoRA: its loss of orthogonality, and the allocation of ranks after the optimizer step.

use super::{model_loader::LlamaEngine, state};
use crate::{
    method_adapter::ADAPTER_NAME,
    recipe::{MethodKind, Recipe},
};
use anyhow::{Context, Result, bail};
use burn::backend::Autodiff;
use burn_llama::{Batch, kernel::Kernels};
use burn_peft::{adapter::RankAllocator, format};
use burn_zero::{TrainStepOutput, segment::DynTensor};
use std::{collections::BTreeMap, path::Path};

/// The file of a checkpoint that holds the state of the allocation.
const FILE: &str = "adalora.safetensors";

/// Refuses AdaLoRA on several ranks.
///
/// # Errors
/// One line with the number of ranks.
pub(super) fn check_world(recipe: &Recipe, world: usize) -> Result<()> {
    if recipe.method.common.kind == MethodKind::AdaLora && world > 1 {
        bail!(
            "`method.kind` = \"adalora\": expected 1 rank, because the ranks of the layers are allocated by the gradients \
             of one process, found {world}; take away mpirun, or take another method"
        );
    }
    Ok(())
}

/// The allocation of ranks in a run with AdaLoRA.
pub(super) struct RankAllocation<B: Kernels> {
    allocator: RankAllocator<Autodiff<B>>,
    /// The norm to which gradients are clipped, if they are.
    max_grad_norm: Option<f64>,
}

impl<B: Kernels> RankAllocation<B> {
    /// Creates the allocation for the adapter of a model; none if that is not trained with AdaLoRA.
    pub(super) fn new(engine: &LlamaEngine<B>, recipe: &Recipe) -> Option<Self> {
        let allocator = RankAllocator::new(engine.model(), ADAPTER_NAME)?;
        let max_grad_norm = Some(recipe.train.optimizer.max_grad_norm).filter(|&norm| norm > 0.0);
        Some(Self { allocator, max_grad_norm })
    }

    /// Takes the step, counted from 1: the passes over its micro-batches, the optimizer step and the allocation. The loss
    /// contains that of orthogonality.
    pub(super) fn train_step(
        &mut self,
        engine: &mut LlamaEngine<B>,
        micro_batches: &[Batch<Autodiff<B>>],
        step: usize,
        learning_rate: f64,
    ) -> Result<TrainStepOutput> {
        let scale = engine.loss_scale();
        let loss = engine.forward_backward(micro_batches)?;
        let orthogonality = self.allocator.orthogonality(engine.model());
        for (id, gradient) in orthogonality.gradients {
            engine.accumulate_gradient(id, DynTensor::new(gradient * scale));
        }
        let mut gradients = BTreeMap::new();
        for id in self.allocator.parameters(engine.model()) {
            let gradient = engine.accumulated_gradient(id).context("AdaLoRA: a parameter has no gradient")?;
            gradients.insert(id, gradient.tensor::<2>());
        }
        let report = engine.step(learning_rate)?;
        if report.skipped {
            // The allocation takes place, but values that are not finite do not count.
            gradients.clear();
        }
        let clip = self.max_grad_norm.map_or(1.0, |max| (max / (report.grad_norm + 1e-6)).min(1.0)) / scale;
        engine.map_model(|mut model| {
            let gradient = |id| Some(gradients.get(&id)?.clone() * clip);
            self.allocator.update_and_allocate(step, &mut model, gradient);
            model
        });
        Ok(TrainStepOutput { loss: loss + orthogonality.loss, report })
    }

    /// Writes the state into a checkpoint's folder.
    pub(super) fn save(&self, engine: &LlamaEngine<B>, folder: &Path) -> Result<()> {
        Ok(format::write_tensors(&folder.join(FILE), self.allocator.state(engine.model()))?)
    }

    /// Takes up the state in a checkpoint's folder.
    pub(super) fn restore(&mut self, engine: &mut LlamaEngine<B>, folder: &Path) -> Result<()> {
        let path = folder.join(FILE);
        let state = format::read_file(&path).with_context(|| state::advice(folder))?;
        let mut restored = Ok(());
        engine.map_model(|mut model| {
            restored = self.allocator.restore(&mut model, state);
            model
        });
        restored.with_context(|| path.display().to_string())
    }
}
