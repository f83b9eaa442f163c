//! AdaLoRA's allocation of ranks during training (Zhang et al., 2023, arXiv:2303.10512), as PEFT's `RankAllocator`.
//!
//! ```text
//! backward → orthogonality: its gradients are added → optimizer step → update_and_allocate: E of some ranks becomes 0
//! ```

use super::linears::Linears;
use crate::{Error, Lora, config::AdaLoraConfig};
use burn::{
    module::{Param, ParamId},
    tensor::{Tensor, TensorData, backend::AutodiffBackend},
};
use burn_peft_kernels::LinearKernels;
use std::collections::BTreeMap;

/// The importance of every value of an AdaLoRA adapter, and what allocates the ranks by it.
pub struct RankAllocator<B: AutodiffBackend> {
    /// The adapter's name.
    name: String,
    config: AdaLoraConfig,
    /// The sums of all ranks at the beginning and in the end.
    budgets: [usize; 2],
    /// The smoothed importance of each parameter's values, of the parameter's shape.
    importance: BTreeMap<String, Importance<B>>,
}

/// The smoothed importance of a parameter's values.
struct Importance<B: AutodiffBackend> {
    /// The moving average of `|p·∂loss/∂p|`.
    sensitivity: Tensor<B::InnerBackend, 2>,
    /// The moving average of the distance of that from its average.
    uncertainty: Tensor<B::InnerBackend, 2>,
}

/// The loss that keeps `A·Aᵀ` and `Bᵀ·B` close to the identity, and its gradients.
pub struct Orthogonality<B: AutodiffBackend> {
    /// The loss: `orth_reg_weight` times the mean of the Frobenius norms of the differences.
    pub loss: f64,
    /// The gradients, of the parameters' shapes.
    pub gradients: Vec<(ParamId, Tensor<B::InnerBackend, 2>)>,
}

/// The parts of PEFT's names of the three parameters of a layer.
const PARTS: [&str; 3] = ["lora_A", "lora_B", "lora_E"];

/// Returns a layer's parameters in the order of [`PARTS`].
fn parameters<B: LinearKernels>(lora: &Lora<B>) -> Option<[&Param<Tensor<B, 2>>; 3]> {
    Some([&lora.lora_a, &lora.lora_b, &lora.adalora.as_ref()?.lora_e])
}

impl<B: AutodiffBackend + LinearKernels> RankAllocator<B> {
    /// Creates the allocator of the named adapter; `None` if that is not trained with AdaLoRA.
    pub fn new<M: Linears<B>>(model: &M, name: &str) -> Option<Self> {
        let (mut found, mut initial, mut layers) = (None, 0, 0);
        model.linears(&mut |_, linear| {
            if let Some(lora) = linear.adapter(name).filter(|lora| lora.adalora.is_some()) {
                found = found.take().or_else(|| lora.config.adalora.clone());
                initial += lora.lora_a.lazy_shape()[0];
                layers += 1;
            }
        });
        let config = found?;
        let budgets = [initial, layers * config.target_r];
        Some(Self { name: name.to_owned(), config, budgets, importance: BTreeMap::new() })
    }

    /// Returns the ids of the adapter's parameters.
    pub fn parameters<M: Linears<B>>(&self, model: &M) -> Vec<ParamId> {
        let mut ids = Vec::new();
        self.layers(model, |_, lora| ids.extend(parameters(lora).into_iter().flatten().map(|param| param.id)));
        ids
    }

    /// Computes the loss of orthogonality and its gradients. Both are part of those of a training step.
    pub fn orthogonality<M: Linears<B>>(&self, model: &M) -> Orthogonality<B> {
        let (mut norms, mut gradients) = (Vec::new(), Vec::new());
        self.layers(model, |_, lora| {
            let [a, b] = [&lora.lora_a, &lora.lora_b].map(|param| param.val().inner());
            let (norm, gradient) = from_identity::<B>(a);
            norms.push(norm);
            gradients.push((lora.lora_a.id, gradient));
            let (norm, gradient) = from_identity::<B>(b.transpose());
            norms.push(norm);
            gradients.push((lora.lora_b.id, gradient.transpose()));
        });
        let share = self.config.orth_reg_weight / norms.len().max(1) as f64;
        let loss = norms.iter().sum::<f64>() * share;
        Orthogonality { loss, gradients: gradients.into_iter().map(|(id, value)| (id, value * share)).collect() }
    }

