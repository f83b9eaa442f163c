//! The model as a list of segments for burn-zero's driver: embedding and prompts, then attention and MLP of every
//! block, then output head and loss. Keys and values of a prefix are computed once in the first segment and passed on
//! with the hidden states, each layer's up to its layer, so that the prefix encoder gets a single gradient.

use crate::{Batch, KvCache, Llama, kernel::Kernels, model::LayerCache};
use burn::{
    module::{Module, ModuleVisitor},
    tensor::backend::{AutodiffBackend, Backend},
};
use burn_peft_kernels::{DeferredWeightGradient, defer_weight_gradients};
use burn_zero::segment::{DeferredGradient, DynTensor, Segments, TrainSegments};

impl<B: Kernels> Segments<B> for Llama<B> {
    type Batch = Batch<B>;

    fn segments(&self) -> usize {
        self.config.num_segments()
    }

    fn forward_segment(&self, segment: usize, batch: &Batch<B>, inputs: Vec<DynTensor<B>>) -> Vec<DynTensor<B>> {
        let mut inputs = inputs.into_iter();
        let Some(x) = inputs.next() else {
            let (x, before) = self.embed_with_prompts(
                batch.ids.clone(),
                batch.embedding_sources.clone(),
                &batch.forward_context,
                &self.active_row_adapters(1),
            );
            return std::iter::once(DynTensor::new(x)).chain(before.into_iter().map(DynTensor::new)).collect();
        };
        let (x, index) = (x.tensor::<2>(), (segment - 1) / 2);
        let outputs = self.outputs_at_layer(index, Some(&batch.output_slots), &batch.forward_context);
        let output = match self.model.layers.get(index) {
            Some(layer) if segment % 2 == 1 => {
                let prefix = inputs.next().map(DynTensor::tensor);
                let cache = &mut KvCache::for_single_layer(prefix, batch.attention_context.rows);
                let cache = Some(LayerCache { cache, layer: 0 });
                layer.attention_block(x, &batch.attention_context, cache, &outputs)
            }
            Some(layer) => layer.mlp_block(x, outputs.output_context()),
            None => {
                return vec![DynTensor::new(self.loss(
                    self.model.norm.forward(x),
                    &batch.targets,
                    &batch.output_slots.forward_context,
                ))];
            }
        };
        // The keys and values of later layers are passed on.
        std::iter::once(DynTensor::new(output)).chain(inputs).collect()
    }
}

impl<B: AutodiffBackend + Kernels> TrainSegments<B> for Llama<B>
where
    B::InnerBackend: Kernels,
{
    fn inner_batch(batch: &Batch<B>) -> Batch<B::InnerBackend> {
        Batch {
            ids: batch.ids.clone().inner(),
            embedding_sources: batch.embedding_sources.clone().map(|sources| sources.inner()),
            attention_context: batch.attention_context.inner(),
            output_slots: batch.output_slots.inner(),
            targets: batch.targets.inner(),
            forward_context: batch.forward_context.clone(),
        }
    }

    fn defer_weight_gradients<R>(backward: impl FnOnce() -> R) -> (R, Vec<DeferredGradient<B::InnerBackend>>) {
        let (result, products) = defer_weight_gradients::<B::InnerBackend, R>(backward);
        let gradient = |product: DeferredWeightGradient<B::InnerBackend>| DeferredGradient {
            id: product.id,
            bytes: product.bytes,
            compute: Box::new(|| DynTensor::from_primitive(product.compute())),
        };
        (result, products.into_iter().map(gradient).collect())
    }

    fn visit_segment<V: ModuleVisitor<B>>(&self, segment: usize, visitor: &mut V) {
        let layers = self.model.layers.len();
        match segment {
            0 => {
                visit_at_path(&["model", "embed_tokens"], visitor, |v| self.model.embed_tokens.visit(v));
                visit_at_path(&["prompts"], visitor, |v| self.prompts.visit(v));
            }
            _ if segment <= 2 * layers => {
                let index = (segment - 1) / 2;
                let (layer, path) = (&self.model.layers[index], index.to_string());
                let part = |name| ["model", "layers", path.as_str(), name];
                if segment % 2 == 1 {
                    visit_at_path(&part("input_layernorm"), visitor, |v| layer.input_layernorm.visit(v));
                    visit_at_path(&part("self_attn"), visitor, |v| layer.self_attn.visit(v));
                } else {
                    visit_at_path(&part("post_attention_layernorm"), visitor, |v| {
                        layer.post_attention_layernorm.visit(v)
                    });
                    visit_at_path(&part("mlp"), visitor, |v| layer.mlp.visit(v));
                }
            }
            _ => {
                visit_at_path(&["model", "norm"], visitor, |v| self.model.norm.visit(v));
                match &self.lm_head {
                    Some(head) => visit_at_path(&["lm_head"], visitor, |v| head.visit(v)),
                    None => visit_at_path(&["model", "embed_tokens"], visitor, |v| self.model.embed_tokens.visit(v)),
                }
            }
        }
    }
}

/// Calls `visit` with the visitor inside the modules of `path`.
fn visit_at_path<B: Backend, V: ModuleVisitor<B>>(path: &[&str], visitor: &mut V, visit: impl FnOnce(&mut V)) {
    path.iter().for_each(|name| visitor.enter_module(name, ""));
    visit(visitor);
    path.iter().rev().for_each(|name| visitor.exit_module(name, ""));
}
