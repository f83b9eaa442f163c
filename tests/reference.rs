//! Comparison of a model with reference logits and gradients computed by `transformers` and `peft`.

use crate::{floats, integers, max_abs, max_diff};
use burn::{
    backend::{Autodiff, Flex},
    module::{Module, ModuleVisitor, Param},
    tensor::{Tensor, TensorData},
};
use burn_llama::{Batch, Example, Llama, SequenceLayout, generate, kernel::Kernels};
use burn_peft::{DropoutKey, ForwardContext};
use burn_zero::segment::{self, Checkpointing};
use std::collections::BTreeMap;

/// The tensors of a `reference.safetensors`.
pub type Reference = BTreeMap<String, TensorData>;

/// Returns the rows of a reference as examples.
pub fn examples(reference: &Reference) -> Vec<Example> {
    let (ids, labels) = (integers(&reference["ids"]), integers(&reference["labels"]));
    let width = reference["ids"].shape[1];
    let row = |(row, &length): (usize, &i64)| {
        let range = row * width..row * width + length as usize;
        Example {
            ids: ids[range.clone()].iter().map(|&id| id as u32).collect(),
            loss_mask: labels[range].iter().map(|&label| label != -100).collect(),
        }
    };
    integers(&reference["lengths"]).iter().enumerate().map(row).collect()
}

/// Returns the largest difference of logits over the tokens that are not padding.
pub fn logits_differ<B: Kernels>(model: &Llama<B>, reference: &Reference) -> f32 {
    let (rows, context) = (examples(reference), ForwardContext::default());
    let lengths: Vec<usize> = rows.iter().map(|row| row.ids.len()).collect();
    let layout = SequenceLayout::padded(&lengths);
    let batch = model.batch(&rows, &layout, 1.0, context.clone()).unwrap();
    let hidden = model.hidden_states(model.embed(batch.ids), &layout, None, &context).unwrap();
    let found = floats(&model.head(hidden, &context).into_data());
    let (expected, width) = (floats(&reference["logits"]), reference["ids"].shape[1]);
    let vocabulary = reference["logits"].shape[2];
    let row = |(row, length): (usize, &usize)| {
        let range = row * width * vocabulary..(row * width + length) * vocabulary;
        assert!(max_abs(&expected[range.clone()]) > 0.1, "logits that could be anything prove nothing");
        max_diff(&found[range.clone()], &expected[range])
    };
    lengths.iter().enumerate().map(row).fold(0.0, f32::max)
}

/// A module visitor that collects every gradient of the mean loss by path, to be compared with the reference's
/// `grad.<key>`.
struct GradientCollector<'a> {
    grads: &'a mut <Autodiff<Flex> as burn::tensor::backend::AutodiffBackend>::Gradients,
    path: Vec<String>,
    found: BTreeMap<String, Vec<f32>>,
}

impl ModuleVisitor<Autodiff<Flex>> for GradientCollector<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Autodiff<Flex>, D>>) {
        if let Some(gradient) = param.val().grad_remove(self.grads) {
            self.found.insert(self.path.join("."), floats(&gradient.into_data()));
        }
    }
}

/// Returns the loss and every gradient by path, with all rows packed into one.
pub fn gradients(model: &Llama<Autodiff<Flex>>, reference: &Reference) -> (f32, BTreeMap<String, Vec<f32>>) {
    let rows = examples(reference);
    let targets: usize = rows.iter().map(Example::num_targets).sum();
    let layout = SequenceLayout::from_lengths(&rows.iter().map(|row| row.ids.len()).collect::<Vec<_>>(), true);
    let batch = model.batch(&rows, &layout, 1.0 / targets as f32, ForwardContext::default()).unwrap();
    let loss = model.batch_loss(&batch).sum();
    let mut grads = loss.backward();
    let mut check = GradientCollector { grads: &mut grads, path: Vec::new(), found: BTreeMap::new() };
    model.visit(&mut check);
    (floats(&loss.into_data())[0], check.found)
}

/// Asserts that a gradient equals the reference's, relative to its largest value.
pub fn compare(found: &[f32], expected: &[f32], name: &str) {
    let (difference, size) = (max_diff(found, expected), max_abs(expected));
    assert!(size > 0.0, "{name}: the reference gradient is zero");
    assert!(difference <= 1e-4 * size, "{name}: max|Δ| = {difference:e}, max|g| = {size:e}");
}

/// Returns the largest difference of logits, with the rows evaluated one by one; uses the model's prompt if it has one.
pub fn row_logits_differ<B: Kernels>(model: &Llama<B>, reference: &Reference) -> f32 {
    let (expected, shape) = (floats(&reference["logits"]), &reference["logits"].shape);
    let row = |(row, example): (usize, Example)| {
        let found = floats(&generate::logits(model, &example.ids).unwrap().into_data());
        let start = row * shape[1] * shape[2];
        let expected = &expected[start..start + found.len()];
        assert!(max_abs(expected) > 0.1, "logits that could be anything prove nothing");
        max_diff(&found, expected)
    };
    examples(reference).into_iter().enumerate().map(row).fold(0.0, f32::max)
}

/// Returns every gradient by path, computed by the segment driver, and asserts that each is reported once.
pub fn driven(
    model: &Llama<Autodiff<Flex>>,
    batch: &Batch<Autodiff<Flex>>,
    how: Checkpointing,
) -> BTreeMap<String, Vec<f32>> {
    let mut found = BTreeMap::new();
    segment::forward_backward(model, batch, how, &mut |ready| {
        for gradient in ready {
            let before = found.insert(gradient.path, floats(&gradient.value.flatten().into_data()));
            assert!(before.is_none(), "a gradient came twice");
        }
    });
    found
}

/// Returns the gradients of the mean loss over rows, computed by the segment driver with dropout; `packed` as for
/// [`SequenceLayout::from_lengths`].
pub fn driven_rows(
    model: &Llama<Autodiff<Flex>>,
    rows: &[Example],
    packed: bool,
    how: Checkpointing,
) -> BTreeMap<String, Vec<f32>> {
    let targets: usize = rows.iter().map(Example::num_targets).sum();
    let layout = SequenceLayout::from_lengths(&rows.iter().map(|row| row.ids.len()).collect::<Vec<_>>(), packed);
    let context = ForwardContext::training(DropoutKey { seed: 1, step: 2, tokens: layout.dropout_tokens(0) });
    driven(model, &model.batch(rows, &layout, 1.0 / targets as f32, context).unwrap(), how)
}