    /// Counts in the importance after the optimizer step `step`, counted from 1, and sets the factors of unimportant
    /// ranks to zero when they are due. `gradient` returns a parameter's gradient in that step, as the optimizer used
    /// it.
    pub fn update_and_allocate<M: Linears<B>>(
        &mut self,
        step: usize,
        model: &mut M,
        gradient: impl Fn(ParamId) -> Option<Tensor<B::InnerBackend, 2>>,
    ) {
        let last = self.config.last_allocation();
        if step < last {
            self.update_importance(model, gradient);
        }
        if let Some(budget) = self.config.budget(step, self.budgets) {
            let scores = self.scores(model);
            let threshold = threshold(&scores, self.budgets[0] - budget.min(self.budgets[0]));
            self.layers_mut(model, |path, lora| {
                let Some(scores) = scores.get(path) else { return };
                if let Some(adalora) = &mut lora.adalora {
                    adalora.kept =
                        Some(scores.iter().map(|&score| threshold.is_none_or(|least| score > least)).collect());
                }
            });
        }
        if step == last {
            self.importance.clear();
        }
        if step >= last || self.config.budget(step, self.budgets).is_some() {
            self.layers_mut(model, |_, lora| mask(lora));
        }
    }

    fn update_importance<M: Linears<B>>(
        &mut self,
        model: &M,
        gradient: impl Fn(ParamId) -> Option<Tensor<B::InnerBackend, 2>>,
    ) {
        let AdaLoraConfig { beta1, beta2, .. } = self.config;
        let mut found = Vec::new();
        self.layers(model, |path, lora| {
            for (part, param) in PARTS.iter().zip(parameters(lora).into_iter().flatten()) {
                if let Some(gradient) = gradient(param.id) {
                    found.push((format!("{path}.{part}"), (param.val().inner() * gradient).abs()));
                }
            }
        });
        for (key, now) in found {
            let before = self
                .importance
                .remove(&key)
                .unwrap_or_else(|| Importance { sensitivity: now.zeros_like(), uncertainty: now.zeros_like() });
            let sensitivity = before.sensitivity * beta1 + now.clone() * (1.0 - beta1);
            let uncertainty = before.uncertainty * beta2 + (now - sensitivity.clone()).abs() * (1.0 - beta2);
            self.importance.insert(key, Importance { sensitivity, uncertainty });
        }
    }

    /// Returns the importance of each rank, by layer: that of its factor, plus the means of its row and its column.
    fn scores<M: Linears<B>>(&self, model: &M) -> BTreeMap<String, Vec<f32>> {
        let mut scores = BTreeMap::new();
        self.layers(model, |path, _| {
            let value = |part: &str| {
                let Importance { sensitivity, uncertainty } = self.importance.get(&format!("{path}.{part}"))?;
                Some(sensitivity.clone() * uncertainty.clone())
            };
            let [Some(a), Some(b), Some(e)] = PARTS.map(value) else { return };
            let sum = e + (a.mean_dim(1) + b.mean_dim(0).transpose());
            scores.insert(path.to_owned(), sum.into_data().iter::<f32>().collect());
        });
        scores
    }

    fn layers<M: Linears<B>>(&self, model: &M, mut visit: impl FnMut(&str, &Lora<B>)) {
        model.linears(&mut |path, linear| {
            if let Some(lora) = linear.adapter(&self.name).filter(|lora| lora.adalora.is_some()) {
                visit(path, lora);
            }
        });
    }

    fn layers_mut<M: Linears<B>>(&self, model: &mut M, mut visit: impl FnMut(&str, &mut Lora<B>)) {
        model.linears_mut(&mut |path, linear| {
            linear.adapters.iter_mut().filter(|lora| lora.name == self.name).for_each(|lora| visit(path, lora));
        });
    }
}

/// Returns the `masked`-th smallest of all scores, up to which ranks are masked; `None` if none is.
fn threshold(scores: &BTreeMap<String, Vec<f32>>, masked: usize) -> Option<f32> {
    let mut all: Vec<f32> = scores.values().flatten().copied().collect();
    all.sort_by(f32::total_cmp);
    all.get(masked.checked_sub(1)?).copied()
}

/// Sets the factors of the ranks that are not kept to zero.
fn mask<B: LinearKernels>(lora: &mut Lora<B>) {
    let Some(adalora) = &mut lora.adalora else { return };
    let Some(kept) = &adalora.kept else { return };
    let kept: Vec<f32> = kept.iter().map(|&kept| f32::from(u8::from(kept))).collect();
    adalora.lora_e = adalora.lora_e.clone().map(|factors| {
        let trained = factors.is_require_grad();
        let kept = TensorData::new(kept, factors.dims());
        let kept = Tensor::<B, 2>::from_data(kept, &factors.device()).equal_elem(0.0);
        factors.detach().mask_fill(kept, 0.0).detach().set_require_grad(trained)
    });
}

