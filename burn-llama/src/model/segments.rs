//! The model as a list of segments for burn-zero's driver: embedding and prompt, then attention and MLP of every block, then
//! head and loss. What a prompt has for the layers is made once and travels beside the hidden states, each layer's part until
//! its layer, so its encoder gets one gradient.

use super::Llama;
use crate::{
    Batch, Context, Past, Tail,
    kernel::{Kernels, Targets, Visibility},
};
use burn::{
    module::{Module, ModuleVisitor},
    tensor::backend::{AutodiffBackend, Backend},
};
use burn_zero::segment::{Segments, TrainSegments, Value};

impl<B: Kernels> Segments<B> for Llama<B> {
    type Batch = Batch<B>;

    fn segments(&self) -> usize {
        2 * self.model.layers.len() + 2
    }

    fn forward_segment(&self, segment: usize, batch: &Batch<B>, inputs: Vec<Value<B>>) -> Vec<Value<B>> {
        let mut inputs = inputs.into_iter();
        let Some(x) = inputs.next() else {
            let (x, before) = self.begin(batch.ids.clone(), batch.sources.clone(), &batch.pass, &self.active_rows(1));
            return std::iter::once(Value::new(x)).chain(before.into_iter().map(Value::new)).collect();
        };
        let (x, index) = (x.tensor::<2>(), (segment - 1) / 2);
        let (tail, pass) = self.at_layer(index, Some(&batch.tail), &batch.pass);
        let output = match self.model.layers.get(index) {
            Some(layer) if segment % 2 == 1 => {
                let mut past = Past::of_layer(inputs.next().map(Value::tensor), batch.context.rows);
                layer.attend(x, &batch.context, Some((&mut past, 0)), (&batch.pass, tail))
            }
            Some(layer) => layer.transform(x, pass),
            None => return vec![Value::new(self.loss(self.model.norm.forward(x), &batch.targets, &batch.tail.pass))],
        };
        // What later layers see before the tokens travels on.
        std::iter::once(Value::new(output)).chain(inputs).collect()
    }
}

impl<B: AutodiffBackend + Kernels> TrainSegments<B> for Llama<B>
where
    B::InnerBackend: Kernels,
{
    fn inner_batch(batch: &Batch<B>) -> Batch<B::InnerBackend> {
        let (context, visibility) = (&batch.context, &batch.context.visibility);
        Batch {
            ids: batch.ids.clone().inner(),
            sources: batch.sources.clone().map(|sources| sources.inner()),
            context: Context {
                rows: context.rows,
                length: context.length,
                cos: context.cos.clone().inner(),
                sin: context.sin.clone().inner(),
                visibility: Visibility {
                    query_segments: visibility.query_segments.clone().inner(),
                    query_positions: visibility.query_positions.clone().inner(),
                    key_segments: visibility.key_segments.clone().inner(),
                    key_positions: visibility.key_positions.clone().inner(),
                    window: visibility.window,
                },
            },
            tail: Tail { slots: batch.tail.slots.clone().inner(), pass: batch.tail.pass.clone() },
            targets: Targets { ids: batch.targets.ids.clone().inner(), weights: batch.targets.weights.clone().inner() },
            pass: batch.pass.clone(),
        }
    }

    fn visit_segment<V: ModuleVisitor<B>>(&self, segment: usize, visitor: &mut V) {
        let layers = self.model.layers.len();
        match segment {
            0 => {
                within(&["model", "embed_tokens"], visitor, |v| self.model.embed_tokens.visit(v));
                within(&["prompts"], visitor, |v| self.prompts.visit(v));
            }
            _ if segment <= 2 * layers => {
                let index = (segment - 1) / 2;
                let (layer, path) = (&self.model.layers[index], index.to_string());
                let part = |name| ["model", "layers", path.as_str(), name];
                if segment % 2 == 1 {
                    within(&part("input_layernorm"), visitor, |v| layer.input_layernorm.visit(v));
                    within(&part("self_attn"), visitor, |v| layer.self_attn.visit(v));
                } else {
                    within(&part("post_attention_layernorm"), visitor, |v| layer.post_attention_layernorm.visit(v));
                    within(&part("mlp"), visitor, |v| layer.mlp.visit(v));
                }
            }
            _ => {
                within(&["model", "norm"], visitor, |v| self.model.norm.visit(v));
                match &self.lm_head {
                    Some(head) => within(&["lm_head"], visitor, |v| head.visit(v)),
                    None => within(&["model", "embed_tokens"], visitor, |v| self.model.embed_tokens.visit(v)),
                }
            }
        }
    }
}

/// Visits as if the modules along `path` had been entered.
fn within<B: Backend, V: ModuleVisitor<B>>(path: &[&str], visitor: &mut V, visit: impl FnOnce(&mut V)) {
    path.iter().for_each(|name| visitor.enter_module(name, ""));
    visit(visitor);
    path.iter().rev().for_each(|name| visitor.exit_module(name, ""));
}
