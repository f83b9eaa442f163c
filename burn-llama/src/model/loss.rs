//! The loss of the output head.

use super::Llama;
use crate::kernel::{CrossEntropyInputs, CrossEntropyOptions, Kernels, Targets, primitive, tensor};
use burn::tensor::{DType, Tensor, activation::log_softmax, s};
use burn_peft::ForwardContext;

/// The most logits that are computed at a time if the head has an adapter.
const MAX_LOGITS: usize = 1 << 24;

impl<B: Kernels> Llama<B> {
    /// Computes the weighted negative log-likelihood of each target, `[n]`, from normalised hidden states
    /// `[n, hidden_size]`. `forward_context` is that of these `n` tokens. The logits of all tokens never exist at
    /// once, except that a backward pass through an adapter on the head keeps them.
    pub fn loss(&self, hidden: Tensor<B, 2>, targets: &Targets<B>, forward_context: &ForwardContext) -> Tensor<B, 1> {
        let adapted = match &self.lm_head {
            Some(head) => head.is_adapted(),
            None => self.model.embed_tokens.adapts_tied_head(),
        };
        if adapted {
            return self.loss_from_logits(hidden, targets, forward_context);
        }
        let head = self.lm_head.as_ref().map_or(&self.model.embed_tokens.weight, |head| &head.weight);
        let inputs =
            CrossEntropyInputs { hidden: primitive(hidden), head: head.matrix_ref(), targets: targets.clone() };
        let precision = self.matmul_precision;
        let options = CrossEntropyOptions { hidden_gradient: true, head_gradient: true, precision };
        tensor(B::linear_cross_entropy(inputs, options).losses)
    }

    fn loss_from_logits(
        &self,
        hidden: Tensor<B, 2>,
        targets: &Targets<B>,
        forward_context: &ForwardContext,
    ) -> Tensor<B, 1> {
        let (n, rows) = (hidden.dims()[0], (MAX_LOGITS / self.config.vocab_size).max(1));
        let block = |from: usize| {
            let range = from..n.min(from + rows);
            let (hidden, places) = (hidden.clone().slice(s![range.clone(), ..]), range.clone().map(|at| at as i32));
            let logits = self.head(hidden, &forward_context.select(&places.collect::<Vec<_>>())).cast(DType::F32);
            let ids = targets.ids.clone().slice(s![range]).unsqueeze_dim::<2>(1);
            log_softmax(logits, 1).gather(1, ids).squeeze_dim::<1>(1).neg()
        };
        Tensor::cat((0..n).step_by(rows).map(block).collect(), 0) * targets.weights.clone()
    }
}