/// Returns the Frobenius norm of `x·xᵀ − I` for `x [r, n]`, and its gradient `[r, n]`, which is zero where the norm is.
fn from_identity<B: AutodiffBackend>(x: Tensor<B::InnerBackend, 2>) -> (f64, Tensor<B::InnerBackend, 2>) {
    let difference = x.clone().matmul(x.clone().transpose());
    let difference = difference - Tensor::eye(x.dims()[0], &x.device());
    let norm: f64 = (difference.clone() * difference.clone()).sum().sqrt().into_data().iter::<f64>().sum();
    let scale = if norm > 0.0 { 2.0 / norm } else { 0.0 };
    (norm, difference.matmul(x) * scale)
}

/// The name of the number of steps in a saved state.
const TOTAL_STEP: &str = "total_step";

/// The names of a parameter's tensors in a saved state.
const STATE: [&str; 2] = ["sensitivity", "uncertainty"];

/// Removes a tensor from the state and returns it, if it has this shape.
fn take(state: &mut BTreeMap<String, TensorData>, key: &str, shape: &[usize]) -> Option<TensorData> {
    if state.get(key)?.shape.as_slice() != shape {
        return None;
    }
    state.remove(key)
}

impl<B: AutodiffBackend + LinearKernels> RankAllocator<B> {
    /// Returns the importance, the ranks kept and the number of steps, by name, to go on with [`RankAllocator::restore`].
    pub fn state<M: Linears<B>>(&self, model: &M) -> BTreeMap<String, TensorData> {
        let total_step = TensorData::new(vec![self.config.total_step as f32], [1]);
        let mut state = BTreeMap::from([(TOTAL_STEP.to_owned(), total_step)]);
        for (key, Importance { sensitivity, uncertainty }) in &self.importance {
            for (name, value) in STATE.iter().zip([sensitivity, uncertainty]) {
                state.insert(format!("{key}.{name}"), value.to_data());
            }
        }
        self.layers(model, |path, lora| {
            if let Some(kept) = lora.adalora.as_ref().and_then(|adalora| adalora.kept.as_ref()) {
                let kept: Vec<f32> = kept.iter().map(|&kept| f32::from(u8::from(kept))).collect();
                let n = kept.len();
                state.insert(format!("{path}.kept"), TensorData::new(kept, [n]));
            }
        });
        state
    }

    /// Takes up the state that [`RankAllocator::state`] returned.
    ///
    /// # Errors
    /// If the number of steps is another one, or a tensor has another shape than in this model or belongs to no parameter
    /// of the adapter.
    pub fn restore<M: Linears<B>>(
        &mut self,
        model: &mut M,
        mut state: BTreeMap<String, TensorData>,
    ) -> Result<(), Error> {
        let before = state.remove(TOTAL_STEP).and_then(|data| data.iter::<f32>().next());
        let now = self.config.total_step;
        if before != Some(now as f32) {
            let before = before.unwrap_or_default();
            let problem = format!("`total_step`: expected {before}, for which the ranks were allocated, found {now}");
            return Err(Error::config(problem));
        }
        let mut restored = BTreeMap::new();
        self.layers_mut(model, |path, lora| {
            let ranks = lora.lora_a.lazy_shape()[0];
            let kept = take(&mut state, &format!("{path}.kept"), &[ranks]);
            if let (Some(kept), Some(adalora)) = (kept, &mut lora.adalora) {
                adalora.kept = Some(kept.iter::<f32>().map(|kept| kept > 0.0).collect());
            }
            for (part, param) in PARTS.iter().zip(parameters(lora).into_iter().flatten()) {
                let (key, shape, device) = (format!("{path}.{part}"), param.lazy_shape(), param.lazy_device());
                let [sensitivity, uncertainty] = STATE.map(|name| {
                    let data = take(&mut state, &format!("{key}.{name}"), shape.as_slice())?;
                    Some(Tensor::<B::InnerBackend, 2>::from_data(data, &device))
                });
                if let (Some(sensitivity), Some(uncertainty)) = (sensitivity, uncertainty) {
                    restored.insert(key, Importance { sensitivity, uncertainty });
                }
            }
        });
        if let Some(name) = state.keys().next() {
            return Err(Error::config(format!("the state of AdaLoRA: expected that of this adapter, found {name}")));
        }
        self.importance = restored;
        Ok(())
    }
}
